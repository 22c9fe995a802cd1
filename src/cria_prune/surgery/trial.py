"""Trial cuts: does the forward adapt where the captured operations cannot tell?

A reshape or split in a captured graph holds numbers. Whether the model's code reads them from its
input or has them written down decides whether its units can leave. So half of them are removed on
a copy, and masked must equal pruned; groups for which it does not are frozen with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from cria_prune.batches import Batch
from cria_prune.errors import CriaError
from cria_prune.plan.make import make_plan
from cria_prune.structure.groups import UnitGroup, UnitGroups
from cria_prune.surgery.apply import apply
from cria_prune.surgery.verify import verify


def settle(model: nn.Module, groups: UnitGroups, example: Batch) -> UnitGroups:
    """Return the groups with every assumption tried: true ones are dropped, false ones freeze their group.

    All prunable groups are cut together, those without an assumption too, for a forward can depend on a
    size without a trace (a division by a width). If that fails, halves are tried until the groups that
    fail are found.
    """
    chosen, frozen = groups.prunable, dict[str, str]()
    failure = _failure(model, groups, chosen, example) if chosen else None
    # A model that differs from itself (NaN, chance) says nothing about its groups; later stages name it.
    if failure and not _failure(model, groups, (), example):
        failures = _failures(model, groups, chosen, failure, example)
        frozen = {name: _reason(groups[name], text) for name, text in failures.items()}
    return replace(
        groups,
        groups=tuple(
            replace(group, frozen=group.frozen or frozen.get(group.name), assumes=()) for group in groups
        ),
    )


def _reason(group: UnitGroup, failure: str) -> str:
    if group.assumes:
        return f"a trial cut failed although {group.assumes[0]}: {failure}"
    return f"a trial cut failed, its forward depends on how many units there are: {failure}"


def _failures(
    model: nn.Module, groups: UnitGroups, chosen: Sequence[UnitGroup], failure: str, example: Batch
) -> dict[str, str]:
    """Return group name -> failure of the groups to blame; `failure` is what all the chosen ones gave."""
    if len(chosen) == 1:
        return {chosen[0].name: failure}
    middle = len(chosen) // 2
    found: dict[str, str] = {}
    for half in (chosen[:middle], chosen[middle:]):
        text = _failure(model, groups, half, example)
        if text is not None:
            found |= _failures(model, groups, half, text, example)
    left = [group for group in chosen if group.name not in found]
    together = (_failure(model, groups, left, example) if found else failure) if left else None
    return found if together is None else {**found, **{group.name: together for group in left}}


def _failure(model: nn.Module, groups: UnitGroups, chosen: Sequence[UnitGroup], example: Batch) -> str | None:
    """Remove a seeded half of the units of the chosen groups on a copy; None if masked equals pruned."""
    generator = np.random.default_rng(0)
    kept = {
        group.name: np.sort(generator.permutation(group.size)[: (group.size + 1) // 2]) for group in chosen
    }
    try:
        plan = make_plan(groups, kept)
        verify(model, plan, apply(model, plan), example)
    except CriaError as error:
        return error.found
    return None
