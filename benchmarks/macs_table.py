"""What a recovery gives at as many MACs, whether all layers share alike or are free to differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from result_cells import ORDER, STARTS, Cells, every, figures, pick, section, settings_text, tuned, way

NEAR = 0.006
"""Of the MACs of the dense network: what counts as the same number of them."""


def macs_table(network: str) -> list[str]:
    """One table for every share of the MACs that cells were asked for and every recovery they had."""
    recovered = [item for item in every(network) if item["cell"]["epochs"]]
    asked = {(goal(item), *recovery(item)) for item in recovered if item["cell"].get("of") == "macs"}
    lines: list[str] = []
    for share, *like in sorted(asked):
        rows, cells = rows_at([item for item in recovered if recovery(item) == tuple(like)], share)
        table = [
            [name, ranking, start, str(len(found)), figures(network, found, "pruned"),
             figures(network, found, "recovered"), f"{100 * statistics.mean(map(left, found)):.2f}%",
             f"{statistics.mean(item['report']['parameters'] for item in found):,.0f}"]
            for (name, ranking, start), found in rows
        ]  # fmt: skip
        title = f"### {network}: recovered with {100 * share:.4g} % of the MACs, {settings_text(cells[0])}"
        head = ["criterion", "ranking", "start", "draws", "pruned", "recovered"]
        lines += section(network, title, cells, [*head, "MACs left", "parameters left"], table)
    return lines


def rows_at(cells: Cells, share: float) -> tuple[list[tuple[tuple[str, str, str], Cells]], Cells]:
    """Choose the cells that leave a share of the MACs, at most NEAR apart from it.

    Args:
        cells: of one network and one recovery.
        share: of the MACs of the dense network.

    Returns:
        Criterion, ranking and start, with the cells of one asked reduction, the nearest where several are
        near, so that no seed counts twice; and all these cells.
    """
    rows: list[tuple[tuple[str, str, str], Cells]] = []
    for name in ORDER:
        of_name = [item for item in pick(cells, criterion=name) if abs(left(item) - share) <= NEAR]
        for how in sorted({way(item) for item in of_name}):
            sizes: dict[tuple[float, str], Cells] = {}
            for item in of_name:
                if way(item) == how:
                    cell = item["cell"]
                    sizes.setdefault((cell["reduction"], cell.get("of", "")), []).append(item)
            nearest = min(sizes.values(), key=lambda found: abs(statistics.mean(map(left, found)) - share))
            rows.append(((name, how[2], STARTS[how[:2]]), nearest))
    return rows, [item for _, found in rows for item in found]


def goal(item: dict[str, Any]) -> float:
    """The share of the MACs that a cell was asked to leave."""
    return round(1 - float(item["cell"]["reduction"]), 6)


def left(item: dict[str, Any]) -> float:
    """The share of the MACs of the dense network that a cell leaves."""
    return float(item["report"]["macs"] / item["report"]["macs_dense"])


def recovery(item: dict[str, Any]) -> Sequence[Any]:
    """What two cells have in common that are compared: scope, rounds, epochs, and how they were tuned."""
    cell = item["cell"]
    return cell["scope"], cell["rounds"], cell["epochs"], *tuned(item)
