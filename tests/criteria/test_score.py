"""Criteria against values computed by hand, and the stage around them."""

import math

import numpy as np
import pytest
import torch
from tests.recording.test_collect_networks import conv_net, each, gather, images, mlp, slices
from torch import nn

from cria_prune.base.errors import CriterionError, SignalError, StructureError
from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.criteria.table import CRITERIA
from cria_prune.recording.collect import record
from cria_prune.spectrum.distortions import distortion, grounded_distortion, innovation
from cria_prune.spectrum.importance import rank_correlation
from cria_prune.structure.groups import Tap, UnitGroup


def tiny():
    """linear 1 -> 2, ReLU, linear 2 -> 1 with weights by hand; the signals of x = -1, 1, 3, -3."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [-4.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[2.0, -5.0]]))
        model[2].bias.zero_()
    group = UnitGroup(
        "0",
        "neuron",
        2,
        2,
        slices(2, ["0.weight"], ["0.bias"], ["2.weight"]),
        (Tap("0.weight", "output", -1, each(2)),),
        (Tap("2.weight", "input", -1, each(2)),),
    )
    return model, gather(model, group), [torch.tensor([[-1.0], [1.0], [3.0], [-3.0]])]


def scores(model, groups, states, criterion, **values):
    return score(model, groups, states, ScoreConfig(criterion=criterion, **values))


def test_hand_computed_values():
    model, groups, batches = tiny()
    states = record(model, groups, batches)
    for criterion, expected in {
        "l1": [3, 4],
        "l2": [3, 4],
        # unit 0 fires 0, 3, 9, 0 and unit 1 fires 4, 0, 0, 12
        "activation-norm": [2 * math.sqrt(90 / 4), 5 * math.sqrt(160 / 4)],
    }.items():
        found = scores(model, groups, states, criterion)["0"].scores
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_taylor_by_hand():
    model, groups, batches = tiny()
    # loss = sum of outputs; y = 2 relu(3x + b) - 5 relu(-4x + b'): g·w is 2·(3 + 9) and -5·(4 + 12)
    states = record(model, groups, batches * 2, gradients=True, loss=lambda net, x: net(x).sum())
    found = scores(model, groups, states, "taylor")["0"]
    torch.testing.assert_close(found.scores, torch.tensor([2 * 24.0**2, 2 * 80.0**2], dtype=torch.float64))
    assert found.diagnosis.split_half is None


def test_norms_follow_positions_over_several_tensors_and_widths():
    model, groups = conv_net(dtype=torch.float64)
    found = scores(model, groups, None, "l1")["3"].scores
    torch.testing.assert_close(found, model[3].weight.detach().abs().sum((1, 2, 3)))
    states = record(model, groups, images(16, dtype=torch.float64))
    rms = (states["3"].output.variance + states["3"].output.mean ** 2).sqrt()
    consumer = model[6].weight.detach().reshape(4, 5, 16).norm(dim=(0, 2))
    found = scores(model, groups, states, "activation-norm")["3"].scores
    torch.testing.assert_close(found, rms * consumer)
    shared, shared_groups = mlp(torch.float64)
    produced = torch.cat([shared.first.weight, shared.shared.weight], 1).detach()
    found = scores(shared, shared_groups, None, "l2")["first"].scores
    torch.testing.assert_close(found, produced.norm(dim=1))


def test_spectral_criteria_are_those_of_spectrum():
    model, groups = conv_net()
    states = record(model, groups, images(64))
    group = states["0"]
    norm2 = model[3].weight.detach().double().square().sum((0, 2, 3))
    options = {"neighbors": 3, "pairs": 4, "sketch": 8, "seed": 5}
    expected = {
        "distortion": distortion(group.input, group.output, ridge=0.1, **options).scores,
        "distortion-weighted": distortion(group.input, group.output, ridge=0.1, **options).scores * norm2,
        "consumed-distortion": distortion(
            group.input, group.output.scaled(norm2.sqrt()), ridge=0.1, **options
        ).scores,
        "grounded-distortion": grounded_distortion(group.input, group.output, **options).scores * norm2,
        "innovation": innovation(group.output).scores * norm2,
    }
    for criterion, values in expected.items():
        asked = {key: value for key, value in options.items() if key in ("seed", *CRITERIA[criterion].reads)}
        asked |= {} if criterion in ("grounded-distortion", "innovation") else {"ridge": 0.1}
        assert len(asked) == {"innovation": 1, "grounded-distortion": 4}.get(criterion, 5)
        found = scores(model, groups, states, criterion, **asked)["0"]
        torch.testing.assert_close(found.scores, values)
        assert found.scores.shape == (6,) and found.scores.dtype == torch.float64


def test_innovation_magnitude_is_the_mean_of_two_ranks():
    model, groups = conv_net()
    states = record(model, groups, images(64))
    one, other = (
        scores(model, groups, states, name)["0"].scores.tolist() for name in ("innovation", "group-l2")
    )
    expected = [
        (sum(a <= item for a in one) + sum(b <= with_it for b in other)) / 12
        for item, with_it in zip(one, other, strict=True)
    ]
    found = scores(model, groups, states, "innovation-magnitude")["0"]
    assert found.scores.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.diagnosis.split_half is not None


def test_innovation_magnitude_of_a_dead_unit_is_nothing_whatever_its_weights():
    model, groups = mlp()
    with torch.no_grad():
        model.first.bias[2], model.shared.bias[2] = -1e4, -1e4
        model.first.weight[2] *= 100
        model.shared.weight[:, 2] *= 100
    states = record(model, groups, [torch.randn(60, 7)])
    found = scores(model, groups, states, "innovation-magnitude")["first"]
    assert found.diagnosis.dead == (2,) and found.scores[2] == 0
    alive = found.scores[torch.arange(len(found.scores)) != 2]
    assert alive.min() > 0 and float(alive.max()) <= 1
    assert float(alive.sum()) == pytest.approx((len(alive) + 1) / 2)  # ranks of the live alone


def test_split_half_is_the_correlation_of_the_halves():
    model, groups = conv_net()
    states = record(model, groups, images(2), RecordConfig(positions=4))
    group = states["0"]
    found = scores(model, groups, states, "innovation")["0"].diagnosis.split_half
    norm2 = model[3].weight.detach().double().square().sum((0, 2, 3))
    even, odd = (innovation(half, norm2).scores for half in group.outputs)
    assert found == rank_correlation(even, odd) < 1
    assert scores(model, groups, states, "innovation", split_half=False)["0"].diagnosis.split_half is None
    assert scores(model, groups, states, "l2")["0"].diagnosis.split_half is None


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_prunable_group_and_repeats(criterion):
    model, groups = conv_net()
    if criterion == "bn-scale":  # the other group has no batch norm
        groups = gather(model, groups["0"])
    states = record(model, groups, images(32), per_example=True)
    one, two = (scores(model, groups, states, criterion) for _ in range(2))
    assert list(one) == [group.name for group in groups.prunable]
    for name, importance in one.items():
        assert importance.scores.shape == (groups[name].size,)
        assert torch.isfinite(importance.scores).all() and (importance.scores >= 0).all()
        assert torch.equal(importance.scores, two[name].scores)
        assert (
            "states" not in CRITERIA[criterion].needs
            or criterion in ("taylor", "fisher")
            or (-1 <= importance.diagnosis.split_half <= 1)
        )
    item = CRITERIA[criterion]
    assert item.name == criterion and item.source and item.summary and item.function.__doc__


def test_random_follows_seed_and_name_only():
    model, groups = conv_net(units=5)
    one = scores(model, groups, None, "random")
    torch.manual_seed(99)
    assert torch.equal(one["0"].scores, scores(model, groups, None, "random")["0"].scores)
    assert not torch.equal(one["0"].scores, one["3"].scores)
    assert not torch.equal(one["0"].scores, scores(model, groups, None, "random", seed=1)["0"].scores)


def test_errors_say_what_to_do():
    model, groups = conv_net()
    with pytest.raises(CriterionError, match=r"found 'magic'\. Known criteria: random, l1, l2, group-l2"):
        scores(model, groups, None, "magic")
    with pytest.raises(CriterionError, match=r"no recorded states.*record\(model, groups, batches\)"):
        scores(model, groups, None, "distortion")
    with pytest.raises(CriterionError, match=r"no recorded states.*gradients=True"):
        scores(model, groups, None, "taylor")
    with pytest.raises(CriterionError, match=r"no recorded states.*record\(model, groups, batches, per_ex"):
        scores(model, groups, None, "fisher")
    states = record(model, groups, images(16))
    with pytest.raises(CriterionError, match=r"without gradients\. Record again"):
        scores(model, groups, states, "taylor")
    with pytest.raises(CriterionError, match=r"without gradients\. Record again.*per_example=True"):
        scores(model, groups, states, "fisher")
    batched = record(model, groups, images(16), gradients=True)
    with pytest.raises(CriterionError, match=r"without the gradients of each example\..*per_example=True"):
        scores(model, groups, batched, "fisher")
    smaller, fewer = conv_net(units=4)
    with pytest.raises(StructureError, match="group '0' of 4 units: the states hold 6 units"):
        scores(smaller, fewer, states, "innovation")
    with pytest.raises(StructureError, match=r"'0.weight' is \(4, 3, 3, 3\)"):
        scores(smaller, groups, None, "l1")


@pytest.mark.parametrize(("criterion", "tensor"), [("l2", "0.weight"), ("innovation", "3.weight")])
def test_a_broken_weight_is_named(criterion, tensor):
    model, groups = conv_net()
    states = record(model, groups, images(16))
    with torch.no_grad():
        model.get_parameter(tensor)[0, 1, 0, 0] = np.inf
    with pytest.raises(SignalError, match=f"The weights of group '0': '{tensor}' holds NaN or infinity"):
        scores(model, groups, states, criterion)
