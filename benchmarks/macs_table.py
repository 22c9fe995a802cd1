"""What a recovery gives at as many MACs, whether all layers share alike or are free to differ."""

from __future__ import annotations

import statistics
from typing import Any

from result_cells import ORDER, STARTS, Cells, every, figures, pick, section, settings_text, tuned, way

NEAR = 0.006
"""Of the MACs of the dense network: what counts as the same number where a cell was not asked for it."""
Row = tuple[tuple[str, str, str], Cells]


def macs_table(network: str) -> list[str]:
    """One table for every share of the MACs that cells were asked for and every recovery they had."""
    recovered = [item for item in every(network) if item["cell"]["epochs"]]
    asked = {(goal(item), *recovery(item)) for item in recovered if item["cell"].get("of") == "macs"}
    lines: list[str] = []
    for share, *like in sorted(asked):
        rows = rows_at([item for item in recovered if recovery(item) == tuple(like)], share)
        cells = [item for _, found in rows for item in found]
        table = [
            [name, ranking, start, str(len(found)), figures(network, found, "pruned"),
             figures(network, found, "recovered"), f"{100 * mean_left(found):.2f}%",
             f"{statistics.mean(item['report']['parameters'] for item in found):,.0f}"]
            for (name, ranking, start), found in rows
        ]  # fmt: skip
        scope = "" if like[0] == "inner" else f", scope {like[0]}"
        title = (
            f"### {network}: recovered with {100 * share:.4g} % of the MACs{scope}, {settings_text(cells[0])}"
        )
        head = ["criterion", "ranking", "start", "draws", "pruned", "recovered"]
        lines += section(network, title, cells, [*head, "MACs left", "parameters left"], table)
    return lines


def rows_at(cells: Cells, share: float) -> list[Row]:
    """Choose what is compared at a share of the MACs of the dense network.

    A row is of one asked size, so that no seed counts twice: the cells that were asked for that very share,
    however near they came; else those of the nearest size, if their mean is at most NEAR from it.

    Args:
        cells: of one network and one recovery.
        share: of the MACs of the dense network.

    Returns:
        Criterion, ranking and start, with the cells.
    """
    rows: list[Row] = []
    for name in ORDER:
        of_name = pick(cells, criterion=name)
        for how in sorted({way(item) for item in of_name}):
            sizes: dict[tuple[str | None, float], Cells] = {}
            for item in of_name:
                if way(item) == how:
                    sizes.setdefault((item["cell"].get("of"), goal(item)), []).append(item)
            nearest = min(sizes.values(), key=lambda found: abs(mean_left(found) - share))
            found = sizes.get(("macs", share), nearest)
            if ("macs", share) in sizes or abs(mean_left(found) - share) <= NEAR:
                rows.append(((name, how[2], STARTS[how[:2]]), found))
    return rows


def goal(item: dict[str, Any]) -> float:
    """The share that a cell was asked to leave."""
    return round(1 - float(item["cell"]["reduction"]), 6)


def left(item: dict[str, Any]) -> float:
    """The share of the MACs of the dense network that a cell leaves."""
    return float(item["report"]["macs"] / item["report"]["macs_dense"])


def mean_left(cells: Cells) -> float:
    return statistics.mean(map(left, cells))


def recovery(item: dict[str, Any]) -> tuple[Any, ...]:
    """What two cells have in common that are compared: scope, rounds, epochs, tuning, and the dense model."""
    cell = item["cell"]
    return cell["scope"], cell["rounds"], cell["epochs"], *tuned(item), cell.get("dense_seed", -1)
