"""Weights that a module computes of its parameters in each forward: parametrizations, and the older hooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cria_prune.base.errors import StructureError, said
from cria_prune.base.modules import copy_of, modes_kept, norm_hooks

LIST = "parametrizations"


def _holder(path: str) -> tuple[str, str]:
    """Return the module that computes a weight, and the weight's name, of a path into its parametrization.

    >>> _holder("conv.parametrizations.weight.0"), _holder("conv")
    (('conv', 'weight'), ('conv', ''))
    """
    parts = path.split(".")
    if LIST not in parts:
        return path, ""
    place = parts.index(LIST)
    return ".".join(parts[:place]), parts[place + 1]


def computed_shapes(model: nn.Module, path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is computed of the tensors of a module (or of a parametrization), by name."""
    holder, name = _holder(path)
    module = model.get_submodule(holder)
    with torch.no_grad(), modes_kept(module):
        module.eval()  # in training a spectral norm changes its buffers
        if name and is_parametrized(module, name):
            return {name: tuple(getattr(module, name).shape)}
        return {hook.name: tuple(getattr(module, hook.name).shape) for hook in norm_hooks(module)}


def recomputed(model: nn.Module, path: str) -> nn.Module:
    """Return the module that computes a weight of some tensors, with the weight of those that it has now.

    Raises:
        StructureError: it cannot compute one of them.
    """
    holder, name = _holder(path)
    module = model.get_submodule(holder)
    with torch.no_grad():
        try:
            computed_shapes(model, path)
        except Exception as error:  # whatever the parametrization raises
            raise StructureError(
                f"Cutting the parametrized {name!r} of {holder!r}",
                said(error),
                "Fold it into a plain weight first: torch.nn.utils.parametrize.remove_parametrizations",
            ) from error
        for hook in norm_hooks(module):
            if isinstance(hook, SpectralNorm):
                weight = hook.compute_weight(module, do_power_iteration=False)
            else:
                weight = hook.compute_weight(module)
            setattr(module, hook.name, weight)
    return module


@dataclass(frozen=True)
class Computed:
    """A weight that a module computes, and that can be set to any value, as that of a weight norm can.

    Attributes:
        module: path of the module; name: of the weight in it.
        source: qualified name of the parameter of the weight's shape that it is computed from.
    """

    module: str
    name: str
    source: str

    @property
    def weight(self) -> str:
        """The qualified name of the weight, once it is a parameter."""
        return f"{self.module}.{self.name}".strip(".")


def settable(model: nn.Module) -> list[Computed]:
    """Return the weights that are computed and can be set."""
    found = []
    for path, module in model.named_modules():
        lists = cast(dict[str, ParametrizationList], getattr(module, LIST, {}))
        local = {name: _source(held) for name, held in dict(lists).items()}
        if None in local.values():  # all of a module's, or none
            continue
        names = {name: f"{LIST}.{name}.{source}" for name, source in local.items()}
        hooks = [hook for hook in norm_hooks(module) if isinstance(hook, WeightNorm)]
        names |= {hook.name: f"{hook.name}_v" for hook in hooks}
        found += [Computed(path, name, f"{path}.{source}".strip(".")) for name, source in names.items()]
    return found


def _source(held: ParametrizationList) -> str | None:
    """Return the parameter of the weight's shape, if the parametrization gives back a weight that is set."""
    with torch.no_grad(), modes_kept(held):
        held.eval()
        weight = held.forward()
        # A weight norm takes every weight; a spectral or orthogonal one makes another of most.
        wanted = 1.5 * weight + 0.1 * weight.roll(1)
        try:
            given: object = wanted
            for step in reversed(list(held)):
                given = step.right_inverse(given)  # type: ignore[operator]
            parts = [given] if isinstance(given, Tensor) else list(cast(Iterable[Tensor], given))
            back = held[0](*parts)
            for step in list(held)[1:]:
                back = step(back)
        except Exception:  # without an inverse, or one that does not take this weight
            return None
        if back.shape != wanted.shape or not torch.allclose(back, wanted, rtol=1e-4, atol=1e-6):
            return None
    names = ["original"] if held.is_tensor else [f"original{place}" for place in range(held.ntensors)]
    return next((name for name in names if getattr(held, name).shape == weight.shape), None)


def folded(model: nn.Module, weights: Iterable[Computed]) -> nn.Module:
    """Return a copy of a model in which the weights that `settable` found are plain parameters."""
    copied = copy_of(model)
    by_module: dict[str, list[str]] = {}
    for item in weights:
        by_module.setdefault(item.module, []).append(item.name)
    for path, names in by_module.items():
        module = copied.get_submodule(path)
        if not is_parametrized(module):
            for name in names:
                remove_weight_norm(module, name)
            continue
        # Not by remove_parametrizations: it takes the weight off the class, which the original shares.
        with torch.no_grad():
            values = {name: getattr(module, name).clone() for name in names}
        delattr(module, LIST)
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    return copied


def set_weight(model: nn.Module, item: Computed, value: Tensor) -> None:
    """Set the parameters of a computed weight so that it has a value."""
    module = model.get_submodule(item.module)
    with torch.no_grad():
        if is_parametrized(module, item.name):
            setattr(module, item.name, value)
            return
        for hook in norm_hooks(module):
            if isinstance(hook, WeightNorm) and hook.name == item.name:
                cast(Tensor, getattr(module, f"{item.name}_v")).copy_(value)
                lengths = torch.norm_except_dim(value, 2, hook.dim)
                cast(Tensor, getattr(module, f"{item.name}_g")).copy_(lengths)
                setattr(module, item.name, hook.compute_weight(module))
