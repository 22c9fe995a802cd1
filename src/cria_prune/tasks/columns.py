"""Which columns of a table a task reads, and which class of the model a label means."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cria_prune.base.errors import DataError
from cria_prune.tasks.corpus import Table

TEXTS = ("sentence", "text", "content", "document", "review", "article", "sentences", "transcription")
LABELS = ("label", "labels", "class", "score", "target", "fine_label", "stars")
PAIRS = (
    ("sentence1", "sentence2"), ("text1", "text2"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("query", "passage"), ("query", "document"), ("query", "text"),
    ("question", "context"), ("text", "text_pair"), ("anchor", "positive"), ("question", "answer"),
)  # fmt: skip
TARGETS = ("target", "summary", "highlights", "answer", "output", "translation", "label", "labels")
SPOKEN = ("text", "sentence", "transcription", "transcript", "normalized_text")
CAPTIONS = ("text", "caption", "captions", "prompt", "question", "sentence")
IMAGES, AUDIO = ("image", "img", "pixel_values", "picture"), ("audio", "file", "speech", "path")
MAPS = ("label", "labels", "annotation", "mask", "segmentation", "semantic_map")
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "labels", "label", "pos_tags", "chunk_tags")
CHATS = ("messages", "conversations", "conversation")
UNKNOWN = -1
"""The label of a row whose class is kept secret."""
LOOKED = 100
"""Rows by whose values a column is told to hold texts."""


@dataclass(frozen=True)
class Reading:
    """How rows are read; what the user said of them.

    Attributes:
        text_column, label_column, pair_column: names; None for the usual ones. The pair is the second text of
            two, and of a sequence-to-sequence model or a caption what belongs to the first.
        chat: texts, or columns of messages, are written by the tokenizer's chat template.
        max_length: tokens of an example at most; None for what suits the task.
    """

    text_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    chat: bool = False
    max_length: int | None = None


@dataclass(frozen=True)
class Rows:
    """Rows by the role that their columns have in a task.

    Attributes:
        columns: role (text, pair, label, image, ...) -> a value for each row of the table.
        index: which of them, in this order.
    """

    columns: Mapping[str, Sequence[Any]] = field(repr=False)
    index: Sequence[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, places: Iterable[int]) -> Rows:
        """Return some of the rows, in this order."""
        return Rows(self.columns, [self.index[place] for place in places])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({role: values[row] for role, values in self.columns.items()} for row in self.index)

    @property
    def labelled(self) -> bool:
        """Whether the rows say what the model should answer."""
        return "label" in self.columns

    def digest(self) -> bytes:
        """Return a SHA-256 of the rows, of files by what is in them."""
        found = hashlib.sha256()
        for row in self:
            for role, value in sorted(row.items()):
                found.update(role.encode())
                found.update(value.read_bytes() if isinstance(value, Path) else repr(value).encode())
        return found.digest()


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several sources, one after another; with the roles that all of them have."""
    if len(parts) == 1:
        return parts[0]
    roles = [role for role in parts[0].columns if all(role in part.columns for part in parts)]
    columns = {role: [row[role] for part in parts for row in part] for role in roles}
    return Rows(columns, range(sum(map(len, parts))))


def strings_of(table: Table) -> list[str]:
    """Return the names of the columns that hold texts."""
    return [name for name, values in table.columns.items() if _holds(values, str)]


def _holds(values: Sequence[Any], kind: type | tuple[type, ...]) -> bool:
    seen = [value for value in islice(values, LOOKED) if value is not None]
    return bool(seen) and all(isinstance(value, kind) for value in seen)


def named(table: Table, name: str | None, option: str) -> str | None:
    """Return a column that the user named.

    Raises:
        DataError: it is not there; the present ones are named.
    """
    if name is not None and name not in table.columns:
        present = ", ".join(table.columns)
        raise DataError(
            f"The column {name!r} of {table.origin}",
            f"its columns are {present}",
            f"Name one of them with --{option}",
        )
    return name


def first_of(table: Table, names: Sequence[str]) -> str | None:
    """Return the first of some names that a table has a column of."""
    return next((name for name in names if name in table.columns), None)


TEXT_OPTION, LABEL_OPTION, PAIR_OPTION = "text-column", "label-column", "pair-column"


def label_column(table: Table, reading: Reading, usual: Sequence[str] = LABELS) -> str | None:
    """Return the column of labels, or None: none is there, or all of them are empty or secret."""
    name = named(table, reading.label_column, LABEL_OPTION) or first_of(table, usual)
    if name is None or all(is_secret(value) for value in table.columns[name]):
        return None
    return name


def is_secret(value: Any) -> bool:
    """Say whether a label is left empty, or kept secret."""
    return value is None or (not isinstance(value, (str, list)) and value == UNKNOWN)


