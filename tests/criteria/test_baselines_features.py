"""Criteria that weigh every feature of a unit, against values by hand and a slow twin with hooks."""

import math

import pytest
import torch
import transformers
from tests.criteria.test_baselines_weights import llama
from tests.recording.test_collect import hooked
from tests.recording.test_collect_networks import conv_net, each, gather, images, mlp, slices
from torch import nn

from cria_prune import discover
from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.recording import states
from cria_prune.recording.collect import record
from cria_prune.recording.states import FeatureMoments
from cria_prune.spectrum.importance import rank_correlation
from cria_prune.structure.groups import ParameterSlice, Tap, UnitGroup
from networks import Plain, randomize

ALL = RecordConfig(examples=10_000, positions=10_000)
BOTH = ("wanda-sp", "fluctuation")


def scores(model, groups, states, criterion, name):
    return score(model, groups, states, ScoreConfig(criterion=criterion))[name]


def twin(criterion, read, units, consumers):
    """The formulas in loops: consumers are (signals (S, n), weight (rows, n)), `read(c, u)` columns of u."""
    found = []
    for unit in range(units):
        total = 0.0
        for number, (signals, weight) in enumerate(consumers):
            for column in read(number, unit):
                y, w = signals[:, column].tolist(), weight[:, column].tolist()
                mean = sum(y) / len(y)
                if criterion == "fluctuation":
                    variance = sum((value - mean) ** 2 for value in y) / len(y)
                    total += variance * sum(value**2 for value in w)
                else:
                    square = sum(value**2 for value in y) / len(y)
                    total += math.sqrt(square) * sum(abs(value) for value in w) / len(w)
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def agree(model, groups, states, name, read, consumers):
    """`consumers` are (signals (B, S, n), weight) of all examples, or with a mask of tokens (B, S)."""
    units = groups[name].size
    for criterion in BOTH:
        found = scores(model, groups, states, criterion, name)
        halves = []
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2)):
            chosen = [
                ((y[part] if mask is None else y[part][mask[part]]).reshape(-1, y.shape[-1]), w)
                for y, w, mask in consumers
            ]
            halves.append(twin(criterion, read, units, chosen))
        torch.testing.assert_close(found.scores, halves[0], rtol=1e-9, atol=0)
        assert found.diagnosis.split_half == pytest.approx(rank_correlation(*halves[1:]))


ROWS = each(2, 2)  # the columns of unit 0 are 0 and 1
STRIPES = each(2, 2).T.copy()  # 0 and 2


