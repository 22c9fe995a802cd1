"""Which groups a vanilla configuration can hold when they are cut uniformly, and at which numbers of units.

Found by trying. A class of groups that one field counts is cut to a number of units; the
configuration gets the fields that a plan would set and, where these are not enough, one more that
the model's code asks for (`head_dim`, `n_inner`); its class is called on the meta device; and names,
shapes and numbers must be those of the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from cria_prune.errors import StructureError
from cria_prune.structure.alike import counted_together
from cria_prune.structure.groups import UnitGroup, UnitGroups
from cria_prune.vanilla.build import Path, Vanilla

UNITS = {
    "head": "heads",
    "kv group": "KV groups",
    "neuron": "neurons",
    "gated": "gated neurons",
    "channel": "channels",
    "residual": "units of its residual width",
}
HEADS = ("head", "kv group")
STEPS = 128
"""Widths of a residual stream that are tried at most."""


@dataclass(frozen=True)
class Extra:
    """A field of the configuration that is set when a class is cut: `width` * units + `constant`."""

    path: Path
    width: int
    constant: int

    def value(self, units: int) -> int:
        """Return what it says with so many units."""
        return self.width * units + self.constant


@dataclass(frozen=True)
class Held:
    """A class of groups that a configuration can hold.

    Attributes:
        names: the groups.
        size: units now.
        extra: a field to set beyond those that count the units.
        counts: numbers of units fewer than now that can be held, as far as they were tried.
        every: all other numbers can be held too.
    """

    names: tuple[str, ...]
    size: int
    extra: Extra | None
    counts: tuple[int, ...]
    every: bool


@dataclass(frozen=True)
class Holdable:
    """What a vanilla configuration can hold of a model, if alike groups keep the same number of units.

    Attributes:
        groups: the structure, what cannot be held frozen with the reason.
        allowed: group name -> numbers of units that can be held, ascending, that of now included;
            a prunable group that is not named can keep any number. For `plan(..., allowed=allowed)`
            with `PlanConfig(uniform=True)`.
        classes: the classes that can be held.
    """

    groups: UnitGroups
    allowed: Mapping[str, tuple[int, ...]]
    classes: tuple[Held, ...] = ()
    vanilla: Vanilla = field(repr=False, kw_only=True)

    def config(self, kept: Mapping[str, Sequence[int]]) -> Any:
        """Return the vanilla configuration of the model with only the `kept` units.

        Args:
            kept: group name -> unit indices that stay, such as `plan.kept`; only their numbers matter.

        Raises:
            StructureError: no configuration holds these numbers; the text says what differs.
        """
        fields = _fields(self.vanilla, self.groups, kept, self.classes)
        reason = self.vanilla.mismatch(self.groups, kept, fields)
        if reason is not None:
            raise StructureError(
                f"A vanilla {type(self.vanilla.config).__name__} for a pruned model",
                reason,
                "Plan with uniform=True and the allowed numbers of holdable, or save without a configuration",
            )
        return self.vanilla.changed(fields)


def holdable(model: nn.Module, groups: UnitGroups) -> Holdable:
    """Find the groups that a vanilla Hugging Face configuration can hold when they are cut uniformly.

    Args:
        model: a model of transformers, also on the meta device; it is only looked at.
        groups: its structure, with the residual widths frozen unless they are to be cut.

    Returns:
        The structure with all else frozen, and the numbers of units that can be held. Numbers hold
        together: any choice for one class with any for another. Heads are tried at every number,
        residual widths at up to 128, neurons at one.

    Raises:
        StructureError: the model has no configuration, or is not what it describes.
    """
    vanilla = Vanilla(model)
    asked = vanilla.asked()
    found: list[Held] = []
    reasons: dict[str, str] = {}
    for names in sorted(counted_together(groups.prunable), key=lambda names: _order(groups[names[0]])):
        held = _alone(vanilla, groups, names, asked)
        if isinstance(held, Held):
            held = _together(vanilla, groups, held, found)
        if isinstance(held, Held):
            found.append(held)
        else:
            what = f"fewer {UNITS[groups[names[0]].kind]}"
            reason = f"a vanilla {type(vanilla.config).__name__} cannot hold {what}: {held}"
            reasons |= dict.fromkeys(names, reason)
    kept = tuple(replace(group, frozen=reasons.get(group.name, group.frozen)) for group in groups)
    allowed = {
        name: (*sorted(held.counts), held.size) for held in found if not held.every for name in held.names
    }
    return Holdable(replace(groups, groups=kept), allowed, tuple(found), vanilla=vanilla)


def _order(group: UnitGroup) -> int:
    """Heads first, residual widths last: what has few numbers decides about what has many."""
    return 0 if group.kind in HEADS else 2 if group.kind == "residual" else 1


def _alone(
    vanilla: Vanilla, groups: UnitGroups, names: tuple[str, ...], asked: Mapping[Path, Any]
) -> Held | str:
    """Return what of a class can be held while all else stays, or why nothing of it can."""
    group = groups[names[0]]
    counts, every = _tried(group)

    def tried(extra: Extra | None, numbers: Iterable[int]) -> dict[int, str | None]:
        held = Held(names, group.size, extra, (), False)
        return {count: _failure(vanilla, groups, [(held, count)]) for count in numbers}

    best, failures = Held(names, group.size, None, (), every), tried(None, counts)
    for extra in chain([None], _candidates(groups, group, asked)):
        found = failures
        if extra is not None:  # it has to help at one of two numbers before all are tried
            helps = None in tried(extra, {counts[0], counts[len(counts) // 2]}).values()
            found = tried(extra, counts) if helps else {}
        good = tuple(count for count, failure in found.items() if failure is None)
        if len(good) > len(best.counts):  # fewer may fit a field that means something else, by chance
            best = Held(names, group.size, extra, good, every and good == counts)
        if good == counts or (good and extra is None):
            break
    return best if best.counts else f"with {counts[-1]} of {group.size}, {failures[counts[-1]]}"


def _tried(group: UnitGroup) -> tuple[tuple[int, ...], bool]:
    """Return the numbers of units to try, descending, and whether they stand for all others."""
    if group.kind in HEADS:
        return tuple(range(group.size - 1, 0, -1)), False
    if group.kind == "residual":
        step = max(1, group.size // STEPS)
        widths = range(group.size - step, 0, -step)
        return tuple(dict.fromkeys([group.size - 1, *widths])), True
    return (group.size - 1,), True


def _candidates(groups: UnitGroups, group: UnitGroup, asked: Mapping[Path, Any]) -> Iterator[Extra]:
    """Yield fields that may count a group's units, then unset ones that may hold what must not change."""
    widths = sorted({1, *(item.positions.shape[1] for item in group.slices)})
    for path, value in asked.items():
        for width in widths:
            if value is None or value == group.size * width:
                yield Extra(path, width, 0)
    sizes = {other.size for other in groups if other.size != group.size}
    for path, value in asked.items():
        if value is None:
            for constant in sorted(sizes | _head_sizes(groups)):
                yield Extra(path, 0, constant)


