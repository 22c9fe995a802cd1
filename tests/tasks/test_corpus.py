"""Files, folders and Python objects give the same rows, each read as what it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_prune.base.errors import DataError
from cria_prune.tasks.corpus import joined, read_source, split_of, tables

ROWS = [
    {"text": 'He said: "the sea, again"', "label": "0"},
    {"text": "two\nlines\u2028of it", "label": "1"},
    {"text": "œ, ü and \\n", "label": "0"},
]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps({"data": ROWS}))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def rows(table: Any) -> list[dict[str, Any]]:
    return [
        dict(zip(table.columns, values, strict=True)) for values in zip(*table.columns.values(), strict=True)
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "disk"])
def test_a_file_is_read_as_what_it_is(tmp_path: Path, kind: str) -> None:
    found = read_source(str(write(tmp_path, kind)))
    assert set(found) == {"train"} and rows(found["train"]) == ROWS


def test_what_python_holds_is_read_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_list(ROWS)
    for data in (ROWS, {"text": [r["text"] for r in ROWS], "label": [r["label"] for r in ROWS]}, given):
        assert rows(tables(data)["train"]) == ROWS
    parts = tables(datasets.DatasetDict(train=given, test=given))
    assert set(parts) == {"train", "test"}
    assert list(tables(["one", "two"])["train"].columns["text"]) == ["one", "two"]
    both = joined([tables(ROWS)["train"], tables([{"text": "more"}])["train"]], "both")
    assert rows(both)[3] == {"text": "more", "label": None}


BAD = {
    "empty.csv": ("", "it is empty"),
    "head.csv": ("text,label\n", "it is empty"),
    "more.csv": ("text\na,b\n", "line 2 has another number of fields"),
    "bad.jsonl": ('{"text": "a"}\n{"text"\n', "line 2 is no JSON"),
    "list.jsonl": ('["a"]\n', "line 1 is a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_with_their_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(BAD[name][0])
    with pytest.raises(DataError, match=BAD[name][1]):
        read_source(str(tmp_path / name))


def picture(path: Path, value: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(path)


def test_folders_of_images(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        picture(tmp_path / "classes" / name)
        picture(tmp_path / "splits" / "train" / name)
        picture(tmp_path / "splits" / "val" / name)
        picture(tmp_path / "flat" / Path(name).name)
    found = read_source(str(tmp_path / "classes"))["train"]
    assert found.columns["label"] == ["a", "a", "b"] and found.folders
    assert set(read_source(str(tmp_path / "splits"))) == {"train", "validation"}
    flat = read_source(str(tmp_path / "flat"))["train"]
    assert set(flat.columns) == {"image"} and len(flat) == 3
    for name in ("1.png", "2.png"):
        picture(tmp_path / "maps" / "images" / name)
        picture(tmp_path / "maps" / "masks" / name)
    maps = read_source(str(tmp_path / "maps"))["train"]
    assert [path.parent.name for path in maps.columns["label"]] == ["masks", "masks"]
    (tmp_path / "maps" / "masks" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png has no map in masks"):
        read_source(str(tmp_path / "maps"))
    (tmp_path / "flat" / "metadata.csv").write_text("file_name,text\n1.png,one\n9.png,nine\n")
    with pytest.raises(DataError, match=r"9\.png is not there"):
        read_source(str(tmp_path / "flat"))


def test_splits_by_their_names(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-2.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    found = read_source(str(tmp_path))
    assert {name: len(table) for name, table in found.items()} == {"train": 2, "validation": 1}
    assert split_of("test_set.csv") == "test"
    (tmp_path / "more.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"files of several kinds: \.jsonl, \.csv|\.csv, \.jsonl"):
        read_source(str(tmp_path))
