"""The user's data as tables: files, folders, hub names, and what a Python program holds.

Nothing is decoded here: an image or a recording is a path, or its bytes as a table holds them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cria_prune.base.errors import DataError, needed, said

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLITS |= {"val": "validation", "dev": "validation", "eval": "validation", "test": "test"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
MASKS = ("masks", "annotations", "labels", "segmentations")
"""Folders beside `images` that hold a map of classes for each image, of the same name."""
HUB_ROWS = 20_000
"""Rows of a split of the hub that are read, from its first on."""
KNOWN = (
    "Give a file (text, csv, tsv, json, jsonl, parquet), a folder of them, of images or of recordings, what "
    "datasets wrote by save_to_disk, or organisation/data of the hub"
)


@dataclass(frozen=True)
class Table:
    """Rows of one split.

    Attributes:
        columns: name -> a value for each row.
        origin: where they come from, for error texts.
        names: column -> what its numbers stand for, in their order, where the data say so.
        plain: the rows are the lines of one text.
        folders: the labels are the names of the folders that the files lie in.
    """

    columns: Mapping[str, Sequence[Any]] = field(repr=False)
    origin: str
    names: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    plain: bool = False
    folders: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def tables(data: Any) -> dict[str, Table]:
    """Return split -> rows of whatever holds data.

    Args:
        data: what `read_source` takes; a `datasets.Dataset` or a dictionary of them; a list of texts, of
            dictionaries, of images or arrays; a mapping of columns; a table of pandas.

    Raises:
        DataError: it is of another kind, or empty.
    """
    if isinstance(data, (str, Path)):
        return read_source(str(data))
    if isinstance(data, Mapping) and data and all(_is_dataset(part) for part in data.values()):
        return {split_of(str(name)): _of_dataset(part, str(name)) for name, part in data.items()}
    if _is_dataset(data):
        return {"train": _of_dataset(data, "the data set")}
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        data = data.to_dict("list")
    if isinstance(data, Mapping):
        return {"train": _checked(Table({str(key): list(data[key]) for key in data}, "the table"))}
    rows = list(data) if isinstance(data, Iterable) else []
    if rows and all(isinstance(row, Mapping) for row in rows):
        return {"train": _checked(Table(_columns(rows), "the rows"))}
    kind = "text" if rows and all(isinstance(row, str) for row in rows) else "image"
    if not rows:
        raise DataError(f"Data of the type {type(data).__name__}", "it holds no rows", KNOWN)
    return {"train": Table({kind: rows}, "the list")}


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
        raise DataError(asked, f"it cannot be read, {error}", f"Give plain UTF-8 text. {KNOWN}") from error
    if not text.strip():
        raise DataError(asked, "it is empty", "Give a file of plain text")
    return text


def read_source(name: str) -> dict[str, Table]:
    """Return split -> rows of a file, of a folder, or of a data set of the hub; each read as what it is.

    A file's name says how it is read: `.csv`, `.tsv`, `.json`, `.jsonl` (`.ndjson`), `.parquet`; an image or
    a recording is one row; all others are plain text. In a folder a file's or folder's name up to the first
    `-`, `_` or `.` says its split (train, validation or dev, test); without such a name, it is "train".

    A folder of images or recordings: folders in it are classes; without any there are no labels.
    `metadata.csv` or `metadata.jsonl` with a column `file_name` says more of each, as for datasets. `images`
    with `masks` (or `annotations`) beside it are images with a map of classes each.

    Args:
        name: a path, or `organisation/dataset` or `organisation/dataset:configuration` on the hub.

    Raises:
        DataError: nothing is found, or a file is not what its name says.
    """
    path = Path(name)
    if path.is_file():
        return {"train": _checked(_file(path))}
    if path.is_dir():
        return {split: _checked(table) for split, table in _folder(path).items()}
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and path.suffix not in (*READERS, ".txt"):
        return _from_hub(name)
    raise DataError(f"The data {name}", "there is no such file or folder", KNOWN)


def split_of(name: str) -> str:
    """Return the split that a name says: `train-00000`, `dev.jsonl`, `test_set`; else the name itself.

    >>> split_of("train-00000-of-00001.parquet"), split_of("dev"), split_of("mine")
    ('train', 'validation', 'mine')
    """
    return SPLITS.get(re.split(r"[-_.]", name)[0].lower(), name)


def _checked(table: Table) -> Table:
    """Return a table that has rows and whose columns are of one length."""
    lengths = {len(values) for values in table.columns.values()}
    if lengths <= {0}:
        raise DataError(f"The rows of {table.origin}", "it is empty", "Give data that hold rows")
    if len(lengths) > 1:
        raise DataError(f"The rows of {table.origin}", "its columns differ in length", "Give equal columns")
    return table


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(str(key) for row in rows for key in row)
    return {name: [row.get(name) for row in rows] for name in names}


# Files.


def _file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix in (*PICTURES, *SOUNDS):
        return Table({"image" if suffix in PICTURES else "audio": [path]}, str(path))
    return READERS.get(suffix, _read_lines)(path)


def _read_lines(path: Path) -> Table:
    return Table({"text": read_text(path).splitlines(keepends=True)}, str(path), plain=True)


def _read_csv(path: Path) -> Table:
    rows, text = list[dict[str, Any]](), read_text(path).removeprefix("\ufeff")
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    before = csv.field_size_limit(len(text))  # the usual limit is shorter than some documents
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"line {reader.line_num} has another number of fields than the first line")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"The table {path}", str(error), "Quote fields that hold commas or quotes") from error
    finally:
        csv.field_size_limit(before)
    return Table(_columns(rows), str(path))


def _read_json(path: Path) -> Table:
    text = read_text(path)
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except ValueError:
            found = None  # lines of objects under another name
        if isinstance(found, dict) and isinstance(found.get("data"), list):
            found = found["data"]
        if isinstance(found, list) and all(isinstance(row, dict) for row in found):
            return Table(_columns(found), str(path))
    return Table(_columns(list(_json_rows(path, text))), str(path))


def _json_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"The rows of {path}", f"line {number} is no JSON, {error}", _OBJECTS) from error
        if not isinstance(row, dict):
            raise DataError(f"The rows of {path}", f"line {number} is a {type(row).__name__}", _OBJECTS)
        yield row


_OBJECTS = 'Write an object on every line, as in {"text": "...", "label": 1}'


class _Arrow(Sequence[Any]):
    """A column of Arrow, whose values are made when they are asked for: images stay as they are stored."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._column[index].to_pylist()
        return self._column[index].as_py()

    def __iter__(self) -> Iterator[Any]:
        return (value.as_py() for value in self._column)


