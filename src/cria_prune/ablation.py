"""The ablation: what a network loses with its lowest-scored, its highest-scored and with random units.

Units leave by surgery, not under a mask: the networks that are measured get smaller with the share, so that
the sweep takes less time than with masked dense ones; normalisations over removed units, which no mask of
weights can imitate, are right too; and every cut is compared with its masked twin on the way.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from cria_prune.ablated import ORDERS, Ablation
from cria_prune.batches import Batch
from cria_prune.errors import ConfigError, TargetError
from cria_prune.metrics import Metric, metric
from cria_prune.modules import copy_of
from cria_prune.plan import Budget, check_prunable, check_share, checked_scores
from cria_prune.plan.make import make_plan
from cria_prune.progress import QUIET, Progress
from cria_prune.stages import remove
from cria_prune.structure import UnitGroups
from cria_prune.surgery import Reference

SHARES = tuple(number / 10 for number in range(1, 10))
SEEDS = (0, 1, 2)

Order = Mapping[str, np.ndarray]


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
    progress: Progress | None = None,
) -> Ablation:
    """Remove units lowest-scored first, highest-scored first and in random orders, and measure each time.

    The scores are those of the whole network: nothing is scored again, trained or repaired. Of every
    prunable group the same share of the units leaves, rounded to whole units (halves up), and at least one
    stays. Of equal scores the lower index leaves first. Every order is fixed before the first cut, so a
    larger share removes what a smaller one does and more.

    Args:
        model: the trained model; it is left as it was.
        groups: its unit groups.
        scores: group name -> (units,) importance, or what `score` returned; one for each prunable group.
        evaluate: a model to the metric; the model it gets is a copy that it may change.
        shares: of the units of every group, each between 0 and 1.
        seeds: one random order each; a group's order depends on the seed and the group's name alone.
        measure: name of the metric, see `metrics.metric`, or the metric itself.
        example: one batch; every cut is then compared with its masked twin on it.
        reference: in place of an example, what the cuts are compared with (`Prepared.reference`).
        progress: where to show how far it is; silent if None.

    Raises:
        TargetError: there is no share, one is not between 0 and 1, or two are equal.
        ConfigError: no random seed, or two equal ones.
        StructureError: nothing is prunable, or the scores do not fit the groups.
        SignalError: a score is NaN or infinite.
        VerificationError: a cut network and its masked twin differ.
    """
    shares, seeds = check_shares(shares), check_seeds(seeds)
    check_prunable(groups)
    plain = {name: getattr(item, "scores", item) for name, item in scores.items()}
    orders = list(removal_orders(groups, plain, seeds))
    sizes = {group.name: group.size for group in groups.prunable}
    if reference is None and example is not None:
        reference = Reference(model, example)
    budget = Budget(groups, "prunable")
    ledger = budget.ledger(groups)
    values: dict[str, list[list[float]]] = {order: [] for order in ORDERS}
    reached, units, differences = [], [], []
    with (progress or QUIET).bar("ablate", 1 + len(shares) * len(orders)) as bar:
        dense = float(evaluate(copy_of(model)))
        bar.update(metric=dense)
        for share in shares:
            gone = {name: leaving(size, share) for name, size in sizes.items()}
            reached.append(budget.share(ledger.count({name: sizes[name] - gone[name] for name in sizes})))
            units.append(sum(gone.values()) / sum(sizes.values()))
            for row in values.values():
                row.append([])
            for name, order in orders:
                cut = make_plan(groups, {key: np.sort(first[gone[key] :]) for key, first in order.items()})
                smaller = remove(model, cut)
                if reference is not None:
                    differences.append(reference.compare(cut, smaller).difference)
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
