"""Several processes at one task: their shares, sums that are alike on all, errors that all hear of.

The processes are those of `torch.distributed`, where it is initialised. All of them call the same functions
in one order. Before every sum they *meet* and say how they are: where one has failed, or is elsewhere, all
others end with an error that names it, at once. One process alone does nothing of this.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor
from torch import distributed as dist

from cria_prune.base.errors import CriaError, RankError, first_line

GOOD, BUSY, FAILED = 0, 1, 2
BEAT = 20.0  # seconds between two signs of life of a process that works alone
PIECE = 2**24  # numbers that are summed at a time
TOLD = "_cria_told"  # the mark on an error that the other processes have heard of

Value = TypeVar("Value")
Told = TypeVar("Told", bound=Exception)

_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = WeakKeyDictionary()
"""The default group -> the one beside it for tensors on the CPU, None where it takes them itself."""


class World:
    """This process among all that work together. With one process every method is free of cost.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def mine(self, index: int) -> bool:
        """Say whether a piece of work is this process's, by its index."""
        return index % self.size == self.rank

    def meet(self, doing: str, alike: Callable[[], str] = str) -> None:
        """Wait for all processes, and check that they are at the same place with the same thing in hand.

        Args:
            doing: what is being done.
            alike: gives what has to be equal on all, such as a digest; not called by one process alone.

        Raises:
            RankError: one has failed, is lost, is elsewhere, or holds something else.
        """
        if self.size > 1:
            self._meet(GOOD, doing, alike())

    @contextmanager
    def together(self, doing: str, alike: Callable[[], str] = str) -> Iterator[None]:
        """Do a block on all processes, and meet at its end; an error in one of them ends it on all.

        Args:
            doing: what is being done, for the error.
            alike: as in `meet`, called at the end.

        Raises:
            RankError: as in `meet`. The process that failed raises its own error.
        """
        try:
            yield
        except Exception as error:
            self._tell(error, doing)
            raise
        self.meet(doing, alike)

    def lead(self, doing: str, function: Callable[[], Value]) -> Value:
        """Return what a function gives that the first process alone runs, as long as it may take.

        Args:
            doing: what is being done, for the error.
            function: its result goes to all processes as JSON. Inside, the process is alone in the world.

        Raises:
            RankError: it failed, in all processes but the first, which raises its own error.
        """
        if self.size == 1:
            return function()
        # A process that waits in one exchange is given up after the timeout of the group. So the others wait
        # in short ones: each sign of life of the first process is a meeting, until one says that it is done.
        if not self.first:
            while BUSY in self._meet(GOOD, doing):
                pass
            return json.loads(self.gathered(b"")[0])
        try:
            with alone(), self._beating(doing):
                value = function()
            said = json.dumps(value).encode()
        except Exception as error:
            self._tell(error, doing)
            raise
        self._meet(GOOD, doing)
        self.gathered(said)
        return value

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the CPU, the same bits on each."""
        # One process adds and all get its sum, so that the bits are the same on each. An all-reduce
        # need not add in one order everywhere, and scores that differ in a bit may give other plans.
        flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
        for piece in flat.split(PIECE) if self.size > 1 else ():
            with _talking("A sum over the processes"):
                dist.reduce(piece, 0, group=self.group)
                dist.broadcast(piece, 0, group=self.group)
        return flat.reshape(tensor.shape)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, in place, the values that they have on the first process."""
        for tensor in tensors if self.size > 1 else ():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            # As bytes, so that whole numbers, truth values and half types go the same way, bit for bit.
            for piece in flat.view(torch.uint8).split(8 * PIECE):
                with _talking("Weights for all processes"):
                    dist.broadcast(piece, 0, group=self.group)
            with torch.no_grad():
                tensor.copy_(flat.reshape(tensor.shape))

    def gathered(self, said: bytes) -> list[bytes]:
        """Return what every process says, in their order."""
        if self.size == 1:
            return [said]
        with _talking("A message to all processes"):
            lengths = self._all(torch.tensor([len(said)]))
            padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
            padded[: len(said)] = torch.frombuffer(bytearray(said or b"\0"), dtype=torch.uint8)[: len(said)]
            texts = self._all(padded) if len(padded) else [padded] * self.size
        return [text[: int(length)].numpy().tobytes() for text, length in zip(texts, lengths, strict=True)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self.group)
        return found

    def _meet(self, state: int, doing: str, detail: str = "") -> list[int]:
        """Exchange how this process is, and return how all are.

        Every meeting begins with the same exchange, so one that has failed is met wherever the others are.
        """
        place = f"{doing}\n{detail}"
        with _talking(doing):
            # Two numbers, always the same message. So a process that has failed can take
            # part, whatever exchange the others are on their way to, and nobody waits for
            # it in vain. The texts follow only if something is wrong, which all see alike.
            met = self._all(torch.tensor([state, crc32(place.encode())]))
        states, places = ([int(item[index]) for item in met] for index in (0, 1))
        if FAILED not in states and len(set(places)) == 1:
            return states
        said = [text.decode() for text in self.gathered(place.encode())]
        wrong = FAILED if FAILED in states else None
        ranks = [rank for rank, item in enumerate(states) if item == wrong]
        # Who has failed raises its own error, which says more.
        if ranks and state != FAILED:
            failed = "; ".join(f"rank {rank}: {said[rank].partition(chr(10))[2]}" for rank in ranks)
            raise _told(
                RankError(f"{doing} on {self.size} processes", f"failed on {failed}", "See to what it says")
            )
        if not ranks:
            other = next(rank for rank in range(self.size) if places[rank] != places[self.rank])
            mine, theirs = place.split("\n"), said[other].split("\n")
            what = "it holds something else there" if mine[0] == theirs[0] else f"it is at {theirs[0]!r}"
            raise _told(
                RankError(
                    f"{doing} on {self.size} processes, rank {self.rank}",
                    f"rank {other} differs: {what}",
                    "Give all processes the same model, the same batches in one order, the same options and "
                    "seeds",
                )
            )
        return states

    def _tell(self, error: Exception, doing: str) -> None:
        """Let the others know of an error, once."""
        # Once: an error on its way up passes several `together`,
        # and each further telling would wait for nobody.
        if self.size > 1 and not hasattr(error, TOLD):
            _told(error)
            text = str(error) if isinstance(error, CriaError) else f"{type(error).__name__}: {error}"
            self._meet(FAILED, doing, " ".join(text.split()))

    @contextmanager
    def _beating(self, doing: str) -> Iterator[None]:
        """Show signs of life to the waiting processes, so that they wait longer than for a dead one."""
        done, failed = threading.Event(), list[Exception]()

        def beat() -> None:
            while not done.wait(BEAT):
                try:
                    self._meet(BUSY, doing)
                except Exception as error:
                    failed.append(error)
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if failed:
            raise failed[0]


