"""Weights that a module computes of its parameters in each forward: parametrizations, and the older hooks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cria_prune.base.modules import modes_kept

LIST = "parametrizations"


def _hooks(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    """Yield the hooks of `torch.nn.utils.weight_norm` and `spectral_norm` on a module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook


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
        return {hook.name: tuple(getattr(module, hook.name).shape) for hook in _hooks(module)}


def recomputed(model: nn.Module, path: str) -> nn.Module:
    """Return the module that computes a weight of some tensors, with the weight of those that it has now."""
    module = model.get_submodule(_holder(path)[0])
    with torch.no_grad():
        for hook in _hooks(module):
            if isinstance(hook, SpectralNorm):
                weight = hook.compute_weight(module, do_power_iteration=False)
            else:
                weight = hook.compute_weight(module)
            setattr(module, hook.name, weight)
    return module
