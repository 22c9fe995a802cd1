"""A model's forward as torch.compile runs it, for a fine-tune; and what is wrong where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cria_prune.errors import ConfigError

SHAPES = 64
"""Shapes of a batch that are compiled for, at most; torch's own limit, 8, counts all models of a class."""


def compiled(model: nn.Module, device: torch.device) -> Callable[..., Any]:
    """Return the compiled forward of a model.

    On CUDA the kernels of a step are kept as graphs: a small network spends most of a step on starting
    them. Batches of another shape are compiled anew, from the second on for any length.
    """
    return torch.compile(model.forward, mode="reduce-overhead" if device.type == "cuda" else "default")


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
def compiling(model: nn.Module) -> Iterator[None]:
    """Compile inside for as many shapes as a fine-tune has; forget on leaving all that torch has compiled.

    Raises:
        ConfigError: torch cannot compile a step.
    """
    import torch._dynamo.config
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
    except (TorchDynamoException, InductorError) as error:
        raise ConfigError(
            f"A fine-tune of {type(model).__name__} with compile",
            f"torch.compile fails with {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "It needs a C++ compiler, on CUDA Triton, and a forward to trace; or train without compile",
        ) from error
    finally:
        torch.compiler.reset()  # or its graphs keep the memory of a GPU
