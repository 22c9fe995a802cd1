"""The dense model behind a pruned one: its configuration, and its architecture without values.

Parameters are on the meta device: shapes that need no memory. Buffers are what the class computes, for some
are in no file: the frequencies of rotary positions, tables of relative positions.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cria_prune.batches import Batch, move
from cria_prune.errors import ArtifactError, StructureError
from cria_prune.modules import meta_copy
from cria_prune.plan.plan import Plan
from cria_prune.structure import UnitGroups, without_residual
from cria_prune.structure import discover as follow
from cria_prune.structure.capture import first_line
from cria_prune.surgery.apply import apply
from cria_prune.vanilla import config_parts


def empty_model(kind: Any, config: Any) -> nn.Module:
    """Return a model in eval mode with parameters on the meta device and buffers on the CPU.

    Args:
        kind: a class of transformers, called with the configuration.
        config: becomes the model's own.
    """

    def on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or value.is_meta:  # a tied one is registered again, and stays the same
            return None
        return nn.Parameter(value.detach().to("meta"), value.requires_grad)

    hook = register_module_parameter_registration_hook(cast(Any, on_meta))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return cast(nn.Module, kind(config)).eval()
    finally:
        hook.remove()


def dense_twin(model: nn.Module, plan: Plan, config: Any, asked: str) -> nn.Module:
    """Return the dense architecture of a pruned model, see `empty_model`.

    Args:
        model: the pruned model; it is left as it was.
        plan: what was removed.
        config: configuration of the dense model; None undoes the plan's edits in the model's own.

    Raises:
        ArtifactError: the configuration builds nothing, or the plan does not make this model of it.
    """
    todo = "Pass the plan that made this model, and as dense_config the configuration of the dense one"
    config = _undone(model, plan) if config is None else copy.deepcopy(config)
    config._attn_implementation = cast(Any, model.config)._attn_implementation
    try:
        dense = empty_model(type(model), config)
        smaller = apply(dense, plan, share=True)
    except StructureError as error:
        raise ArtifactError(asked, f"the plan does not fit its dense model ({error})", todo) from error
    except Exception as error:  # the model's code, the validators of configurations
        raise ArtifactError(asked, f"the dense model cannot be built, {first_line(error)}", todo) from error
    made, found = (
        {name: tuple(tensor.shape) for name, tensor in item.state_dict().items()} for item in (smaller, model)
    )
    for name in [*found, *made]:
        if made.get(name) != found.get(name):
            raise ArtifactError(
                asked,
                f"{name!r} is {found.get(name)}, the plan makes {made.get(name)} of the dense one",
                todo,
            )
    return dense


def structure_of(dense: nn.Module, example: Batch, plan: Plan) -> UnitGroups:
    """Return the unit groups of a dense architecture, found by shapes alone.

    Residual widths are frozen unless the plan cuts one.

    Raises:
        CaptureError: its operations cannot be captured.
    """
    groups = follow(meta_copy(dense), move(example, "meta"))
    cut = {name for name, size in plan.sizes.items() if len(plan.kept[name]) < size}
    asked = any(group.kind == "residual" and group.name in cut for group in groups)
    return groups if asked else without_residual(groups)


def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give a model the values of its state: no copy, and tensors that are tied stay tied.

    Args:
        model: with tensors of the right shapes, on the meta device or not.
        values: name -> tensor; of a tensor with several names, one is enough.

    Raises:
        ArtifactError: a name, a shape or a kind of number is not the model's, or something has no value.
    """
    state = model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    wrong = [f"{name!r} is not in the model" for name in values if name not in state]
    for name, place in state.items():
        value = values.get(name)
        if value is None:
            continue
        if value.shape != place.shape or not _alike(value, place):
            wrong.append(f"{name!r} is {_said(value)}, the model has {_said(place)}")
        found[id(place)] = (
            nn.Parameter(value, place.requires_grad) if isinstance(place, nn.Parameter) else value
        )
    wrong += [f"{name!r} is missing" for name, place in state.items() if id(place) not in found]
    asked, todo = f"Filling a {type(model).__name__}", "Use the plan and the weights of one saved folder"
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArtifactError(asked, "; ".join(wrong[:3]) + more, todo)
    model.load_state_dict({name: found[id(place)] for name, place in state.items()}, assign=True)
    empty = [name for name, item in [*model.named_parameters(), *model.named_buffers()] if item.is_meta]
    if empty:
        raise ArtifactError(asked, f"{empty[0]!r} is in no state and gets no value", todo)


def _undone(model: nn.Module, plan: Plan) -> Any:
    """The model's configuration with what it said before the plan."""
    now: Any = model.config
    config = copy.deepcopy(now)
    twins = {
        id(part): twin for (_, part), (_, twin) in zip(config_parts(now), config_parts(config), strict=True)
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    for edit in plan.attributes:
        part = twins.get(id(getattr(modules.get(edit.module), "config", None)))
        if part is not None and edit.name.startswith("config."):
            setattr(part, edit.name.removeprefix("config."), edit.before)
    return config


def _alike(value: Tensor, place: Tensor) -> bool:
    """Floats may be of any type, for a model is saved in its own; other numbers are what the class says."""
    return value.dtype == place.dtype or (value.is_floating_point() and place.is_floating_point())


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
