"""What batches hold while others are worked on: in memory as long as there is room, and else in files.

The bytes go, and the tensors stay: each storage is written and emptied, and filled again in its batch's turn.
So views of one storage stay views of it, and what writes into one of them is still seen by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from cria_prune.base.errors import ArtifactError
from cria_prune.base.ranks import World
from cria_prune.base.room import free_memory
from cria_prune.repair.program import Look, Run


def room_for(device: torch.device, here: World) -> int | None:
    """Return the bytes that batches may hold between their turns; None where the system does not tell.

    Half of what is free, shared out over the processes.
    """
    free = free_memory(device)
    return None if free is None else free // 2 // here.size


class Storages:
    """Storages that are known by themselves, also when they hold nothing; none of them is kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        """Know the storage of a tensor."""
        for key, storage in _storages([tensor]):
            # Held by a weak reference, the number is nobody else's later.
            if key not in self._known:
                self._known[key] = StorageWeakRef(storage)

    def __contains__(self, key: int) -> bool:
        return key in self._known


def _storages(values: Sequence[Any]) -> Iterator[tuple[int, torch.UntypedStorage]]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            try:
                storage = leaf.untyped_storage()
            except (NotImplementedError, RuntimeError):  # a sparse tensor has none
                continue
            yield storage._cdata, storage


def noting(look: Look, fixed: Storages) -> Look:
    """Return a look that notes the storages of the weights that it gives."""

    def noted(name: str) -> Tensor:
        value = look(name)
        fixed.add(value)
        return value

    return noted


class Waiting:
    """Batches that are worked on in turns.

    Args:
        runs: of each network, one for each batch.
        fixed: storages of weights, which are never emptied: other batches read them too.
        memory: bytes that the batches may hold; None for any number. The one whose turn it is comes on top.
        folder: where a folder for the files is made; that of the system for temporary files by default.
        beside: further tensors of each batch, none of them a weight.
    """

    def __init__(
        self, runs: Sequence[Sequence[Run]], fixed: Storages, memory: int | None, folder: Path | None = None,
        beside: Sequence[Sequence[Tensor]] = (),
    ) -> None:  # fmt: skip
        self._runs, self._memory, self._parent, self._beside = runs, memory, folder, beside
        self._folder: TemporaryDirectory[str] | None = None
        self._held: dict[int, int] = {}
        self._out: dict[int, list[tuple[int, int]]] = {}
        self._fixed = fixed
        for run in (run for network in runs for run in network):
            for step in run.program.steps:
                if step.kind == "constant" and isinstance(run.values[step.number], Tensor):
                    fixed.add(run.values[step.number])

    @contextmanager
    def turn(self, batch: int, *, reading: bool = False) -> Iterator[None]:
        """Inside, what a batch holds is there.

        Args:
            batch: its number.
            reading: nothing that it holds is changed, so that its file need not be written again.

        Raises:
            ArtifactError: the system refuses to write or read the file; what the batch held is there then,
                or is lost, but no weight is.
        """
        file = self._out.get(batch)
        if file is not None:
            self._read(batch)
        yield
        if self._memory is None:
            return
        own = self._own(batch)
        if reading and file is not None:
            self._empty(batch, own, file)
            return
        self._held[batch] = sum(storage.nbytes() for storage in own.values())
        # The batch that was last at work is the one to wait in a file, for all
        # others come before it: the first ones stay in memory round after round.
        if sum(self._held.values()) > self._memory and len(self._runs[0]) > 1:
            self._write(batch, own)

    def held(self, batch: int) -> int:
        """Return the bytes that a batch holds in memory."""
        return sum(storage.nbytes() for storage in self._own(batch).values())

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _own(self, batch: int) -> dict[int, torch.UntypedStorage]:
        values = [*(run[batch].values for run in self._runs), *self._beside[batch : batch + 1]]
        return {
            key: storage
            for key, storage in _storages(values)
            if key not in self._fixed and storage.resizable()
        }

    def _write(self, batch: int, own: dict[int, torch.UntypedStorage]) -> None:
        def write() -> None:
            if self._folder is None:
                self._folder = TemporaryDirectory(prefix=".cria-walk-", dir=self._parent)
            with self._path(batch).open("wb") as file:
                for storage in own.values():
                    # A copy, for what NumPy has seen cannot be emptied any more.
                    file.write(_bytes(storage).to("cpu", copy=True).numpy().data)

        self._or_say(write)
        # Only now: after an error all of it is still there.
        self._empty(batch, own, [(key, storage.nbytes()) for key, storage in own.items()])

    def _empty(
        self, batch: int, own: Mapping[int, torch.UntypedStorage], file: list[tuple[int, int]]
    ) -> None:
        self._out[batch] = file
        for storage in own.values():
            storage.resize_(0)
        self._held[batch] = 0

    def _read(self, batch: int) -> None:
        own = self._own(batch)

        def read() -> None:
            with self._path(batch).open("rb") as file:
                for key, size in self._out[batch]:
                    storage = own.get(key)
                    if storage is None:  # nothing reads it any more
                        file.seek(size, 1)
                        continue
                    storage.resize_(size)
                    there = torch.empty(size, dtype=torch.uint8)
                    if file.readinto(there.numpy().data) != size:
                        raise OSError(f"{file.name} is shorter than it was")
                    _bytes(storage).copy_(there)

        self._or_say(read)
        del self._out[batch]

    def _path(self, batch: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"batch-{batch}"

    def _or_say(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise ArtifactError(
                "Keeping what a batch holds in a file, for the memory does not suffice",
                f"the system refused, {error}",
                "Let TMPDIR name a folder with room, or give fewer calibration examples or more memory",
            ) from error


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """Return the bytes of a storage, as a tensor that is a view of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
