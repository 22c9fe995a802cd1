"""The ablation: what a network loses with its lowest-scored, its highest-scored and with random units.

Units leave by surgery, not under a mask: the networks that are measured get smaller with the share, so that
the sweep takes less time than with masked dense ones; normalisations over removed units, which no mask of
weights can imitate, are right too; and every cut is compared with its masked twin on the way.

Every cut is repaired as a pruning would before it is measured. The default's score, and not it alone, is the
loss after the best repair; without a repair it would be asked for what it does not promise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ConfigError, TargetError
from cria_prune.base.inputs import read_one
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.metrics import Metric, metric
from cria_prune.base.modules import copy_of
from cria_prune.base.progress import QUIET, Progress
from cria_prune.config import REPAIRED, PruneConfig
from cria_prune.planning.budget import Budget
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.planning.selection import check_prunable, check_share, checked_scores
from cria_prune.stages import Prepared, Ranking, prepared_with, rank, remove, removed
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.verify import Reference, Verification

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
        repair: how every cut network was repaired before it was measured, see `PruneConfig.repair`.
    """

    metric: Metric
    dense: float
    shares: tuple[float, ...]
    curves: Mapping[str, Values]
    seeds: tuple[int, ...]
    reached: tuple[float, ...]
    units: tuple[float, ...]
    difference: float | None = None
    repair: str = "none"

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
        """Whether the criterion earns its name: one line, with the repair and the shares that it misses."""
        missed, done = self.misses(), REPAIRED[self.repair]
        if not any(missed.values()):
            return (
                f"{done}, the criterion holds: lowest-first better and highest-first worse than random at "
                "every share"
            )
        texts = {"lowest": "lowest-first not better", "highest": "highest-first not worse"}
        said = [
            f"{texts[order]} than every random seed at {', '.join(f'{share:.4g}' for share in shares)}"
            for order, shares in missed.items()
            if shares
        ]
        bad = {share for shares in missed.values() for share in shares}
        number = len(self.shares) - len(bad)
        return f"{done}, the criterion holds at {number} of {len(self.shares)} shares: {'; '.join(said)}"

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
            "repair": self.repair,
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


SHARES = tuple(number / 10 for number in range(1, 10))
SEEDS = (0, 1, 2)

Order = Mapping[str, np.ndarray]


