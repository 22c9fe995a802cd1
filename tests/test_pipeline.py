"""prune(): rounds, budgets, untouched models and clear errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from watching import never

from cria_prune import (
    CRITERIA,
    PruneConfig,
    PruneResult,
    discover,
    plan,
    prune,
    record,
    score,
    verify,
)
from cria_prune.base.errors import (
    CriterionError,
    DataError,
    SignalError,
    StructureError,
    TargetError,
)
from cria_prune.structure.groups import shrink
from networks import OptionA, Plain, randomize

GENERATOR = torch.Generator().manual_seed(3)
BATCHES = [
    (torch.randn(16, 3, 8, 8, generator=GENERATOR), torch.randint(4, (16,), generator=GENERATOR))
    for _ in range(3)
]


def config(**values: object) -> PruneConfig:
    plan = {"reduction": 0.5, "rounds": 2, **values}
    return PruneConfig(plan=plan, record={"examples": 48})


def normed() -> nn.Sequential:
    """Batch norms in every group."""
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
    return nn.Sequential(
        *(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_and_leaves_the_model(criterion: str, repair: bool) -> None:
    torch.manual_seed(0)
    model = randomize(normed() if criterion == "bn-scale" else Plain()).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    result = prune(
        model,
        BATCHES,
        PruneConfig(
            **{
                **config().model_dump(),
                "score": {"criterion": criterion},
                "repair": "once" if repair else "none",
                "batch_norm": repair,
            }
        ),
    )
    assert result.report["reached"] >= 0.5
    assert sum(item.numel() for item in result.model.parameters()) == result.report["parameters"]
    if repair:
        differences = [item.verification.difference for item in result.rounds if item.verification]
        assert len(differences) == 2 and max(differences) <= 1e-10 and all(i.repairs for i in result.rounds)
    else:
        assert verify(model, result.plan, result.model, BATCHES[0]).difference <= 1e-10
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_stages_alone_give_what_one_round_gives() -> None:
    model = randomize(Plain())
    result = prune(model, BATCHES, config(rounds=1))
    groups = discover(model, BATCHES[0])
    states = record(model, groups, BATCHES, result.config.record)
    scores = {name: item.scores.numpy() for name, item in score(model, groups, states).items()}
    step = plan(groups, scores, result.config.plan)
    assert step.kept == result.plan.kept and step.cuts == result.plan.cuts
    assert shrink(groups, step.kept).shapes == result.groups.shapes


def test_the_same_seed_gives_the_same_plan_and_rounds_only_remove() -> None:
    model = randomize(Plain())
    one, two = prune(model, BATCHES, config()), prune(model, iter(BATCHES), config())
    assert one.plan == two.plan
    first, second = (item.report["parameters"] for item in one.rounds)
    assert float(one.report["parameters_dense"]) > float(first) > float(second)
    assert "reached" in str(one) and f"{int(second):,}" in str(one)


def test_budgets_of_macs_and_of_the_prunable_part() -> None:
    model = randomize(Plain())
    by_macs = prune(model, BATCHES, config(of="macs")).report
    assert (
        0.5 <= 1 - float(by_macs["macs"]) / float(by_macs["macs_dense"]) == pytest.approx(by_macs["reached"])
    )
    assert prune(model, BATCHES, config(of="prunable", ranking="global")).report["reached"] >= 0.5


def test_residual_width_is_pruned_only_on_request() -> None:
    model = randomize(OptionA())
    inner = prune(model, BATCHES, config(reduction=0.2))
    assert len(inner.plan.kept["stem"]) == 8 and len(inner.plan.kept["a1"]) < 8
    everything = prune(model, BATCHES, config(reduction=0.2, residual=True))
    assert len(everything.plan.kept["stem"]) < 8


def test_on_round_sees_every_round_and_evaluate_is_shown() -> None:
    seen: list[PruneResult] = []
    result = prune(randomize(Plain()), BATCHES, config(), evaluate=lambda model: 0.25, on_round=seen.append)
    assert [len(item.rounds) for item in seen] == [1, 2] and seen[-1] is result
    assert [item.metric for item in result.rounds] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"reduction": 1.5}, TargetError, r"A reduction of 1.5: it is not between 0 and 1"),
        ({"reduction": 0.99}, TargetError, r"at most \d+\.\d+% can be removed with a floor"),
    ],
)
def test_targets_out_of_range(change: dict[str, float], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        prune(randomize(Plain()), BATCHES, config(**change))


def test_bad_batches() -> None:
    model = randomize(Plain())
    with pytest.raises(DataError, match="found none"):
        prune(model, [], config())
    with pytest.raises(DataError, match="A batch for the model: found str"):
        prune(model, ["text"], config())  # type: ignore[list-item]
    with pytest.raises(DataError, match="found int"):
        prune(model, 3, config())  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"forward pass of Plain on the example inputs of shape"):
        prune(model, [torch.randn(4, 5, 8, 8)], config())


def test_not_finite_weights_and_activations_and_unknown_criterion() -> None:
    model = randomize(Plain())
    with pytest.raises(CriterionError, match=r"found 'magic'.*Known criteria: random, l1"):
        prune(model, BATCHES, PruneConfig(score={"criterion": "magic"}))
    with torch.no_grad():
        model.fc1.bias[2] = float("nan")
    with pytest.raises(SignalError, match=r"weights of 'fc1.bias': found NaN"):
        prune(model, BATCHES, config())
    model = randomize(Plain())
    broken = [(images * float("inf"), target) for images, target in BATCHES]
    with pytest.raises(SignalError, match="'conv1'"):
        prune(model, broken, config())


def test_a_network_with_nothing_to_prune() -> None:
    with pytest.raises(StructureError, match=r"no group can be pruned \(0: is part of the model's output\)"):
        prune(nn.Sequential(nn.Linear(3, 2)), [torch.randn(8, 3)], config())


def test_a_forward_that_writes_into_its_input_leaves_the_calibration_data() -> None:
    class Scaling(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(3))

    batches = [(images.clone(), target) for images, target in BATCHES]
    prune(randomize(Scaling()), batches, config())
    assert all(torch.equal(left[0], right[0]) for left, right in zip(batches, BATCHES, strict=True))


def test_a_model_that_cannot_be_copied_is_an_error_that_says_why() -> None:
    model = randomize(Plain())
    model.computed = model.fc1.weight * 2
    with pytest.raises(StructureError, match=r"A copy of Plain: Only Tensors created.*detach computed"):
        prune(model, BATCHES, config())


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + torch.rand(3)


def test_data_and_networks_that_can_say_nothing_are_refused_before_anything_is_recorded() -> None:
    several, net = [torch.randn(8, 4) for _ in range(4)], Random()
    for model, data, said in (
        (net, several, "apart in two runs"), (net.layers, [torch.ones(8, 4)] * 4, "32 examples, 1 distinct"),
    ):  # fmt: skip
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with never("record", "score"), pytest.raises(DataError, match=said):
            prune(model, data)
        assert model.training and all(torch.equal(model.state_dict()[name], before[name]) for name in before)
