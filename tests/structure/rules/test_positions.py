"""Channels that are reordered, rows that are moved by number, and sums by hand: cut, and equal to masked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.networks import randomize
from torch import Tensor, nn
from torch.nn import functional as F

from cria_prune import UnitGroups, apply, discover, load, save, verify
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.structure.groups import shrink


class Net(nn.Module):
    """Two layers with an operation between them that is given."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(5, 12, 1), nn.Conv1d(12, 6, 1), nn.Linear(6, 3)
        self.alone = nn.ConvTranspose1d(12, 12, 3, groups=12, bias=False)
        self.two_each = nn.Sequential(
            nn.ConvTranspose1d(12, 24, 3, groups=12, bias=False), nn.Conv1d(24, 12, 1)
        )
        self.grouped, self.shuffle = nn.ConvTranspose1d(12, 12, 3, groups=3, bias=False), nn.ChannelShuffle(3)
        self.register_buffer("order", torch.tensor([7, 2, 9, 0, 11, 4, 1, 8, 3, 10, 5, 6]))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.middle(self, F.relu(self.a(x)))).mean(-1))


def cut(model: nn.Module, groups: UnitGroups, example: Tensor, seed: int) -> tuple[nn.Module, Plan]:
    """Remove about a third of the first layer, and compare with the masked network in float64."""
    dice = np.random.default_rng(seed)
    stays = {
        group.name: np.sort(dice.permutation(group.size)[: max(1, group.size * 2 // 3)])
        for group in groups.prunable
        if group.name.startswith("a")
    }
    plan = make_plan(groups, stays)
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, example).difference < 1e-12
    return smaller, plan


EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])


def spread(x: Tensor, reduce: str) -> Tensor:
    index = EDGES[1][None, None, :].expand(x.shape[0], x.shape[1], -1)
    return torch.zeros_like(x).scatter_reduce(2, index, x[:, :, EDGES[0]], reduce, include_self=False)


ORDERED: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "flip": (lambda net, x: x.flip(1), 12),
    "roll": (lambda net, x: x.roll(2, 1), 10),
    "roll back": (lambda net, x: x.roll(-3, 1), 9),
    "order": (lambda net, x: x[:, net.order], 12),
    "order twice": (lambda net, x: x.index_select(1, net.order).index_select(1, net.order), 0),
    "worked out": (lambda net, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)], 12),
    "written": (lambda net, x: torch.cat([x[:, [1, 0]], x[:, 2:]], 1), 10),
    "shuffle": (lambda net, x: net.shuffle(x), 4),
    "depthwise": (lambda net, x: net.alone(x), 12),
    "depthwise, two each": (lambda net, x: net.two_each(x), 12),
    "grouped": (lambda net, x: net.grouped(x), 4),
    "added up": (lambda net, x: torch.zeros_like(x).index_add(2, EDGES[1], x[:, :, EDGES[0]]), 12),
    "the most": (lambda net, x: spread(x, "amax"), 12),
    "put": (lambda net, x: torch.zeros_like(x.mT).index_put(
        (torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)), x.mT[:, 1]).mT, 12),
    "repeated": (lambda net, x: x * x.mean((1,), keepdim=True).expand(-1, 12, -1), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_what_moves_channels_and_rows_is_cut_with_them(name: str) -> None:
    middle, free = ORDERED[name]
    model, x = randomize(Net(middle)).eval(), torch.randn(2, 5, 4)
    groups = discover(model, x)
    assert sum(group.size for group in groups.prunable if group.name.startswith("a")) == free
    for seed in range(2 if free else 0):
        smaller, plan = cut(model, groups, x, seed)
        gone = np.setdiff1d(np.arange(12), next(item.kept for item in plan.cuts if item.tensor == "a.weight"))
        # The other oracle: the channels of the dense network are put below the ReLU where they are made.
        lost, wide = torch.from_numpy(gone), torch.randn(3, 5, 4)
        hook = model.a.register_forward_hook(lambda _, __, y, lost=lost: y.index_fill(1, lost, -1))
        with torch.no_grad():
            torch.testing.assert_close(smaller(wide), model(wide), rtol=1e-4, atol=1e-5)
        hook.remove()
        again = shrink(groups, plan.kept)
        cut(smaller, again, x, seed + 5)
        assert [(g.name, g.size, g.frozen) for g in discover(smaller, x)] == [
            (g.name, g.size, g.frozen) for g in again
        ]


def test_an_order_is_counted_anew_and_loads_again(tmp_path: Path) -> None:
    model, x = randomize(Net(ORDERED["order"][0])).eval(), torch.randn(2, 5, 4)
    smaller, plan = cut(model, discover(model, x), x, 0)
    assert sorted(smaller.order.tolist()) == [*range(8)] and len(model.order) == 12
    save(tmp_path, smaller, plan)
    other = randomize(Net(ORDERED["order"][0]), 1)
    other.order.copy_(other.order.flip(0))
    found = load(tmp_path, other).model
    torch.testing.assert_close(found(x), smaller(x))
    # Values that are read as numbers too are no mere order, and stay.
    model.middle = lambda net, y: y[:, net.order] * net.order[:, None]
    assert "is picked from by index" in str(discover(model, x)["a"].frozen)