def text_columns(table: Table, reading: Reading, pairs: bool) -> tuple[str, str | None]:
    """Return the column of texts, and that of the second texts where they come in pairs.

    Args:
        table: the rows.
        reading: what the user said of them.
        pairs: the task can read pairs.

    Raises:
        DataError: there is none, or it is not clear which.
    """
    text = named(table, reading.text_column, TEXT_OPTION)
    pair = named(table, reading.pair_column, PAIR_OPTION)
    strings = [name for name in strings_of(table) if name not in (LABELS[0], LABELS[1], reading.label_column)]
    if text is None and reading.chat:
        text = first_of(table, CHATS)
    if text is not None:
        return text, pair
    both = [two for two in PAIRS if all(name in strings for name in two)]
    if both and pairs and pair is None:
        return both[0]
    found = [name for name in TEXTS if name in strings and name != pair]
    others = [name for name in strings if name != pair]
    if (both and not pairs) or not (found or len(others) == 1):
        chats = first_of(table, CHATS)
        todo = f"Name one with --{TEXT_OPTION}, or call it one of {', '.join(TEXTS[:5])}"
        if chats is not None and not strings:
            todo = f"{chats} holds chats: pass --chat to write them by the tokenizer's template"
        elif both:
            todo += "; pairs of texts are not one text"
        raise DataError(
            f"The texts of {table.origin}",
            f"its columns of strings are {', '.join(strings) or 'none'} of {', '.join(table.columns)}",
            todo,
        )
    return (found or others)[0], pair


class Classes:
    """The classes of a model, and what stands for them in a column of labels.

    Numbers, texts of numbers, whole floats and names are read; a name of the data set that the model knows
    counts more than its number there, for the two may number them differently.

    Args:
        config: of the model; table, column: the labels.
        name: of the model, for error texts.
    """

    def __init__(self, config: Any, table: Table, column: str, name: str) -> None:
        names = {
            int(number): str(text) for number, text in dict(getattr(config, "id2label", None) or {}).items()
        }
        self.count = int(getattr(config, "num_labels", len(names)))
        self.names = [names.get(number, f"LABEL_{number}") for number in range(self.count)]
        self._model, self._exact = name, {text: number for number, text in enumerate(self.names)}
        folded: dict[str, list[int]] = {}
        for number, text in enumerate(self.names):
            folded.setdefault(_folded(text), []).append(number)
        self._folded = {text: numbers[0] for text, numbers in folded.items() if len(numbers) == 1}
        self._theirs = list(table.names.get(column, ()))
        unnamed = self.names == [f"LABEL_{number}" for number in range(self.count)]
        if table.folders and unnamed:
            found = sorted({str(value) for value in table.columns[column]})
            if len(found) == self.count:  # as torchvision and datasets number the folders
                self._exact |= {text: number for number, text in enumerate(found)}
        self._by_name = any(self._known(text) is not None for text in self._theirs)

    def _known(self, text: str) -> int | None:
        return self._exact.get(text, self._folded.get(_folded(text)))

    def number(self, value: Any) -> int:
        """Return the class that a label means.

        Raises:
            DataError: the model does not know it.
        """
        found = self._number(value)
        if found is None or not 0 <= found < self.count:
            raise DataError(
                f"The labels for {self._model}",
                f"found {value!r}, and the model knows {', '.join(map(repr, self.names[:20]))}",
                f"Give numbers from 0 to {self.count - 1}, or these names",
            )
        return found

    def _number(self, value: Any) -> int | None:
        if isinstance(value, str):
            known = self._known(value)
            return known if known is not None else _whole(_float(value))
        number = _whole(value)
        if number is not None and self._by_name and 0 <= number < len(self._theirs):
            return self._known(self._theirs[number])
        return number

    def several(self, value: Any) -> list[float]:
        """Return 0 or 1 for each class, of a list of classes or of such numbers; see `number`."""
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value)
        numbers = [_whole(item) for item in items]
        if len(items) == self.count and set(numbers) <= {0, 1} and not isinstance(value, str):
            return [float(number or 0) for number in numbers]
        chosen = {self.number(item) for item in items if item != ""}
        return [float(number in chosen) for number in range(self.count)]


def _folded(text: str) -> str:
    return text.strip().casefold().replace(" ", "_").replace("-", "_")


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(value: Any) -> int | None:
    """Return a whole number that a number is, or None."""
    try:
        return operator.index(value)
    except TypeError:
        number = float(value) if isinstance(value, float) or hasattr(value, "item") else math.nan
        return int(number) if number.is_integer() else None


def number_of(value: Any, name: str) -> float:
    """Return a label that is a number. Raises a DataError for what is none."""
    found: Any = _float(value) if isinstance(value, str) else value
    try:
        return float(found)
    except (TypeError, ValueError):
        raise DataError(
            f"The labels for {name}", f"found {value!r}, and it gives one number", "Give numbers as labels"
        ) from None
