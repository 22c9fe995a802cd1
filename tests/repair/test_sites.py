"""Where layers are found, and the sums that they are added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune.repair.program import Program
from cria_prune.repair.sites import Site, find_sites


class Adds(nn.Module):
    """Branches that are added in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.one, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.rows, self.gamma = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.gated, self.written, self.head = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.one(x)) + x)
        x = F.relu(self.left(x) + self.right(x) + x)
        x = x + (self.rows(x.permute(0, 2, 3, 1)) * self.gamma / 2).permute(0, 3, 1, 2)
        x = x + self.gated(x) * x.mean((2, 3), keepdim=True)
        y = self.written(x)
        x.mul_(0.5)
        return self.head((x + y).mean((2, 3)))


def found(model: nn.Module) -> tuple[Program, dict[str, Site]]:
    program = Program(model.eval(), torch.randn(2, 3, 4, 4))
    sites, left = find_sites(program)
    assert not left
    return program, {site.weight.removesuffix(".weight"): site for site in sites}


def test_meetings() -> None:
    program, sites = found(Adds())

    def way(name: str) -> list[str] | None:
        met = sites[name].meeting
        return None if met is None else [program.steps[step].name for step in (*met.chain, met.at)]

    assert list(sites) == ["stem", "one", "left", "right", "rows", "gated", "written", "head"]
    assert way("stem") is None and way("head") is None  # an activation is behind it, and nothing
    assert way("one") == ["batch_norm", "add"]
    # The other branch is still to be refitted; of two sums in a row the last one counts.
    assert way("left") is None and "another layer" in sites["left"].why
    assert way("right") == ["add", "add"]
    assert way("rows") == ["mul", "div", "permute", "add"]
    assert way("gated") is None  # a scale that depends on the data is not undone
    # What the layer has read is changed before the sum.
    assert way("written") is None and "writes" in sites["written"].why
    assert sites["one"].norm == "norm.running_mean" and sites["one"].bias == "one.bias"


def test_only_the_wanted_ones_are_waited_for() -> None:
    program = Program(Adds().eval(), torch.randn(2, 3, 4, 4))
    sites, left = find_sites(program, {"left.weight", "gamma"})
    assert [site.weight for site in sites] == ["left.weight"] and sites[0].meeting is not None
    assert left == {"gamma": "is read by an operation that cannot be refitted"}


def test_a_buffer_is_no_layer() -> None:
    class Banked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.ones(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ self.bank

    program = Program(Banked().eval(), torch.randn(2, 3, 4, 4))
    assert find_sites(program, fixed={"bank"}) == ([], {"bank": "is a buffer, and no parameter"})
