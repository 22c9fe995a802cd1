"""Sums over units that are written by hand; one key for all queries; pictures among words; a graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.support.networks import randomize
from torch import Tensor, nn
from torch.nn import functional as F

from cria_prune import PruneConfig, apply, discover, prune, verify
from cria_prune.planning.plan import make_plan

Scores = Callable[[Tensor, Tensor], Tensor]


def normalised(h: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (h - mean.unsqueeze(-1)) / (variance + 1e-3).sqrt()[..., None]


class Pool(nn.Module):
    """Attention pooling over a sequence by a vector, after a norm."""

    def __init__(self, add: Scores, norm: Callable[[Tensor], Tensor], units: int = 10) -> None:
        super().__init__()
        self.v, self.out, self.query = (
            nn.Linear(5, units),
            nn.Linear(units, 3),
            nn.Parameter(torch.rand(units)),
        )
        self.add, self.norm = add, norm

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.cos(self.v(x)))
        return self.out((h * self.add(h, self.query).softmax(1)[..., None]).sum(1))


ADDED: dict[str, Scores] = {
    "product": lambda h, q: (h * q).sum(-1),
    "matmul": lambda h, q: h @ q,
    "matmul from the left": lambda h, q: q @ h.mT,
    "einsum": lambda h, q: torch.einsum("btd,d->bt", h, q),
    "no vector": lambda h, q: (h + q).exp().sum(-1),
}
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda h: h / h.norm(dim=-1)[..., None],
    "moments": lambda h: normalised(h, h.mean(-1), h.var(-1)),
}


@pytest.mark.parametrize("name", [*ADDED, *NORMS])
def test_units_that_are_added_up_leave_as_in_a_network_built_small(name: str) -> None:
    parts = ADDED.get(name, ADDED["product"]), NORMS.get(name, lambda h: h)
    model, x = randomize(Pool(*parts)), torch.randn(2, 6, 5)
    groups = discover(model, x)
    assert groups["v"].frozen is None and groups["v"].normed and groups["v"].size == 10
    kept = np.array([0, 3, 4, 8])
    plan = make_plan(groups, {"v": kept})
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, x).difference < 1e-12
    small = Pool(*parts, units=4).eval()
    with torch.no_grad():
        for mine, whole in ((small.v.weight, model.v.weight), (small.v.bias, model.v.bias)):
            mine.copy_(whole[kept])
        small.query.copy_(model.query[kept])
        small.out.weight.copy_(model.out.weight[:, kept])
        small.out.bias.copy_(model.out.bias)
        torch.testing.assert_close(smaller(x[:1, :4]), small(x[:1, :4]))


class OneKey(nn.Module):
    """Four query heads of three on one key-value head; `how` says how the key comes to all of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.num_heads, self.size, self.how = 4, 3, how
        self.stem, self.qkv, self.out = nn.Linear(5, 8), nn.Linear(8, 6 * 3), nn.Linear(4 * 3, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.stem(x)).view(batch, length, self.num_heads + 2, self.size)
        q, k, v = heads[:, :, :-2], heads[:, :, [-2]], heads[:, :, [-1]]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.how == "repeated":
            k, v = (item[:, :, None].expand(batch, 1, self.num_heads, length, self.size) for item in (k, v))
            k, v = (item.reshape(batch, self.num_heads, length, self.size) for item in (k, v))
        else:
            k, v = k.expand(-1, self.num_heads, -1, -1), v.expand(-1, self.num_heads, -1, -1)
        y = (q @ k.mT).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("how", ["expanded", "repeated"])
def test_query_heads_of_one_key_leave(how: str) -> None:
    model, x = randomize(OneKey(how)), torch.randn(2, 5, 5)
    groups = discover(model, x)
    heads = next(group for group in groups.prunable if group.kind == "head")
    assert heads.size == 4 and groups["stem"].frozen is None
    plan = make_plan(groups, {heads.name: [0, 3], "stem": [1, 2, 5]})
    smaller = apply(model, plan)
    assert smaller.num_heads == 2 and smaller.qkv.out_features == 4 * 3
    assert verify(model, plan, smaller, x).difference < 1e-12
    # The other oracle: the output layer reads zeros where a head left.
    with torch.no_grad():
        model.out.weight.view(6, 4, 3)[:, [1, 2]] = 0
        model.qkv.weight[:, [0, 3, 4, 6, 7]] = 0
        torch.testing.assert_close(smaller(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)


class Seeing(nn.Module):
    """Words, of which some are pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.seen = nn.Embedding(20, 8), nn.Linear(7, 8)
        self.inner, self.back, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, pictures: Tensor) -> Tensor:
        x = self.words(ids)
        x = x.masked_scatter((ids == 1).unsqueeze(-1).expand_as(x), self.seen(pictures))
        return self.out(x + self.back(F.relu(self.inner(x))))


class Graph(nn.Module):
    """What comes along the edges, added up at each node."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.near, self.own, self.out = (
            nn.Linear(*pair) for pair in ((5, 12), (12, 8), (12, 8), (8, 3))
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.relu(self.inner(x))
        rows = edges[1][:, None].expand(-1, x.shape[1])
        near = torch.zeros_like(x).scatter_add(0, rows, torch.gather(x, 0, edges[0][:, None].expand_as(rows)))
        return self.out(F.relu(self.near(near) + self.own(x)))


IDS = torch.tensor([[1, 1, 3, 4], [1, 5, 1, 7]])
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 2]])
MIXED = {
    "pictures among words": (Seeing, lambda: {"ids": IDS, "pictures": torch.randn(4, 7)}, {8, 12}),
    "a graph": (Graph, lambda: {"x": torch.randn(6, 5), "edges": EDGES}, {12, 8}),
}


@pytest.mark.parametrize("name", MIXED)
def test_inputs_of_several_lengths_are_pruned_whole(name: str) -> None:
    made, batch, sizes = MIXED[name]
    model = randomize(made())
    groups = discover(model, batch())
    assert {group.size for group in groups.prunable} == sizes
    result = prune(
        model,
        [batch() for _ in range(4)],
        PruneConfig(plan={"reduction": 0.3, "residual": True, "rounds": 2}),
    )
    assert result.report["reached"] >= 0.3 and result.rounds[-1].verification is not None
