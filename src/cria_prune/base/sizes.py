"""Calls of a model's code whose sizes are restated, where the code works them out from something else.

An attention that divides the width of its input by its number of heads asks for a wrong shape once a head is
gone, and no attribute of it says that shape. The tensor that is reshaped does: its own sizes are known from
the cuts. So while such a module runs, its reshapes, expansions and splits are looked at, and a call on a
tensor of a noted shape gets the noted sizes in place of those that were asked for. Parameters, code and names
stay as they were (docs/decisions/0027).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Operation = Literal["reshape", "expand", "split"]
Size = int | tuple[int, ...] | None
"""A number, the product of the tensor's sizes along some dimensions, or None: as the code asks."""

CALLS: dict[Any, Operation] = {
    **dict.fromkeys([Tensor.view, Tensor.reshape, torch.reshape], "reshape"),
    **dict.fromkeys([Tensor.unflatten, torch.unflatten], "reshape"),
    **dict.fromkeys([Tensor.expand, Tensor.broadcast_to, torch.broadcast_to], "expand"),
    **dict.fromkeys([Tensor.split, torch.split], "split"),
    **dict.fromkeys([Tensor.split_with_sizes, torch.split_with_sizes], "split"),
}
UNFLATTEN = {Tensor.unflatten, torch.unflatten}


@dataclass(frozen=True)
class Sizing:
    """What a call gives, whatever sizes it asks for.

    Attributes:
        operation: `reshape` (also view and unflatten), `expand` or `split`.
        takes: sizes of the tensor that it is called on; None: any.
        gives: sizes of the result, one for each dimension; of a split, of each part.
        passes: the dimension of the tensor that each dimension of the result is, where it is a whole one:
            calls that take the same are told apart by it.
        dim: the dimension that is split.
    """

    operation: Operation
    takes: tuple[int | None, ...]
    gives: tuple[Size, ...]
    passes: tuple[int | None, ...]
    dim: int = -1

    @property
    def known(self) -> int:
        """How many sizes of its tensor are known."""
        return sum(size is not None for size in self.takes)

    def meets(self, operation: str, shape: Sequence[Any], asked: Sequence[Any], dim: int) -> bool:
        """Say whether a call can be this one."""
        if (self.operation, self.dim) != (operation, dim) or len(self.takes) != len(shape):
            return False
        if operation != "split" and len(self.gives) != len(asked):
            return False
        known = [(size, found) for size, found in zip(self.takes, shape, strict=True) if size is not None]
        # Without a size to know the tensor by, something of what is asked for has to be right.
        return all(size == found for size, found in known) and (bool(known) or self.agrees(shape, asked) > 0)

    def agrees(self, shape: Sequence[Any], asked: Sequence[Any]) -> int:
        """Return how many dimensions the code passes on as this call does."""
        if self.operation == "split":
            return 0
        count = 0
        for dim, said in zip(self.passes, asked, strict=True):
            if dim is not None and _equal(shape[dim], said):
                count += 1
        return count

    def sizes(self, shape: Sequence[Any], asked: Sequence[Any]) -> list[Any]:
        """Return the sizes to give for a tensor of this shape."""
        return [
            said
            if size is None
            else size
            if isinstance(size, int)
            else functools.reduce(operator.mul, [shape[dim] for dim in size])
            for size, said in zip(self.gives, asked, strict=True)
        ]


def _equal(size: Any, other: Any) -> bool:
    """Compare two sizes; of symbols without a guard."""
    if isinstance(size, int) and isinstance(other, int):
        return size == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size == other)


