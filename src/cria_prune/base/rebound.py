"""Functions on a model that hold parts of it: a deep copy would share them, and here gets its own.

`copy.deepcopy` takes a function as it is, whatever its closure holds. A forward hook that keeps features in a
dictionary of the model, or a forward that was put in another's place and calls the old one, would then work
on the original from inside every copy. So the functions of a copy are made anew, with the copy's parts in
their closures. What a function reaches by a global name, or within an object that is not of the model, stays;
`check_hooks` sees whether such a one writes into the original.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from cria_prune.base.written import Containers

Memo = dict[int, Any]
"""id of an object of the original -> the copy's, as `copy.deepcopy` leaves it."""


def functions_on(module: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (container, key, callable) for each that a module holds: hooks, a forward of its own, others."""
    for name, value in list(vars(module).items()):
        if isinstance(value, (FunctionType, MethodType)):
            yield vars(module), name, value
        elif isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules"):
            yield from ((value, key, item) for key, item in list(value.items()) if _is_function(item))
        elif isinstance(value, list):
            yield from ((value, place, item) for place, item in enumerate(value) if _is_function(item))


def _is_function(item: Any) -> bool:
    return isinstance(item, (FunctionType, MethodType))


def rebind(model: nn.Module, memo: Memo) -> None:
    """Give the functions on a copy the copy's own parts in place of the original's.

    Args:
        model: the copy; its functions are the original's.
        memo: what `copy.deepcopy` has kept of the copying.
    """
    made = _Rebinding(memo)
    for module in model.modules():
        for container, key, function in functions_on(module):
            new = made.own(function)
            if new is not function:
                container[key] = new


@dataclass
class _Rebinding:
    """Remakes functions, each once, so that those that share a cell still do."""

    memo: Memo
    made: dict[int, Any] = field(default_factory=dict)

    def own(self, item: Any) -> Any:
        """Return what an object of the original is in the copy; the same object where it is of neither."""
        if id(item) in self.memo:
            return self.memo[id(item)]
        if id(item) in self.made:
            return self.made[id(item)]
        if not self._moves(item, set()):
            return item
        if isinstance(item, MethodType):
            return MethodType(self.own(item.__func__), self.own(item.__self__))
        if type(item) is functools.partial:
            named = {name: self.own(value) for name, value in item.keywords.items()}
            return functools.partial(self.own(item.func), *map(self.own, item.args), **named)
        return self._function(item)

    def _moves(self, item: Any, seen: set[int]) -> bool:
        """Say whether something is, or a function holds, a part of the original that the copy has anew."""
        if id(item) in self.memo:
            return self.memo[id(item)] is not item
        if id(item) in seen:
            return False
        seen.add(id(item))
        return any(self._moves(part, seen) for part in held_by(item))

    def _function(self, item: FunctionType) -> FunctionType:
        cells = [(cell, self.made.get(id(cell))) for cell in item.__closure__ or ()]
        closure = tuple(CellType() if known is None else known for _, known in cells)
        new = FunctionType(item.__code__, item.__globals__, item.__name__, None, closure or None)
        # Before the cells are filled: a function may hold itself, or two each other.
        self.made[id(item)] = new
        for (cell, known), mine in zip(cells, closure, strict=True):
            self.made[id(cell)] = mine
            if known is None and not _is_empty(cell):
                mine.cell_contents = self.own(cell.cell_contents)
        new.__defaults__ = tuple(map(self.own, item.__defaults__)) if item.__defaults__ else None
        new.__kwdefaults__ = {name: self.own(value) for name, value in (item.__kwdefaults__ or {}).items()}
        new.__qualname__, new.__doc__ = item.__qualname__, item.__doc__
        new.__annotations__ = item.__annotations__
        new.__dict__.update({name: self.own(value) for name, value in item.__dict__.items()})
        return new


def held_by(item: Any) -> list[Any]:
    """Return what a function, a method or a partial holds by itself; nothing of anything else."""
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    if type(item) is functools.partial:
        return [item.func, *item.args, *item.keywords.values()]
    if not isinstance(item, FunctionType):
        return []
    cells = [cell.cell_contents for cell in item.__closure__ or () if not _is_empty(cell)]
    return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]


def _is_empty(cell: CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:  # nothing was put there yet
        return True


def computed_tensors(model: nn.Module) -> Memo:
    """Return id -> detached copy of the computed tensors in a model's dictionaries and lists.

    A hook or a forward has left them there; they cannot be copied otherwise, and their gradients are of no
    copy. One that is an attribute itself may be a weight, as those of the old weight_norm: it is left.
    """
    return {
        id(item): item.detach().clone()
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (dict, list)) and name not in ("_parameters", "_buffers", "_modules")
        for item in (value.values() if isinstance(value, dict) else value)
        if isinstance(item, Tensor) and not item.is_leaf
    }


def reaches(function: Any, moved: Collection[int]) -> bool:
    """Say whether a function reaches parts of a model in a way that `rebind` leaves as it is.

    That is by a global name, or within a container or an object that is not of the model.

    Args:
        function: any callable.
        moved: ids of what a copy of the model has anew.
    """
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType):
        return False
    names = _names(function.__code__) & function.__globals__.keys()
    known = [function.__globals__[name] for name in names]
    if any(id(item) in moved for item in known):
        return True
    outside = [item for item in (*known, *held_by(function)) if id(item) not in moved]
    return any(id(part) in moved for item in outside for part in _parts(item))


def held_outside(model: nn.Module) -> list[Any]:
    """Return the lists, dictionaries and the like that hooks and other functions on a model may fill.

    Those that they name or hold, and the attributes of the objects that they are; none of the model's own.
    """
    tables = [vars(module) for module in model.modules()]
    functions = [item for module in model.modules() for _, _, item in functions_on(module)]
    # A hook may be an object that is called; those of torch keep what their weight needs.
    called = [
        item
        for table in tables
        for key, hooks in table.items()
        if key.endswith("_hooks") and hooks
        for item in hooks.values()
        if not _is_function(item) and not type(item).__module__.startswith("torch.")
    ]
    owners = [item.__self__ if isinstance(item, MethodType) else item for item in [*functions, *called]]
    found = [vars(item) for item in owners if hasattr(item, "__dict__") and not isinstance(item, nn.Module)]
    for function in functions:
        plain = function.__func__ if isinstance(function, MethodType) else function
        found += held_by(plain)
        if isinstance(plain, FunctionType):
            named = _names(plain.__code__) & plain.__globals__.keys()
            found += [plain.__globals__[name] for name in named]
    own = {
        id(part) for table in tables for item in (table, *table.values()) for part in (item, *_parts(item))
    }
    return [item for item in found if isinstance(item, Containers) and id(item) not in own]


def _parts(item: Any) -> list[Any]:
    """Return what a container or a plain object holds."""
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, (list, tuple, set)):
        return list(item)
    if isinstance(item, (type, nn.Module, Tensor, ModuleType, FunctionType, MethodType)):
        return []
    return list(getattr(item, "__dict__", {}).values())


def _names(code: CodeType) -> set[str]:
    inner = (item for item in code.co_consts if isinstance(item, CodeType))
    return {*code.co_names, *(name for item in inner for name in _names(item))}
