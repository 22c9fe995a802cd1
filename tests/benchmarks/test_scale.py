"""The table and the growth exponents of benchmarks/scale.py, and its smallest cell."""

from __future__ import annotations

from typing import Any

import pytest

import scale
import scale_cell


def sizes(power: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for width in (10, 100, 200, 400):
        item: dict[str, Any] = {"record": {"ratio": 1.5}, "repair": {"none": 0.5, "repaired": 0.25}}
        for stage, key in scale.STAGES.values():
            item.setdefault(stage, {})[key] = {"wall": 1.0, "processor": 3.0 * width**power}
        found[str(width)] = item
    found["10"]["solve"]["solve"]["processor"] = 1e6  # not among the largest three
    return found


def test_exponents_are_those_of_a_power_law() -> None:
    found = scale.exponents(sizes(1.3))
    assert set(found) == set(scale.STAGES)
    assert list(found.values()) == pytest.approx([1.3] * len(found))
    assert scale.exponents({"10": {}}) == {}


def test_the_table_tells_each_width_and_the_slopes() -> None:
    values = sizes(1.0)
    text = scale.table({"sizes": values, "exponents": scale.exponents(values)})
    assert "   400   nan     1.50" in text and "error 0.5000 -> 0.2500" in text and "solve 1.00" in text


def test_a_small_cell_runs_all_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_cell, "BATCH", 64)
    cell = scale_cell.Cell(96)
    for stage in (cell.record, cell.graph, cell.solve, cell.innovation, cell.repair):
        assert stage()
    found = cell.dense()
    assert found["ranks: innovation"] == pytest.approx(1) and found["ranks: solver"] > 0.9
    assert cell.error(cell.model) > found["repaired"] > 0
