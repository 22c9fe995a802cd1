"""Heads: found in every way that they are written, cut with what belongs to them, and told about."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.attention import MultiheadAttention, plain_attention
from cria_prune.planning.plan import make_plan
from cria_prune.structure.groups import UnitGroup
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import verify
from networks import randomize

TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """Separate projections, four query heads of six features on two key-value heads; residual and norm."""

    query_heads, kv_heads, head_dim = 4, 2, 6

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = self.query_heads, self.kv_heads
        self.inp, self.norm, self.out = nn.Linear(12, 10), nn.LayerNorm(10), nn.Linear(10, 3)
        self.q = nn.Linear(10, self.query_heads * self.head_dim)
        self.k, self.v = (nn.Linear(10, self.kv_heads * self.head_dim) for _ in range(2))
        self.o = nn.Linear(self.query_heads * self.head_dim, 10)

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], count, self.head_dim).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        y = self.norm(x)
        q = self.heads(self.q(y), self.num_heads)
        k, v = (self.heads(layer(y), self.num_key_value_heads) for layer in (self.k, self.v))
        mixed = self.mix(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x + self.o(mixed))


class Interleaved(Block):
    """Keys and values repeated, a product, a softmax, a product."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (item.repeat_interleave(self.query_heads // self.kv_heads, 1) for item in (k, v))
        return (q @ k.transpose(-1, -2) / self.head_dim**0.5).softmax(-1) @ v


