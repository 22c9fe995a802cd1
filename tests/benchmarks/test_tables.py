"""The tables of docs/results.md: what stands in one row, and in one table."""

from __future__ import annotations

import re
from typing import Any

import pytest

import result_cells
import summary
import tables
import walk_table
from cria_prune.bench.peer import IMPORTANCES
from cria_prune.criteria.table import CRITERIA
from macs_table import macs_table, rows_at

DENSE = {"macs_dense": 1000, "parameters_dense": 1000}


def cell(
    criterion: str, seed: int, macs: int, *, reduction: float = 0.5, recovered: float = 0.8, **more: Any
) -> dict[str, Any]:
    """A result file, as far as the tables read it."""
    said = {"network": "digits", "scope": "inner", "criterion": criterion, "reduction": reduction,
            "rounds": 4, "seed": seed, "epochs": 3, **more}  # fmt: skip
    report = {**DENSE, "macs": macs, "parameters": macs // 2, "reached": 1 - macs / 1000}
    return {
        "cell": said, "metric": "accuracy", "pruned": 0.5, "recovered": recovered, "report": report,
        "provenance": {"commit": "abc", "seed": seed},
    }  # fmt: skip


def lines_of(table: list[str]) -> list[list[str]]:
    return [[part.strip() for part in line.strip("|").split("|")] for line in table if line.startswith("| ")]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    monkeypatch.setattr("macs_table.every", lambda _network: cells)
    monkeypatch.setattr(tables, "read", lambda _network: cells)
    return cells


def test_two_shares_that_are_near_each_other_are_two_tables_of_the_cells_near_each(given: Any) -> None:
    given += [cell("l2", 0, 505, reduction=0.4945, of="macs", ranking="global", recovered=0.9)]
    given += [cell("l2", 0, 501, reduction=0.499, of="macs", ranking="global", recovered=0.7)]
    first, second = (line for line in macs_table("digits") if line.startswith("### "))
    assert "50.1 % of the MACs, 4 rounds, 3 epochs" in first and "50.55 % of the MACs" in second
    rows = lines_of(macs_table("digits"))
    assert [row[3:6] for row in rows if row[0] == "l2"] == [["1", "50.00", "70.00"], ["1", "50.00", "90.00"]]


def test_a_seed_counts_once_and_the_nearest_size_is_taken(given: Any) -> None:
    given += [cell("innovation", seed, 505, reduction=0.4945, of="macs", ranking="global") for seed in (0, 1)]
    given += [cell("innovation", seed, 504, reduction=0.495, recovered=0.9) for seed in (0, 1, 2)]
    given += [cell("innovation", seed, 500, reduction=0.5, recovered=0.1) for seed in (0, 1)]
    given += [cell("innovation", 0, 499, reduction=0.495, of="prunable", recovered=0.1)]
    given += [cell("l1", 0, 512), cell("fpgm", 0, 511)]  # 0.0065 and 0.0055 apart
    rows = rows_at(given, 0.5055)
    assert [(label, len(found)) for label, found in rows] == [
        (("fpgm", "uniform", "as cut"), 1), (("innovation", "global", "as cut"), 2),
        (("innovation", "uniform", "as cut"), 3),
    ]  # fmt: skip
    assert all(item["recovered"] != 0.1 for _, found in rows for item in found)
    shown = {(row[0], row[1]): row[6:] for row in lines_of(macs_table("digits"))}
    assert shown["innovation", "uniform"] == ["50.40%", "252"] and shown["fpgm", "uniform"] == [
        "51.10%",
        "255",
    ]


def test_what_was_asked_for_a_share_stays_however_near_it_came(given: Any) -> None:
    """A draw that went astray is not left out, and a peer that cannot come nearer neither."""
    asked: dict[str, Any] = {"reduction": 0.4945, "of": "macs", "ranking": "global"}
    given += [cell("tp-taylor", seed, macs, **asked) for seed, macs in enumerate((505, 530, 505))]
    given += [cell("tp-taylor", 3, 505, reduction=0.495, ranking="global")]  # nearer, but not asked for it
    (row,) = [row for row in lines_of(macs_table("digits")) if row[0] == "tp-taylor"]
    assert row[3] == "3" and row[6] == "51.33%"


def test_what_is_recovered_otherwise_or_starts_otherwise_is_apart(given: Any) -> None:
    given += [cell("l2", 0, 504, reduction=0.4945, of="macs")]
    given += [cell("l2", 0, 505, compensate=True, recovered=0.9)]
    given += [cell("l2", 0, 505, compensate=True, batch_norm=True, recovered=0.7)]
    given += [cell("l2", 0, 505, batch_norm=True, recovered=0.6)]
    given += [
        cell("l2", 0, 505, repair="walk", recovered=0.95),
        cell("l2", 1, 505, repair="once", recovered=0.9),
    ]
    apart: list[dict[str, Any]] = [
        *({"tune": {"distill": 0.5}}, {"quick": True}, {"rounds": 1}),
        *({"scope": "all"}, {"epochs": 60}, {"dense_seed": 1}),
    ]
    given += [cell("l2", 0, 505, compensate=True, recovered=0.1, **more) for more in apart]
    table = macs_table("digits")
    assert (
        sum(line.startswith("### ") for line in table) == 1
    )  # the others were not asked for a share of the MACs
    assert [(row[2], row[3], row[5]) for row in lines_of(table)[2:]] == [
        ("as cut", "1", "80.00"), ("norms", "1", "60.00"), ("once", "2", "90.00 ± 0.0"),
        ("once, norms", "1", "70.00"), ("walk", "1", "95.00"),
    ]  # fmt: skip
    given += [cell("l2", 1, 505, reduction=0.4945, **{"of": "macs", **more}) for more in apart]
    titles = [line for line in macs_table("digits") if line.startswith("### ")]
    assert len(set(titles)) == len(titles) == 1 + len(apart)


def test_cells_of_different_dense_models_are_in_different_tables(given: Any) -> None:
    given += [cell("l2", 0, 500), *(cell("l2", seed, 500, dense_seed=1, recovered=0.9) for seed in (1, 2))]
    table = tables.recovered_table("digits")
    assert [line for line in table if line.startswith("### ")][1].count("dense model 1") == 1
    assert [row[2:5] for row in lines_of(table) if row[0] == "l2"] == [
        ["1", "50.00", "80.00"], ["2", "50.00 ± 0.0", "90.00 ± 0.0"],
    ]  # fmt: skip


def test_every_way_and_every_criterion_is_known() -> None:
    assert {how[:2] for how in result_cells.WAYS} == set(result_cells.STARTS)
    assert set(result_cells.ORDER) == {*CRITERIA, *IMPORTANCES}


def test_the_summary_has_six_rows_and_names_its_files() -> None:
    rows = lines_of(summary.summary())[2:]
    assert len(rows) == 6
    for row in rows:
        folders = re.findall(r"\]\((.*?)\)", row[-1])
        assert folders and all((result_cells.ROOT / folder).is_dir() for folder in folders)
        assert row[2] in ("3", "6", "3 / 1")


def test_a_side_takes_its_own_cells_and_a_perplexity_is_that_of_its_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_net = {"a": [cell("l2", 0, 500), cell("l2", 1, 500), cell("l1", 2, 500)], "b": [cell("l2", 4, 500)]}
    of_net["a"] += [cell("l2", 0, 500, compensate=True), cell("l2", 0, 500, tune={"distill": 0.5})]
    of_net["a"] += [cell("l2", 0, 500, reduction=0.3), cell("l2", 0, 500, rounds=1)]
    monkeypatch.setattr(summary, "read", of_net.__getitem__)
    dense = {"a": {0: {"dense": 0.4}, 1: {"dense": 0.2}}, "b": {4: {"dense": 0.1}}}
    monkeypatch.setattr(summary, "dense_of", dense.__getitem__)
    monkeypatch.setattr(summary, "metric_of", lambda _network: "perplexity-128")
    side = summary.Side("plain", "l2", result_cells.PLAIN)
    found = {name: side.cells(name, 3) for name in of_net}
    assert [len(cells) for cells in found.values()] == [2, 1]
    assert summary.value(found).startswith("4.67 ± ")  # the mean of 0.8 / 0.4, 0.8 / 0.2 and 0.8 / 0.1
    assert summary.dense_text(found) == "perplexity 0.1 to 0.4"


def walked(criterion: str, seed: int, pruned: float, agreement: float, **more: Any) -> dict[str, Any]:
    """A cell of the suites of the walk; its farthest output decides, and its last stage."""
    made = cell(criterion, seed, 600, epochs=0, rounds=1, **more)
    outputs = [
        {"name": name, "samples": 8, "relative_error": 1.0, "cosine": 0.9, "divergence": apart,
         "agreement": share}
        for name, apart, share in (("near", 0.1, 1.0), ("far", 2 * (1 - agreement), agreement))
    ]  # fmt: skip
    stages = ["norms"] if "batch_norm" in more else ["as cut"]
    before = [{**outputs[0], "divergence": 9.0, "agreement": 0.0}]
    return {
        **made, "pruned": pruned, "gone": {"parameters": 0.7, "macs": 0.4},
        "report": {**made["report"], "of": more.get("of", "parameters")},
        "fidelity": {**{stage: {"examples": 8, "outputs": outputs} for stage in stages},
                     **({"repaired": {"examples": 8, "outputs": before}} if "batch_norm" in more else {})},
    }  # fmt: skip


def test_the_tables_of_the_walk_have_a_row_for_every_way_and_end_with_the_last_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk: dict[str, Any] = {"repair": "walk", "batch_norm": True}
    cells = [walked("innovation", seed, 0.8 + seed / 100, 0.9, **walk) for seed in (0, 2)]
    cells += [walked("innovation", 0, 0.85, 0.75, ranking="measured", **walk)]
    cells += [walked("l2", 0, 0.3, 0.5), walked("tp-magnitude", 0, 0.2, 0.5)]
    cells += [walked("innovation", 0, 0.7, 0.5, of="macs", reduction=0.3)]
    folder = "cifar10-resnet20-walk"
    monkeypatch.setattr(walk_table, "every", lambda name: cells if name == folder else [])
    for module in (walk_table, result_cells):
        monkeypatch.setattr(module, "dense_of", lambda _name: {seed: {"dense": 0.9} for seed in range(3)})
    lines = walk_table.walk_tables()
    assert [line for line in lines if line.startswith("### ")] == [
        "### ResNet-20, 50% of the parameters gone, nothing trained",
        "### ResNet-20, 30% of the MACs gone, nothing trained",
    ]
    assert [row[:7] for row in lines_of(lines)[2:7]] == [
        ["dense", "", "", "", "90.00", "0", "100%"],
        ["as cut", "uniform", "tp-magnitude", "1", "20.00", "1.000", "50.0%"],
        ["as cut", "uniform", "l2", "1", "30.00", "1.000", "50.0%"],
        ["walk, norms", "uniform", "innovation", "2", "81.00 ± 12.7", "0.200", "90.0%"],
        ["walk, norms", "measured", "innovation", "1", "85.00", "0.500", "75.0%"],
    ]
    assert lines_of(lines)[3][7:] == ["70.0%", "40.0%"]
    assert lines_of(walk_table.without_training())[2:] == [
        ["ResNet-20, parameters", "90.00", "20.00", "", "", "81.00 ± 12.7", "85.00"]
    ]
