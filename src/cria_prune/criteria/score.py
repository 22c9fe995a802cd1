"""The stage: unit groups and recorded states to one importance per unit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cria_prune.base.dispatched import values_of
from cria_prune.base.errors import CriterionError, StructureError
from cria_prune.base.events import passed
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.ranks import World, world
from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence, UnitWeights
from cria_prune.criteria.experts import routed_importance
from cria_prune.criteria.table import CRITERIA, Criterion
from cria_prune.recording.states import EVERYTHING, GroupStates, States
from cria_prune.spectrum.importance import Diagnosis, Importance, rank_correlation
from cria_prune.structure.groups import UnitGroup, UnitGroups

FEW, MANY = 3, 16
"""Live units of a group from which on equal scores count, and are an error in a single group."""
NOTHING = (0.0, 1e-30)
"""Scores of units without any effect; `spectrum` keeps those of live ones above 0."""

OLD_RIDGE = 1e-2
"""What a configuration said before a ridge was the criterion's own: no error where it is not read."""


@of_plain_models
def score(
    model: nn.Module,
    groups: UnitGroups,
    states: States | None = None,
    config: ScoreConfig | None = None,
    *,
    whole: bool = True,
) -> dict[str, Importance]:
    """Score the units of every prunable group: high is kept, low is a candidate for removal.

    Whole experts are scored by what they give their tokens (`criteria.experts`) under any criterion that
    reads signals; under one of weights alone by their rows of the router.

    With several processes (`base.ranks`) each scores its share of the groups, and all get all scores.

    Args:
        model: the live model; only its weights are read.
        groups: its unit groups.
        states: what `record` returned for these groups; None for criteria that read weights only.
        config: the criterion and its numbers. With `split_half`, criteria that read signals also score
            the even and the odd examples apart, and their rank correlation is in the diagnosis.
        whole: the groups are all that is scored; False for a part of them.

    Returns:
        group name -> importance, scores (units,) float64, in the order of the network.

    Raises:
        CriterionError: the criterion is unknown, is given settings that it does not read, needs states or
            gradients that were not recorded, or tells no unit from another (see `check_telling`).
        StructureError: states, groups and model do not fit together.
        SignalError: a weight or a signal holds NaN or infinity.
        RankError: another process failed or is gone.
    """
    config = config or ScoreConfig()
    passed("score", criterion=config.criterion, states=states)
    criterion = find_criterion(config)
    _check_needs(criterion, states)
    tensors = values_of(model)
    here, importances = world(), dict[str, Importance]()
    with here.together("Scoring"):
        for index, group in enumerate(groups.prunable):
            # Groups are dealt out like cards: neighbours are often
            # alike in width, so each process gets some of every width.
            if not here.mine(index):
                continue
            weights = UnitWeights(group, tensors)
            if group.kind == "experts" and states is not None and criterion.needs:
                # A removed expert gives its tokens to others: what it did for them is what is lost.
                importances[group.name] = _score_experts(group, states, config)
                continue
            found = _states_of(group, states) if states and criterion.needs else None
            scored = _score_group(criterion, weights, found, config)
            importances[group.name] = _with_unreached(scored, group, states)
    if here.size > 1:
        importances = _from_all(here, groups.prunable, importances)
    check_telling(criterion.name, importances, whole)
    passed("scored", scores=importances)
    return importances


def _with_unreached(importance: Importance, group: UnitGroup, states: States | None) -> Importance:
    """Return an importance that names the experts, of the layer that the group lies in, without a sample."""
    modules = {item.tensor.rpartition(".")[0] for item in group.slices if item.role != "follows"}
    missed = [states.unreached[name] for name in modules if states and name in states.unreached]
    if not missed or group.kind == "residual":  # a residual width has signals of its own
        return importance
    numbers = tuple(sorted({number for item in missed for number in item}))
    return replace(importance, diagnosis=replace(importance.diagnosis, unreached=numbers))


def check_telling(criterion: str, importances: Mapping[str, Importance], whole: bool = True) -> None:
    """Check that scores tell units from one another: a cut by equal ones would be the cut of a coin.

    A group of 16 live units or more whose scores are all the same is refused, and a whole network where no
    group of three or more has two different ones. What may be alike is: the scores of smaller groups beside
    others, for two units are as far from each other as the other way round, ranks of a few may add up to the
    same, and a few units may all be on for every sample; and scores of nothing (dead units, weights of 0),
    where no choice is worse than another.

    Raises:
        CriterionError: they do not.
    """
    alike = []
    for name, item in importances.items():
        live = torch.ones(len(item.scores), dtype=torch.bool)
        live[list(item.diagnosis.dead)] = False
        values = item.scores[live]
        # Scores by distances are always alike for two units: each is as far from the other.
        if len(values) < FEW:
            continue
        alike.append(bool((values == values[0]).all()))
        if alike[-1] and len(values) >= MANY and float(values[0]) not in NOTHING:
            raise _untold(f"{criterion!r} for group {name!r}", f"its {len(values)} units", float(values[0]))
    if whole and alike and all(alike):
        raise _untold(f"{criterion!r}", "the units of every group", None)


