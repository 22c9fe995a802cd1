"""Hooks that write into the model itself from inside its copies: found before the capture, and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import Batch, outputs
from cria_prune.base.errors import StructureError, some
from cria_prune.base.modules import buffers_kept, copy_and_memo, modes_kept, named_tensors, shared_copy
from cria_prune.base.rebound import functions_on, reaches

Written = list[tuple[str, str | None, Any]]
"""Of each entry that was written: path of the module, its container (None: the module itself), the key."""


def check_functions(model: nn.Module, example: Batch) -> None:
    """Check that no hook or other function on a model makes a copy's forward read what the original holds.

    `copy_of` gives a copy's functions its own parts. What is left are those that reach the model by a global
    name or through another object. They do harm where the forward reads what they write: only such are
    refused, after two runs of copies and one of the model on the example. Prints and counters pass.

    Raises:
        StructureError: there is such a function; the text names it.
    """
    if not any(True for module in model.modules() for _ in functions_on(module)):
        return
    _, memo = copy_and_memo(model, {id(tensor): tensor for tensor in model.parameters()})
    moved = {id(item) for item in memo.get(id(memo), ())} | {
        id(item) for item in named_tensors(model).values()
    }
    suspects = [
        f"{getattr(function, '__qualname__', key)} on {path or type(model).__name__!r}"
        for path, module in model.named_modules()
        for _, key, function in functions_on(module)
        if reaches(function, moved)
    ]
    if not suspects:
        return
    with containers_kept(model) as written:
        _run(shared_copy(model), example)
    if not written:
        return
    with containers_kept(model):
        if _same(_run(_without(model, written), example), _run(model, example)):
            return
    raise StructureError(
        f"A copy of {type(model).__name__}",
        f"its hook {some(suspects)} writes into the original from there, and the forward reads what it wrote",
        "Remove the hook, make it a method of the module (register_forward_hook(self.keep)), or let the "
        "forward itself keep what it reads later",
    )


def _run(model: nn.Module, example: Batch) -> list[Tensor] | None:
    """Return a model's outputs; None where it does not run."""
    try:
        with modes_kept(model), buffers_kept(model):
            return outputs(model, example)
    except Exception:  # whatever a forward raises that misses what a hook should have kept
        return None


def _same(one: list[Tensor] | None, other: list[Tensor] | None) -> bool:
    if one is None or other is None:
        return other is None  # a model that does not run says so itself, at the capture
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _without(model: nn.Module, written: Written) -> nn.Module:
    """Return a copy of a model without the entries that its functions have written into the original."""
    copied = shared_copy(model)
    for path, name, key in written:
        owner = vars(copied.get_submodule(path))
        container = owner if name is None else owner[name]
        if isinstance(container, dict):
            container.pop(key, None)
        else:
            container.clear()
    return copied


@contextmanager
def containers_kept(model: nn.Module) -> Iterator[Written]:
    """Put the dictionaries, lists and attributes of a model's modules back on leaving.

    Yields:
        What had tensors written into it; complete once it is left.
    """
    before = list[tuple[str, str | None, Any, Any]]()
    for path, module in model.named_modules():
        before.append((path, None, vars(module), dict(vars(module))))
        before += [
            (path, name, value, value.copy())
            for name, value in vars(module).items()
            if isinstance(value, (dict, list))
        ]
    written: Written = []
    try:
        yield written
    finally:
        for path, name, container, values in before:
            changed = _changed(container, values)
            written += [(path, name, key) for key, value in changed.items() if _holds_tensors(value)]
            if changed or len(container) != len(values):
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(values)


def _changed(now: Any, before: Any) -> dict[Any, Any]:
    """Return the entries of a dictionary or a list that are new or other objects."""
    if isinstance(now, dict):
        return {key: value for key, value in now.items() if key not in before or before[key] is not value}
    return {
        place: value for place, value in enumerate(now) if place >= len(before) or before[place] is not value
    }


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(item, Tensor) for item in tree_leaves(value))
