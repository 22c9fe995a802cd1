"""Which sums are residual widths: those of which one branch goes around a layer of another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cria_prune import discover


class Net(nn.Module):
    """Layers over a width of 8, and a forward that is given."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(n, 8) for n in (6, 8, 8, 6))
        self.down, self.up, self.out = nn.Linear(6, 2), nn.Linear(2, 8), nn.Linear(8, 3)
        self.gates, self.forget = nn.Linear(6 + 8, 24), nn.Linear(6 + 8, 8)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self, x))


def remembered(net: Net, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), net.out.in_features)
    for _ in range(3):
        both = torch.cat([x, h], 1)
        i, g, o = net.gates(both).chunk(3, 1)
        c = net.forget(both).sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def gated(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x)
    return torch.lerp(x, F.relu(net.a(x)), net.b(x).sigmoid())


PARALLEL: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "two branches": lambda net, x: F.relu(net.stem(x) + net.c(x)),
    "low rank": lambda net, x: F.relu(net.stem(x) + 2 * net.up(net.down(x))),
    "then a layer": lambda net, x: net.a(net.stem(x) + net.c(x)),
    "a gate behind": lambda net, x: (y := net.stem(x) + net.c(x)) * net.a(y).sigmoid(),
    "the cell of an LSTM": remembered,
    "one layer twice": lambda net, x: F.gelu(net.stem(x)) + net.stem(x + 1),
}
SKIPPING: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "identity": lambda net, x: (y := net.stem(x)) + net.a(y),
    "around two layers": lambda net, x: (y := net.stem(x)) - net.b(F.relu(net.a(y))),
    "the second sum": lambda net, x: (y := net.stem(x) + net.c(x)) + net.a(y),
    "scaled": lambda net, x: torch.addcmul(y := net.stem(x), net.a(y), net.c(x)),
    "a highway": gated,
}


@pytest.mark.parametrize("name", PARALLEL)
def test_branches_that_are_added_are_ordinary_units(name: str) -> None:
    groups = discover(Net(PARALLEL[name]), torch.randn(4, 6))
    assert not [group.name for group in groups if group.kind == "residual"]
    assert {group.kind for group in groups.prunable} <= {"neuron", "gated"} and groups.prunable


@pytest.mark.parametrize("name", SKIPPING)
def test_a_branch_around_a_layer_is_a_residual_width(name: str) -> None:
    groups = discover(Net(SKIPPING[name]), torch.randn(4, 6))
    assert groups["stem"].kind == "residual" and groups["stem"].size == 8 and groups["stem"].frozen is None
