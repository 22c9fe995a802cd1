"""What a recovery gives at as many MACs, whether all layers share alike or are free to differ."""

from __future__ import annotations

import statistics
from typing import Any

from result_cells import ORDER, Cells, every, figures, pick, plural, section, tuned, way

NEAR = 0.006
"""Of the MACs of the dense network: what counts as the same number of them."""


def macs_table(network: str) -> list[str]:
    """What is recovered at as many MACs, whether layers share alike or are free to differ."""
    recovered = [item for item in every(network) if item["cell"]["epochs"]]
    shares = {round(left(item), 2) for item in recovered if item["cell"].get("of") == "macs"}
    lines: list[str] = []
    for share, epochs in sorted({(s, item["cell"]["epochs"]) for s in shares for item in recovered}):
        cells = pick(recovered, epochs=epochs, rounds=4, scope="inner")
        chosen = [item for item in cells if abs(left(item) - share) <= NEAR and not any(tuned(item))]
        if not any(item["cell"].get("of") == "macs" for item in chosen):
            continue
        rows = [
            [name, how[2], "repaired" if how[0] else "as cut", str(len(found)),
             figures(network, found, "pruned"), figures(network, found, "recovered"),
             mean_of(found, "macs"), mean_of(found, "parameters")]
            for name in ORDER
            for how in sorted({way(item) for item in chosen})
            if (found := [item for item in pick(chosen, criterion=name) if way(item) == how])
        ]  # fmt: skip
        title = f"### {network}: recovered with {100 * share:.0f} % of the MACs, {plural(epochs, 'epoch')}"
        head = [
            "criterion",
            "ranking",
            "start",
            "draws",
            "pruned",
            "recovered",
            "MACs left",
            "parameters left",
        ]
        lines += section(network, title, chosen, head, rows)
    return lines


def left(item: dict[str, Any]) -> float:
    """The share of the MACs of the dense network that a cell leaves."""
    return float(item["report"]["macs"] / item["report"]["macs_dense"])


def mean_of(cells: Cells, key: str) -> str:
    return f"{statistics.mean(item['report'][key] for item in cells):,.0f}"
