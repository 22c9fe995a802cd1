"""The twin of operations: against networks built small by hand, and against wrong cuts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import discover
from cria_prune.base.errors import VerificationError
from cria_prune.planning.plan import make_plan
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import Reference, verify
from networks import randomize

TOKENS = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3)).double()
STAYS = [0, 2, 3, 7]


class HandNorm(nn.Module):
    """A normalisation written by hand, with a mean and a deviation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / (spread + 1e-6).sqrt() + self.bias


class HandRMS(HandNorm):
    """The mean square only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + self.bias


class HandLength(HandNorm):
    """Vectors of unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.normalize(x, dim=-1) + self.bias


class GroupOfOne(nn.GroupNorm):
    """All channels in one group, for features in the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


NORMS = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "mean and deviation": HandNorm,
    "mean square": HandRMS,
    "length": HandLength,
    "group": GroupOfOne,
}


class Stream(nn.Module):
    """A residual stream of eight under a norm."""

    def __init__(self, norm: type[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(7, width), norm(width), nn.Linear(width, 3)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(self.norm(x))


def stream(name: str) -> tuple[nn.Module, UnitGroups]:
    torch.manual_seed(0)
    model = randomize(Stream(NORMS[name])).double()
    return model, discover(model, TOKENS)


@pytest.mark.parametrize("name", NORMS)
def test_the_twin_is_the_network_that_is_built_small(name: str) -> None:
    model, groups = stream(name)
    assert groups["inp"].frozen is None and groups["inp"].normed and groups["inp"].kind == "residual"
    plan = make_plan(groups, {"inp": STAYS})
    assert plan.normed
    # Copied by hand, with none of the project's surgery: built with a width of four.
    small, dense = Stream(NORMS[name], len(STAYS)).double().eval(), model.state_dict()
    rows = {"inp.weight", "inp.bias", "norm.weight", "norm.bias", "down.weight", "down.bias"}
    state = {
        key: value[STAYS] if key in rows else value[:, STAYS] if key in ("up.weight", "out.weight") else value
        for key, value in dense.items()
    }
    small.load_state_dict(state)
    expected = small(TOKENS)
    found = Reference(model, TOKENS).masked_outputs(plan)[0]
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    assert not torch.allclose(found, model(TOKENS), atol=1e-3)
    result = verify(model, plan, apply(model, plan), TOKENS)
    assert result.twin == "operations" and result.difference <= 1e-12


def test_the_weights_twin_is_not_enough_under_a_norm() -> None:
    from cria_prune.surgery.verify import mask

    model, groups = stream("layer")
    plan = make_plan(groups, {"inp": STAYS})
    assert not torch.allclose(mask(model, plan)(TOKENS), apply(model, plan)(TOKENS), atol=1e-3)


def test_a_wrong_cut_under_a_norm_fails() -> None:
    model, groups = stream("layer")
    plan = make_plan(groups, {"inp": STAYS})
    other = apply(model, make_plan(groups, {"inp": [0, 2, 3, 6]}))
    with pytest.raises(VerificationError, match="the relative difference is"):
        verify(model, plan, other, TOKENS)
    stale = apply(model, plan)
    stale.norm.eps = 1e-2
    with pytest.raises(VerificationError, match="the relative difference is"):
        verify(model, plan, stale, TOKENS)


def test_groups_of_a_norm_leave_whole() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv1d(7, 12, 1), nn.GroupNorm(4, 12), nn.Conv1d(12, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.norm(self.first(x.transpose(1, 2)))))

    model = randomize(Grouped()).double()
    groups = discover(model, TOKENS)
    group = groups["first"]
    assert (group.size, group.slices[0].positions.shape, group.normed) == (4, (4, 3), False)
    plan = make_plan(groups, {"first": [1, 2, 3]})
    smaller = apply(model, plan)
    assert (smaller.norm.num_groups, smaller.norm.num_channels) == (3, 9)
    assert verify(model, plan, smaller, TOKENS).twin == "weights"


def test_a_statistic_that_goes_elsewhere_freezes_the_units() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.gate = nn.Linear(7, 6), nn.Linear(6, 3), nn.Linear(1, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x * torch.sigmoid(self.gate(x.mean(-1, keepdim=True))))

    assert "is reduced over by mean" in str(discover(Attentive().double(), TOKENS)["first"].frozen)


def test_the_reference_is_dense_again_after_every_plan() -> None:
    model, groups = stream("layer")
    reference = Reference(model, TOKENS)
    before = copy.deepcopy(reference.model.state_dict())
    for kept in ({"inp": STAYS}, {"up": [0, 5]}):
        plan = make_plan(groups, {name: np.array(stays) for name, stays in kept.items()})
        reference.compare(plan, apply(reference.model, plan, share=True))
    assert all(torch.equal(value, before[key]) for key, value in reference.model.state_dict().items())
