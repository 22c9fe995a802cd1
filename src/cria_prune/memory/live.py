"""How many bytes of tensors are alive while a model runs, counted by a dispatch mode.

What an operation allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes(...) as live:`, adds up the storages that operations make, until they are freed.

    Also right on the meta device, where nothing is allocated.

    Args:
        known: tensors that were there before; their storages do not count, nor do views of them.

    Attributes:
        now: bytes that are alive.
        trace: what was alive after each operation.

    Examples:
        >>> import torch
        >>> with LiveBytes([]) as live:
        ...     x = torch.zeros(1000)
        ...     x = (x + 1) * 2
        >>> live.now, live.peak
        (4000, 12000)
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.trace: list[int] = []
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._meet(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf, counted=True)
        self.trace.append(self.now)
        return out

    @property
    def peak(self) -> int:
        """The most that was alive after any operation."""
        return max(self.trace, default=0)

    def _meet(self, tensor: Tensor, counted: bool) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a sparse tensor has none
            return
        key = id(storage)
        if key in self._seen and self._seen[key]() is storage:
            return
        size = storage.nbytes() if counted else 0

        def free(gone: weakref.ref[Any]) -> None:
            self._free(gone, key, size)

        self._seen[key] = weakref.ref(storage, free)
        self.now += size

    def _free(self, gone: weakref.ref[Any], key: int, size: int) -> None:
        self.now -= size
        if self._seen.get(key) is gone:
            del self._seen[key]


def storages(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind some tensors, each counted once."""
    found = {id(item): item for item in (tensor.untyped_storage() for tensor in tensors)}
    return sum(item.nbytes() for item in found.values())
