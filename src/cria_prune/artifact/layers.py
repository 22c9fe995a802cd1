"""What the layers of a pruned model hold, in the words of transformers: `per_layer_config`.

Since 5.15 a configuration may say for each numbered layer which of its fields are others there. Few
architectures build their layers from it yet: it describes what the folder holds, and Cria reads the plan.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cria_prune.artifact.dense import structure_of
from cria_prune.artifact.sizes import WIDTHS
from cria_prune.batches import Batch
from cria_prune.errors import CriaError
from cria_prune.plan.plan import Plan
from cria_prune.structure.capture import first_line
from cria_prune.structure.groups import Count, UnitGroup, UnitGroups, said_values
from cria_prune.vanilla import config_parts

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
    notes = (f"{SCHEMA} does not count {_some(unsaid)}",) if unsaid else ()
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
