"""A plan: which units stay; and the making of one from scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Self, get_args

import numpy as np

from cria_prune.base.errors import ArtifactError, StructureError
from cria_prune.base.events import passed
from cria_prune.base.progress import screenful
from cria_prune.base.sizes import Operation, Size, Sizing
from cria_prune.config import PlanConfig
from cria_prune.planning.allocation import Losses
from cria_prune.planning.budget import Budget, count_macs, count_parameters
from cria_prune.planning.control import left_alone
from cria_prune.planning.latency import LatencyTable
from cria_prune.planning.selection import ranking_of, reachable, select, sized
from cria_prune.planning.stairs import Allowed
from cria_prune.structure.groups import Role, UnitGroups, removed_positions, said_values, units_gone

FORMAT, VERSION = "cria-plan", 2


@dataclass(frozen=True)
class TensorCut:
    """What stays of one tensor along one dimension.

    Attributes:
        tensor: qualified name of a parameter or buffer of the dense model.
        dim: dimension.
        size: length of the dimension before the cut.
        kept: positions that stay, ascending.
        role: `produces`, `consumes`, `follows` or `picks`, see `ParameterSlice`.
    """

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class AttributeEdit:
    """An attribute that counts units, and what it says before and after.

    Attributes:
        module: qualified name of the module; `` for the model itself.
        name: the attribute; `config.<field>` is a field of the module's configuration.
        before, after: its values.
    """

    module: str
    name: str
    before: int
    after: int


@dataclass(frozen=True)
class CallEdit:
    """A call of a module's code, and the sizes that it gives from now on; see `base.sizes`.

    Attributes:
        module: qualified name of the module; `` for the model itself.
        place: which of the model's captured operations it is.
        sizing: its sizes.
    """

    module: str
    place: int
    sizing: Sizing


@dataclass(frozen=True, repr=False)
class Plan:
    """Kept units per group and kept positions per tensor, relative to the model; prints as a table.

    Attributes:
        sizes: group name -> units before.
        kept: group name -> unit indices that stay, ascending.
        cuts: the same as positions in tensors: all that surgery needs. A tensor
            dimension that stays whole has no cut.
        report: asked, reached and reachable shares and their denominators.
        attributes: what modules say of their sizes, beyond the shapes of their own parameters.
        normed: a normalisation takes statistics over removed units, see `surgery/verify.py`.
        calls: calls that ask for sizes which the code works out from something else.
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]
    cuts: tuple[TensorCut, ...]
    report: Mapping[str, float | str]
    attributes: tuple[AttributeEdit, ...] = ()
    normed: bool = False
    calls: tuple[CallEdit, ...] = ()

    def __repr__(self) -> str:
        stay = sum(map(len, self.kept.values()))
        return f"Plan({stay} of {sum(self.sizes.values())} units in {len(self.sizes)} groups stay)"

    def __str__(self) -> str:
        width = max([5, *(len(name) for name in self.sizes)])
        lines = [f"{'group':<{width}}  {'units':>7}  {'kept':>7}  {'share':>6}"]
        for name, size in self.sizes.items():
            stays = len(self.kept[name])
            lines.append(f"{name:<{width}}  {size:>7}  {stays:>7}  {stays / max(size, 1):>6.1%}")
        lines = screenful(lines)
        said = {key: value for key, value in self.report.items() if not isinstance(value, str)}
        if "reached" in said:
            lines.append(
                f"removed {said['reached']:.2%} of the {self.report.get('of', 'cost')}"
                + (f", asked {said['asked']:.2%}" if "asked" in said else "")
                + (f", at most {said['reachable']:.2%}" if "reachable" in said else "")
            )
        for key in ("parameters", "macs"):
            if key in said and f"{key}_dense" in said:
                lines.append(f"{key}: {said[f'{key}_dense']:,.0f} -> {said[key]:,.0f}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dictionaries and lists, ready for JSON."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "sizes": dict(self.sizes),
            "kept": {name: list(stays) for name, stays in self.kept.items()},
            "cuts": [
                {"tensor": c.tensor, "dim": c.dim, "size": c.size, "kept": list(c.kept), "role": c.role}
                for c in self.cuts
            ],
            "attributes": [asdict(item) for item in self.attributes],
            "normed": self.normed,
            "report": dict(self.report),
        }
        # Most plans have none, and are written as they were before there were any.
        return {**values, "calls": [_written(edit) for edit in self.calls]} if self.calls else values

    def to_json(self) -> str:
        """Return the plan as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read a plan from what `to_dict` gives, and check all of it.

        Raises:
            ArtifactError: a key, type, range, order or size is wrong; the text says which.
        """
        fields = _mapping(values, "the plan")
        if (fields.get("format"), fields.get("version")) == (FORMAT, 1):  # before attributes were restated
            fields = {"attributes": [], "normed": False, **fields, "version": VERSION}
        fields = {"calls": [], **fields}
        keys = ("format", "version", "sizes", "kept", "cuts", "attributes", "normed", "report", "calls")
        fields = _mapping(fields, "the plan", keys)
        if fields["format"] != FORMAT or fields["version"] != VERSION:
            raise _wrong(
                f"format {fields['format']!r} version {fields['version']!r}, not {FORMAT!r} {VERSION}"
            )
        sizes = {
            name: _integer(size, f"sizes[{name!r}]", 1)
            for name, size in _mapping(fields["sizes"], "sizes").items()
        }
        kept = _mapping(fields["kept"], "kept")
        if set(kept) != set(sizes):
            raise _wrong(f"groups {sorted(set(kept) ^ set(sizes))} in only one of sizes and kept")
        if not isinstance(fields["cuts"], list):
            raise _wrong(f"cuts is a {type(fields['cuts']).__name__}, not a list")
        cuts = tuple(_cut(value, number) for number, value in enumerate(fields["cuts"]))
        if len({(cut.tensor, cut.dim) for cut in cuts}) != len(cuts):
            raise _wrong("two cuts of one tensor dimension")
        return cls(
            sizes=sizes,
            kept={name: _ascending(kept[name], f"kept[{name!r}]", size) for name, size in sizes.items()},
            cuts=cuts,
            attributes=_attributes(fields["attributes"]),
            normed=bool(fields["normed"]),
            calls=_calls(fields["calls"]),
            report={key: _said(value, key) for key, value in _mapping(fields["report"], "report").items()},
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan from the text that `to_json` gives.

        Raises:
            ArtifactError: the text is not JSON, or not a valid plan.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"no JSON, {error}") from error
        return cls.from_dict(values)


