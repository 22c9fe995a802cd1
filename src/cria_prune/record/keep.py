"""Puts a model and the random generators back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from cria_prune.attention import plain_attention
from cria_prune.modules import cache_off, devices_in_use, modes_kept


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """On leaving, also by an exception, restore what recording changes.

    That is: train or eval mode of every submodule, `requires_grad` and `.grad` of every parameter,
    and the global generators of torch (CPU, and CUDA once in use), NumPy and Python.
    """
    grads = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    forked = torch.random.fork_rng(devices=devices_in_use())
    with modes_kept(model), cache_off(model), plain_attention(model), forked:
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for parameter, requires_grad, grad in grads:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
