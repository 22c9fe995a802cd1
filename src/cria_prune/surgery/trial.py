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

    All suspects are cut together first; only if that fails is each tried alone. In the end all prunable
    groups are cut together, for a forward can depend on a size without a trace (a division by a width);
    if that fails, halves are tried until the groups that fail are found.
    """
    suspects = [group for group in groups.prunable if group.assumes]
    frozen: dict[str, str] = {}
    if suspects and _failure(model, groups, suspects, example):
        for group in suspects:
            failure = _failure(model, groups, [group], example)
            if failure:
                frozen[group.name] = f"a trial cut failed although {group.assumes[0]}: {failure}"
        left = [group for group in suspects if group.name not in frozen]
        failure = _failure(model, groups, left, example) if left and frozen else None
        if failure or not frozen:
            frozen.update(
                (group.name, f"a trial cut failed together with other groups: {failure}") for group in left
            )
    left = [group for group in groups.prunable if group.name not in frozen]
    # A model that differs from itself (NaN, chance) says nothing about its groups; later stages name it.
    if left and _failure(model, groups, left, example) and not _failure(model, groups, (), example):
        frozen.update(
            (name, f"a trial cut failed, its forward depends on how many units there are: {failure}")
            for name, failure in _failures(model, groups, left, example).items()
        )
    return replace(
        groups,
        groups=tuple(
            replace(group, frozen=group.frozen or frozen.get(group.name), assumes=()) for group in groups
        ),
    )


def _failures(
    model: nn.Module, groups: UnitGroups, chosen: Sequence[UnitGroup], example: Batch
) -> dict[str, str]:
    """Return group name -> failure, of the groups whose removal fails, found by halving."""
    failure = _failure(model, groups, chosen, example) if chosen else None
    if failure is None:
        return {}
    if len(chosen) == 1:
        return {chosen[0].name: failure}
    middle = len(chosen) // 2
    halves = (chosen[:middle], chosen[middle:])
    found = {name: text for half in halves for name, text in _failures(model, groups, half, example).items()}
    left = [group for group in chosen if group.name not in found]
    together = _failure(model, groups, left, example) if left else None
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
