"""The optimizer and its tensors, the learning rate of every step, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.config import RecoverConfig

SECOND_DECAY = 0.98
"""AdamW's second decay rate: short runs have no time for 0.999."""


def rate(step: int, steps: int, peak: float, warmup: float, schedule: str = "cosine") -> float:
    """Return the learning rate of `step` (from 0) of `steps`: a linear rise, then a fall to zero.

    The fall is half a cosine, or a straight line if `schedule` is `linear`.

    >>> [round(rate(step, 10, 1.0, 0.2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    >>> [round(rate(step, 5, 1.0, 0.2, "linear"), 2) for step in range(5)]
    [1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    share = min(1.0, (step - rising) / max(1, steps - rising))
    if schedule == "linear":
        return peak * (1 - share)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: matrices and kernels decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: RecoverConfig) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW, on the parameters that are trained."""
    groups = decay_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, SECOND_DECAY))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors (momentum, moments, steps), named `<index of the parameter>.<key>`."""
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def all_of(value: Tensor, _parameter: Tensor) -> Tensor:
    """Return the tensor: a process that shares nothing out holds all of it."""
    return value


def set_moments(
    optimizer: torch.optim.Optimizer,
    held: dict[str, Tensor],
    share: Callable[[Tensor, Tensor], Tensor] = all_of,
) -> None:
    """Give an optimizer the tensors that `moments` returned.

    Args:
        optimizer: its tensors are replaced.
        held: name -> tensor.
        share: (tensor, parameter) -> what of the tensor this process holds, as it does of the parameter.
    """
    parameters = _parameters(optimizer)
    for name, value in held.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        # In the parameter's memory layout: sums over other layouts may round differently.
        optimizer.state[parameter][key] = (
            value if key == "step" else torch.empty_like(parameter).copy_(share(value, parameter))
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