def _read_parquet(path: Path) -> Table:
    with needed("recipes", f"The data set {path}"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise DataError(f"The data set {path}", f"it is no parquet file, {text}", KNOWN) from error
    return Table(
        {name: _Arrow(found[name]) for name in found.column_names}, str(path), _class_names(found.schema)
    )


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return what datasets wrote of the classes of a file: column -> names."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = {str(key): item.get("names") for key, item in features.items() if isinstance(item, dict)}
        inner = {str(key): item.get("feature") for key, item in features.items() if isinstance(item, dict)}
        names |= {key: item.get("names") for key, item in inner.items() if isinstance(item, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {key: [str(name) for name in item] for key, item in names.items() if isinstance(item, list)}


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".ndjson": _read_json,
    ".parquet": _read_parquet,
}  # fmt: skip
"""Suffix of a file -> how it is read; all others are plain text."""


# Folders.


def _folder(folder: Path) -> dict[str, Table]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder)
    media = _media(folder)
    if media:
        return media
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in (*READERS, ".txt") and path.name != "dataset_infos.json":
            files.setdefault(path.suffix.lower(), []).append(path)
    if not files:
        raise DataError(f"The data set {folder}", "the folder holds no files of data", KNOWN)
    if len(files) > 1 and ".txt" in files:  # a licence beside the data
        del files[".txt"]
    if len(files) > 1:
        raise DataError(
            f"The data set {folder}",
            f"it holds files of several kinds: {', '.join(files)}",
            "Name one of them",
        )
    parts: dict[str, list[Table]] = {}
    for path in next(iter(files.values())):
        split = split_of(path.name)
        parts.setdefault(split if split in SPLITS.values() else "train", []).append(_file(path))
    return {split: joined(found, f"{folder}, {split}") for split, found in parts.items()}


def joined(parts: Sequence[Table], origin: str) -> Table:
    """Return the rows of several tables as one; columns that one of them lacks are empty there."""
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part.columns)
    whole = {
        name: [value for part in parts for value in part.columns.get(name, [None] * len(part))]
        for name in names
    }
    known = {key: value for part in parts for key, value in part.names.items()}
    return Table(whole, origin, known, all(part.plain for part in parts), all(p.folders for p in parts))


def _media(folder: Path) -> dict[str, Table]:
    """Return the images or recordings of a folder by split; empty where there are none."""
    parts = {split_of(path.name): path for path in sorted(folder.iterdir()) if path.is_dir()}
    parts = {split: path for split, path in parts.items() if split in SPLITS.values()}
    if parts and not _directly(folder):
        found = {split: _one_media(path) for split, path in parts.items()}
        return {split: table for split, table in found.items() if table is not None}
    table = _one_media(folder)
    return {} if table is None else {"train": table}


