"""Every parameter is accounted for: once, with a reason and a way out where it stays."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.errors import TargetError
from cria_prune.planning.budget import largest_reachable
from cria_prune.structure.account import LOOSE, NO_RULE, UNREAD
from cria_prune.structure.groups import UnitGroups, without_residual


class Mixed(nn.Module):
    """A skip, an operation without a rule, a layer that nothing runs, a number, and free units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.turned, self.out, self.unused = nn.Linear(8, 9), nn.Linear(9, 4), nn.Linear(5, 7)
        self.scale, self.moved = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x + self.moved)
        x = x + self.back(F.relu(self.inner(x)))
        return self.out(torch.fft.fft(self.turned(x)).real * self.scale)


def by_entry(groups: UnitGroups, name: str) -> tuple[int, int]:
    """Count the entries of a parameter in a prunable group and in any, entry by entry."""
    held: dict[tuple[int, int], set[bool]] = {}
    for group in groups:
        for item in group.slices:
            if item.tensor == name:
                for position in np.unique(item.positions).tolist():
                    held.setdefault((item.dim, position), set()).add(group.frozen is None and group.size > 1)
    at = [[held.get((dim, place), set()) for place in range(n)] for dim, n in enumerate(groups.shapes[name])]
    entries = [set().union(*chosen) for chosen in product(*at)]
    return sum(True in entry for entry in entries), sum(bool(entry) for entry in entries)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("residual", [False, True])
def test_every_parameter_is_counted_once(floor: float, residual: bool) -> None:
    model = Mixed()
    groups = discover(model, torch.randn(3, 6))
    groups = groups if residual else without_residual(groups)
    found = groups.account(floor)
    count = {item.fate: 0 for item in found}
    for item in found:
        count[item.fate] += item.parameters
    assert sum(count.values()) == found.total == sum(item.numel() for item in model.parameters())
    assert sum(item.share for item in found) == pytest.approx(1, abs=1e-12)
    # Two other ways to count: by what the plans can reach, and entry by entry.
    assert found.entries[0].share == pytest.approx(largest_reachable(groups, floor, "parameters"), abs=1e-12)
    counted = [by_entry(groups, name) for name in groups.parameters]
    assert count["prunable"] + count["floor"] == sum(movable for movable, _ in counted)
    assert sum(grouped for _, grouped in counted) == found.total - 42 - 1 - 6  # unused, scale and moved


def test_all_positions_of_a_unit_are_counted() -> None:
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
    groups = discover(model, torch.randn(2, 3, 4))
    assert groups.account(0.3).entries[0].share == pytest.approx(largest_reachable(groups, 0.3, "parameters"))


def test_what_stays_names_its_reason_and_the_way_out() -> None:
    model = Mixed()
    found = without_residual(discover(model, torch.randn(3, 6))).account()
    said = {item.reason: item for item in found}
    fft = next(item for item in found if item.reason.startswith(NO_RULE))
    assert fft.fate == "not followed" and "fft" in fft.reason and fft.where == ("turned", "out.weight")
    # The bias before it and the columns behind it; its rows would lose their columns with the stream.
    assert fft.parameters == 9 + 9 * 4
    assert said[UNREAD].where == ("unused.weight", "unused.bias") and said[UNREAD].parameters == 42
    stream = next(item for item in found if item.reason.startswith("residual"))
    assert (
        "--residual" in stream.way_out
        and stream.where == ("stem",)
        and stream.parameters == 8 * 6 + 8 + 8 + 9 * 8
    )
    assert said["meets a tensor of fixed size in add in the model"].where == ("moved",)
    assert said[LOOSE].where == ("scale",)


def test_a_refusal_names_the_three_largest_reasons() -> None:
    with pytest.raises(TargetError) as caught:
        prune(Mixed(), [torch.randn(8, 6)], PruneConfig(plan={"reduction": 0.9}))
    text = str(caught.value)
    assert "at most" in text and "What stays of the parameters: 31" in text and text.count(" | ") == 2
    assert f"not followed: {NO_RULE} fft" in text and "or report it" in text and "(--residual)" in text
    assert f"not followed: {UNREAD}" in text
