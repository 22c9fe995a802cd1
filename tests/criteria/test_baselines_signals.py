"""The criteria `apoz` and `chip`, against values by hand and slow twins on full activations."""

import math

import pytest
import torch
from tests.criteria.test_baselines_weights import llama
from tests.recording.test_collect import ALL, channels, hooked
from tests.recording.test_collect_networks import conv_net, images, mlp
from torch import nn

from cria_prune import discover
from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.graph.moments import MomentAccumulator, Moments
from cria_prune.recording.collect import record
from cria_prune.spectrum.distortions import channel_independence
from cria_prune.spectrum.importance import rank_correlation


def scored(model, groups, states, criterion, name):
    return score(model, groups, states, ScoreConfig(criterion=criterion))[name]


def seen_by_consumers():
    """Signals (units, all features and samples) of each kind of group: (model, groups, states, name, Y)."""
    conv, groups = conv_net(dtype=torch.float64)
    batches = images(12, batch=5, dtype=torch.float64)
    states = record(conv, groups, batches, ALL)
    seen = hooked(conv, torch.cat([x for x, _ in batches]), before=["3", "6"])
    yield conv, groups, states, "0", channels(seen["in", "3"][0])
    flat = seen["in", "6"][0].reshape(12, 5, 16)
    yield conv, groups, states, "3", flat.movedim(1, 0).flatten(1)
    shared, groups = mlp(torch.float64)
    X = torch.randn(9, 7, dtype=torch.float64)
    states = record(shared, groups, [X[:4], X[4:]])
    inner = hooked(shared, X, before=["shared"], after=["shared"])
    parts = [*inner["in", "shared"], inner["out", "shared"][1].relu()]
    yield shared, groups, states, "first", torch.cat(parts).T
    network = llama()
    tokens = torch.randint(0, 50, (6, 7))
    groups = discover(network, {"input_ids": tokens})
    states = record(network, groups, [{"input_ids": tokens[:4]}, {"input_ids": tokens[4:]}], ALL)
    o, down = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    inner = hooked(network, tokens, before=[o, down])
    names = {group.kind: group.name for group in groups.prunable if group.kind != "residual"}
    yield network, groups, states, names["gated"], inner["in", down][0].flatten(0, 1).T
    heads = inner["in", o][0].reshape(6 * 7, 3, 8)
    yield network, groups, states, names["kv group"], heads.movedim(1, 0).flatten(1)


CASES = pytest.mark.parametrize("case", range(5), ids=["channel", "flattened", "neuron", "gated", "kv group"])


@pytest.fixture(scope="module")
def cases():
    torch.manual_seed(0)
    return list(seen_by_consumers())


@CASES
def test_apoz_is_the_share_of_outputs_above_zero(case, cases):
    model, groups, states, name, Y = cases[case]
    found = scored(model, groups, states, "apoz", name)
    expected = [sum(value > 0 for value in row) / len(row) for row in Y.tolist()]
    assert found.scores.tolist() == pytest.approx(expected)
    halves = [half.positive.cpu() for half in states[name].outputs]
    assert found.diagnosis.split_half == pytest.approx(rank_correlation(*halves))


def test_apoz_by_hand_for_a_relu_and_what_is_never_exactly_zero():
    """Signals of x = -1, 1, 3, -3, 0 are 3x, -4x and x + 2."""
    X = torch.tensor([[-1.0], [1.0], [3.0], [-3.0], [0.0]])
    for activation in (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.LeakyReLU()):
        model = nn.Sequential(nn.Linear(1, 3), activation, nn.Linear(3, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[3.0], [-4.0], [1.0]]))
            model[0].bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
        groups = discover(model, X)
        states = record(model, groups, [X])
        found = scored(model, groups, states, "apoz", "0").scores
        assert found.tolist() == pytest.approx([2 / 5, 2 / 5, 4 / 5])
    assert states["0"].input.positive is None  # only the side that is asked for is counted


def test_sketched_groups_count_too():
    model, groups = conv_net()
    sketched = record(model, groups, images(16), RecordConfig(exact_units=5, sketch_columns=32))
    assert sketched["0"].output.covariance is None
    exact = record(model, groups, images(16))
    one, other = (scored(model, groups, states, "apoz", "0").scores for states in (sketched, exact))
    torch.testing.assert_close(one, other)


def twin(Y):
    """What the nuclear norm of Y (d, M) loses with each row, one singular value decomposition each."""
    whole = torch.linalg.svdvals(Y).sum()
    rows = torch.arange(len(Y))
    lost = [whole - torch.linalg.svdvals(Y[rows != row]).sum() for row in rows]
    return torch.stack(lost) / math.sqrt(Y.shape[1])


@CASES
def test_chip_is_what_the_nuclear_norm_loses(case, cases):
    model, groups, states, name, Y = cases[case]
    found = scored(model, groups, states, "chip", name)
    expected = twin(Y)
    torch.testing.assert_close(found.scores, expected, rtol=1e-6, atol=1e-6 * float(expected.max()))
    halves = [channel_independence(half) for half in states[name].outputs]
    assert found.diagnosis.split_half == pytest.approx(rank_correlation(*halves))


def independence(rows):
    return channel_independence(Moments.from_signals(torch.tensor(rows, dtype=torch.float64))).tolist()


def test_chip_by_hand():
    # orthogonal rows lose their own norms: 3, 4 and nothing
    assert independence([[3.0, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]) == pytest.approx([1.5, 2, 0], abs=1e-9)
    # two equal rows of norm 2 have one singular value of 2 √2: without one of them 2 is left
    assert independence([[2.0, 0], [2, 0], [0, 1]]) == pytest.approx(
        [2 - math.sqrt(2)] * 2 + [math.sqrt(0.5)]
    )
    assert independence([[0.0, 0], [0, 0]]) == [0, 0]
    assert independence([[2.0, 2.0]]) == pytest.approx([2])  # the mean counts: nothing is centred


@pytest.mark.parametrize(("d", "M"), [(40, 30), (30, 200), (1, 5)])
def test_chip_over_many_orders_of_magnitude_and_without_full_rank(d, M):
    generator = torch.Generator().manual_seed(d)
    Y = torch.randn(d, M, generator=generator, dtype=torch.float64)
    Y *= 10 ** torch.linspace(-4, 2, d, dtype=torch.float64)[:, None]
    found = channel_independence(Moments.from_signals(Y))
    expected = twin(Y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    assert (found >= 0).all()


def test_chip_of_a_sketch_is_that_of_its_columns():
    X = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    total = MomentAccumulator(30, exact=False, columns=32)
    total.add(X)
    found = channel_independence(total.moments())  # up to its columns a sketch is exact
    torch.testing.assert_close(found, twin(X), rtol=1e-4, atol=1e-6)
