"""Fisher importances against values by hand and a slow twin: gates, one example at a time."""

import pytest
import torch
import transformers
from tests.criteria.test_baselines_weights import Flat, llama
from tests.criteria.test_score import tiny
from tests.recording.test_collect import ALL, moments_equal, snapshot
from tests.recording.test_collect_networks import conv_net, each, gather, images, mlp, slices
from torch import nn
from torch.nn import functional

from cria_prune import discover
from cria_prune.base.errors import CriterionError, DataError
from cria_prune.config import ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.recording.collect import record
from cria_prune.structure.groups import ParameterSlice, Tap, UnitGroup


def slow(model, gated, units, examples, loss):
    """Sum over examples of the squared gradient of gates (units,) at the outputs of the `gated` modules."""
    total = torch.zeros(units, dtype=torch.float64)
    for example in examples:
        gate = torch.ones(units, dtype=torch.float64, requires_grad=True)

        def close(module, args, out, gate=gate):
            dim = 1 if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else -1
            wide = gate.repeat_interleave(out.shape[dim] // units)
            return out * (wide[:, None, None] if dim == 1 else wide)

        handles = [model.get_submodule(name).register_forward_hook(close) for name in gated]
        total += torch.autograd.grad(loss(model, example), gate)[0].square()
        for handle in handles:
            handle.remove()
    return total


def cube(model, batch):
    """A mean over examples, whatever the model gives; no constant of what a layer norm gives."""
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return (out if isinstance(out, torch.Tensor) else out[0]).pow(3).mean()


def entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def ones(batches):
    """Batches of one example each."""
    for batch in batches:
        if isinstance(batch, dict):
            size = len(next(iter(batch.values())))
            yield from ({key: value[i : i + 1] for key, value in batch.items()} for i in range(size))
        elif isinstance(batch, tuple):
            yield from ((batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[0])))
        else:
            yield from batch.split(1)


def tokens():
    ids = torch.randint(0, 50, (7, 6), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}]


def case(kind):
    """(model, groups, name of the group, modules that make its signals, batches of uneven sizes, loss)."""
    if kind in ("channel", "flattened"):
        model, groups = conv_net(dtype=torch.float64)
        name, makers = ("0", ["1"]) if kind == "channel" else ("3", ["3"])
        return model, groups, name, makers, images(8, batch=5, dtype=torch.float64), entropy
    if kind == "norm without scale":
        torch.manual_seed(0)
        model = Flat().double().eval()
        batches = [torch.randn(size, 2, 2, 2, dtype=torch.float64) for size in (5, 2)]
        return model, discover(model, batches[0]), "conv", ["norm"], batches, cube
    if kind == "neuron":
        model, groups = mlp(torch.float64)
        batches = [torch.randn(size, 3, 7, dtype=torch.float64) for size in (4, 3)]
        return model, groups, "first", ["first", "shared"], batches, cube
    if kind == "head":
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=20,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
        model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
        at, ends = "encoder.layer.0.attention.self.", ("query", "key", "value")
    else:
        model, at = llama(), "model.layers.0."
        ends = ("mlp.gate_proj", "mlp.up_proj")
        if kind == "kv group":
            ends = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    groups = discover(model, tokens()[0])
    name = next(group.name for group in groups.prunable if group.kind == kind)
    return model, groups, name, [at + end for end in ends], tokens(), cube


KINDS = ("channel", "flattened", "norm without scale", "neuron", "gated", "kv group", "head")


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_slow_twin_on_every_kind_and_taylor_of_single_examples(kind):
    model, groups, name, makers, batches, loss = case(kind)
    states = record(model, groups, batches, ALL, loss=loss, per_example=True)
    expected = slow(model, makers, groups[name].size, ones(batches), loss)
    assert expected.max() > 0
    near = 1e-5 if kind in ("gated", "kv group") else 1e-9  # a Llama's norms compute in float32
    torch.testing.assert_close(states[name].fisher, expected, rtol=near, atol=near * float(expected.max()))
    found = score(model, groups, states, ScoreConfig(criterion="fisher"))[name]
    assert torch.equal(found.scores, states[name].fisher) and found.diagnosis.split_half is None
    if kind != "norm without scale":  # Taylor reads parameters, and there are none
        single = record(model, groups, ones(batches), ALL, loss=loss, gradients=True)
        torch.testing.assert_close(states[name].fisher, single[name].taylor, rtol=near, atol=near)


