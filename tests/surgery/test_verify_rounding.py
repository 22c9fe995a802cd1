"""A forward that rounds to float32 on its way is not held to the last bits of float64."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from cria_prune.base.errors import VerificationError
from cria_prune.planning.plan import identity_plan
from cria_prune.stages import discover
from cria_prune.surgery.verify import difference, verify

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

verifying = import_module("cria_prune.surgery.verify")


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


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_the_difference_is_the_same_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    one = 2 + torch.rand(5, 9, generator=generator)  # the median counts up to one
    other = one.clone()
    other[1, 2] += 0.3
    other[4, 8] -= 0.1
    other[2, 2] = one[2, 2] = float("inf")
    expected = 0.3 / float(max(one[1, 2], one[4, 8]))
    monkeypatch.setattr(verifying, "BLOCK", block)
    monkeypatch.setattr(verifying, "PIECE", block)
    assert difference([one], [other]) == pytest.approx(expected, rel=1e-6)
    assert difference([one, one], [one, other]) == pytest.approx(expected, rel=1e-6)
    assert difference([one], [one.clone()]) == difference([], []) == 0
    assert difference([torch.zeros(0, 3)], [torch.zeros(0, 3)]) == 0
    assert difference([one], [one.T]) == float("inf")
    for place in ((0, 0), (4, 8)):
        broken = one.clone()
        broken[place] = float("nan")
        assert difference([one], [broken]) == difference([broken], [one]) == float("inf")
    both = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert difference([both[0]], [both[1]]) == 1
    turned = torch.complex(torch.full((3, 3), 2.0), torch.full((3, 3), 2.0))
    assert difference([turned], [turned * 1j]) == pytest.approx(2**0.5, rel=1e-6)
    hidden = torch.tensor([-1e9, 0.5, 0.25, 0.5]), torch.tensor([-1e9, 0.5, 0.3, 0.5])
    if block > 4:  # a masked logit that is equal on both sides does not hide the others
        assert difference([hidden[0]], [hidden[1]]) == pytest.approx(0.05 / 0.5, rel=1e-6)