def _wrong(found: str) -> ArtifactError:
    return ArtifactError("Reading a plan", f"found {found}", "Use a plan that Cria wrote, unchanged")


def _mapping(value: Any, what: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _wrong(f"{what} is a {type(value).__name__}, not a mapping of names")
    if keys is not None and set(value) != set(keys):
        missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
        raise _wrong(f"{what} without {missing}, with unknown {unknown}")
    return value


def _integer(value: Any, what: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(f"{what} = {str(value)[:40]!r}, not an integer of at least {least}")
    return value


def _ascending(value: Any, what: str, size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(f"{what} is a {type(value).__name__} without items, not a list of indices")
    for item in value:
        _integer(item, f"an index in {what}", 0)
    if any(later <= earlier for earlier, later in pairwise(value)):
        raise _wrong(f"{what} is not in ascending order")
    if value[-1] >= size:
        raise _wrong(f"{what} holds the index {value[-1]}, but the size is {size}")
    return tuple(value)


def _cut(value: Any, number: int) -> TensorCut:
    what = f"cuts[{number}]"
    fields = _mapping(value, what, ("tensor", "dim", "size", "kept", "role"))
    if not isinstance(fields["tensor"], str) or fields["role"] not in get_args(Role):
        raise _wrong(f"{what} for tensor {fields['tensor']!r} with role {fields['role']!r}")
    size = _integer(fields["size"], f"{what}.size", 1)
    kept = _ascending(fields["kept"], f"{what}.kept", size)
    return TensorCut(fields["tensor"], _integer(fields["dim"], f"{what}.dim", 0), size, kept, fields["role"])


def _attributes(values: Any) -> tuple[AttributeEdit, ...]:
    if not isinstance(values, list):
        raise _wrong(f"attributes is a {type(values).__name__}, not a list")
    edits = []
    for number, value in enumerate(values):
        what = f"attributes[{number}]"
        fields = _mapping(value, what, ("module", "name", "before", "after"))
        if not isinstance(fields["module"], str) or not isinstance(fields["name"], str):
            raise _wrong(f"{what} of module {fields['module']!r} with name {fields['name']!r}")
        before, after = (_integer(fields[key], f"{what}.{key}", 1) for key in ("before", "after"))
        edits.append(AttributeEdit(fields["module"], fields["name"], before, after))
    if len({(edit.module, edit.name) for edit in edits}) != len(edits):
        raise _wrong("two edits of one attribute")
    return tuple(edits)


def _written(edit: CallEdit) -> dict[str, Any]:
    """Return a call as JSON has it: lists in place of tuples."""
    values = {
        key: list(item) if isinstance(item, tuple) else item for key, item in asdict(edit.sizing).items()
    }
    values["gives"] = [list(item) if isinstance(item, tuple) else item for item in values["gives"]]
    return {"module": edit.module, "place": edit.place, **values}


def _calls(values: Any) -> tuple[CallEdit, ...]:
    if not isinstance(values, list):
        raise _wrong(f"calls is a {type(values).__name__}, not a list")
    edits = []
    for number, value in enumerate(values):
        what = f"calls[{number}]"
        keys = ("module", "place", "operation", "takes", "gives", "passes", "dim")
        fields = _mapping(value, what, keys)
        lists = all(isinstance(fields[key], list) for key in ("takes", "gives", "passes"))
        known = fields["operation"] in get_args(Operation) and isinstance(fields["module"], str)
        if not (lists and known) or len(fields["gives"]) != len(fields["passes"]):
            raise _wrong(f"{what} of module {fields['module']!r}: {fields['operation']!r}")
        takes = tuple(_size(item, f"{what}.takes", 1) for item in fields["takes"])
        passes = tuple(_size(item, f"{what}.passes", 0) for item in fields["passes"])
        gives: list[Size] = [
            tuple(_integer(dim, f"{what}.gives", 0) for dim in item)
            if isinstance(item, list) and item
            else _size(item, f"{what}.gives", 1)
            for item in fields["gives"]
        ]
        named = [dim for item in (*gives, passes) if isinstance(item, tuple) for dim in item]
        if any(dim is not None and dim >= len(takes) for dim in named):
            raise _wrong(f"{what} names a dimension of {len(takes)} that is not there")
        dim = _integer(fields["dim"], f"{what}.dim", -1)
        sizing = Sizing(fields["operation"], takes, tuple(gives), passes, dim)
        edits.append(CallEdit(fields["module"], _integer(fields["place"], f"{what}.place", 0), sizing))
    return tuple(edits)


def _size(value: Any, what: str, least: int) -> int | None:
    return None if value is None else _integer(value, what, least)


def _said(value: Any, key: str) -> float | str:
    good = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(f"report[{key!r}] = {str(value)[:40]!r}, neither a finite number nor a text")
    return value


Kept = Mapping[str, Sequence[int] | np.ndarray]


def plan(
    groups: UnitGroups,
    scores: Mapping[str, np.ndarray],
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    target: float | None = None,
    allowed: Allowed | None = None,
    losses: Losses | None = None,
    latency: LatencyTable | None = None,
) -> Plan:
    """Choose what stays so that a share of the dense network's cost is gone.

    Args:
        groups: the structure now.
        scores: group name -> (units,) importance, higher stays.
        config: all but `rounds`, `residual`, `units` and `vanilla` is used.
        dense: structure of the dense network, the denominator; `groups` by default.
        target: share to be gone after this round, earlier rounds counted in; `config.reduction` by default.
        allowed: group name -> the numbers of units that may stay; any number for groups not named.
        losses: group name -> units kept -> measured loss, for the ranking `measured`.
        latency: measured seconds, for the cost `latency`.

    Returns:
        A plan relative to `groups`. Its report holds the shares `asked`, `reached` and `reachable`
        of the dense cost `of`, the `ranking`, and `parameters_dense`, `parameters`, `macs_dense`, `macs` (per
        example). Of latency what was reached is foretold by the table, with `seconds_dense` and `seconds`.

    Raises:
        TargetError, StructureError, SignalError: see `select`.
        ConfigError: a pattern of the configuration names no group, or two contradict each other.
    """
    dense = groups if dense is None else dense
    within = sized(left_alone(groups, config), config, allowed or {})
    groups, allowed, config = within.groups, within.allowed, within.plan
    target = config.reduction if target is None else target
    passed("plan", groups=groups, target=target)
    further: dict[str, Any] = {"dense": dense, "allowed": allowed, "latency": latency}
    kept = select(groups, scores, target, config, losses=losses, **further)
    counts = {name: len(stays) for name, stays in kept.items()}
    budget = Budget(dense, config.of, latency)
    report: dict[str, float | str] = {
        "asked": float(target),
        "reached": budget.reduction(groups, counts),
        "reachable": reachable(groups, config, **further),
        "of": config.of,
        "ranking": ranking_of(config, losses),
        "parameters_dense": count_parameters(dense),
        "parameters": count_parameters(groups, counts),
        "macs_dense": count_macs(dense),
        "macs": count_macs(groups, counts),
    }
    if latency is not None and config.of == "latency":
        report |= {"seconds_dense": budget.total, "seconds": budget.amount(groups, counts)}
    return make_plan(groups, kept, report)


def make_plan(groups: UnitGroups, kept: Kept, report: Mapping[str, float | str] | None = None) -> Plan:
    """Turn kept unit indices into a plan; groups that are not named keep all their units.

    Args:
        groups: the structure that the indices belong to.
        kept: group name -> unit indices that stay, in any order.
        report: what the plan says about itself.

    Raises:
        StructureError: a group is unknown or frozen, or its indices are empty, repeated or out of range.
    """
    chosen = {name: _checked_indices(groups, name, stays) for name, stays in kept.items()}
    slices = [item for group in groups for item in group.slices]
    # A tied weight produces and consumes along one dimension: consuming is what a mask has to know.
    slices.sort(key=lambda item: item.role == "consumes")
    roles = {(item.tensor, item.dim): item.role for item in slices}
    cuts = []
    for (tensor, dim), gone in removed_positions(groups.groups, chosen).items():
        if len(gone):
            size = groups.shapes[tensor][dim]
            stays = np.setdiff1d(np.arange(size), gone)
            cuts.append(TensorCut(tensor, dim, size, tuple(stays.tolist()), roles[tensor, dim]))
    return Plan(
        sizes={group.name: group.size for group in groups},
        kept={group.name: chosen.get(group.name, tuple(range(group.size))) for group in groups},
        cuts=tuple(cuts),
        report=dict(report or {}),
        attributes=_attribute_edits(groups, chosen),
        normed=any(
            group.normed and len(chosen.get(group.name, ())) not in (0, group.size) for group in groups
        ),
        calls=_call_edits(groups, chosen),
    )


def _call_edits(groups: UnitGroups, kept: Mapping[str, tuple[int, ...]]) -> tuple[CallEdit, ...]:
    """Return every call of the modules that have to be restated when these units leave."""
    gone = units_gone(groups, kept)
    modules = {name for group in groups if group.name in gone for name in group.restated}
    # An earlier round may have restated a module, and a group that could do without lies in its calls.
    able = {name for group in groups for name in group.restated}
    modules |= {call.module for call in groups.calls if call.module in able and call.groups & gone.keys()}
    return tuple(
        CallEdit(call.module, call.place, call.without(gone).sizing())
        for call in groups.calls
        if call.module in modules
    )


def _attribute_edits(groups: UnitGroups, kept: Mapping[str, tuple[int, ...]]) -> tuple[AttributeEdit, ...]:
    """Return what attributes say afterwards.

    A field of a configuration that changes for one module is listed for all that count by it, for
    they may share the configuration.
    """
    said = said_values(groups.groups, kept)
    changed = {key for key, (now, after) in said.items() if now != after}
    fields = {name for _, name in changed if name.startswith("config.")}
    return tuple(
        AttributeEdit(*key, now, after)
        for key, (now, after) in said.items()
        if key in changed or key[1] in fields
    )


def identity_plan(groups: UnitGroups) -> Plan:
    """Return the plan that keeps every unit; its report gives the dense counts."""
    parameters, macs = count_parameters(groups), count_macs(groups)
    report = {"parameters_dense": parameters, "parameters": parameters, "macs_dense": macs, "macs": macs}
    return make_plan(groups, {}, report)


def compose(first: Plan, second: Plan) -> Plan:
    """Return the one plan that does `first`, then `second` on its result.

    The report is the second one's. Where the two count shares of different dense networks, the
    first one's dense counts are kept and the shares, which belong to the other, are left out.

    Raises:
        StructureError: the second plan's groups or tensors do not have the sizes that the first leaves.
    """
    if set(first.sizes) != set(second.sizes):
        raise StructureError(
            "Composing two plans",
            f"groups {sorted(set(first.sizes) ^ set(second.sizes))} are in one of them only",
            "Compose plans of one network",
        )
    kept = {}
    for name, stays in first.kept.items():
        _check_size(f"group {name!r}", len(stays), second.sizes[name])
        kept[name] = tuple(stays[index] for index in second.kept[name])
    # Indices of the second plan count among what the first one left;
    # through the first one's they become positions of the dense tensor.
    later = {(cut.tensor, cut.dim): cut for cut in second.cuts}
    cuts = []
    for cut in first.cuts:
        after = later.pop((cut.tensor, cut.dim), None)
        if after is not None:
            _check_size(f"{cut.tensor!r} along dimension {cut.dim}", len(cut.kept), after.size)
            stays = tuple(cut.kept[index] for index in after.kept)
            cut = TensorCut(cut.tensor, cut.dim, cut.size, stays, cut.role)
        cuts.append(cut)
    edits = {(edit.module, edit.name): edit for edit in first.attributes}
    for edit in second.attributes:
        start = edits.get((edit.module, edit.name), edit)
        edits[edit.module, edit.name] = replace(start, after=edit.after)
    # A module that the second plan restates says all that its calls give; the others are as they were.
    calls = {(edit.module, edit.place): edit for edit in (*first.calls, *second.calls)}
    return Plan(
        dict(first.sizes), kept, (*cuts, *later.values()), _composed_report(first, second),
        tuple(edits.values()), first.normed or second.normed, tuple(calls.values()),
    )  # fmt: skip


def _composed_report(first: Plan, second: Plan) -> dict[str, float | str]:
    totals = {key: first.report[key] for key in ("parameters_dense", "macs_dense") if key in first.report}
    if any(second.report.get(key, value) != value for key, value in totals.items()):
        counts = {key: second.report[key] for key in ("parameters", "macs") if key in second.report}
        return {**totals, **counts}
    return {**first.report, **second.report}


def _check_size(what: str, left: int, expected: int) -> None:
    if left != expected:
        raise StructureError(
            f"Composing two plans at {what}",
            f"the first leaves {left}, the second expects {expected}",
            "Make the second plan for the result of the first",
        )


def _checked_indices(groups: UnitGroups, name: str, stays: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    asked, todo = f"Keeping units of group {name!r}", "Give distinct indices of units, at least one"
    group = next((group for group in groups if group.name == name), None)
    if group is None:
        known = ", ".join(item.name for item in groups)
        raise StructureError(asked, "found no such group", f"Known groups: {known}")
    indices = np.asarray(stays)
    if indices.ndim != 1 or len(indices) == 0 or indices.dtype.kind not in "iu":
        raise StructureError(asked, f"found an array of shape {indices.shape}, type {indices.dtype}", todo)
    unique = np.unique(indices)
    if len(unique) != len(indices) or unique[0] < 0 or unique[-1] >= group.size:
        raise StructureError(
            asked,
            f"found {len(indices)} indices from {unique[0]} to {unique[-1]} for {group.size} units",
            todo,
        )
    if len(unique) < min(group.least, group.size):
        raise StructureError(
            asked, f"found {len(unique)} indices, and {group.least} always stay",
            f"Keep {group.least} units or more: a router picks so many for each token",
        )  # fmt: skip
    if group.frozen is not None and len(unique) < group.size:
        raise StructureError(asked, f"it is frozen: {group.frozen}", "Keep all its units")
    return tuple(unique.tolist())
