"""Model and example inputs -> graph of ATen operations, by torch.export (non-strict).

The model's mode and random state are as before; nothing is left on it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from cria_prune.base.attention import plain_attention
from cria_prune.base.batches import SMALLER, Batch, check_memory, model_inputs
from cria_prune.base.errors import CaptureError, DataError, first_line
from cria_prune.base.events import passed
from cria_prune.base.modules import cache_off, shared_copy


def capture(model: nn.Module, example: Batch) -> ExportedProgram:
    """Return the model's operations on the example batch, in evaluation mode.

    Raises:
        DataError: the model's forward does not accept the example.
        CaptureError: the forward runs, but its operations cannot be captured; the text names
            the operation and the line of the model's code.
        StructureError: the model cannot be copied.
    """
    passed("capture", model=model)
    args, kwargs = model_inputs(example)
    model = shared_copy(model)  # some forwards keep caches on their module
    with (
        cache_off(model),
        plain_attention(model),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        model.eval()
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            check_memory(error, f"Capturing the operations of {type(model).__name__}", SMALLER)
            _raise_clear(model, args, kwargs, error)
            raise AssertionError("unreachable") from error


def _raise_clear(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
    try:
        model(*args, **kwargs)
    except Exception as forward:
        shapes = [tuple(item.shape) for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        raise DataError(
            f"A forward pass of {type(model).__name__} on the example inputs of shape {shapes}",
            f"{type(forward).__name__}: {first_line(forward)}",
            "Pass one batch of inputs that the model accepts",
        ) from error
    raise CaptureError(
        f"The operations of {type(model).__name__}",
        f"torch.export stops at {_offender(model, error)} with {type(error).__name__}: {first_line(error)}",
        "Write that line with tensor operations whose control flow does not depend on the data",
    ) from error


def _offender(model: nn.Module, error: BaseException) -> str:
    """Name the deepest frame of the traceback that runs a module of the model, and its code line."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    place = f"module {type(model).__name__}"
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        code = trace.tb_frame.f_code
        if id(owner) in names and "torch/" not in code.co_filename.replace("\\", "/"):
            place = f"module {names[id(owner)]!r}, {code.co_name}() line {trace.tb_lineno}"
        trace = trace.tb_next
    operation = re.search(r"\baten[.:]+[\w.]+", str(error))
    return f"{operation.group(0)} in {place}" if operation else place


def operation_name(node: Node) -> str:
    """Return the base name of a node's operation: `aten.relu_.default` is `relu`."""
    target = node.target
    name = target.__name__ if callable(target) and not hasattr(target, "_schema") else str(target)
    parts = name.split(".")
    base = parts[1] if parts[0] == "aten" and len(parts) > 1 else parts[0]
    return base.rstrip("_") or base


def module_path(node: Node) -> str:
    """Return the qualified name of the module that a node runs in; `` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str([value[0] for value in stack.values()][-1]) if stack else ""
