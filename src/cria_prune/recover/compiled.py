"""A model as torch.compile runs it, for a fine-tune; and what is wrong where it cannot be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from cria_prune.errors import ConfigError


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with a compiled forward and backward; the same parameters, and no other names.

    On CUDA the kernels of a step are kept as graphs: a small network spends most of a step on starting
    them. Batches of another shape are compiled anew.
    """
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return cast(nn.Module, torch.compile(model, mode=mode, dynamic=False))


@contextmanager
def compiling(model: nn.Module) -> Iterator[None]:
    """Name what was asked where torch cannot compile a step inside.

    Raises:
        ConfigError: that is so.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        raise ConfigError(
            f"A fine-tune of {type(model).__name__} with compile",
            f"torch.compile fails with {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "It needs a C++ compiler, on CUDA Triton, and a forward to trace; or train without compile",
        ) from error
