"""Texts of the user: a text file, a parquet file or folder, or a data set by its hub name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cria_prune.base.errors import DataError, needed, said

TEXTS = ("sentence", "text", "content", "document", "review")
LABELS = ("label", "labels")
PAIRED = (
    *("question", "question1", "question2", "premise", "hypothesis"),
    *("sentence1", "sentence2", "text1", "text2"),
)
LABEL_UNKNOWN = -1
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLITS |= {"dev": "validation", "test": "test"}
LOCAL = "Give a text file with --calibration, or a parquet file or a folder of them with --dataset"


@dataclass(frozen=True)
class Corpus:
    """Texts of one split.

    Attributes:
        texts: one per row.
        labels: one per row as they were stored, numbers or names; None where there are none.
    """

    texts: Sequence[str] = field(repr=False)
    labels: Sequence[int | str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.texts)


def read_text(path: Path) -> str:
    """Return the text in a file.

    Raises:
        DataError: there is no such file, it is no UTF-8, or it is empty.
    """
    asked = f"The text {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(asked, "there is no such file", "Give a file of plain text") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(asked, f"it cannot be read, {error}", "Give a file of plain UTF-8 text") from error
    if not text.strip():
        raise DataError(asked, "it is empty", "Give a file of plain text")
    return text


def read_dataset(name: str) -> dict[str, Corpus]:
    """Return split -> texts of a parquet file, of a folder of them, or of a data set of the hub.

    In a folder a file's name up to the first `-`, `_` or `.` says its split (train, validation or dev, test);
    files without such a name, and a single file, are "train". The text is the column `sentence`, `text`, ...
    or the only one that holds strings, the labels are in `label` or `labels`; rows without a text or label
    are left out. A split whose labels are all -1 (hidden) has none.

    Args:
        name: a path, or `organisation/dataset` or `organisation/dataset:configuration` on the hub.

    Raises:
        DataError: nothing is found, a file is no parquet, or has no column of text.
    """
    path = Path(name)
    if path.is_file():
        return {"train": _columns(_table([path]), name)}
    if path.is_dir():
        return _from_folder(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        raise DataError(f"The data set {name}", "there is no such file or folder", LOCAL)
    return _from_hub(name)


def _from_folder(folder: Path) -> dict[str, Corpus]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        files.setdefault(SPLITS.get(re.split(r"[-_.]", path.name)[0], "train"), []).append(path)
    if not files:
        raise DataError(f"The data set {folder}", "the folder holds no parquet files", LOCAL)
    return {split: _columns(_table(paths), f"{folder}, {split}") for split, paths in files.items()}


def _table(paths: Sequence[Path]) -> Mapping[str, Any]:
    with needed("recipes", f"The data set {paths[0]}"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    try:
        found = pa.concat_tables([pq.read_table(path) for path in paths])
    except (pa.ArrowException, OSError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise DataError(f"The data set {paths[0]}", f"it is no parquet file, {text}", LOCAL) from error
    kept = (*TEXTS, *LABELS)
    strings = [f.name for f in found.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    return {name: found[name].to_pylist() for name in found.column_names if name in kept or name in strings}


def _from_hub(name: str) -> dict[str, Corpus]:
    asked = f"The data set {name} of the hub"
    with needed("hub", asked):
        import datasets
    path, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # whatever a server and its files can raise
        raise DataError(asked, said(error), f"Without a network: {LOCAL}") from error
    return {str(split): _columns(part.to_dict(), f"{name}, {split}") for split, part in found.items()}


def _columns(table: Mapping[str, Any], name: str) -> Corpus:
    """Pick the column of text and that of labels.

    Raises:
        DataError: there is none, or it is not clear which: a pair of sentences is not one text.
    """
    strings = [
        key
        for key, values in table.items()
        if key not in LABELS and any(isinstance(value, str) for value in values)
    ]
    known = [key for key in TEXTS if key in strings]
    others = [key for key in strings if key in PAIRED]
    if others or (not known and len(strings) != 1):
        raise DataError(
            f"The texts of {name}",
            f"its columns of strings are {', '.join(strings) or 'none'}",
            f"One column of text is read: call it one of {', '.join(TEXTS)}; pairs of texts are not",
        )
    column = (known or strings)[0]
    labels = next((table[key] for key in LABELS if key in table), None)
    if labels is not None and all(label in (None, LABEL_UNKNOWN) for label in labels):
        labels = None
    rows = [
        row
        for row, text in enumerate(table[column])
        if isinstance(text, str) and (labels is None or labels[row] is not None)
    ]
    return Corpus(
        [table[column][row] for row in rows], None if labels is None else [labels[row] for row in rows]
    )
