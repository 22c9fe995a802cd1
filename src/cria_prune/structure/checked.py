"""Sizes that code compares with numbers that a module stores: `assert x.shape[-1] == self.width`.

Such a check leaves no operation behind. What can be seen is which modules handle a tensor that holds units,
and which of them store the size of one of its dimensions. Whether the number counts these units only a trial
cut shows, so that these are guesses of the last resort.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from cria_prune.structure.groups import Count, Sight
from cria_prune.structure.rules.core import Context, arrays_of, module_path


def stored_sizes(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers that a module's own code stores, those in a list or tuple as `name.place`."""
    if type(module).__module__.startswith("torch.nn."):  # these say what they mean, and check nothing else
        return {}
    found = dict[str, int]()
    for name, value in vars(module).items():
        items = {name: value}
        if type(value) in (list, tuple):
            items = {f"{name}.{place}": item for place, item in enumerate(value)}
        found |= {key: item for key, item in items.items() if type(item) is int and item > 1}
    return found


def checked_sizes(
    model: nn.Module, context: Context, classes: np.ndarray, owner: Mapping[int, str]
) -> dict[str, list[Count]]:
    """Return group -> numbers that modules store, and that are as many as the units of a tensor they handle.

    Args:
        model: it is only looked at.
        context: the axes of all operations.
        classes: (atoms,) the class of each atom; `owner`: class -> the group whose unit it is.
    """
    modules = model.named_modules(remove_duplicate=False)
    stored = {path: sizes for path, module in modules if (sizes := stored_sizes(module))}
    wanted = {size for sizes in stored.values() for size in sizes.values()}
    found: dict[str, dict[tuple[str, str, str], Count]] = {}
    seen = set[tuple[str, Sight, bytes]]()
    for node, axes in context.axes.items() if stored else ():
        # What comes from weights alone, no code looks at.
        for atoms in (item for item in arrays_of(axes) if node in context.data and len(item) in wanted):
            units = classes[atoms]
            for path, sight in _handled(node, stored):
                names = [name for name, size in stored[path].items() if size == len(atoms)]
                key = path, sight, units.tobytes()
                if not names or key in seen:
                    continue
                seen.add(key)
                for group, width in _widths(units, owner):
                    for name in names:
                        item = Count(
                            path, name, f"{sight} {len(seen)}", width, len(atoms), len(atoms), False, sight
                        )
                        found.setdefault(group, {})[path, name, item.place] = item
    return {group: list(items.values()) for group, items in found.items()}


def _widths(units: np.ndarray, owner: Mapping[int, str]) -> Iterator[tuple[str, int]]:
    """Yield each group whose units are all there, as often each, with how often."""
    widths: dict[str, set[int]] = {}
    for unit, count in zip(*np.unique(units, return_counts=True), strict=True):
        widths.setdefault(owner.get(int(unit), ""), set()).add(int(count))
    for group, width in widths.items():
        if group and len(width) == 1:
            yield group, min(width)


def _handled(node: Node, stored: Mapping[str, Any]) -> Iterator[tuple[str, Sight]]:
    """Yield the modules whose code handles what a node gives: made inside of them, or given to them."""
    made = module_path(node)
    readers = {module_path(user) for user in node.users}
    for path in _around(made):
        # What stays within a child is out of its parent's sight.
        child = f"{_child(path, made)}."
        leaves = path == made or not all(f"{item}.".startswith(child) for item in readers)
        if path in stored and leaves:
            yield path, "made"
    around = set(_around(made))
    for path in dict.fromkeys(item for reader in sorted(readers) for item in _around(reader)):
        if path in stored and path not in around:
            yield path, "enters"


def _around(path: str) -> Iterator[str]:
    """Yield a module's path and those of the modules around it, the model itself last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _child(path: str, inner: str) -> str:
    """Return the path of the module in `path` that `inner` lies in."""
    start = f"{path}." if path else ""
    return start + inner.removeprefix(start).partition(".")[0]
