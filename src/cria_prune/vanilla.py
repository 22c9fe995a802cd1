"""What the vanilla configuration of a Hugging Face model can hold, and that configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from cria_prune.base.errors import StructureError
from cria_prune.base.modules import named_tensors
from cria_prune.base.progress import quiet
from cria_prune.structure.discovery import held_numbers
from cria_prune.structure.groups import (
    UnitGroup,
    UnitGroups,
    counted_together,
    removed_positions,
    said_values,
    shrunk_shapes,
)

Path = tuple[str, ...]
Fields = Mapping[Path, int]
Kept = Mapping[str, Sequence[int]]


class Vanilla:
    """A model, and its class called with other configurations.

    Attributes:
        model: the model; it is only looked at.
        groups: its structure.
        config: its configuration.

    Raises:
        StructureError: the model has no configuration of transformers, or is not what it describes.
    """

    def __init__(self, model: nn.Module, groups: UnitGroups) -> None:
        config: Any = getattr(model, "config", None)
        asked = f"A vanilla configuration for {type(model).__name__}"
        if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
            raise StructureError(
                asked, f"its config is {type(config).__name__}", "Pass a model of transformers itself"
            )
        self.model, self.groups, self.config = model, groups, config
        tensors = named_tensors(model)
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}
        self._canonical = {name: first[id(tensors[name])] for name in model.state_dict() if name in tensors}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._paths = {id(part): path for path, part in config_parts(config)}
        self._floats = _floats(model)
        # First without any change: a model that its own configuration does not
        # describe (layers exchanged, weights added) can be held by no other.
        built = self._built(self.changed({}))
        found = None if isinstance(built, str) else self._difference(built, self._shapes)
        if isinstance(built, str) or found:
            raise StructureError(
                asked,
                f"the configuration builds another model: {built if isinstance(built, str) else found}",
                "Pass the model as from_pretrained or its class gave it, with its own configuration",
            )
        # Floats that the class does not make again from the same
        # configuration were set later, and cannot be compared.
        same = _floats(built)
        self._floats = {key: value for key, value in self._floats.items() if same.get(key) == value}

    def fields(self, kept: Kept, classes: Iterable[Held] = ()) -> dict[Path, int]:
        """Return the fields to set for `kept` units: those that count units, and those of cut classes."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        fields = {}
        for (module, name), (now, after) in said_values(self.groups.groups, kept).items():
            path = self._paths.get(id(getattr(modules[module], "config", None)))
            if name.startswith("config.") and now != after and path is not None:
                fields[*path, name.removeprefix("config.")] = after
        for held in classes:
            count = len(kept.get(held.names[0], range(held.size)))
            if held.extra is not None and count < held.size:
                fields[held.extra.path] = held.extra.width * count + held.extra.constant
        return fields

    def changed(self, fields: Fields) -> Any:
        """Return the configuration with other values in some fields, or the text of its refusal."""
        values = self.config.to_dict()
        for path, value in fields.items():
            place = values
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        try:
            with quiet():
                return type(self.config).from_dict(values)
        except Exception as error:  # whatever a validator raises
            return f"it refuses {_said(fields)}: {_last_line(error)}"

    def mismatch(self, kept: Kept, fields: Fields) -> str | None:
        """Say how the model that a changed configuration builds differs from the one with `kept` units.

        Compared are the names and shapes of the state dict, the floats that modules hold (scales), and
        the attributes that count units. None if there is no difference.
        """
        config = self.changed(fields)
        built = config if isinstance(config, str) else self._built(config)
        if isinstance(built, str):
            return built
        shapes = shrunk_shapes(self.groups.shapes, removed_positions(self.groups.groups, kept))
        found = self._difference(built, shapes)
        if found is not None:
            return found
        # Shapes are not all: a Gemma of another hidden size has all shapes right,
        # and scales its embeddings by another number (docs/decisions/0008).
        floats = _floats(built)
        for (path, name), value in self._floats.items():
            if floats.get((path, name)) != value:
                return f"{name} would be {floats.get((path, name))}, not {value}"
        modules = dict(built.named_modules(remove_duplicate=False))
        for (path, name), (_, after) in said_values(self.groups.groups, kept).items():
            said = held_numbers(modules[path]).get(name) if path in modules else None
            if not name.startswith("config.") and said != after:
                return f"{name} would be {said}, not {after}"
        return None

    def failure(self, chosen: Sequence[tuple[Held, int]]) -> str | None:
        """Say why the configuration cannot hold these classes at these numbers of units."""
        kept = _kept(chosen)
        return self.mismatch(kept, self.fields(kept, [held for held, _ in chosen]))

    def asked(self) -> dict[Path, Any]:
        """Return the fields that the model's code reads while it is built, with their values.

        A field that is asked for and not there has the value None, like one that is there and None.
        """
        config = self.changed({})
        found: dict[Path, Any] = {}
        for path, part in list(config_parts(config)):
            _listen(part, path, found)
        self._built(config)
        return found

    def _built(self, config: Any) -> nn.Module | str:
        try:
            with (
                quiet(),
                torch.random.fork_rng(devices=[]),
                torch.device("meta"),
            ):
                model: nn.Module = type(self.model)(config)
                return model
        except Exception as error:  # whatever the model's code raises
            return f"it cannot be built, {_last_line(error)}"

    def _difference(self, built: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Compare the state dict of a built model with the shapes of the plan."""
        found = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        for name in sorted(found.keys() ^ self._canonical.keys()):
            return f"{_short(name)} would be {'new' if name in found else 'missing'}"
        for name, first in self._canonical.items():
            if found[name] != shapes[first]:
                return f"{_short(name)} would be {_sizes(found[name])}, not {_sizes(shapes[first])}"
        return None


def config_parts(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield a configuration and those in it, each with the names of the fields that lead to it."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from config_parts(value, (*path, name))


def _listen(config: Any, path: Path, found: dict[Path, Any]) -> None:
    """Make a configuration write down which of its fields are read."""
    kind = type(config)

    # Which fields may count a width is not in a table of families:
    # those are asked for that the code reads while it builds.
    class Listening(kind):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                try:
                    value = super().__getattribute__(name)
                except AttributeError:
                    found.setdefault((*path, name), None)
                    raise
                if value is None or (isinstance(value, int) and not isinstance(value, bool)):
                    own = super().__getattribute__("attribute_map").get(name, name)
                    found.setdefault((*path, own), value)
                return value
            return super().__getattribute__(name)

    config.__class__ = Listening


def _floats(model: nn.Module) -> dict[tuple[str, str], float]:
    """Return (module, attribute) -> value of every float that a module holds."""
    return {
        (path, name): value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, float)
    }


def _short(name: str) -> str:
    """Return a tensor's name within its block."""
    return re.split(r"\.\d+\.", name)[-1]


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _said(fields: Fields) -> str:
    return ", ".join(f"{'.'.join(path)} = {value}" for path, value in fields.items()) or "its own values"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1][:200].rstrip('.')}"


