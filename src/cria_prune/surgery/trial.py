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

    All suspects are cut together first; only if that fails is each tried alone.
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
    return replace(
        groups,
        groups=tuple(
            replace(group, frozen=group.frozen or frozen.get(group.name), assumes=()) for group in groups
        ),
    )


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
