"""The criteria that read weights alone, against values by hand and slow twins on every kind of group."""

import math

import pytest
import torch
import transformers
from tests.recording.test_collect_networks import conv_net, gather, mlp, slices
from torch import nn

from cria_prune import discover
from cria_prune.base.errors import CriterionError, SignalError
from cria_prune.config import ScoreConfig
from cria_prune.criteria import baselines
from cria_prune.criteria.score import score
from cria_prune.structure.groups import UnitGroup
from networks import Mixed, randomize


def scores(model, groups, criterion):
    return {
        name: item.scores
        for name, item in score(model, groups, None, ScoreConfig(criterion=criterion)).items()
    }


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def three():
    """linear 2 -> 4 -> 1, whose producer weights are (0, 0), (3, 4), (-3, 4) and (3, 4) again."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, 4.0], [3.0, 4.0]]))
    group = UnitGroup("0", "neuron", 4, 4, slices(4, ["0.weight"], ["0.bias"], ["1.weight"]))
    return model, gather(model, group)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def kinds():
    """What produces the units of every kind of group, cut out by hand: name -> (model, groups, rows)."""
    conv, conv_groups = conv_net(dtype=torch.float64)
    shared, shared_groups = mlp(torch.float64)
    network = llama()
    found = discover(network, {"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    layer = network.model.layers[0]
    attention, gated = layer.self_attn, layer.mlp
    names = {group.kind: group.name for group in found.prunable if group.kind != "residual"}
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=20,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    ).double()
    heads = discover(bert, {"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    own = bert.encoder.layer[0].attention.self
    head = next(group.name for group in heads.prunable if group.kind == "head")
    q, k, v = (item.weight for item in (attention.q_proj, attention.k_proj, attention.v_proj))
    return {
        "channel": (conv, conv_groups, "3", [conv[3].weight.flatten(1)]),
        "neuron": (shared, shared_groups, "first", [shared.first.weight, shared.shared.weight]),
        "gated": (network, found, names["gated"], [gated.gate_proj.weight, gated.up_proj.weight]),
        "kv group": (network, found, names["kv group"], [item.reshape(3, -1) for item in (q, k, v)]),
        "head": (bert, heads, head, [item.weight.reshape(4, -1) for item in (own.query, own.key, own.value)]),
    }


@pytest.mark.parametrize("kind", ["channel", "neuron", "gated", "kv group", "head"])
def test_fpgm_and_lamp_are_their_slow_twins_on_every_kind(kind, kinds):
    model, groups, name, parts = kinds[kind]
    rows = torch.cat([part.detach().double() for part in parts], 1).tolist()
    away = [sum(math.dist(one, other) for other in rows) for one in rows]
    torch.testing.assert_close(scores(model, groups, "fpgm")[name], numbers(*away), rtol=1e-9, atol=1e-6)
    square = [sum(value**2 for value in row) for row in rows]
    share = [one / sum(other for other in square if other >= one) for one in square]
    found = scores(model, groups, "lamp")[name]
    torch.testing.assert_close(found, numbers(*share), rtol=1e-9, atol=0)
    assert torch.equal(found.argsort(), scores(model, groups, "l2")[name].argsort())


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_fpgm_by_hand_also_in_blocks(rows, monkeypatch):
    monkeypatch.setattr(baselines, "DISTANCE_ROWS", rows)
    model, groups = three()
    expected = numbers(15, 5 + 6, 5 + 6 + 6, 5 + 6)
    torch.testing.assert_close(scores(model, groups, "fpgm")["0"], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        model[0].weight += 1e9 / 3  # a common offset is no distance
    torch.testing.assert_close(scores(model, groups, "fpgm")["0"], expected, rtol=0, atol=1e-6)


def test_lamp_by_hand_counts_equals_together_and_nothing_as_nothing():
    model, groups = three()
    assert scores(model, groups, "lamp")["0"].tolist() == [0, 1 / 3, 1 / 3, 1 / 3]
    with torch.no_grad():
        model[0].weight[2, 0] = 0  # squares 0, 25, 16, 25
    assert scores(model, groups, "lamp")["0"].tolist() == [0, 0.5, 16 / 66, 0.5]
    with torch.no_grad():
        model[0].weight.zero_()
    found = score(model, groups, None, ScoreConfig(criterion="lamp"), whole=False)
    assert found["0"].scores.tolist() == [0, 0, 0, 0]
    with pytest.raises(CriterionError, match="it scores the units of every group all alike"):
        scores(model, groups, "lamp")


def test_bn_scale_by_hand_and_where_there_is_none():
    model, groups = conv_net(dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 4.0, -5.0, 6.0]))
    with pytest.raises(CriterionError, match=r"'bn-scale' for group '3': its 5 units of kind 'channel'"):
        scores(model, groups, "bn-scale")
    only = gather(model, groups["0"])
    assert scores(model, only, "bn-scale")["0"].tolist() == [1, 2, 0, 4, 5, 6]


def test_group_l2_counts_producers_batch_norms_and_consumers():
    model, groups = conv_net(dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 4.0, -5.0, 6.0]))
    made = [sum(w**2 for w in row) for row in model[0].weight.detach().flatten(1).tolist()]
    read = [sum(w**2 for w in row) for row in model[3].weight.detach().transpose(0, 1).flatten(1).tolist()]
    scale = [w**2 for w in model[1].weight.tolist()]
    expected = [math.sqrt(a + b + c) for a, b, c in zip(made, read, scale, strict=True)]
    found = scores(model, groups, "group-l2")
    torch.testing.assert_close(found["0"], numbers(*expected), rtol=1e-12, atol=0)
    made = model[3].weight.detach().flatten(1).square().sum(1)  # no batch norm follows
    read = model[6].weight.detach().reshape(4, 5, 16).square().sum((0, 2))
    torch.testing.assert_close(found["3"], (made + read).sqrt(), rtol=1e-12, atol=0)


class Flat(nn.Module):
    """A batch norm without scale, then one over the flattened channels."""

    def __init__(self, affine=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False)
        self.wide, self.out = nn.BatchNorm1d(12, affine=affine), nn.Linear(12, 2)

    def forward(self, x):
        return self.out(self.wide(self.norm(self.conv(x)).relu().flatten(1)))


def test_bn_scale_sums_over_all_batch_norms_and_features_of_a_unit():
    model = Mixed()
    randomize(model)
    groups = discover(model, torch.randn(2, 3, 8, 8))
    deep = groups["expand"]  # two depthwise channels for each of its units, and a norm over them
    assert deep.size == 8
    found = scores(model, gather(model, deep), "bn-scale")["expand"]
    torch.testing.assert_close(found, model.bn.weight.detach().double().reshape(8, 2).sum(1))
    flat = Flat().double().eval()
    with torch.no_grad():
        flat.wide.weight.copy_(torch.arange(12) - 6)
    groups = discover(flat, torch.randn(2, 2, 2, 2, dtype=torch.float64))
    assert scores(flat, groups, "bn-scale")["conv"].tolist() == [6 + 5 + 4 + 3, 2 + 1 + 0 + 1, 2 + 3 + 4 + 5]
    bare = Flat(affine=False).double().eval()
    with pytest.raises(CriterionError, match="no batch norm with a scale"):
        scores(bare, discover(bare, torch.randn(2, 2, 2, 2, dtype=torch.float64)), "bn-scale")


@pytest.mark.parametrize("criterion", ["fpgm", "lamp", "bn-scale"])
def test_a_broken_weight_is_named(criterion):
    model, groups = conv_net()
    tensor = "1.weight" if criterion == "bn-scale" else "0.weight"
    with torch.no_grad():
        model.get_parameter(tensor).view(-1)[3] = float("nan")
    with pytest.raises(SignalError, match=f"The weights of group '0': '{tensor}' holds NaN or infinity"):
        scores(model, groups, criterion)