UNITS = {
    "head": "heads",
    "kv group": "KV groups",
    "neuron": "neurons",
    "gated": "gated neurons",
    "channel": "channels",
    "residual": "units of its residual width",
    "experts": "experts",
}
HEADS = ("head", "kv group")
STEPS = 128
"""Widths of a residual stream that are tried at most."""
TRIED = 16
"""Numbers of experts that are."""


@dataclass(frozen=True)
class Extra:
    """A field of the configuration that is set when a class is cut: `width` * units + `constant`."""

    path: Path
    width: int
    constant: int


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
        fields = self.vanilla.fields(kept, self.classes)
        reason = self.vanilla.mismatch(kept, fields)
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
    vanilla = Vanilla(model, groups)
    asked = vanilla.asked()
    found: list[Held] = []
    reasons: dict[str, str] = {}
    for names in sorted(counted_together(groups.prunable), key=lambda names: _order(groups[names[0]])):
        held = _alone(vanilla, names, asked)
        if isinstance(held, Held):
            held = _together(vanilla, held, found)
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


def _alone(vanilla: Vanilla, names: tuple[str, ...], asked: Mapping[Path, Any]) -> Held | str:
    """Return what of a class can be held while all else stays, or why nothing of it can."""
    group = vanilla.groups[names[0]]
    counts, every = _tried(group)

    def tried(extra: Extra | None, numbers: Iterable[int]) -> dict[int, str | None]:
        held = Held(names, group.size, extra, (), False)
        return {count: vanilla.failure([(held, count)]) for count in numbers}

    best, failures = Held(names, group.size, None, (), every), tried(None, counts)
    for extra in chain([None], _candidates(vanilla.groups, group, asked)):
        found = failures
        if extra is not None:  # it has to help at one of two numbers before all are tried
            helps = None in tried(extra, {counts[0], counts[len(counts) // 2]}).values()
            found = tried(extra, counts) if helps else {}
        good = tuple(count for count, failure in found.items() if failure is None)
        if len(good) > len(best.counts):  # fewer may fit a field that means something else, by chance
            best = Held(names, group.size, extra, good, every and good == counts)
        # A further field is only looked for where the fields that count the units are not enough.
        if good == counts or (good and extra is None):
            break
    return best if best.counts else f"with {counts[-1]} of {group.size}, {failures[counts[-1]]}"


def _tried(group: UnitGroup) -> tuple[tuple[int, ...], bool]:
    """Return the numbers of units to try, descending, and whether they stand for all others."""
    if group.kind in HEADS:
        return tuple(range(group.size - 1, 0, -1)), False
    if group.kind in ("residual", "experts"):
        step = max(1, group.size // (STEPS if group.kind == "residual" else TRIED))
        widths = range(group.size - step, group.least - 1, -step)
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


def _together(vanilla: Vanilla, held: Held, found: Sequence[Held]) -> Held | str:
    """Keep the numbers that the configuration takes with those of the classes before, or say why not."""
    counts = held.counts
    # Validators may refuse numbers together that they take alone, as heads that do not divide
    # a width. What has been held before stays, and the numbers of this class give way.
    for other in found:
        for mine in counts:
            for count in other.counts:
                refusal = vanilla.changed(
                    vanilla.fields(_kept([(held, mine), (other, count)]), (held, other))
                )
                if isinstance(refusal, str):
                    counts = tuple(item for item in counts if item != mine)
                    if not counts:
                        return refusal
                    break
    # All classes at their fewest units: the choice furthest from the model stands for all others.
    least = [(item, item.counts[-1]) for item in found]
    failure = vanilla.failure([*least, (held, counts[-1])])
    if failure is not None:
        return f"beside fewer units of {', '.join(item.names[0] for item in found)}, {failure}"
    return replace(held, counts=counts, every=held.every and counts == held.counts)


def _kept(chosen: Iterable[tuple[Held, int]]) -> dict[str, range]:
    return {name: range(count) for held, count in chosen for name in held.names}