def _head_sizes(groups: UnitGroups) -> set[int]:
    """Return what the size of one head may be: positions per unit, by how many heads a unit counts."""
    heads = [group for group in groups if group.kind in HEADS]
    return {
        item.positions.shape[1] // times
        for group in heads
        for item in group.slices
        for times in {1, *(count.width for count in group.counts)}
        if item.positions.shape[1] % times == 0
    }


def _together(vanilla: Vanilla, groups: UnitGroups, held: Held, found: Sequence[Held]) -> Held | str:
    """Keep the numbers that the configuration takes with those of the classes before, or say why not."""
    counts = held.counts
    for other in found:
        for mine in counts:
            for count in other.counts:
                fields = _fields(vanilla, groups, _kept([(held, mine), (other, count)]), (held, other))
                refusal = vanilla.changed(fields)
                if isinstance(refusal, str):
                    counts = tuple(item for item in counts if item != mine)
                    if not counts:
                        return refusal
                    break
    least = [(item, item.counts[-1]) for item in found]
    failure = _failure(vanilla, groups, [*least, (held, counts[-1])])
    if failure is not None:
        return f"beside fewer units of {', '.join(item.names[0] for item in found)}, {failure}"
    return replace(held, counts=counts, every=held.every and counts == held.counts)


def _failure(vanilla: Vanilla, groups: UnitGroups, chosen: Sequence[tuple[Held, int]]) -> str | None:
    """Say why the configuration cannot hold these classes at these numbers of units."""
    kept = _kept(chosen)
    return vanilla.mismatch(groups, kept, _fields(vanilla, groups, kept, [held for held, _ in chosen]))


def _kept(chosen: Iterable[tuple[Held, int]]) -> dict[str, range]:
    return {name: range(count) for held, count in chosen for name in held.names}


def _fields(
    vanilla: Vanilla, groups: UnitGroups, kept: Mapping[str, Sequence[int]], classes: Iterable[Held]
) -> dict[Path, int]:
    """Return the fields to set: those that count units, and the further ones of the classes that are cut."""
    fields = vanilla.edits(groups, kept)
    for held in classes:
        count = len(kept.get(held.names[0], range(held.size)))
        if held.extra is not None and count < held.size:
            fields[held.extra.path] = held.extra.value(count)
    return fields
