"""The vanilla twin of any pruned model: its tensors in zeros, as wide as the widest of each kind of layer.

A unit of zeros gets nothing and gives nothing, so the twin computes the same and plain transformers loads it.
What this costs are the zeros: they are stored, loaded and multiplied like other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cria_prune.artifact.layers import empty_model, fill, structure_of
from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, StructureError
from cria_prune.base.modules import device_of, meta_copy
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.structure.groups import UnitGroups, counted_together, freeze
from cria_prune.vanilla import Holdable, holdable


def padded(model: nn.Module, plan: Plan, dense: nn.Module, example: Batch, asked: str) -> nn.Module:
    """Return the padded twin of a pruned model, of the same class, type and device.

    Args:
        model: the pruned model; plan: what was removed.
        dense: the dense architecture, with or without values.
        example: keyword arguments of its forward.
        asked: for error texts.

    Raises:
        ArtifactError: the plan was not made for the structure of the dense model.
    """
    # The plan is made again on the dense model: zeros are put by its positions, so they must be the same.
    groups = structure_of(dense, example, plan)
    try:
        same = _cuts(make_plan(groups, plan.kept)) == _cuts(plan)
    except StructureError as error:
        raise _foreign(asked, str(error)) from error
    if not same:
        raise _foreign(asked, "its positions are others")
    # What the plan left whole need not be held at other numbers, and must not be refused for it.
    whole = {
        name
        for names in counted_together(groups.prunable)
        if all(len(plan.kept[name]) == plan.sizes[name] for name in names)
        for name in names
    }
    groups = freeze(groups, lambda group: "the plan keeps it whole" if group.name in whole else None)
    found = holdable(meta_copy(dense), groups)
    wider = _wider(groups, plan, found)
    stored = empty_model(type(model), _config(found, wider, model))
    fill(stored, _scattered(model, plan, make_plan(groups, wider)))
    stored.to(device_of(model))  # buffers that are in no state
    if model.can_generate():  # type: ignore[operator]
        stored.generation_config = model.generation_config
    return stored


def _wider(groups: UnitGroups, plan: Plan, found: Holdable) -> dict[str, tuple[int, ...]]:
    """Return group name -> the units that stay and those that pad them."""
    sizes = {group.name: group.size for group in groups}
    for held in found.classes:
        widest = max(len(plan.kept[name]) for name in held.names)
        counts = (*held.counts, held.size)
        count = widest if held.every else min(number for number in counts if number >= widest)
        sizes |= dict.fromkeys(held.names, count)
    wider = {}
    for group in groups:
        stays = plan.kept[group.name]
        gone = sorted(set(range(group.size)) - set(stays))
        # The padding stands where removed units stood. Which of them does not matter: all they hold is zeros.
        wider[group.name] = tuple(sorted([*stays, *gone[: sizes[group.name] - len(stays)]]))
    return wider


def _config(found: Holdable, wider: Mapping[str, tuple[int, ...]], model: nn.Module) -> Any:
    config = found.config(wider)
    now: Any = model.config
    config._attn_implementation, config.dtype = now._attn_implementation, now.dtype
    return config


def _scattered(model: nn.Module, plan: Plan, wider: Plan) -> dict[str, Tensor]:
    """Return the state of the pruned model, each tensor in zeros where the wider plan keeps more."""
    state = model.state_dict(keep_vars=True)
    names = {name: id(tensor) for name, tensor in state.items()}
    room = {(cut.tensor, cut.dim): cut.kept for cut in wider.cuts}
    places: dict[int, dict[int, tuple[int, Tensor]]] = {}
    for cut in plan.cuts:
        around = room.get((cut.tensor, cut.dim), tuple(range(cut.size)))
        if cut.tensor in names and len(around) > len(cut.kept):
            # Where the units that stay lie among those and the padding.
            inside = torch.from_numpy(np.searchsorted(np.asarray(around), np.asarray(cut.kept)))
            places.setdefault(names[cut.tensor], {})[cut.dim] = (len(around), inside)
    done: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in done:
            done[id(tensor)] = _in_zeros(tensor.detach(), places.get(id(tensor), {}))
    return {name: done[id(tensor)] for name, tensor in state.items()}


def _in_zeros(tensor: Tensor, places: Mapping[int, tuple[int, Tensor]]) -> Tensor:
    """Return a tensor that holds this one at the given positions along each dimension, and else zeros.

    >>> _in_zeros(torch.ones(1, 2), {1: (3, torch.tensor([0, 2]))})
    tensor([[1., 0., 1.]])
    """
    for dim, (size, inside) in places.items():
        shape = [size if other == dim else length for other, length in enumerate(tensor.shape)]
        tensor = tensor.new_zeros(shape).index_copy_(dim, inside.to(tensor.device), tensor)
    return tensor


def _cuts(plan: Plan) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(cut.tensor, cut.dim): cut.kept for cut in plan.cuts if len(cut.kept) < cut.size}


def _foreign(asked: str, found: str) -> ArtifactError:
    return ArtifactError(
        asked, f"the plan does not fit the structure of the dense model: {found}",
        "Pass the plan that made this model, and as dense_config the configuration of the dense one",
    )  # fmt: skip
