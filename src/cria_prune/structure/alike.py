"""Which groups are the same layer of different blocks, and which ones a configuration counts together."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from cria_prune.structure.groups import UnitGroup


def alike(groups: Iterable[UnitGroup]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the groups by class: the same layer of different blocks.

    Groups are alike that have the same kind, the same number of units and the same name once its
    digits are taken out. Every group is in one class, in the order of the groups.

    Examples:
        >>> blocks = [UnitGroup(f"layer.{number}.fc", "neuron", 8, 8, ()) for number in (0, 1)]
        >>> alike([*blocks, UnitGroup("pooler", "neuron", 8, 8, ())])
        (('layer.0.fc', 'layer.1.fc'), ('pooler',))
    """
    classes: dict[Hashable, list[str]] = {}
    for group in groups:
        key = (group.kind, group.size, re.sub(r"\d+", "*", group.name))
        classes.setdefault(key, []).append(group.name)
    return tuple(map(tuple, classes.values()))


def counted_together(groups: Iterable[UnitGroup]) -> tuple[tuple[str, ...], ...]:
    """Return the classes of alike groups, those joined whose units one field of a configuration counts.

    The feed-forward layers of an encoder and of its decoder are two classes of `alike`; where one
    `d_ff` says the width of both, they are one here. Only classes of as many units are joined.
    """
    named = {group.name: group for group in groups}
    joined: list[tuple[set[Hashable], list[str]]] = []
    for names in alike(named.values()):
        members = [named[name] for name in names]
        fields: set[Hashable] = {
            (group.size, item.module, item.name, item.said)
            for group in members
            for item in group.counts
            if item.sure and item.name.startswith("config.")
        }
        same = [entry for entry in joined if entry[0] & fields]
        joined = [entry for entry in joined if entry not in same]
        merged = [name for _, earlier in same for name in earlier]
        joined.append((fields.union(*(earlier for earlier, _ in same)), [*merged, *names]))
    order = {name: number for number, name in enumerate(named)}
    classes = [tuple(sorted(names, key=order.__getitem__)) for _, names in joined]
    return tuple(sorted(classes, key=lambda names: order[names[0]]))
