"""Whatever Cria gives back prints on one screen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from cria_prune import (
    CRITERIA,
    LoadedCheckpoint,
    PruneConfig,
    RecordConfig,
    RecoverConfig,
    ablate,
    discover,
    plan,
    predict_memory,
    prune,
    record,
    recover,
    score,
    score_once,
)
from cria_prune.base.progress import LINES, WIDTH
from cria_prune.structure.groups import shrink

SCREEN = 8192
"""Characters at most."""


def deep(layers: int = 60) -> nn.Sequential:
    """Return a network of which no two layers are alike, so that none is folded away."""
    sizes = [10, *(20 + number for number in range(layers)), 10]
    parts: list[nn.Module] = []
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """One of each object that a user gets, of a network with 60 groups."""
    torch.manual_seed(0)
    model = deep()
    batches = [(torch.randn(40, 10), torch.randint(0, 10, (40,))) for _ in range(2)]
    inputs = [batch for batch, _ in batches]
    groups = discover(model, inputs[0])
    config = PruneConfig(score={"criterion": "l2"}, plan={"rounds": 2})
    result = prune(model, inputs, config)
    states = record(model, groups, inputs, RecordConfig(examples=80), consumed=True)
    scores = score(model, groups, states)
    values = {name: item.scores.numpy() for name, item in scores.items()}
    return {
        "groups": groups,
        "group": groups.groups[0],
        "states": states,
        "states of a group": states[groups.prunable[-1].name],
        "importance": scores[groups.prunable[0].name],
        "plan": plan(groups, values, config.plan),
        "result": result,
        "round": result.rounds[0],
        "scored": score_once(model, inputs),
        "ablation": ablate(model, groups, scores, lambda _network: 0.5),
        "checkpoint": LoadedCheckpoint(model, result.plan, {"sizes": dict(result.plan.sizes)}),
        "memory": predict_memory(model, groups, inputs[0], PruneConfig()),
        "recovery": recover(model, batches, RecoverConfig(epochs=1)),
        "criteria": CRITERIA,
        "config": PruneConfig(),
        "recovery's config": RecoverConfig(),
    }


OBJECTS = ("groups", "group", "states", "states of a group", "importance", "plan", "result", "round")
OBJECTS += ("scored", "ablation", "checkpoint", "memory", "recovery", "criteria", "config")
OBJECTS += ("recovery's config",)


@pytest.mark.parametrize("name", OBJECTS)
def test_it_prints_on_one_screen(printed: dict[str, Any], name: str) -> None:
    assert set(printed) == set(OBJECTS)
    for text in (str(printed[name]), repr(printed[name])):
        assert len(text) < SCREEN and text.count("\n") < LINES + 8, text


def test_groups_print_as_the_table_of_inspect(printed: dict[str, Any]) -> None:
    lines = str(printed["groups"]).splitlines()
    weights = [item.numel() for item in deep().parameters()]
    costs = f"{sum(weights):,} parameters, {sum(weights[::2]):,} MACs per example"
    assert lines[0] == f"groups: 60 prunable, 0 residual, 1 frozen; {costs}"
    assert " ".join(lines[1].split()) == "group kind units params/unit MACs/unit producers → consumers"
    assert lines[2].split() == ["0", "neuron", "20", "32", "31", "0", "→", "2"]
    assert lines[-1] == "... and 22 more groups" and len(lines) == LINES + 2
    assert max(map(len, lines)) <= WIDTH
    assert repr(printed["groups"]) == "UnitGroups(60 of 61 groups prunable)"
    assert repr(printed["group"]) == "UnitGroup('0', neuron, 20 units)"


def test_repeated_layers_are_said_once_and_frozen_ones_with_their_reason() -> None:
    groups = discover(nn.Sequential(*[Block() for _ in range(60)]), torch.randn(2, 8))
    assert [" ".join(line.split()) for line in str(groups).splitlines()] == [
        "groups: 60 prunable, 0 residual, 1 frozen; 12,720 parameters, 11,520 MACs per example",
        "group kind units params/unit MACs/unit producers → consumers",
        "0-59 60 ×",
        "up neuron 12 17 16 up → down",
        "frozen kind units why",
        "0.down residual 8 meets a tensor of fixed size in add in 0",
    ]
    assert repr(shrink(groups, {"3.up": [1, 2, 3]})["3.up"]) == "UnitGroup('3.up', neuron, 3 of 12 units)"
    assert repr(groups["0.down"]).endswith(
        "residual, 8 units, frozen: meets a tensor of fixed size in add in 0)"
    )
