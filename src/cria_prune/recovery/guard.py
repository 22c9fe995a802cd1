"""What a training changes and how it is put back: weights, gradients, layout, device, generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

from cria_prune.base.modules import attributes_kept
from cria_prune.resume.store import State


def trained(model: nn.Module) -> State:
    """Return what a training changes, by name: trained parameters and persistent buffers."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def snapshot(model: nn.Module) -> State:
    """Return a copy of what a training changes, by name."""
    return {name: deepcopy(value) for name, value in trained(model).items()}


def is_finite(value: Tensor) -> bool:
    """Say whether all entries are finite; of a tensor that is shared out, this process's."""
    local = getattr(value, "to_local", None)
    return bool(torch.isfinite(value if local is None else local()).all())


def put_back(model: nn.Module, state: State) -> None:
    """Copy the values of a snapshot into the model."""
    model.load_state_dict(state, strict=False)  # a snapshot leaves out what is frozen


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators (dropout, a shuffling DataLoader) and put them back on leaving.

    Meanwhile cuDNN takes the algorithms that give the same bits every time.
    """
    cuda, cudnn = device.type == "cuda", torch.backends.cudnn
    devices = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    # Not by `cudnn.flags`: what it is not told, it switches off, cuDNN itself among it.
    flags = attributes_kept([cudnn], "deterministic", "benchmark")
    with torch.random.fork_rng(devices=devices), flags:
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield


def generators(device: torch.device) -> State:
    """Return the states of the generators that a training on `device` draws from, each uint8 (bytes,)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: State, device: torch.device) -> None:
    """Put the generators into states that `generators` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Start without gradients; put the caller's own gradients back on leaving."""
    with attributes_kept(model.parameters(), "grad"):
        for parameter in model.parameters():
            parameter.grad = None
        yield


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
    shapes and the same values; the convolutions of a GPU need not turn their data either. Nothing happens to
    a model without 4-d weights.
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