def world() -> World:
    """Return this process among those of `torch.distributed`; alone where it is not initialised."""
    if _ALONE.get() or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return World()
    return World(dist.get_rank(), dist.get_world_size(), _cpu_group())


@contextmanager
def alone() -> Iterator[None]:
    """Work inside as one process, whatever others there are: for what one of them does for itself."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _cpu_group() -> dist.ProcessGroup | None:
    """Return a group that takes tensors on the CPU: the default one (None), or one beside it, made once."""
    default = dist.group.WORLD
    assert default is not None
    # NCCL takes no tensors on the CPU. The group beside it
    # is made once, by all: making it is an exchange too.
    if default not in _GROUPS:
        takes_cpu = "gloo" in dist.get_backend_config()
        _GROUPS[default] = None if takes_cpu else dist.new_group(backend="gloo")
    return _GROUPS[default]


@contextmanager
def _talking(doing: str) -> Iterator[None]:
    """Turn what torch.distributed raises, where a process is gone or silent, into an error to read."""
    try:
        yield
    except RuntimeError as error:  # those of gloo have no class of their own
        raise lost(doing, error) from error


def lost(doing: str, error: Exception) -> RankError:
    """Return the error for a process that does not answer any more."""
    return _told(
        RankError(
            doing,
            f"another process has ended or does not answer ({first_line(error)})",
            "Its own error says why, if it could; start all processes again",
        )
    )


def _told(error: Told) -> Told:
    setattr(error, TOLD, True)
    return error