def _untold(what: str, units: str, value: float | None) -> CriterionError:
    return CriterionError(
        f"The criterion {what}",
        f"it scores {units} all alike" + ("" if value is None else f", at {value:g}"),
        "Use another criterion, or other settings of this one: what it reads of them says nothing",
    )


def _from_all(
    here: World, groups: Sequence[UnitGroup], own: Mapping[str, Importance]
) -> dict[str, Importance]:
    """Return the importances of all groups, each from the process that scored it."""
    said = json.dumps({name: item.diagnosis.to_dict() for name, item in own.items()})
    diagnoses = {
        name: found for part in here.gathered(said.encode()) for name, found in json.loads(part).items()
    }
    importances = {}
    for group in groups:
        scores = own[group.name].scores.cpu() if group.name in own else torch.zeros(group.size).double()
        diagnosis = Diagnosis.from_dict(diagnoses[group.name])
        # All others add zeros, so the sum is the one score, bit for bit.
        importances[group.name] = Importance(here.total(scores), diagnosis)
    return importances


def find_criterion(asked: str | ScoreConfig) -> Criterion:
    """Return a criterion by its name, or that of a configuration once the settings fit it.

    Raises:
        CriterionError: there is none of that name, or it does not read a setting that is given to it; the
            text lists those that there are, or that read it.
    """
    name = asked if isinstance(asked, str) else asked.criterion
    if name not in CRITERIA:
        raise CriterionError("A criterion", f"found {name!r}", f"Known criteria: {', '.join(CRITERIA)}")
    for setting in () if isinstance(asked, str) else asked.changed():
        if setting in CRITERIA[name].reads or (setting, getattr(asked, setting)) == ("ridge", OLD_RIDGE):
            continue
        readers = ", ".join(item.name for item in CRITERIA.values() if setting in item.reads)
        raise CriterionError(
            f"The criterion {name!r} with {setting} {getattr(asked, setting)!r}",
            f"it does not read {setting}",
            f"Leave {setting} out, or use one that reads it: {readers}",
        )
    return CRITERIA[name]


def graph_settings(config: ScoreConfig) -> dict[str, Any]:
    """Return how neuron graphs are made that are kept to be looked at: as those of the criterion, if any."""
    own = {"neighbors", "ridge"} <= find_criterion(config).reads and config.ridge is not None
    return {"neighbors": config.neighbors, **({"ridge": config.ridge} if own else {})}


def _check_needs(criterion: Criterion, states: States | None) -> None:
    """Check that what a criterion needs was recorded."""
    asked = f"The criterion {criterion.name!r}"
    if "examples" in criterion.needs:
        how = "record(model, groups, batches, per_example=True)"
    else:
        how = f"record(model, groups, batches{', gradients=True' if 'gradients' in criterion.needs else ''})"
    if criterion.needs and states is None:
        raise CriterionError(asked, "no recorded states were given", f"Pass states={how}")
    missing = [] if states is None else sorted(EVERYTHING & criterion.needs - states.reads)
    if missing:
        raise CriterionError(
            asked,
            f"the states were recorded without {' and '.join(map(repr, missing))}",
            f"Record again with {how}, which reads everything",
        )
    if "gradients" in criterion.needs and states is not None and not states.gradients:
        raise CriterionError(asked, "the states were recorded without gradients", f"Record again with {how}")
    if "examples" in criterion.needs and states is not None and not states.per_example:
        raise CriterionError(
            asked,
            "the states were recorded without the gradients of each example",
            f"Record again with {how}",
        )


def _states_of(group: UnitGroup, states: States) -> GroupStates:
    """Return a group's states once they fit it."""
    found = states.groups.get(group.name)
    if found is None or found.units != group.size:
        raise StructureError(
            f"Scoring group {group.name!r} of {group.size} units",
            "the states do not hold it" if found is None else f"the states hold {found.units} units",
            "Record the states of these groups again, after every structural change",
        )
    return found


def _score_experts(group: UnitGroup, states: States, config: ScoreConfig) -> Importance:
    """Score whole experts, whatever the criterion."""
    found = states.routed.get(group.name)
    if found is None or found.tokens.shape[1] != group.producers[0].positions.size:
        raise StructureError(
            f"Scoring group {group.name!r} of {group.size} units",
            "the states do not hold what its experts did",
            "Record the states of these groups again, after every structural change",
        )
    return routed_importance(group, found, drop=config.drop_unreached)


def _score_group(
    criterion: Criterion, weights: UnitWeights, states: GroupStates | None, config: ScoreConfig
) -> Importance:
    """Score a group, and its two halves where the criterion reads signals."""
    name = weights.group.name
    if states is None:
        return criterion.function(Evidence(name, weights), config)
    whole = Evidence(
        name, weights, states.input, states.output, states.taylor, states.features, states.fisher
    )
    importance = criterion.function(whole, config)
    # Gradients are summed over all examples, so there are no halves of them.
    if not config.split_half or "gradients" in criterion.needs:
        return importance
    even, odd = (
        criterion.function(
            replace(
                whole,
                input=states.inputs[half] if states.inputs else None,
                output=states.outputs[half],
                features=states.features_by_half[half],
            ),
            config,
        )
        for half in (0, 1)
    )
    agreement = rank_correlation(even.scores, odd.scores)
    return replace(importance, diagnosis=replace(importance.diagnosis, split_half=agreement))
