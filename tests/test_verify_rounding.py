"""A forward that rounds to float32 on its way is not held to the last bits of float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cria_prune.errors import VerificationError
from cria_prune.pipeline import discover
from cria_prune.plan import identity_plan
from cria_prune.surgery import verify

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers; with `rounds` the hidden signals pass float32, as in the norms of transformers' Llama."""

    def __init__(self, rounds: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rounds = nn.Linear(4, 6), nn.Linear(6, 3), rounds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        if self.rounds is None:  # a constant of fewer bits rounds nothing
            hidden = hidden + torch.zeros(6, dtype=torch.float32).to(x.dtype)
        elif self.rounds:
            hidden = hidden.to(torch.float32).to(x.dtype)
        out: torch.Tensor = self.second(hidden)
        return out


def apart(net: nn.Module, by: float) -> nn.Module:
    """A copy whose outputs differ by about that much."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.second.bias.add_(by)  # type: ignore[union-attr]
    return other


@pytest.mark.parametrize(("rounds", "by", "passes"), [
    (False, 1e-12, True), (False, 1e-8, False), (None, 1e-8, False), (True, 1e-8, True), (True, 1e-5, False),
])  # fmt: skip
def test_tolerance_follows_the_arithmetic_of_the_forward(
    rounds: bool | None, by: float, passes: bool
) -> None:
    net = Net(rounds).double()
    plan = identity_plan(discover(net, X.double()))
    if not passes:
        allowed = "1e-06" if rounds else "1e-10"
        with pytest.raises(VerificationError, match=f"equal to the masked model's within {allowed}"):
            verify(net, plan, apart(net, by), X.double())
        return
    found = verify(net, plan, apart(net, by), X.double())
    assert 0 < found.difference <= found.tolerance == (1e-6 if by == 1e-8 else 1e-10)
