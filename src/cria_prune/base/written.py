"""Weights that a forward writes into, and what it leaves in lists and dictionaries: put back.

RWKV divides its projections by a power of two in its first forward of a mode; a head may normalise its weight
in place. What a pass over data does to the network must not stay in the user's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Containers = (dict, list, set, deque)
DEEP, MANY = 3, 1000
"""How many containers within containers are looked into, and how many entries of one."""


class _Written(TorchDispatchMode):
    """Keeps the values of parameters that an operation is about to write into."""

    supports_higher_order_operators = True

    def __init__(self, owners: dict[int, list[Tensor]]) -> None:
        super().__init__()
        self._owners = owners
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(getattr(func, "_schema", None), "is_mutable", False):
            for item in tree_leaves((args, kwargs)):
                for owner in self._owners.get(_place(item) or 0, ()) if isinstance(item, Tensor) else ():
                    if id(owner) not in self.before:
                        self.before[id(owner)] = owner, owner.detach().clone()
        return func(*args, **(kwargs or {}))


def _place(item: Tensor) -> int | None:
    """Return where a tensor's values lie; None where they lie nowhere."""
    if item.is_meta or not item.numel():
        return None
    with suppress(RuntimeError, NotImplementedError):  # of a fake or a wrapping tensor
        return item.untyped_storage().data_ptr()
    return None


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[Mapping[int, Any]]:
    """Put the parameters back on leaving that the first forward inside writes into or gives other values.

    No copy is made of what is not written. Later forwards are not looked at, for that would double the time
    of small operations (11 µs each): of those that write, the first does.

    Yields:
        What was written into, by its id; filled by the first forward.
    """
    # The values themselves, for a forward may also give a parameter others (`weight.data = ...`).
    held: list[tuple[Tensor, Tensor]]
    held = [(item, item.detach()) for item in model.parameters() if not item.is_meta]
    owners: dict[int, list[Tensor]] = {}
    for item, _ in held:
        place = _place(item)
        if place is not None:
            owners.setdefault(place, []).append(item)
    written, inside = _Written(owners), ExitStack()
    hooks: list[Any] = []

    def enter(*_: Any) -> None:
        hooks.pop(0).remove()
        inside.enter_context(written)

    def leave(*_: Any) -> None:
        inside.close()

    if not held:  # on the meta device nothing is written
        yield written.before
        return
    try:
        hooks.append(model.register_forward_pre_hook(enter, prepend=True))
        hooks.append(model.register_forward_hook(leave, always_call=True))
        yield written.before
    finally:
        inside.close()
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for tensor, values in held:
                if _place(tensor) != _place(values):
                    tensor.data = values
            for tensor, value in written.before.values():
                tensor.copy_(value)


@contextmanager
def entries_kept(containers: Iterable[Any]) -> Iterator[None]:
    """Put the entries of lists, dictionaries, sets and deques back on leaving, of those within them too."""
    before = list[tuple[Any, Any]]()
    seen = set[int]()
    for item in containers:
        _note(item, before, seen, DEEP)
    try:
        yield
    finally:
        for item, entries in before:
            now = list(item.items()) if isinstance(item, dict) else list(item)
            if len(now) == len(entries) and all(map(_is_same, now, entries)):
                continue
            item.clear()
            fill: Callable[..., Any] = item.update if isinstance(item, (dict, set)) else item.extend
            fill(entries)


def _note(item: Any, before: list[tuple[Any, Any]], seen: set[int], depth: int) -> None:
    if not isinstance(item, Containers) or id(item) in seen or not depth:
        return
    seen.add(id(item))
    before.append((item, list(item.items()) if isinstance(item, dict) else list(item)))
    for part in (item.values() if isinstance(item, dict) else item) if len(item) <= MANY else ():
        _note(part, before, seen, depth - 1)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 2:
        return one[0] is other[0] and one[1] is other[1]  # an entry of a dictionary
    return one is other
