"""What an ablation measured: its curves, its verdict, its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cria_prune.metrics import Metric

ORDERS = ("lowest", "highest", "random")
COLUMNS = ["units removed", "prunable parameters", "lowest first", "random", "highest first"]

Values = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Ablation:
    """What `ablate` measured; prints as a table and its verdict.

    Attributes:
        metric: what was measured, and which direction is better.
        dense: its value with all units.
        shares: of the units of every group that were to leave, ascending.
        curves: `lowest`, `highest`, `random` -> one row per share: (1,) value, `random` (seeds,) values.
        seeds: of the random orders.
        reached: per share, the share of the prunable parameters that was really gone, the same in all
            orders. Prunable are the parameters that at least one prunable group touches.
        units: per share, the share of all prunable units that was really gone.
        difference: largest relative difference between a cut network and its masked twin; None if no
            example was given.
    """

    metric: Metric
    dense: float
    shares: tuple[float, ...]
    curves: Mapping[str, Values]
    seeds: tuple[int, ...]
    reached: tuple[float, ...]
    units: tuple[float, ...]
    difference: float | None = None

    def misses(self) -> dict[str, tuple[float, ...]]:
        """Return the shares at which an order is not on its side of random.

        `lowest` has to be better than the best random seed, `highest` worse than the worst one; level
        with it is a miss, and so is a value that is no number.
        """
        better = self._better
        found: dict[str, list[float]] = {"lowest": [], "highest": []}
        for share, (low,), (high,), rows in zip(
            self.shares, *(self.curves[order] for order in ORDERS), strict=True
        ):
            if not all(better(low, value) for value in rows):
                found["lowest"].append(share)
            if not all(better(value, high) for value in rows):
                found["highest"].append(share)
        return {order: tuple(shares) for order, shares in found.items()}

    def _better(self, one: float, other: float) -> bool:
        return self.metric.better(one, other) and one != other

    @property
    def verdict(self) -> str:
        """Whether the criterion earns its name: one line, with the shares at which it does not."""
        missed = self.misses()
        if not any(missed.values()):
            return (
                "the criterion holds: lowest-first better and highest-first worse than random at every share"
            )
        texts = {"lowest": "lowest-first not better", "highest": "highest-first not worse"}
        said = [
            f"{texts[order]} than every random seed at {', '.join(f'{share:.4g}' for share in shares)}"
            for order, shares in missed.items()
            if shares
        ]
        bad = {share for shares in missed.values() for share in shares}
        number = len(self.shares) - len(bad)
        return f"the criterion holds at {number} of {len(self.shares)} shares: {'; '.join(said)}"

    def rows(self) -> list[list[str]]:
        """Return the table's cells: share, parameters gone, lowest first, random, highest first."""
        found = [["0", "0.00 %", *[self.metric.text(self.dense)] * 3]]
        for number, share in enumerate(self.shares):
            low, high, values = (self.curves[order][number] for order in ORDERS)
            found.append(
                [
                    f"{share:.4g}",
                    f"{self.reached[number] * 100:.2f} %",
                    self.metric.text(low[0]),
                    _interval(self.metric, values),
                    self.metric.text(high[0]),
                ]
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON; a value that is no finite number becomes None."""
        return {
            "metric": self.metric.name,
            "higher_is_better": self.metric.higher_is_better,
            "dense": _finite(self.dense),
            "shares": list(self.shares),
            "curves": {
                order: [
                    [share, [_finite(value) for value in values]]
                    for share, values in zip(self.shares, self.curves[order], strict=True)
                ]
                for order in ORDERS
            },
            "reached": list(self.reached),
            "units": list(self.units),
            "random_seeds": list(self.seeds),
            "misses": {order: list(shares) for order, shares in self.misses().items()},
            "verdict": self.verdict,
            "masked_equals_pruned": self.difference,
        }

    def __str__(self) -> str:
        lines = [COLUMNS, *self.rows()]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in lines
        ]
        return "\n".join([*table, self.verdict])


def _interval(metric: Metric, values: Sequence[float]) -> str:
    mean = metric.text(fmean(values))
    return mean if len(values) < 2 else f"{mean} ({metric.text(min(values))} to {metric.text(max(values))})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
