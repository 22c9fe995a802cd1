"""The learning rate of every step, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Return the learning rate of `step` (from 0) of `steps`: a linear rise, then half a cosine to zero.

    >>> [round(rate(step, 10, 1.0, 0.2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    share = min(1.0, (step - rising) / max(1, steps - rising))
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return SGD's parameter groups: matrices and kernels decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
