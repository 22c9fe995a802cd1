"""What a plan says of single groups: by which names, what it does, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cria_prune import PlanConfig, PruneConfig, UnitGroups, discover, plan, prune
from cria_prune.base.errors import ConfigError, CriaError, StructureError, TargetError
from cria_prune.planning.budget import count_macs, count_parameters
from cria_prune.planning.control import check_alike, left_alone, matched, on_the_way
from cria_prune.structure.groups import without_residual


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Four gated blocks around a stream of 16, and a layer before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(6, 16), nn.ModuleList(Block() for _ in range(4))
        self.hidden, self.head = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.relu(self.hidden(x)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def groups(net: nn.Module) -> UnitGroups:
    return without_residual(discover(net, torch.randn(2, 6)))


BATCHES = [torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def left(groups: UnitGroups, **config: Any) -> dict[str, int]:
    """How many units stay in every group that is cut, by scores of one draw."""
    draw = np.random.default_rng(0)
    scores = {group.name: draw.random(group.size) for group in groups}
    made = plan(groups, scores, PlanConfig(**config))
    return {name: len(stays) for name, stays in made.kept.items() if len(stays) < made.sizes[name]}


def names(groups: UnitGroups, pattern: str) -> list[str]:
    return [group.name for group in matched(groups, pattern)]


def test_patterns_are_of_the_names_that_inspect_prints(groups: UnitGroups) -> None:
    units = [group.name for group in groups if group.kind == "gated"]
    assert len(units) == 4 and units[0].startswith("layers.0.")
    assert names(groups, units[1]) == units[1:2]
    assert names(groups, "layers.*") == names(groups, "layers.0-3.{up, gate}") == units
    # The module that makes one half of a gated unit, or the block around it, stands for the whole.
    assert names(groups, "layers.2.up") == names(groups, "layers.2.gate") == units[2:3]
    assert set(units[1:3]) <= set(names(groups, "layers.1-2"))
    assert names(groups, "hidden") == ["hidden"] and names(groups, "h*d*n") == ["hidden"]
    with pytest.raises(ConfigError, match=r"'layers.*.upp' names: there is none; the nearest names are .*up"):
        matched(groups, "layers.*.upp")
    with pytest.raises(ConfigError, match="'9' names: there is none; there are stem, layers"):
        matched(groups, "9")


def test_shares_and_sizes_are_what_is_left_and_the_others_stay(groups: UnitGroups) -> None:
    units = [group.name for group in groups if group.kind == "gated"]
    assert left(groups, share={"layers.*": 0.25}) == dict.fromkeys(units, 24)
    assert left(groups, keep={"layers.0": 10, "hidden": 20}) == {units[0]: 10, "hidden": 20}
    # Beside a share of the whole the others make it up.
    both = left(groups, keep={"layers.0": 30}, reduction=0.4)
    assert both[units[0]] == 30 and set(both) == {*units, "hidden"} and both[units[1]] < 20
    assert left(groups, ignore=("layers.0-1", "hidden"), reduction=0.3).keys() == set(units[2:])
    assert left(groups, protect="ends", reduction=0.3).keys() == set(units[1:])  # `hidden` is the last
    assert left(groups, protect="first", reduction=0.3).keys() == {*units[1:], "hidden"} - {units[0]}
    assert left(groups, share={"*": 0.3}, ignore=("layers.3",)).keys() == {*units[:3], "hidden"}
    assert left(groups, share={"hidden": 0.3}, multiple=8) == {"hidden": 16}
    assert left(groups, share={"hidden": 0.0, "layers.0": 0.5}) == {units[0]: 16}


@pytest.mark.parametrize(("target", "count"), [("to_parameters", count_parameters), ("to_macs", count_macs)])
def test_absolute_targets_are_met(groups: UnitGroups, target: str, count: Any) -> None:
    total = count(groups)
    for wanted in (int(total * 0.7), f"{total * 0.7 / 1e3:.3f}k"):
        sizes = left(groups, **{target: wanted}, ranking="uniform")
        now = count(groups, sizes)
        assert total * 0.66 < now <= total * 0.7
    config = PlanConfig(**{target: "1.5M"})
    assert getattr(config, target) == 1.5e6 and config.of == target[3:]
    assert PlanConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("repair", "rounds", "ranking"), [("walk", 1, "measured"), ("once", 3, "uniform"), ("none", 2, "global")]
)
def test_rounds_repair_and_proof_work_with_it(net: nn.Module, repair: str, rounds: int, ranking: str) -> None:
    settings = {
        "keep": {"layers.1": 12}, "share": {"layers.2": 0.5}, "ignore": ["layers.0"], "protect": "last",
        "reduction": 0.35, "rounds": rounds, "ranking": ranking,
    }  # fmt: skip
    result = prune(net, BATCHES, PruneConfig(plan=settings, repair=repair))
    kept = {name: len(stays) for name, stays in result.plan.kept.items()}
    units = [name for name in kept if name.startswith("layers")]
    assert [kept[name] for name in units[:3]] == [32, 12, 16] and kept["hidden"] == 24 and kept[units[3]] < 32
    assert result.model.layers[1].up.out_features == 12
    assert all(item.verification.difference < 1e-10 for item in result.rounds)
    sizes = [len(item.kept[units[1]]) for item in result.rounds]
    assert sizes == {1: [12], 2: [22, 12], 3: [26, 19, 12]}[rounds], "as many steps as there are rounds"
    assert result.report["reached"] >= 0.35 and result.rounds[-1].fidelity


def test_a_plain_configuration_leaves_all_alike_layers_alone_or_none(groups: UnitGroups) -> None:
    check_alike(groups, left_alone(groups, PlanConfig(ignore=["layers.*"])))
    with pytest.raises(ConfigError, match=r"protects its first.*describes it and 'layers.1.*per-layer"):
        check_alike(groups, left_alone(groups, PlanConfig(protect="first")))


def test_a_part_of_the_way_is_never_below_its_end(groups: UnitGroups) -> None:
    config = PlanConfig(multiple=8)
    name = names(groups, "layers.0")[0]
    assert [on_the_way(groups, {name: 16}, config, part)[name] for part in (0.1, 0.5, 0.99, 1)] == [
        [32], [24], [24], [16],
    ]  # fmt: skip


def test_a_pruned_network_is_cut_to_sizes_again(net: nn.Module) -> None:
    first = prune(net, BATCHES, PruneConfig(plan={"keep": {"layers.*": 20}}, repair="none"))
    again = prune(first.model, BATCHES, PruneConfig(plan={"share": {"layers.*": 0.5}}, repair="none"))
    assert [layer.up.out_features for layer in again.model.layers] == [10] * 4
    assert again.model.hidden.out_features == 24
    wide = {"keep": {"stem": 12}, "residual": True}
    residual = prune(net, BATCHES, PruneConfig(plan=wide, repair="none"))
    assert residual.model.head.in_features == 24 and residual.model.stem.out_features == 12


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ({"ignore": "layer.0"}, ConfigError, r"there is none; the nearest names are .*layers.0"),
        ({"keep": {"layers.*": 12, "layers.0-1": 10}}, ConfigError,
         r"keep layers\.\*=12 leaves 12 of its units, and keep layers\.0-1=10 leaves 10. Write patterns"),
        ({"keep": {"head": 2}}, ConfigError, r"none of its groups can be cut \(head: is part of the"),
        ({"keep": {"layers.0": 12}, "ignore": "layers.0"}, ConfigError,
         r"none of its groups can be cut \(layers.0.*: the plan leaves it alone \(ignore 'layers.0'\)\)"),
        ({"keep": {"stem": 12}}, ConfigError, "residual width is pruned only when asked for"),
        ({"keep": {"hidden": 100}}, TargetError, "keep 100 units, it has 24 units. The nearest .*: 23, 24"),
        ({"keep": {"hidden": 1}}, TargetError, "a floor of 0.1 keeps 3 at least. The nearest .*; or low"),
        ({"keep": {"hidden": 10}, "multiple": 8}, TargetError, "numbers are in steps. The nearest .*: 8, 16"),
        ({"keep": {"layers.0": 12}, "uniform": True}, ConfigError,
         r"alike groups keep the same number of units, and 'layers.1.*' is not given it. Name all of them"),
        ({"keep": {"layers.*": 31}, "reduction": 0.7}, TargetError,
         r"at most .* with a floor of 0.1 .*, the sizes that are given \(share, keep\).* \(down to [\d,]+"),
        ({"ignore": "layers.*", "reduction": 0.7}, TargetError, r"what is left alone \(ignore, protect\)"),
        ({"to_parameters": 300}, TargetError, r"at most .* Ask for .* \(down to [\d,]+ parameters\)"),
        ({"to_parameters": "50M"}, TargetError, r"of 50,000,000 parameters: it has .* Ask for fewer"),
        ({"share": {"layers.*": 0.0}}, TargetError, "the sizes of single groups: they are those of now"),
        ({"ignore": "*"}, StructureError, "no group can be pruned"),
        ({"to_macs": 1e5, "reduction": 0.3}, ConfigError, "to_macs is given, and reduction 0.3 too"),
        ({"to_macs": 1e5, "to_parameters": 5}, ConfigError, "are both given: give one target"),
        ({"to_macs": 1e5, "of": "parameters"}, ConfigError, "to_macs is given, and of parameters too"),
        ({"to_parameters": "many"}, ConfigError, "must be a number, like 5M"),
        ({"share": ["layers"]}, ConfigError, "must be PATTERN=NUMBER"),
        ({"share": {"layers.*": 1.5}}, ConfigError, "should be less than 1"),
        ({"keep": ["a=1", "a=2"]}, ConfigError, "'a' is given 1 and 2"),
        ({"protect": "middle"}, ConfigError, "protect"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(groups: UnitGroups, config: Any, kind: type[CriaError], said: str) -> None:
    with pytest.raises(kind, match=said):
        left(groups, **config)
