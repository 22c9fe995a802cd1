"""Groups, scores and a configuration -> Plan; plans of several rounds -> one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cria_prune.base.events import passed
from cria_prune.config import PlanConfig
from cria_prune.errors import StructureError
from cria_prune.plan.budget import Budget, count_macs, count_parameters
from cria_prune.plan.plan import AttributeEdit, Plan, TensorCut
from cria_prune.plan.select import select
from cria_prune.plan.stairs import Allowed, reachable
from cria_prune.structure.groups import UnitGroups, removed_positions, said_values

Kept = Mapping[str, Sequence[int] | np.ndarray]


def plan(
    groups: UnitGroups,
    scores: Mapping[str, np.ndarray],
    config: PlanConfig,
    *,
    dense: UnitGroups | None = None,
    target: float | None = None,
    allowed: Allowed | None = None,
) -> Plan:
    """Choose what stays so that a share of the dense network's cost is gone.

    Args:
        groups: the structure now.
        scores: group name -> (units,) importance, higher stays.
        config: all but `rounds` and `residual` is used.
        dense: structure of the dense network, the denominator; `groups` by default.
        target: share to be gone after this round, earlier rounds counted in; `config.reduction` by default.
        allowed: group name -> the numbers of units that may stay; any number for groups not named.

    Returns:
        A plan relative to `groups`. Its report holds the shares `asked`, `reached` and `reachable`
        of the dense cost `of`, and `parameters_dense`, `parameters`, `macs_dense`, `macs` (per example).

    Raises:
        TargetError, StructureError, SignalError: see `select`.
    """
    dense = groups if dense is None else dense
    target = config.reduction if target is None else target
    passed("plan", groups=groups, target=target)
    kept = select(groups, scores, target, config, dense=dense, allowed=allowed)
    counts = {name: len(stays) for name, stays in kept.items()}
    report: dict[str, float | str] = {
        "asked": float(target),
        "reached": Budget(dense, config.of).reduction(groups, counts),
        "reachable": reachable(groups, config, dense=dense, allowed=allowed),
        "of": config.of,
        "parameters_dense": count_parameters(dense),
        "parameters": count_parameters(groups, counts),
        "macs_dense": count_macs(dense),
        "macs": count_macs(groups, counts),
    }
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
    return Plan(
        dict(first.sizes), kept, (*cuts, *later.values()), _composed_report(first, second),
        tuple(edits.values()), first.normed or second.normed,
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
    if group.frozen is not None and len(unique) < group.size:
        raise StructureError(asked, f"it is frozen: {group.frozen}", "Keep all its units")
    return tuple(unique.tolist())