@of_plain_models
def ablate(
    model: nn.Module,
    groups: UnitGroups,
    scores: Mapping[str, Any],
    evaluate: Callable[[nn.Module], float],
    shares: Sequence[float] = SHARES,
    *,
    seeds: Sequence[int] = SEEDS,
    measure: str | Metric = "metric",
    example: Batch | None = None,
    reference: Reference | None = None,
    repair: str | None = None,
    batches: Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """Remove units lowest-scored first, highest-scored first and in random orders, and measure each time.

    The scores are those of the whole network: nothing is scored again or trained. Given batches, the
    consumers of every cut network are repaired as `prune` would, and then it is measured. Of every prunable
    group the same share of the units leaves, rounded to whole units (halves up), and at least one stays. Of
    equal scores the lower index leaves first. Every order is fixed before the first cut, so a larger share
    removes what a smaller one does and more.

    Args:
        model: the trained model; it is left as it was.
        groups: its unit groups.
        scores: group name -> (units,) importance, or what `score` returned; one for each prunable group.
        evaluate: a model to the metric; the model it gets is a copy that it may change.
        shares: of the units of every group, each between 0 and 1.
        seeds: one random order each; a group's order depends on the seed and the group's name alone.
        measure: name of the metric, see `base.metrics.metric`, or the metric itself.
        example: one batch; every cut is then compared with its masked twin on it.
        reference: in place of an example, what the cuts are compared with (`Prepared.reference`). Repaired
            cuts are compared with their own repaired network, on the example or the first batch.
        repair: `walk`, `once` or `none`, see `PruneConfig.repair`; by default that of a `PruneConfig`, and
            none without batches.
        batches: calibration batches for the repair; a pass over them is made once, not for every cut.
        progress: where to show how far it is; silent if None.

    Raises:
        TargetError: there is no share, one is not between 0 and 1, or two are equal.
        ConfigError: no random seed, or two equal ones; no such repair, or no batches for it.
        StructureError: nothing is prunable, or the scores do not fit the groups.
        SignalError: a score is NaN or infinite.
        VerificationError: a cut network and its masked twin differ.
    """
    shares, seeds = check_shares(shares), check_seeds(seeds)
    check_prunable(groups)
    if repair is None:
        repair = "none" if batches is None else PruneConfig().repair
    # The scores are given: a criterion that reads nothing leaves the recording to the repair.
    config = PruneConfig(repair=repair, score={"criterion": "random"})
    if repair != "none":
        if batches is None:
            raise ConfigError(
                f"An ablation with the repair {repair}", "there are no batches to repair on",
                "Give the calibration batches, or repair none",
            )  # fmt: skip
        prepared = prepared_with(model, groups, batches, config, example=example)
        ranking = Ranking(scores, rank(prepared).consumed)
        return ablation_of(
            prepared, ranking, evaluate, shares, seeds=seeds, measure=measure, progress=progress
        )
    if reference is None and example is not None:
        reference = Reference(model, read_one(model, example), training=False)

    def cut(step: Plan) -> tuple[nn.Module, Verification | None]:
        smaller = remove(model, step)
        return smaller, None if reference is None else reference.compare(step, smaller)

    return _measured(model, groups, scores, evaluate, cut, shares, seeds, measure, progress or QUIET)


def ablation_of(
    prepared: Prepared,
    ranking: Ranking,
    evaluate: Callable[[nn.Module], float],
    shares: Sequence[float] = SHARES,
    *,
    seeds: Sequence[int] = SEEDS,
    measure: str | Metric = "metric",
    progress: Progress | None = None,
) -> Ablation:
    """Ablate a model that is prepared and ranked, every cut repaired as its configuration says.

    The arguments and errors are those of `ablate`. Every cut is compared with its masked twin.
    """

    def cut(step: Plan) -> tuple[nn.Module, Verification | None]:
        # What the repair `once` needs was recorded on the network with
        # all units: each cut is one from there, whatever its share.
        return removed(prepared, ranking, step)

    found = _measured(
        prepared.model, prepared.groups, ranking.importances, evaluate, cut, check_shares(shares),
        check_seeds(seeds), measure, progress or QUIET,
    )  # fmt: skip
    return replace(found, repair=prepared.config.repair)


def _measured(
    model: nn.Module,
    groups: UnitGroups,
    scores: Mapping[str, Any],
    evaluate: Callable[[nn.Module], float],
    cut: Callable[[Plan], tuple[nn.Module, Verification | None]],
    shares: tuple[float, ...],
    seeds: tuple[int, ...],
    measure: str | Metric,
    progress: Progress,
) -> Ablation:
    """Measure the networks that `cut` makes, share by share in all orders; see `ablate`."""
    check_prunable(groups)
    plain = {name: getattr(item, "scores", item) for name, item in scores.items()}
    orders = list(removal_orders(groups, plain, seeds))
    sizes = {group.name: group.size for group in groups.prunable}
    budget = Budget(groups, "prunable")
    ledger = budget.ledger(groups)
    values: dict[str, list[list[float]]] = {order: [] for order in ORDERS}
    reached, units, differences = [], [], []
    with progress.bar("ablate", 1 + len(shares) * len(orders)) as bar:
        dense = float(evaluate(copy_of(model)))
        bar.update(metric=dense)
        for share in shares:
            gone = {name: leaving(size, share) for name, size in sizes.items()}
            reached.append(budget.share(ledger.count({name: sizes[name] - gone[name] for name in sizes})))
            units.append(sum(gone.values()) / sum(sizes.values()))
            for row in values.values():
                row.append([])
            for name, order in orders:
                step = make_plan(groups, {key: np.sort(first[gone[key] :]) for key, first in order.items()})
                smaller, verification = cut(step)
                if verification is not None:
                    differences.append(verification.difference)
                values[name][-1].append(float(evaluate(smaller)))
                bar.update(share=share, order=name, metric=values[name][-1][-1])
    return Ablation(
        metric(measure) if isinstance(measure, str) else measure, dense, shares,
        {name: tuple(map(tuple, rows)) for name, rows in values.items()},
        seeds, tuple(reached), tuple(units), max(differences, default=None),
    )  # fmt: skip


def leaving(size: int, share: float) -> int:
    """Return how many of a group's units leave: the share, halves rounded up, but never the last unit."""
    return min(size - 1, math.floor(share * size + 0.5 + 1e-9))  # 0.29 * 50 is 14.499999999999998


def removal_orders(
    groups: UnitGroups, scores: Mapping[str, Any], seeds: Sequence[int]
) -> Iterator[tuple[str, Order]]:
    """Yield `lowest`, `highest` and, for each seed, `random`, each with group name -> units, first to leave.

    Raises:
        StructureError, SignalError: the scores do not fit the groups, or are not finite.
    """
    prunable = groups.prunable
    values = {group.name: checked_scores(group, scores, "uniform") for group in prunable}
    yield "lowest", {name: np.argsort(item, kind="stable") for name, item in values.items()}
    yield "highest", {name: np.argsort(-item, kind="stable") for name, item in values.items()}
    for seed in seeds:
        # By name, as the criterion `random` does it: another group more or less moves no other group.
        yield (
            "random",
            {
                group.name: np.random.default_rng([seed, zlib.crc32(group.name.encode())]).permutation(
                    group.size
                )
                for group in prunable
            },
        )


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares, ascending.

    Raises:
        TargetError: there is none, one is not between 0 and 1, or two are equal.
    """
    for share in shares:
        check_share(share)
    if not shares or len(set(shares)) < len(shares):
        raise TargetError(
            "The shares of an ablation",
            f"found {', '.join(map(str, shares)) or 'none'}",
            "Give at least one share, each once",
        )
    return tuple(sorted(map(float, shares)))


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds of the random orders.

    Raises:
        ConfigError: there is none, one is negative, or two are equal.
    """
    found = tuple(map(int, seeds))
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ConfigError(
            "The random orders of an ablation",
            f"found the seeds {', '.join(map(str, found)) or 'none'}",
            "Give at least one seed of 0 or more, each once",
        )
    return found
