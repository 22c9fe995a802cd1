"""Which column is which, and which class a label means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cria_prune.base.errors import DataError
from cria_prune.tasks.columns import Classes, Reading, label_column, text_columns
from cria_prune.tasks.corpus import Table

CONFIG = SimpleNamespace(id2label={0: "negative", 1: "Positive", 2: "not sure"}, num_labels=3)


def classes(*names: str, config: Any = CONFIG, folders: bool = False, values: Any = ()) -> Classes:
    table = Table({"label": list(values)}, "x", {"label": names} if names else {}, folders=folders)
    return Classes(config, table, "label", "m")


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1), (np.int64(2), 2), (1.0, 1), (np.float32(2), 2), ("1", 1), ("2.0", 2), (True, 1), ("negative", 0),
     ("POSITIVE", 1), ("not-sure", 2), (" Not_Sure ", 2)],
)  # fmt: skip
def test_a_label_is_known_by_number_or_name(value: Any, number: int) -> None:
    assert classes().number(value) == number


@pytest.mark.parametrize("value", [3, -2, 0.5, float("nan"), "3", "neutral", None, [1]])
def test_other_labels_are_refused(value: Any) -> None:
    with pytest.raises(
        DataError, match=r"the model knows 'negative', 'Positive', 'not sure'.*numbers from 0 to 2"
    ):
        classes().number(value)


def test_the_names_of_the_data_count_more_than_their_numbers() -> None:
    """A data set that numbers the same classes in another order would be silently measured wrong."""
    assert [classes("not sure", "negative", "positive").number(n) for n in range(3)] == [2, 0, 1]
    assert [classes("a", "b", "c").number(n) for n in range(3)] == [0, 1, 2]  # unknown names: numbers
    with pytest.raises(DataError, match="found 2"):
        classes("negative", "positive", "other").number(2)


def test_folders_number_the_classes_of_a_model_without_names() -> None:
    bare = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}, num_labels=2)
    assert classes(config=bare, folders=True, values=["dog", "cat"]).number("dog") == 1
    for wrong in (
        classes(config=bare, values=["dog", "cat"]),
        classes(config=bare, folders=True, values="abc"),
    ):
        with pytest.raises(DataError, match="LABEL_0"):
            wrong.number("dog")


def test_several_labels_of_an_example() -> None:
    found = classes()
    for value in ([1, 2], ["Positive", "not sure"], "Positive, not sure", [0, 1, 1], [0.0, 1.0, 1.0]):
        assert found.several(value) == [0.0, 1.0, 1.0]


def columns(**given: Any) -> Table:
    return Table({name: [value] for name, value in given.items()}, "the file x.csv")


def test_the_columns_of_texts() -> None:
    plain = Reading()
    assert text_columns(columns(sentence="a", other="b", label=1), plain, True) == ("sentence", None)
    assert text_columns(columns(only="a", number=1), plain, False) == ("only", None)
    assert text_columns(columns(premise="a", hypothesis="b"), plain, True) == ("premise", "hypothesis")
    asked = Reading(text_column="b", pair_column="a")
    assert text_columns(columns(a="x", b="y"), asked, True) == ("b", "a")
    with pytest.raises(
        DataError, match=r"'c' of the file x\.csv: its columns are a, b\. Name one .*--text-column"
    ):
        text_columns(columns(a="x", b="y"), Reading(text_column="c"), True)
    with pytest.raises(DataError, match=r"a, b of a, b\. Name one with --text-column"):
        text_columns(columns(a="x", b="y"), plain, True)
    with pytest.raises(DataError, match="messages holds chats: pass --chat"):
        text_columns(columns(messages=[{"role": "user"}]), plain, False)
    assert text_columns(columns(messages=[]), Reading(chat=True), False) == ("messages", None)
    assert label_column(columns(text="a", label=-1), plain) is None  # kept secret
    with pytest.raises(DataError, match="--label-column"):
        label_column(columns(text="a"), Reading(label_column="stars"))