def _directly(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (*PICTURES, *SOUNDS))


def _one_media(folder: Path) -> Table | None:
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return _with_metadata(folder, _file(folder / name))
    below = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    masks = next((below[name] for name in MASKS if name in below and "images" in below), None)
    if masks is not None:
        return _with_masks(folder, below["images"], masks)
    files, labels = _directly(folder), list[str]()
    if not files:
        pairs = [(path, name) for name in sorted(below) for path in _directly(below[name])]
        files, labels = [path for path, _ in pairs], [below[name].name for _, name in pairs]
    if not files:
        return None
    kind = "image" if files[0].suffix.lower() in PICTURES else "audio"
    columns: dict[str, Sequence[Any]] = {kind: files, **({"label": labels} if labels else {})}
    return Table(columns, str(folder), folders=bool(labels))


def _with_metadata(folder: Path, table: Table) -> Table:
    """Return the rows of `metadata.csv` with the paths of the files that they name."""
    key = next((name for name in ("file_name", "image", "audio", "path") if name in table.columns), None)
    if key is None:
        raise DataError(
            f"The files that {table.origin} describes",
            f"it has no column file_name; its columns are {', '.join(table.columns)}",
            "Name each file in a column file_name",
        )
    columns: dict[str, list[Any]] = {name: list(values) for name, values in table.columns.items()}
    for name, values in columns.items():  # a map of classes is a file, too
        files = [isinstance(value, str) and Path(value).suffix.lower() in PICTURES for value in values]
        if name != key and files and all(files):
            columns[name] = [folder / value for value in values]
    paths = [folder / str(value) for value in columns.pop(key)]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise DataError(
            f"The files that {table.origin} describes", f"{missing} is not there", "Mend its name"
        )
    kind = "audio" if paths[0].suffix.lower() in SOUNDS else "image"
    return Table({kind: paths, **columns}, str(folder))


def _with_masks(folder: Path, images: Path, masks: Path) -> Table:
    maps = {path.stem: path for path in _directly(masks)}
    files = _directly(images)
    lonely = next((path for path in files if path.stem not in maps), None)
    if lonely is not None:
        raise DataError(f"The images in {folder}", f"{lonely.name} has no map in {masks.name}", "Add it")
    return Table({"image": files, "label": [maps[path.stem] for path in files]}, str(folder))


# The library datasets.


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "features") and hasattr(data, "column_names") and not isinstance(data, Mapping)


def _saved(folder: Path) -> dict[str, Table]:
    asked = f"The data set {folder}"
    with needed("hub", asked):
        import datasets
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever files can make another library raise
        raise DataError(asked, said(error), "Write it again with save_to_disk") from error
    parts = found if isinstance(found, Mapping) else {"train": found}
    return {split_of(str(name)): _of_dataset(part, f"{folder}, {name}") for name, part in parts.items()}


def _of_dataset(data: Any, origin: str) -> Table:
    """Return the rows of a `datasets.Dataset` (or the first of a stream), nothing decoded."""
    names = dict[str, list[str]]()
    for name, feature in (data.features or {}).items():
        inner = getattr(feature, "feature", feature)
        if getattr(inner, "names", None):
            names[str(name)] = list(inner.names)
        if hasattr(feature, "decode"):  # images and recordings: their bytes, or the path
            data = data.cast_column(name, type(feature)(decode=False))
    if not hasattr(data, "__len__"):
        return _checked(Table(_columns(list(islice(data, HUB_ROWS))), origin, names))
    return _checked(Table({name: _OfDataset(data, name) for name in data.column_names}, origin, names))


class _OfDataset(Sequence[Any]):
    """A column of a `datasets.Dataset`, whose values are read when they are asked for."""

    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = data.select_columns([name]), name

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        return self._data[index][self._name]

    def __iter__(self) -> Iterator[Any]:
        return (row[self._name] for row in self._data)


def _from_hub(name: str) -> dict[str, Table]:
    asked = f"The data set {name} of the hub"
    with needed("hub", asked):
        import datasets
    path, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(path, configuration or None, streaming=True)
        return {split_of(str(split)): _of_dataset(part, f"{name}, {split}") for split, part in found.items()}
    except DataError:
        raise
    except Exception as error:  # whatever a server and its files can raise
        raise DataError(
            asked,
            f"there is no such file or folder, and the hub gives {said(error)}",
            f"Without a network: {KNOWN}",
        ) from error
