from __future__ import annotations

import copy
import json
import math
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from watching import counted

import networks
from cria_prune import stages
from cria_prune.ablation import SHARES, Ablation, ablate, leaving, removal_orders
from cria_prune.base.errors import (
    ConfigError,
    SignalError,
    StructureError,
    TargetError,
    VerificationError,
)
from cria_prune.base.metrics import Metric, metric
from cria_prune.config import PruneConfig
from cria_prune.planning.plan import make_plan
from cria_prune.repair.consumers import compensate
from cria_prune.stages import discover
from cria_prune.structure.groups import without_residual
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import mask


class Sum(nn.Module):
    """The sum of weighted units: what is left of it is known without running anything."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        size = len(weights)
        self.up, self.down = nn.Linear(1, size, bias=False), nn.Linear(size, 1, bias=False)
        with torch.no_grad():
            self.up.weight.fill_(1)
            self.down.weight.copy_(weights[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def total(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.ones(1, 1)).sum())


def summed() -> tuple[Sum, np.ndarray]:
    weights = torch.tensor([5.0, 1.0, 9.0, 2.0, 7.0, 3.0, 10.0, 4.0, 8.0, 6.0])
    return Sum(weights), weights.numpy()


def test_what_is_left_is_the_sum_of_the_units_that_stay() -> None:
    model, weights = summed()
    groups = discover(model, torch.ones(2, 1))
    found = ablate(model, groups, {"up": weights}, total, SHARES, seeds=(0, 5), example=torch.ones(2, 1))
    assert found.dense == 55
    # the lowest first: 1 + 2 + ... + n leave; the highest first: 1 + 2 + ... + (10 - n) stay
    assert found.curves["lowest"] == tuple((55 - n * (n + 1) / 2,) for n in range(1, 10))
    assert found.curves["highest"] == tuple(((10 - n) * (11 - n) / 2,) for n in range(1, 10))
    for column, seed in enumerate((0, 5)):
        order = dict(list(removal_orders(groups, {"up": weights}, (seed,)))[2:])["random"]["up"]
        for n, row in enumerate(found.curves["random"], start=1):
            assert row[column] == pytest.approx(55 - weights[order[:n]].sum())
    assert found.units == SHARES and found.reached == pytest.approx(SHARES)
    assert found.difference is not None and found.difference < 1e-10


def test_what_the_repair_gives_back_is_measured() -> None:
    """The units are all the same function, so those that stay can do the work of those that leave."""
    model, weights = summed()
    groups, inputs = discover(model, torch.ones(2, 1)), torch.linspace(0.5, 1.5, 64)[:, None]
    found = ablate(
        model, groups, {"up": weights}, total, (0.1, 0.5, 0.9), batches=inputs.split(32), repair="once"
    )
    assert found.repair == found.to_dict()["repair"] == "once"
    assert found.difference is not None and found.difference < 1e-10
    for curve in found.curves.values():  # of m units that stay the ridge is worth 1e-4 / m of them
        for (value, *_), units in zip(curve, (9, 5, 1), strict=True):
            assert 55 * (1 - 1.01e-4 / units) <= value <= 55
    assert found.verdict.startswith("repaired at once, the criterion holds")
    walked = ablate(model, groups, {"up": weights}, total, (0.5,), batches=inputs.split(32))
    assert walked.repair == "walk" and all(value > 54.9 for ((value, *_),) in walked.curves.values())
    plain = ablate(model, groups, {"up": weights}, total, (0.5,), batches=inputs.split(32), repair="none")
    assert plain == ablate(model, groups, {"up": weights}, total, (0.5,)) and plain.repair == "none"


def test_every_repaired_network_is_the_one_that_compensate_makes() -> None:
    model = networks.randomize(networks.Plain())
    batches = list(torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0)).split(32))
    prepared = stages.prepare(model, batches, PruneConfig(score={"criterion": "l2"}, repair="once"))
    ranking, seen = stages.rank(prepared), list[nn.Module]()

    def evaluate(network: nn.Module) -> float:
        seen.append(network)
        return 0.5

    scores, groups = ranking.scores, prepared.groups
    with counted("record") as recorded:
        ablate(model, groups, scores, evaluate, (0.4,), seeds=(3,), batches=batches, repair="once")
    assert len(recorded) == 1 and ranking.consumed is not None
    for found, (_, order) in zip(seen[1:], removal_orders(groups, scores, (3,)), strict=True):
        step = make_plan(
            groups, {key: np.sort(first[leaving(len(first), 0.4) :]) for key, first in order.items()}
        )
        expected = apply(compensate(model, groups, step.kept, ranking.consumed)[0], step).state_dict()
        states = found.state_dict()
        assert expected.keys() == states.keys()
        assert all(torch.equal(states[name], value) for name, value in expected.items())


def test_a_repair_needs_batches_and_is_one_of_the_choices() -> None:
    model, weights = summed()
    groups, scores = discover(model, torch.ones(2, 1)), {"up": weights}
    with pytest.raises(ConfigError, match="there are no batches to repair on"):
        ablate(model, groups, scores, total, repair="once")
    with pytest.raises(ConfigError, match="'walk', 'once' or 'none'"):
        ablate(model, groups, scores, total, repair="foo", batches=[torch.ones(32, 1)])


def test_every_value_is_that_of_the_masked_network_and_the_counts_are_those_of_the_cut_one() -> None:
    model = networks.randomize(networks.Plain())
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    groups = without_residual(discover(model, x))
    generator = np.random.default_rng(1)
    scores = {group.name: generator.random(group.size) for group in groups.prunable}
    prunable = {item.tensor for group in groups.prunable for item in group.slices} & set(groups.parameters)
    counts: list[int] = []

    def evaluate(network: nn.Module) -> float:
        counts.append(sum(item.numel() for name, item in network.named_parameters() if name in prunable))
        with torch.no_grad():
            return float(network.eval()(x).square().mean())

    found = ablate(model, groups, scores, evaluate, (0.2, 0.45, 0.7), seeds=(3,))
    cut, dense = counts[1:], counts[0]
    orders = list(removal_orders(groups, scores, (3,)))
    for number, share in enumerate(found.shares):
        units = removed = 0
        for name, order in orders:
            kept = {key: first[leaving(len(first), share) :] for key, first in order.items()}
            value = evaluate(mask(model, make_plan(groups, kept)))
            assert found.curves[name][number] == pytest.approx((value,), rel=1e-5)
            units = sum(map(len, order.values()))
            removed = units - sum(map(len, kept.values()))
        assert found.units[number] == removed / units
        sizes = set(cut[3 * number : 3 * number + 3])
        assert sizes == {round((1 - found.reached[number]) * dense)}
        assert found.reached[number] == pytest.approx(1 - sizes.pop() / dense, abs=1e-12)


def test_shares_are_rounded_to_whole_units_and_one_stays() -> None:
    for size in range(2, 60):
        for hundredths in range(1, 100):
            exact = math.floor(Fraction(hundredths * size, 100) + Fraction(1, 2))
            assert leaving(size, hundredths / 100) == min(exact, size - 1), (size, hundredths)
    assert leaving(2, 0.999) == 1 and leaving(50, 0.29) == 15


def test_orders_are_of_the_scores_and_of_the_seeds() -> None:
    model = networks.randomize(networks.Plain())
    groups = discover(model, torch.randn(2, 3, 10, 10))
    scores = {group.name: np.zeros(group.size) for group in groups.prunable}
    scores["conv1"] = np.array([3.0, 1.0, 1.0, 3.0, 0.0, 2.0, 3.0, 0.0])
    orders = list(removal_orders(groups, scores, (0, 1)))
    assert [name for name, _ in orders] == ["lowest", "highest", "random", "random"]
    assert orders[0][1]["conv1"].tolist() == [4, 7, 1, 2, 5, 0, 3, 6]
    assert orders[1][1]["conv1"].tolist() == [0, 3, 6, 5, 1, 2, 4, 7]
    assert orders[0][1]["conv2"].tolist() == orders[1][1]["conv2"].tolist() == list(range(6))
    first, second = orders[2][1], orders[3][1]
    drawn = np.random.default_rng([1, zlib.crc32(b"conv1")]).permutation(8)
    assert sorted(first["conv1"]) == list(range(8)) and np.array_equal(second["conv1"], drawn)
    assert list(first["conv1"]) != list(second["conv1"])
    again = list(removal_orders(groups, scores | {"conv1": np.arange(8.0)}, (1,)))[2][1]
    assert all(np.array_equal(again[name], second[name]) for name in second)


def made(curves: dict[str, list[list[float]]], of: str | Metric = "accuracy", dense: float = 0.9) -> Ablation:
    shares = tuple((number + 1) / 10 for number in range(len(curves["random"])))
    rows = {name: tuple(map(tuple, values)) for name, values in curves.items()}
    return Ablation(
        metric(of) if isinstance(of, str) else of, dense, shares, rows, (0, 1), shares, shares, 1e-16
    )


def test_the_criterion_holds_only_beyond_every_random_seed() -> None:
    random = [[0.6, 0.7], [0.6, 0.7], [0.6, 0.7], [0.1, 0.1]]
    curves = {"lowest": [[0.8], [0.7], [0.65], [0.1]], "highest": [[0.5], [0.6], [0.5], [0.1]]}
    found = made({**curves, "random": random})
    assert found.misses() == {"lowest": (0.2, 0.3, 0.4), "highest": (0.2, 0.4)}
    assert found.verdict == (
        "without repair, the criterion holds at 1 of 4 shares: lowest-first not better than every random "
        "seed at 0.2, 0.3, 0.4; highest-first not worse than every random seed at 0.2, 0.4"
    )
    good = made({"lowest": [[0.8]], "highest": [[0.5]], "random": [[0.6, 0.7]]})
    assert good.verdict.endswith("at every share") and not any(good.misses().values())
    perplexity = {"lowest": [[20.0]], "highest": [[90.0]], "random": [[40.0, 60.0]]}
    assert not any(made(perplexity, "perplexity-128", 15.0).misses().values())
    assert made(perplexity, Metric("words", higher_is_better=True)).misses() == {
        "lowest": (0.1,), "highest": (0.1,),
    }  # fmt: skip
    broken = made({"lowest": [[math.nan]], "highest": [[math.inf]], "random": [[40.0, 60.0]]}, "loss")
    assert broken.misses() == {"lowest": (0.1,), "highest": ()}


def test_it_prints_and_goes_to_json() -> None:
    found = made({"lowest": [[math.nan]], "highest": [[math.inf]], "random": [[40.0, 60.0]]}, "loss", 15.0)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["curves"] == {
        "lowest": [[0.1, [None]]], "highest": [[0.1, [None]]], "random": [[0.1, [40.0, 60.0]]],
    }  # fmt: skip
    assert (values["metric"], values["higher_is_better"], values["dense"]) == ("loss", False, 15.0)
    assert values["shares"] == values["reached"] == [0.1] and values["random_seeds"] == [0, 1]
    lines = str(found).splitlines()
    assert "50 (40 to 60)" in lines[2] and "10.00 %" in lines[2] and lines[3] == found.verdict


def test_the_model_is_left_and_what_evaluate_gets_is_its_own() -> None:
    model, weights = summed()
    before = copy.deepcopy(model.state_dict())

    def spoil(network: nn.Module) -> float:
        value = total(network)
        with torch.no_grad():
            for item in network.parameters():
                item.zero_()
        return value

    groups = discover(model, torch.ones(2, 1))
    found = ablate(model, groups, {"up": weights}, spoil, (0.5,), seeds=(0,))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert found.curves["lowest"] == ((40.0,),) and found.difference is None


def test_a_wrong_cut_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = summed()

    def wrong(network: nn.Module, plan: object) -> nn.Module:
        return module_apply(network, make_plan(groups, {"up": [0]}))

    groups = discover(model, torch.ones(2, 1))
    module_apply = stages.apply
    monkeypatch.setattr(stages, "apply", wrong)
    with pytest.raises(VerificationError, match="equal to the masked model"):
        ablate(model, groups, {"up": weights}, total, (0.5,), example=torch.ones(2, 1))


def test_bad_input_is_refused_before_anything_is_measured() -> None:
    model, weights = summed()
    groups = discover(model, torch.ones(2, 1))

    def never(_network: nn.Module) -> float:
        raise AssertionError("evaluated")

    def refused(kind: type[Exception], text: str, **options: object) -> None:
        values: dict = {"groups": groups, "scores": {"up": weights}, "shares": (0.5,), **options}
        with pytest.raises(kind, match=text):
            ablate(model, evaluate=never, **values)

    refused(TargetError, "found none", shares=())
    refused(TargetError, "not between 0 and 1", shares=(0.5, 1.0))
    refused(TargetError, "each once", shares=(0.5, 0.5))
    refused(ConfigError, "at least one seed", seeds=())
    refused(ConfigError, "found the seeds 1, 1", seeds=(1, 1))
    refused(ConfigError, "found the seeds -1", seeds=(-1,))
    refused(StructureError, "found no scores for it", scores={})
    refused(StructureError, r"found scores of shape \(3,\)", scores={"up": [1, 2, 3]})
    refused(SignalError, "are NaN or infinite", scores={"up": np.full(10, np.nan)})
    refused(StructureError, "no group can be pruned", groups=discover(nn.Linear(3, 2), torch.ones(2, 3)))