class Expanded(Block):
    """Keys and values repeated by unsqueeze, expand and reshape, as the decoders do it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def repeat(x: Tensor) -> Tensor:
            b, h, t, d = x.shape
            return x[:, :, None].expand(b, h, 2, t, d).reshape(b, h * 2, t, d)

        return F.scaled_dot_product_attention(q, repeat(k), repeat(v))


class Einsum(Block):
    """As many keys as queries, in einsum."""

    kv_heads = 4

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", scores, v)


class Folded(Block):
    """Heads folded into the batch for bmm, and unfolded."""

    kv_heads = 4

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (item.reshape(-1, *item.shape[2:]) for item in (q, k, v))
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return mixed.view(-1, self.num_heads, *mixed.shape[1:])


class Biased(Block):
    """A bias per head, looked up by distance, as in T5 and Swin."""

    kv_heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step = torch.arange(q.shape[2])
        bias = self.table(step[:, None] - step[None] + 4).permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Fused(nn.Module):
    """One projection for queries, keys and values, (3, heads, size) as in ViT; sizes by number."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 3, 4, 12
        self.inp, self.qkv, self.proj, self.out = (
            nn.Linear(12, 8), nn.Linear(8, 36), nn.Linear(12, 8), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        x = self.inp(x)
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(self.proj(mixed.reshape(b, t, self.attn_dim)))


class Torch(nn.Module):
    """PyTorch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(12, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 4, 10, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.inp(x)))


ATTENTIONS: dict[str, tuple[type[nn.Module], str, str, int]] = {
    "gqa": (Block, "q", "kv group", 2),
    "interleaved": (Interleaved, "q", "kv group", 2),
    "expanded": (Expanded, "q", "kv group", 2),
    "einsum": (Einsum, "q", "head", 4),
    "folded": (Folded, "q", "head", 4),
    "biased": (Biased, "q", "head", 4),
    "fused": (Fused, "qkv", "head", 3),
    "torch": (Torch, "layer.self_attn", "head", 4),
}


def found(name: str) -> tuple[nn.Module, UnitGroup]:
    torch.manual_seed(0)
    model = randomize(ATTENTIONS[name][0]())
    return model, discover(model, TOKENS)[ATTENTIONS[name][1]]


def widths(group: UnitGroup) -> dict[str, int]:
    return {
        item.tensor.removesuffix(".weight"): item.positions.shape[1]
        for item in group.slices
        if "bias" not in item.tensor
    }


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_are_found_and_cut_exactly(name: str) -> None:
    _, first, kind, size = ATTENTIONS[name]
    model, group = found(name)
    assert (group.name, group.kind, group.size, group.frozen) == (first, kind, size, None)
    groups = discover(model, TOKENS)
    for seed in range(3):
        generator = np.random.default_rng(seed)
        kept = {
            item.name: np.sort(generator.permutation(item.size)[: generator.integers(1, item.size + 1)])
            for item in groups.prunable
        }
        plan = make_plan(groups, kept)
        smaller = apply(model, plan)
        assert verify(model, plan, smaller, TOKENS).difference <= 1e-10
        smaller(TOKENS).sum().backward()


def test_what_leaves_with_a_head() -> None:
    assert widths(found("expanded")[1]) == {"q": 12, "k": 6, "v": 6, "o": 12}
    assert widths(found("fused")[1]) == {"qkv": 12, "proj": 4}
    assert widths(found("biased")[1]) == {"q": 6, "k": 6, "v": 6, "table": 1, "o": 6}
    _, group = found("fused")
    assert group.slices[0].positions[1].tolist() == [*range(4, 8), *range(16, 20), *range(28, 32)]


def test_modules_say_their_heads_after_surgery() -> None:
    model, group = found("gqa")
    smaller = apply(model, make_plan(discover(model, TOKENS), {"q": [1]}))
    assert (smaller.num_heads, smaller.num_key_value_heads, smaller.head_dim) == (2, 1, 6)
    assert (model.num_heads, model.num_key_value_heads) == (4, 2) and "q" in group.name
    model, _ = found("fused")
    smaller = apply(model, make_plan(discover(model, TOKENS), {"qkv": [0, 2]}))
    assert (smaller.num_heads, smaller.attn_dim, smaller.head_dim) == (2, 8, 4)
    model, _ = found("torch")
    smaller = apply(model, make_plan(discover(model, TOKENS), {"layer.self_attn": [0, 1, 2]}))
    attention = smaller.layer.self_attn
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (3, 8, 2)
    assert type(attention) is MultiheadAttention and type(model.layer.self_attn) is nn.MultiheadAttention
    assert smaller.eval()(TOKENS).shape == smaller.train()(TOKENS).shape  # the fused kernel is not taken


def test_a_number_that_no_attribute_holds_is_restated_at_its_call() -> None:
    class Hidden(Fused):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.inp(x)).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(
                self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12))
            )

    model = randomize(Hidden())
    groups = discover(model, TOKENS)
    assert groups["qkv"].restated == ("",) and groups["proj"].restated == ()
    plan = make_plan(groups, {"qkv": [0, 2]})
    assert verify(model, plan, apply(model, plan), TOKENS).difference < 1e-12


def test_an_attribute_of_another_name_is_restated_only_where_it_is_needed() -> None:
    class Odd(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.seats = self.num_heads, self.num_heads
            del self.num_heads

        def forward(self, x: Tensor) -> Tensor:
            self.num_heads = self.h
            return super().forward(x)

    groups = discover(randomize(Odd()), TOKENS)
    assert groups["qkv"].frozen is None
    assert {item.name for item in groups["qkv"].counts if item.sure} >= {"h", "attn_dim"}


@pytest.mark.parametrize("criterion", ["distortion-weighted", "activation-norm", "innovation", "l2"])
@pytest.mark.parametrize("name", ["expanded", "fused", "torch"])
def test_heads_are_recorded_scored_and_pruned(name: str, criterion: str) -> None:
    model, _ = found(name)
    batches = [torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    config = PruneConfig(
        score={"criterion": criterion}, plan={"reduction": 0.3, "rounds": 2, "residual": True, "floor": 0.0}
    )
    result = prune(model, batches, config)
    assert result.report["reached"] >= 0.3
    assert result.rounds[-1].scores.keys() >= {ATTENTIONS[name][1]}


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "additive": lambda: torch.randn(5, 7).double(),
    "truth values": lambda: torch.rand(5, 7) > 0.8,
    "per head": lambda: torch.randn(6, 5, 7).double(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 8, "vdim": 10},
    ],
    ids=str,
)
def test_the_plain_attention_is_pytorchs(options: dict[str, object], mask: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(12, 3, **options).double().eval()  # type: ignore[arg-type]
    order = (lambda x: x) if options.get("batch_first") else (lambda x: x.transpose(0, 1))
    q, k, v = (order(torch.randn(2, *size).double()) for size in ((5, 12), (7, model.kdim), (7, model.vdim)))
    attn_mask = MASKS[mask]()
    padding = torch.arange(7)[None] >= torch.tensor([[7], [5]])
    if attn_mask is not None and attn_mask.is_floating_point():
        padding = torch.zeros(2, 7).double().masked_fill(padding, float("-inf"))
    for needed in (True, False):
        call = {"key_padding_mask": padding, "attn_mask": attn_mask, "need_weights": needed}
        expected = model(q, k, v, **call)
        with plain_attention(model):
            output, weights = model(q, k, v, **call)
        torch.testing.assert_close(output, expected[0], atol=1e-12, rtol=0)
        assert (weights is None) == (expected[1] is None)
        if weights is not None:
            torch.testing.assert_close(weights, expected[1], atol=1e-12, rtol=0)
    assert type(model) is nn.MultiheadAttention


def test_the_plain_attention_takes_unbatched_and_equal_inputs() -> None:
    model = nn.MultiheadAttention(12, 3).double().eval()
    for x in (torch.randn(5, 12).double(), torch.randn(5, 2, 12).double()):
        expected = model(x, x, x, average_attn_weights=False)
        with plain_attention(model):
            output, weights = model(x, x, x, average_attn_weights=False)
        torch.testing.assert_close(output, expected[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(weights, expected[1], atol=1e-12, rtol=0)
