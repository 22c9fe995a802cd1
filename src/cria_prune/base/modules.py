"""Modules as they are: devices, tensors, copies; modes, gradients and generators put back."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cria_prune.base.attention import plain_attention
from cria_prune.base.errors import SignalError, StructureError, first_line
from cria_prune.base.experts import plain_experts
from cria_prune.base.rebound import computed_tensors, rebind


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model under all of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU where it has none.

    Of a model that accelerate offloads it is the device on which its layers run.
    """
    first = next(model.parameters(), None)
    if first is not None and first.is_meta:
        hooks = (hook for module in model.modules() for hook in offloading_hooks(module))
        running = next(hooks, None)
        return first.device if running is None else torch.device(running.execution_device)
    return torch.device("cpu") if first is None else first.device


def devices_in_use() -> Sequence[int]:
    """Return the CUDA devices whose generators a fork of the random states has to hold."""
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()


def offloading_hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate on a module that load its weights for each forward."""
    hook: Any = getattr(module, "_hf_hook", None)
    for item in getattr(hook, "hooks", (hook,)):
        if getattr(item, "offload", False) and getattr(item, "weights_map", None) is not None:
            yield item


def copy_of(model: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a model; tensors whose id is in `replaced` come from there instead.

    Its hooks and other functions have its own parts in their closures, see `base.rebound`.

    Raises:
        StructureError: the model holds something that cannot be copied, such as a computed tensor.
    """
    return copy_and_memo(model, replaced)[0]


def copy_and_memo(
    model: nn.Module, replaced: dict[int, Any] | None = None
) -> tuple[nn.Module, dict[int, Any]]:
    """Return what `copy_of` does, and what `copy.deepcopy` has kept of the copying."""
    memo = {**computed_tensors(model), **_left_by_hooks(model), **(replaced or {})}
    try:
        found = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the model's parts raise
        computed = "graph leaves" in str(error)
        raise StructureError(
            f"A copy of {type(model).__name__}",
            first_line(error),
            "Keep the tensors that were computed with gradients off the model, or detach computed tensors"
            if computed
            else "Keep what cannot be copied (locks, files, handles) off the model, or give it __deepcopy__",
        ) from error
    rebind(found, memo)
    return found, memo


def norm_hooks(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    """Yield the hooks of `torch.nn.utils.weight_norm` and `spectral_norm` on a module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook


def _left_by_hooks(model: nn.Module) -> dict[int, Any]:
    """Return, by their id, detached copies of the weights that `norm_hooks` left on their modules.

    They hang on a graph of gradients, which no deep copy takes, and are computed anew in every forward.
    """
    kept = (getattr(module, hook.name, None) for module in model.modules() for hook in norm_hooks(module))
    return {id(item): item.detach().clone() for item in kept if isinstance(item, Tensor)}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a SignalError, naming the tensor, if a parameter or buffer holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SignalError(
                f"The weights of {name!r}", "found NaN or infinity", "Prune a model whose weights are finite"
            )


def check_in_memory(model: nn.Module) -> None:
    """Raise a StructureError, naming the tensor, if one has no values, as in a model that is offloaded."""
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise StructureError(
                f"Pruning {type(model).__name__} in memory", f"{name!r} has no values there",
                "Load the model into memory, or prune its folder with prune_offloaded (cria prune --offload)",
            )  # fmt: skip


def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> the first name of the very same tensor; one without elements is no other's."""
    first: dict[Any, str] = {}
    found = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        found[name] = first.setdefault(place if value.numel() else name, name)
    return found


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a text and of tensors with their names, dtypes and shapes."""
    total = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        total.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def shared_copy(model: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of a model that shares its parameters: what its forward leaves on itself (caches,
    counters, running statistics) stays off the original.

    Raises:
        StructureError: see `copy_of`.
    """
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    return copy_of(model, {**tensors, **(replaced or {})})


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and kind, a parameter too, without values."""
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device: shapes without values."""
    return copy_of(model, {id(tensor): on_meta(tensor) for tensor in named_tensors(model).values()})


@contextmanager
def attributes_kept(items: Iterable[Any], *names: str) -> Iterator[None]:
    """Put attributes of some objects back on leaving."""
    before = [(item, name, getattr(item, name)) for item in items for name in names]
    try:
        yield
    finally:
        for item, name, value in before:
            setattr(item, name, value)


def modes_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Put the train/eval mode of every single module back on leaving."""
    return attributes_kept(model.modules(), "training")


@contextmanager
def forward_of(model: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Let a model run another forward inside; None changes nothing.

    It stays the object that it is, with its hooks, and with the names of its forward's arguments.
    """
    if forward is None:
        yield
        return
    own = vars(model).get("forward")
    try:
        model.forward = forward
        yield
    finally:
        vars(model).pop("forward", None)
        if own is not None:
            model.forward = own


@contextmanager
def cache_off(model: nn.Module) -> Iterator[None]:
    """Switch off the key-value cache of every configuration that has one, and put it back on leaving.

    A decoder's cache objects are in its output, and torch.export cannot follow them.
    """
    modules = model.modules()
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    with attributes_kept(cached, "use_cache"):
        for config in cached:
            config.use_cache = False
        yield


def give_back() -> None:
    """Hand freed memory back to the system, where the C library keeps it and can (glibc).

    Blocks of up to 32 MB stay with the process once they were freed, hundreds of megabytes between two
    stages that ask for other sizes.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def random_kept() -> Iterator[None]:
    """Put the global generators of torch (CPU, and CUDA once in use), NumPy and Python back on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices_in_use()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def buffers_kept(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Put a model's buffers (counters, caches) back on leaving, but for some, and its modules' attributes and
    hooks.
    """
    left = {id(tensor) for tensor in but}
    before = [(item, item.clone()) for item in model.buffers() if id(item) not in left and not item.is_meta]
    # A forward may also put another tensor in a buffer's place, or count in an attribute.
    # Or install hooks at its first run and note that it has (transformers): the note without the hooks, or
    # they without it, would install them again, and what they collect would come twice.
    tables = [
        table
        for module in model.modules()
        for table in (vars(module), module._buffers, *(vars(module)[name] for name in HOOKS))
    ]
    held = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, entries in held:
            for name in table.keys() - entries.keys():
                del table[name]
            for name, value in entries.items():
                if table.get(name) is not value:
                    table[name] = value
        with torch.no_grad():
            for item, value in before:
                item.copy_(value)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """On leaving, also by an exception, restore what recording changes.

    That is: train or eval mode of every submodule, `requires_grad` and `.grad` of every parameter,
    and the global generators, see `random_kept`.
    """
    gradients = attributes_kept(model.parameters(), "requires_grad", "grad")
    plain = plain_attention(model), plain_experts(model)
    with modes_kept(model), cache_off(model), plain[0], plain[1], random_kept(), gradients:
        yield
