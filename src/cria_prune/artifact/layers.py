"""What the layers of a pruned model hold, in the words of transformers; and the dense model behind it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cria_prune.base.batches import Batch, move
from cria_prune.base.errors import (
    ArtifactError,
    CertificateError,
    CriaError,
    StructureError,
    first_line,
    some,
)
from cria_prune.base.modules import meta_copy
from cria_prune.planning.plan import Plan
from cria_prune.structure.discovery import discover as follow
from cria_prune.structure.groups import (
    Count,
    UnitGroup,
    UnitGroups,
    said_values,
    without_experts,
    without_residual,
)
from cria_prune.surgery.removal import apply
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
    made, found = shapes_of(smaller), shapes_of(model)
    for name in [*found, *made]:
        if made.get(name) != found.get(name):
            apart = f"{name!r} is {found.get(name)}, the plan makes {made.get(name)} of the dense one"
            raise ArtifactError(asked, apart, todo)
    return dense


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in a model's state."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def structure_of(dense: nn.Module, example: Batch, plan: Plan) -> UnitGroups:
    """Return the unit groups of a dense architecture, found by shapes alone.

    Residual widths and whole experts are frozen unless the plan cuts some.

    Raises:
        CaptureError: its operations cannot be captured.
    """
    groups = follow(meta_copy(dense), move(example, "meta"))
    cut = {name for name, size in plan.sizes.items() if len(plan.kept[name]) < size}
    kinds = {group.kind for group in groups if group.name in cut}
    groups = groups if "residual" in kinds else without_residual(groups)
    return groups if "experts" in kinds else without_experts(groups)


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
        # Floats may be of any type, for a model is saved in its own; other numbers are what the class says.
        floats = value.is_floating_point() and place.is_floating_point()
        if value.shape != place.shape or not (floats or value.dtype == place.dtype):
            wrong.append(f"{name!r} is {_said(value)}, the model has {_said(place)}")
        found[id(place)] = (
            nn.Parameter(value, place.requires_grad) if isinstance(place, nn.Parameter) else value
        )
    wrong += [f"{name!r} is missing" for name, place in state.items() if id(place) not in found]
    asked, todo = f"Filling a {type(model).__name__}", "Use the plan and the weights of one saved folder"
    if wrong:
        raise ArtifactError(asked, some(wrong, 3, "; "), todo)
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


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]]

WIDTHS = ("n_inner", "intermediate_size")
"""Feed-forward widths; a configuration may leave its own to a rule: for GPT-2, four times the hidden size."""


def check_sizes(model: nn.Module, plan: Plan, asked: str) -> None:
    """Check that the model's class builds the same shapes from its configuration alone.

    A size that the configuration left to a rule is written into it first, where that helps: the head size of
    Qwen2 and ViT (hidden size by heads), the feed-forward width of GPT-2 (four times the hidden size).

    Raises:
        CertificateError: the configuration refuses its numbers, or the shapes differ.
    """
    apart = _apart(model, asked)
    # A size that follows from another one is right as long as both are whole. After
    # a cut it has to be written down, and is taken back where that does not help.
    for rule in (_head_size, _width):
        said = rule(model, apart) if apart else None
        if said:
            before = dict(vars(model.config))
            setattr(model.config, *said)
            after = _apart(model, asked)
            if len(after) < len(apart):
                apart = after
            elif said[0] in before:
                setattr(model.config, said[0], before[said[0]])
            else:  # None would not be the same: Phi-3 computes a head size that is not there
                delattr(model.config, said[0])
    if not apart:
        return
    kind, uneven = type(model.config).__name__, _uneven(plan, apart)
    name, (found, held) = next(iter(apart.items()))
    if uneven:
        raise CertificateError(
            asked,
            some(uneven, 4, "; "),
            f"One {kind} describes all layers: prune with uniform=True, so that each keeps the same number",
        )
    raise CertificateError(
        asked,
        f"{name!r} is {found}, a model of its {kind} has {held} there",
        f"{kind} has no field for this: leave such groups whole, or use cria_prune.save",
    )


def _apart(model: nn.Module, asked: str) -> Shapes:
    """Return tensor name -> (shape in the model, shape by its configuration) where they differ."""
    config: Any = model.config
    try:
        with torch.device("meta"):
            plain = type(model)(type(config).from_dict(config.to_dict()))
    except Exception as error:  # the validators of configurations raise many kinds
        raise CertificateError(
            asked,
            f"{type(config).__name__} refuses what is left: {' '.join(str(error).split())[:300].rstrip('.')}",
            "Keep a number of units that it takes",
        ) from error
    held = shapes_of(plain)
    return {
        name: (shape, held.get(name)) for name, shape in shapes_of(model).items() if shape != held.get(name)
    }


def _head_size(model: nn.Module, apart: Shapes) -> tuple[str, int] | None:
    """The head size in which all attention modules agree, if the configuration does not say it."""
    sizes = {vars(module).get("head_dim") for module in model.modules()} - {None}
    size = sizes.pop() if len(sizes) == 1 else None
    return (
        ("head_dim", size) if isinstance(size, int) and vars(model.config).get("head_dim") is None else None
    )


def _width(model: nn.Module, apart: Shapes) -> tuple[str, int] | None:
    """The feed-forward width that explains all lengths that differ, if the configuration has a field for it.

    A field that says nothing takes the one length in which all shapes differ. A field that still says the
    width of before (Phi-3, whose gate and up projections are one tensor) shrinks as these lengths did.
    """
    lengths = {
        (size, other)
        for found, held in apart.values()
        for size, other in zip(found, held or (), strict=False)
        if size != other
    }
    for name in WIDTHS:
        said = vars(model.config).get(name, 0)
        if said is None:
            wanted = {float(size) for size, _ in lengths}
        elif isinstance(said, int) and said and not any(other % said for _, other in lengths):
            wanted = {size * said / other for size, other in lengths}
        else:
            continue
        if len(wanted) == 1 and (width := wanted.pop()) == int(width):
            return name, int(width)
    return None


def _uneven(plan: Plan, apart: Shapes) -> list[str]:
    """Say which groups of numbered layers keep different numbers, among those whose shapes differ."""
    alike: dict[tuple[str, int], dict[int, str]] = {}
    for name, stays in plan.kept.items():
        alike.setdefault((re.sub(r"\d+", "*", name), plan.sizes[name]), {}).setdefault(len(stays), name)
    patterns = {re.sub(r"\d+", "*", name.rpartition(".")[0]) for name in apart}
    return [
        ", ".join(f"{name!r} keeps {count} units" for count, name in sorted(counts.items())[:3])
        for (pattern, _), counts in alike.items()
        if len(counts) > 1 and pattern in patterns
    ]


Path = tuple[str, ...]
Overrides = dict[Path, dict[int, dict[str, int]]]
SCHEMA = "per_layer_config"


def layered(dense: nn.Module, plan: Plan, example: Batch) -> tuple[Any, tuple[str, ...]]:
    """Return the dense configuration with what each layer holds, and notes on what could not be said.

    Args:
        dense: the dense architecture.
        plan: what was removed.
        example: keyword arguments of its forward.
    """
    plain: Any = copy.deepcopy(dense.config)
    if not hasattr(type(plain), SCHEMA):
        return plain, (f"no {SCHEMA}: this transformers does not have it",)
    try:
        groups = structure_of(dense, example, plan)
    except CriaError as error:
        return plain, (f"no {SCHEMA}: {error.found}",)
    overrides, unsaid = _overrides(dense, groups, plan)
    notes = (f"{SCHEMA} does not count {some(unsaid)}",) if unsaid else ()
    if not overrides:
        return plain, (
            f"no {SCHEMA}: no field of a numbered layer counts what was removed",
        ) if unsaid else ()
    for readable in (False, True):  # some validators read a field of the whole, as if all layers shared it
        config = copy.deepcopy(plain)
        try:
            for path, part in list(config_parts(config)):
                if path in overrides:
                    if readable:
                        part.allow_global_per_layer_attribute_access = True
                    part.per_layer_config = overrides[path]
            type(config).from_dict(config.to_dict())
            return config, notes
        except Exception as error:  # whatever a validator raises
            refusal = f"no {SCHEMA}: {type(plain).__name__} refuses it, {first_line(error)}"
    return plain, (refusal,)


def unlayered(config: Any) -> Any:
    """Take out of a configuration what it says of single layers; return the same object."""
    for _, part in list(config_parts(config)):
        if hasattr(type(part), SCHEMA):
            part.per_layer_config = None
        vars(part).pop(SCHEMA, None)  # where transformers does not know it, it is a field like others
        vars(part).pop("allow_global_per_layer_attribute_access", None)
    return config


def _overrides(dense: nn.Module, groups: UnitGroups, plan: Plan) -> tuple[Overrides, list[str]]:
    """Return the fields that differ by layer, and the groups that lost units which no field counts."""
    parts = dict(config_parts(dense.config))
    paths = {id(part): path for path, part in parts.items()}
    holders = {
        name: paths[id(module.config)]
        for name, module in dense.named_modules(remove_duplicate=False)
        if id(getattr(module, "config", None)) in paths
    }
    found: Overrides = {}
    prefixes: dict[Path, set[str]] = {}
    counted: dict[str, set[Path]] = {}
    for (prefix, number), members in _cut_layers(groups, plan, parts[()]).items():
        said = said_values(members, plan.kept)
        for name, count in ((member.name, count) for member in members for count in member.counts):
            now, after = said.get((count.module, count.name), (0, 0))
            if now != after and count.name.startswith("config.") and count.module in holders:
                path = holders[count.module]
                layer = found.setdefault(path, {}).setdefault(number, {})
                layer[count.name.removeprefix("config.")] = after
                prefixes.setdefault(path, set()).add(prefix)
                counted.setdefault(name, set()).add(path)
    good = {path for path, names in prefixes.items() if len(names) == 1}  # else two layers have one number
    found = {path: _with_head_sizes(parts[path], found[path]) for path in found if path in good}
    cut = [name for name, size in plan.sizes.items() if len(plan.kept[name]) < size]
    return found, [name for name in cut if not counted.get(name, set()) & good]


def _cut_layers(groups: UnitGroups, plan: Plan, config: Any) -> dict[tuple[str, int], list[UnitGroup]]:
    """Return (path before the number, number) -> the groups of that layer which lose units."""
    unset = [f"config.{name}" for name in WIDTHS if vars(config).get(name, 0) is None]
    layers: dict[tuple[str, int], list[UnitGroup]] = {}
    for group in groups:
        number = re.search(r"(?<=\.)\d+(?=\.)", group.name)
        if number is None or len(plan.kept[group.name]) == group.size:
            continue
        counted = any(count.sure and count.name.startswith("config.") for count in group.counts)
        if group.kind in ("neuron", "gated") and unset and not counted:  # n_inner of GPT-2
            width = group.slices[0].positions.shape[1]
            said = group.size * width
            group = replace(group, counts=(Count("", unset[0], group.name, width, said, said, True),))
        layers.setdefault((group.name[: number.start()], int(number[0])), []).append(group)
    return layers


def _with_head_sizes(config: Any, layers: dict[int, dict[str, int]]) -> dict[int, dict[str, int]]:
    """Add the size of a head where the configuration leaves it to a division that would now be wrong."""
    names = {config.attribute_map.get(name, name) for name in ("num_attention_heads", "num_key_value_heads")}
    divided = getattr(config, "head_dim", None) is None and hasattr(config, "hidden_size")
    if divided and any(names & set(layer) for layer in layers.values()):
        size = config.hidden_size // config.num_attention_heads
        for number in range(config.num_hidden_layers):
            layers.setdefault(number, {})["head_dim"] = size
    return layers