def test_fisher_by_hand():
    model, groups, batches = tiny()
    states = record(model, groups, batches, loss=lambda net, x: net(x).mean(), per_example=True)
    # y = 2 relu(3x) - 5 relu(-4x) for x = -1, 1, 3, -3: x · ∂y/∂x is 2 · (0, 3, 9, 0) and -5 · (4, 0, 0, 12)
    assert states["0"].fisher.tolist() == pytest.approx([4 * (9 + 81), 25 * (16 + 144)])
    assert states.per_example and states.gradients
    # gradients of opposite signs cancel in a batch, and not in its examples
    batch = [torch.tensor([[1.0], [1.0]])]
    signs = torch.tensor([[1.0], [-1.0]])
    states = record(model, groups, batch, loss=lambda net, x: (net(x) * signs).mean(), per_example=True)
    assert states["0"].fisher.tolist() == [72, 0] and states["0"].taylor.tolist() == [0, 0]


def test_fisher_changes_nothing_else_and_leaves_nothing_behind():
    model, groups = conv_net(dtype=torch.float64)
    batches = images(8, batch=3, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = snapshot(model)
    states = record(model, groups, batches, per_example=True)
    assert snapshot(model) == before
    plain = record(model, groups, batches, gradients=True)
    assert plain["0"].fisher is None and not plain.per_example
    assert torch.equal(plain["0"].taylor, states["0"].taylor)
    moments_equal(plain, states)
    with pytest.raises(DataError):
        record(model, groups, [*batches, torch.zeros(2, 1, 8, 8)], per_example=True)
    assert snapshot(model) == before


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_fisher_of_short_types_is_near_the_long_one(dtype, near):
    model, groups, name, _, batches, loss = case("gated")
    long = record(model, groups, batches, ALL, loss=loss, per_example=True)[name].fisher
    short = record(model.to(dtype), groups, batches, ALL, loss=loss, per_example=True)[name].fisher
    torch.testing.assert_close(short, long, rtol=0, atol=near * float(long.max()))


class Positions(nn.Module):
    """Tokens plus positions that all examples share."""

    def __init__(self):
        super().__init__()
        self.first, self.place, self.last = nn.Linear(2, 6), nn.Embedding(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last((self.first(x) + self.place(torch.arange(5))).relu())


def test_a_signal_that_examples_share_is_an_error_with_a_way_out():
    torch.manual_seed(0)
    model = Positions().double().eval()
    taps = (Tap("first.weight", "output", -1, each(6)), Tap("place.weight", "rows", -1, each(6)))
    cut = slices(6, ["first.weight"], ["first.bias"], ["last.weight"])
    group = UnitGroup(
        *("first", "neuron", 6, 6, (*cut, ParameterSlice("place.weight", 1, each(6), "produces"))),
        *(taps, (Tap("last.weight", "input", -1, each(6)),)),
    )
    groups, X = gather(model, group), torch.randn(4, 5, 2, dtype=torch.float64)
    with pytest.raises(
        CriterionError, match=r"at 'place.weight': the signal has 5 rows for 4 examples.*of one"
    ):
        record(model, groups, [X], loss=cube, per_example=True)
    states = record(model, groups, X.split(1), loss=cube, per_example=True)
    torch.testing.assert_close(states["first"].fisher, slow(model, ["first", "place"], 6, X.split(1), cube))


class TimeFirst(nn.Module):
    """Its layers see (time, batch, features)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.transpose(0, 1)))).mean(0)


def test_a_layout_with_time_first_is_refused():
    torch.manual_seed(0)
    model = TimeFirst().double().eval()
    X, y = torch.randn(4, 8, 3, dtype=torch.float64), torch.randint(0, 2, (4,))
    with pytest.raises(CriterionError, match=r"\(8, 4, 4\): its second dimension goes by the 4 examples"):
        record(model, discover(model, X), [(X, y)], per_example=True)
