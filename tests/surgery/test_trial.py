"""Trial cuts: what a forward reads beside its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cria_prune import apply, discover
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.surgery.trial import _Trials
from cria_prune.surgery.verify import Reference, verify

pytest.importorskip("transformers")


def test_rotary_positions_of_a_shared_configuration_keep_the_size_of_a_head():
    """Phi-MoE works out the size of a head in each forward, from the numbers that a cut restates."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=30, hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=2, max_position_embeddings=32, pad_token_id=0,
        original_max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = PhimoeForCausalLM(config).eval()
    example = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    groups = discover(model, example)
    heads = [group for group in groups.prunable if group.kind == "kv group"]
    assert len(heads) == 2
    plan = make_plan(groups, {group.name: np.array([0, 2]) for group in heads})
    smaller = apply(model, plan)
    assert smaller.config.num_attention_heads == 4 and smaller.config.head_dim == 8
    assert "head_dim" not in vars(config)
    assert Reference(model, {"input_ids": torch.arange(1, 8)[None]}).compare(plan, smaller).difference < 1e-10
    narrow = make_plan(groups, {"model.embed_tokens": np.arange(40)})
    assert Reference(model, example).compare(narrow, apply(model, narrow)).difference < 1e-10


class Mixer(nn.Module):
    """Splits by sizes that it stores, as Mamba-2 does; its heads, their size and its state are all 4."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.state = 4, 4, 4
        self.inner, self.mixed = 16, 20
        self.up, self.down = nn.Linear(8, self.inner + self.mixed + self.heads), nn.Linear(self.inner, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed, scale = self.up(x).split([self.inner, self.mixed, self.heads], -1)
        y, state = mixed.split([self.inner, self.state], -1)
        y = y.reshape(len(x), self.heads, self.size) * scale[..., None]
        y = y[..., None] * state.reshape(len(x), 1, 1, self.state)
        y = y.sum(-1).reshape(len(x), self.heads * self.size)
        return self.down(y * torch.sigmoid(gate))


def test_sizes_that_a_layer_stores_are_told_apart_where_they_are_equal() -> None:
    """Four attributes of six are one number by chance, one has a name that says so, and three are needed."""
    torch.manual_seed(0)
    model, x = Mixer(), torch.randn(2, 8)
    groups = discover(model, x)
    (group,) = groups.prunable
    plan = make_plan(groups, {group.name: np.array([0, 3])})
    assert Reference(model, torch.randn(5, 8)).compare(plan, apply(model, plan)).difference < 1e-10
    assert {item.name for item in group.counts} == {"heads", "size", "state", "inner", "mixed"}
    needed = {"size", "inner", "mixed"}

    def test(plan: Plan) -> str | None:
        said = {edit.name for edit in plan.attributes if edit.before != edit.after}
        return None if said == needed else f"cut with {said}"

    trials = _Trials(model, groups)
    trials.test, trials.shapes = test, True
    assert trials.chosen([group.name])
    assert {item.name for item in trials.groups[group.name].counts if item.sure} == needed
    needed.add("none of them")
    assert not trials.chosen([group.name])
    assert {item.name for item in trials.groups[group.name].counts if item.sure} == {"size", "inner", "mixed"}


class Halved(nn.Module):
    """Heads cut out of a width that is read off the input: half of both still splits into three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.heads = nn.Parameter(torch.rand(12, 9) - 0.3), 2
        self.joint, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.outside.T
        b, t, c = x.shape
        parts = (item.view(b, t, self.heads, c // self.heads) for item in self.joint(x).split(c, -1))
        q, k, v = (item.transpose(1, 2) for item in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


def test_what_is_mended_together_is_tried_alone_too() -> None:
    torch.manual_seed(0)
    model, example = Halved().eval(), torch.randn(2, 3, 9)
    groups = discover(model, example)
    assert {group.name for group in groups.prunable} == {"outside", "joint"}
    for kept in ({"outside": np.arange(5)}, {"joint": np.arange(1)}, {"outside": np.arange(7), "joint": [1]}):
        plan = make_plan(groups, {name: np.asarray(stays) for name, stays in kept.items()})
        assert verify(model, plan, apply(model, plan), example).difference < 1e-12