def two_heads(columns=ROWS):
    """linear 1 -> 4, linear 4 -> 2: two units of two features, each a x + b."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        order = columns.ravel()
        model[0].weight[order] = torch.tensor([[1.0], [2.0], [0.0], [3.0]]).double()
        model[0].bias[order] = torch.tensor([0.0, 10.0, 5.0, -7.0]).double()
        model[1].weight[:, order] = torch.tensor([[1.0, 0.0, 2.0, 1.0], [-3.0, 2.0, 4.0, 0.0]]).double()
    x = torch.tensor([[-1.0], [1.0], [3.0], [-3.0]]).double()
    return model, head_groups(model, columns, columns), [x]


def head_groups(model, weights, signals):
    """Two units whose consumer has its weights and its signals at these positions."""
    group = UnitGroup(
        "0",
        "head",
        2,
        2,
        (ParameterSlice("1.weight", 1, weights, "consumes"),),
        (Tap("0.weight", "output", -1, signals),),
        (Tap("1.weight", "input", -1, signals),),
    )
    return gather(model, group)


@pytest.mark.parametrize("columns", [ROWS, STRIPES])
def test_by_hand_the_features_of_a_unit_keep_their_weights_and_their_means(columns):
    model, groups, batches = two_heads(columns)
    states = record(model, groups, batches)
    # x has mean 0 and mean square 5; the features are x, 2x + 10 | 5, 3x - 7
    read = states["0"].features["1.weight"]
    torch.testing.assert_close(read.mean, torch.tensor([[0.0, 10.0], [5.0, -7.0]]).double())
    torch.testing.assert_close(read.variance, torch.tensor([[5.0, 20.0], [0.0, 45.0]]).double())
    assert read.samples == 4 and [half["1.weight"].samples for half in states["0"].features_by_half] == [2, 2]
    expected = {
        "fluctuation": [5 * 10 + 20 * 4, 0 * 20 + 45 * 1],
        "wanda-sp": [2 * math.sqrt(5) + 1 * math.sqrt(120), 3 * 5 + 0.5 * math.sqrt(94)],
    }
    for criterion, values in expected.items():
        found = scores(model, groups, states, criterion, "0").scores
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_moments_of_features_merge_exactly_far_from_zero(piece, monkeypatch):
    monkeypatch.setattr(states, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(101, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7)
    offset = 2.0**30
    X = (X * 2**20).round() / 2**20  # so that the offset loses nothing
    parts = [FeatureMoments.from_samples(part + offset, units=2) for part in X.split([1, 60, 40])]
    total = parts[0].merge(parts[1]).merge(parts[2])
    assert total.samples == 101
    torch.testing.assert_close(total.variance.flatten(), X.var(0, correction=0), rtol=1e-7, atol=0)
    torch.testing.assert_close(total.mean.flatten() - offset, X.mean(0), rtol=0, atol=1e-6)


def tokens(words):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(7, 9, dtype=torch.int64)
    mask[1, 4:], mask[2, 8:], mask[5, 2:] = 0, 0, 0
    return {
        "input_ids": torch.randint(0, words, (7, 9), generator=generator),
        "attention_mask": mask,
    }


def transformer_states(model, batch, consumers):
    """Groups, states of two batches, and what the consumers read, all tokens together."""
    groups = discover(model, batch)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 4), slice(4, 7))]
    states = record(model, groups, parts, ALL)
    modules, seen, handles = dict(model.named_modules()), {}, []
    for name in consumers:
        hook = modules[name].register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
        handles.append(hook)
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    return groups, states, {name: [(seen[name], modules[name].weight.detach(), mask)] for name in consumers}


def test_groups_of_query_heads_and_gated_neurons_of_a_llama():
    model = llama()
    o, down = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    groups, states, seen = transformer_states(model, tokens(50), [o, down])
    names = {item.tensor: group.name for group in groups.prunable for item in group.consumers}
    heads, neurons = names[f"{o}.weight"], names[f"{down}.weight"]
    assert groups[heads].kind == "kv group" and states[heads].features[f"{o}.weight"].mean.shape == (3, 8)
    agree(model, groups, states, heads, lambda _, unit: range(8 * unit, 8 * unit + 8), seen[o])
    assert groups[neurons].kind == "gated" and not states[neurons].features
    agree(model, groups, states, neurons, lambda _, unit: [unit], seen[down])


def test_heads_and_neurons_of_a_bert():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=20,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).double().eval()
    dense, out = "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense"
    groups, states, seen = transformer_states(model, tokens(50), [dense, out])
    names = {item.tensor: group.name for group in groups.prunable for item in group.consumers}
    heads, neurons = names[f"{dense}.weight"], names[f"{out}.weight"]
    assert groups[heads].kind == "head"
    agree(model, groups, states, heads, lambda _, unit: range(5 * unit, 5 * unit + 5), seen[dense])
    agree(model, groups, states, neurons, lambda _, unit: [unit], seen[out])


def test_channels_that_are_flattened_and_channels_and_neurons_that_are_not():
    torch.manual_seed(0)
    model = randomize(Plain()).double()
    X = torch.randn(9, 3, 8, 8, dtype=torch.float64)
    groups = discover(model, X)
    states = record(model, groups, X.split(4), ALL)
    seen = hooked(model, X, before=["conv2", "fc1", "fc2"])

    def consumer(name):
        y, weight = seen["in", name][0], model.get_submodule(name).weight.detach()
        if y.ndim == 4:  # every place of the kernel is a row: the mean is over them too
            y, weight = y.flatten(2).mT, weight.movedim(1, -1).flatten(0, -2)
        return [(y.reshape(9, -1, y.shape[-1]), weight, None)]

    assert states["conv2"].features["fc1.weight"].mean.shape == (6, 4)
    agree(model, groups, states, "conv2", lambda _, unit: range(4 * unit, 4 * unit + 4), consumer("fc1"))
    assert not states["conv1"].features and not states["fc1"].features
    agree(model, groups, states, "conv1", lambda _, unit: [unit], consumer("conv2"))
    agree(model, groups, states, "fc1", lambda _, unit: [unit], consumer("fc2"))


class Readers(nn.Module):
    """Channels read by a convolution, flattened row by row and column by column, and by a grouped one."""

    def __init__(self, grouped=False):
        super().__init__()
        self.conv, self.next = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1, groups=2 if grouped else 1)
        self.rows, self.columns = nn.Linear(24, 3), nn.Linear(24, 5)

    def forward(self, x):
        x = self.conv(x).relu()
        side = self.rows(x.flatten(1)) * self.columns(x.transpose(2, 3).flatten(1)).sum(1, keepdim=True)
        return side.sum(1) + self.next(x).sum((1, 2, 3))


def test_consumers_of_other_widths_and_orders_are_read_each_by_itself():
    torch.manual_seed(0)
    model = Readers().double().eval()
    X = torch.randn(8, 2, 4, 5, dtype=torch.float64)
    groups = discover(model, X)
    states = record(model, groups, [X[:3], X[3:]], ALL)
    seen = hooked(model, X, before=["rows", "columns", "next"])
    consumers = [(seen["in", name][0][:, None], model.get_submodule(name).weight.detach(), None)
                 for name in ("rows", "columns")]  # fmt: skip
    y = seen["in", "next"][0]
    consumers.append((y.flatten(2).mT, model.next.weight.detach().flatten(1), None))
    read = {0: 6, 1: 6, 2: 1}
    agree(
        *(model, groups, states, "conv"),
        lambda number, unit: range(read[number] * unit, read[number] * (unit + 1)),
        consumers,
    )


def test_a_weight_that_does_not_lie_as_its_signal_takes_the_unit_as_a_whole():
    """A grouped convolution, whose weight serves several channels; and a slice in another order."""
    model, groups, batches = two_heads()
    states = record(model, groups, batches)
    turned = head_groups(model, ROWS, ROWS[:, ::-1].copy())
    output = states["0"].output
    norms = model[1].weight.detach().square().sum(0).reshape(2, 2).sum(1)
    found = scores(model, turned, states, "fluctuation", "0").scores
    torch.testing.assert_close(found, output.variance * norms)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)).double()
    weight = model[2].weight.detach()  # (6, 2, 1, 1): position p serves the channels p and p + 2
    channels = UnitGroup(
        "0", "channel", 2, 2, slices(2, consumers=["2.weight"]),
        (Tap("0.weight", "output", 1, STRIPES),), (Tap("2.weight", "input", 1, STRIPES),),
    )  # fmt: skip
    groups = gather(model, channels)
    states = record(model, groups, [torch.randn(6, 2, 5, 5, dtype=torch.float64)], ALL)
    output = states["0"].output
    found = scores(model, groups, states, "fluctuation", "0").scores
    torch.testing.assert_close(found, output.variance * weight.square().sum((0, 2, 3)))
    rms = (output.variance + output.mean.square()).sqrt()
    found = scores(model, groups, states, "wanda-sp", "0").scores
    torch.testing.assert_close(found, rms * weight.abs().mean((0, 2, 3)))


def test_batches_do_not_matter_and_units_of_one_feature_have_none():
    model, groups = conv_net(dtype=torch.float64)
    one, other = (record(model, groups, images(20, batch=size, dtype=torch.float64)) for size in (20, 3))
    assert one["0"].features == {} and one["0"].features_by_half == ({}, {})
    for a, b in zip(
        (one["3"].features, *one["3"].features_by_half),
        (other["3"].features, *other["3"].features_by_half),
        strict=True,
    ):
        assert a["6.weight"].samples == b["6.weight"].samples
        torch.testing.assert_close(a["6.weight"].mean, b["6.weight"].mean)
        torch.testing.assert_close(a["6.weight"].variance, b["6.weight"].variance)
    shared, shared_groups = mlp()
    assert record(shared, shared_groups, [torch.randn(4, 7)])["first"].features == {}