class _Restating(TorchFunctionMode):
    """Gives the noted sizes while a module runs."""

    def __init__(self, sizings: Sequence[Sizing]) -> None:
        super().__init__()
        self._sizings = sizings
        self._turns: dict[tuple[Sizing, ...], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = CALLS.get(func)
        call = None if operation is None else _asked(func, operation, args, kwargs)
        if operation is not None and call is not None:
            tensor, asked, dim = call
            sizing = self._sizing(operation, tensor.shape, asked, dim)
            if sizing is not None:
                return _called(func, tensor, sizing, asked)
        return func(*args, **kwargs)

    def _sizing(self, operation: str, shape: Sequence[Any], asked: Sequence[Any], dim: int) -> Sizing | None:
        """Return the noted call that this one is."""
        found = [item for item in self._sizings if item.meets(operation, shape, asked, dim)]
        if len({item.gives for item in found}) > 1:
            # The one that the code agrees with most. Calls that are alike in all go by their order.
            ranks = [(item.agrees(shape, asked), item.known) for item in found]
            best = max(ranks)
            found = [item for item, rank in zip(found, ranks, strict=True) if rank == best]
            turn = self._turns.get(tuple(found), 0)
            self._turns[tuple(found)] = turn + 1
            return found[turn % len(found)]
        return found[0] if found else None


def _asked(func: Any, operation: str, args: Any, kwargs: Any) -> tuple[Tensor, list[Any], int] | None:
    """Return the tensor of a call, the sizes that it asks for, and the dimension of a split; else None."""
    tensor, *rest = args if args else (kwargs.get("input", kwargs.get("self")),)
    if not isinstance(tensor, Tensor) or (rest and isinstance(rest[0], torch.dtype)) or "dtype" in kwargs:
        return None
    rank = tensor.dim()
    if operation == "split":
        names = ("split_size", "split_size_or_sections", "split_sizes")
        sizes = rest[0] if rest else next((kwargs[name] for name in names if name in kwargs), None)
        dim = int(rest[1] if len(rest) > 1 else kwargs.get("dim", 0))
        return tensor, list(sizes) if isinstance(sizes, (list, tuple)) else [sizes], dim % max(rank, 1)
    if func in UNFLATTEN:
        dim = rest[0] if rest else kwargs.get("dim")
        sizes = rest[1] if len(rest) > 1 else kwargs.get("sizes")
        if not isinstance(dim, int) or not isinstance(sizes, (list, tuple)):
            return None
        shape = list(tensor.shape)
        return tensor, [*shape[: dim % rank], *sizes, *shape[dim % rank + 1 :]], -1
    given = rest or [kwargs.get("shape", kwargs.get("size"))]
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return None if any(size is None for size in sizes) else (tensor, list(sizes), -1)


def _called(func: Any, tensor: Tensor, sizing: Sizing, asked: Sequence[Any]) -> Any:
    if sizing.operation == "split":
        return tensor.split([*cast(tuple[int, ...], sizing.gives)], sizing.dim)
    sizes = sizing.sizes(tensor.shape, asked)
    if sizing.operation == "expand":
        return tensor.expand(sizes)
    return tensor.view(sizes) if func is Tensor.view else tensor.reshape(sizes)


class Restated(nn.Module):
    """A module some of whose calls get other sizes than they ask for; see `restate_calls`."""

    _restated: tuple[Sizing, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names the one that it was made from.
        return _again, (type(self).__mro__[2],), dict(self.__dict__)


def _again(kind: Any) -> nn.Module:
    made = _restated_class(kind)
    return cast(nn.Module, made.__new__(made))


@functools.cache
def _restated_class(kind: Any) -> Any:
    """Return the class of the same name whose forward runs under the noted sizes."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Restating(self._restated):
            return kind.forward(self, *args, **kwargs)

    members = {
        "forward": forward,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Restated, kind), members)


def restate_calls(module: nn.Module, sizings: Sequence[Sizing]) -> None:
    """Let some calls of a module's own code give the noted sizes from now on.

    The module becomes one of a class of the same name, derived from its own. It can be copied, pickled,
    exported and compiled, and its forward takes the same arguments. What was noted before is forgotten.
    """
    if not isinstance(module, Restated):
        module.__class__ = _restated_class(cast(Any, type(module)))
    cast(Any, module)._restated = tuple(sizings)
