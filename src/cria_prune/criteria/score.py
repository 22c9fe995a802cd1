"""The stage: unit groups and recorded states to one importance per unit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from cria_prune.base.events import passed
from cria_prune.config import ScoreConfig
from cria_prune.criteria.evidence import Evidence, UnitWeights
from cria_prune.criteria.table import CRITERIA, Criterion
from cria_prune.dispatched import values_of
from cria_prune.errors import CriterionError, StructureError
from cria_prune.ranks import World, world
from cria_prune.record.states import EVERYTHING, GroupStates, States
from cria_prune.spectrum import Diagnosis, Importance, rank_correlation
from cria_prune.structure.groups import UnitGroup, UnitGroups


def score(
    model: nn.Module,
    groups: UnitGroups,
    states: States | None = None,
    config: ScoreConfig | None = None,
) -> dict[str, Importance]:
    """Score the units of every prunable group: high is kept, low is a candidate for removal.

    With several processes (`cria_prune.ranks`) each scores its share of the groups, and all get all scores.

    Args:
        model: the live model; only its weights are read.
        groups: its unit groups.
        states: what `record` returned for these groups; None for criteria that read weights only.
        config: the criterion and its numbers. With `split_half`, criteria that read signals also score
            the even and the odd examples apart, and their rank correlation is in the diagnosis.

    Returns:
        group name -> importance, scores (units,) float64, in the order of the network.

    Raises:
        CriterionError: the criterion is unknown, or needs states or gradients that were not recorded.
        StructureError: states, groups and model do not fit together.
        SignalError: a weight or a signal holds NaN or infinity.
        RankError: another process failed or is gone.
    """
    config = config or ScoreConfig()
    passed("score", criterion=config.criterion, states=states)
    criterion = find_criterion(config.criterion)
    _check_needs(criterion, states)
    tensors = values_of(model)
    here, importances = world(), dict[str, Importance]()
    with here.together("Scoring"):
        for index, group in enumerate(groups.prunable):
            if not here.mine(index):
                continue
            weights = UnitWeights(group, tensors)
            found = _states_of(group, states) if states and criterion.needs else None
            importances[group.name] = _score_group(criterion, weights, found, config)
    if here.size > 1:
        importances = _from_all(here, groups.prunable, importances)
    passed("scored", scores=importances)
    return importances


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
        importances[group.name] = Importance(here.total(scores), diagnosis)
    return importances


def find_criterion(name: str) -> Criterion:
    """Return a criterion by its name.

    Raises:
        CriterionError: there is none of that name; the text lists those that there are.
    """
    if name not in CRITERIA:
        raise CriterionError("A criterion", f"found {name!r}", f"Known criteria: {', '.join(CRITERIA)}")
    return CRITERIA[name]


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
