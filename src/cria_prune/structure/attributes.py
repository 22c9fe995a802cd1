"""Which attributes of modules count units: `num_heads`, `all_head_size`, `config.intermediate_size`.

A captured reshape or split holds a number; the module that runs it may hold the same number as an
attribute, and read it the next time. After surgery it has to say the new number. Attributes whose
name tells what they count are restated always; others of the same value only where the trial cut
fails without them (`sure` is False).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from cria_prune.structure.groups import Count, UnitGroup
from cria_prune.structure.rules.core import Counted

HEADS = re.compile(r"(^|_)n?heads?$")
WIDTHS = {"all_head_size", "inner_dim", "attn_dim", "split_size", "attention_dim", "proj_size", "qkv_dim"}
CONFIG_WIDTHS = {
    "neuron": (
        "intermediate_size",
        "n_inner",
        "d_ff",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "hidden_dim",
    ),
    "residual": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"),
}


def held_numbers(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers that a module holds, those of its configuration as `config.<field>`."""
    found = {name: value for name, value in vars(module).items() if _is_number(value)}
    shape = vars(module).get("normalized_shape")
    if isinstance(shape, tuple) and len(shape) == 1 and _is_number(shape[0]):
        found["normalized_shape"] = shape[0]
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict") and hasattr(config, "model_type"):
        found.update({f"config.{name}": value for name, value in vars(config).items() if _is_number(value)})
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def with_counts(
    model: nn.Module, groups: Iterable[UnitGroup], atoms: Mapping[str, np.ndarray],
    counted: Iterable[Counted], classes: np.ndarray,
) -> list[UnitGroup]:  # fmt: skip
    """Return the groups with the attributes that count their units.

    Args:
        model: the live model; it is only looked at.
        groups: the groups; `atoms`: group name -> (units,) the class of each of its units.
        counted: numbers of the captured operations; `classes`: (atoms,) the class of each atom.
    """
    groups = list(groups)
    owner = {int(unit): group.name for group in groups for unit in atoms[group.name]}
    found: dict[str, dict[tuple[str, str, str], Count]] = {group.name: {} for group in groups}
    modules = dict(model.named_modules(remove_duplicate=False))
    for place, item in enumerate(counted):
        module = modules.get(item.module)
        names = {} if module is None else _names(module, item)
        if not names:
            continue
        units, times = np.unique(classes[item.atoms], return_counts=True)
        widths: dict[str, set[int]] = {}
        for unit, count in zip(units.tolist(), times.tolist(), strict=True):
            widths.setdefault(owner.get(unit, ""), set()).add(count)
        for owned, width in widths.items():
            if owned and len(width) == 1:
                for name, sure in names.items():
                    for path in _holders(modules, item.module, name, item.value):
                        entry = Count(path, name, str(place), min(width), item.value, item.value, sure)
                        found[owned][path, name, entry.place] = entry
    for group in groups:
        for entry in _config_widths(modules, group):
            found[group.name][entry.module, entry.name, entry.place] = entry
    return [replace(group, counts=tuple(found[group.name].values())) for group in groups]


def _names(module: nn.Module, item: Counted) -> dict[str, bool]:
    """Return attribute name -> whether its name says that it counts this."""
    held = {name for name, value in held_numbers(module).items() if value == item.value}
    if item.names:
        return {name: True for name in item.names if name in held}
    own = type(module).__module__.startswith("torch.nn.")  # these say what they mean
    names = {}
    for name in held:
        said = bool(HEADS.search(name.removeprefix("config."))) or name in WIDTHS
        if said or not (own or name.startswith("config.")):
            names[name] = said
    return names


def _holders(modules: Mapping[str, nn.Module], path: str, name: str, value: int) -> list[str]:
    """Return the modules that say this number: for a field of a configuration also those around."""
    if not name.startswith("config."):
        return [path]
    part = {"encoder": "decoder", "decoder": "encoder"}
    if any(f".{mine}." in f".{path}." and other in name for mine, other in part.items()):
        return []  # a field of the other half
    paths = [path]
    while path:
        path = path.rpartition(".")[0]
        paths.append(path)
    return [item for item in paths if item in modules and held_numbers(modules[item]).get(name) == value]


def _config_widths(modules: Mapping[str, nn.Module], group: UnitGroup) -> Iterable[Count]:
    """Yield the configurations' fields that hold a group's width: feed-forward or residual."""
    kind = "neuron" if group.kind in ("neuron", "gated") else group.kind
    if kind not in CONFIG_WIDTHS or not group.producers:
        return
    width = group.slices[0].positions.shape[1]
    said = group.size * width
    module = group.producers[0].tensor.rpartition(".")[0]
    for name in (f"config.{field}" for field in CONFIG_WIDTHS[kind]):
        for path in _holders(modules, module, name, said):
            yield Count(path, name, group.name, width, said, said, True)
