"""Hostile networks whose wrong cuts pass a single trial; every cut of every group is tried here."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from tests.end_to_end.test_hostile import IMAGE, SCALE, Fixed, Middle, Net, proven, reasons
from torch import nn

from cria_prune import discover
from cria_prune.base.errors import StructureError
from cria_prune.planning.plan import make_plan
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import verify
from networks import randomize


def test_a_mask_of_channels() -> None:
    found = reasons(proven(randomize(Net(Fixed(SCALE > 0, lambda x, held: x[:, held]))), IMAGE))
    assert found["c1"] is None and found["c2"] is not None and found["c3"] is None


def test_a_model_that_cannot_be_copied_is_an_error_that_says_so() -> None:
    model = randomize(Net())
    model.lock = threading.Lock()
    with pytest.raises(StructureError, match="A copy of Net"):
        discover(model, IMAGE)


BOUNDS: dict[str, tuple[int, Middle]] = {
    "last half": (3, lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1)),
    "first to the back": (3, lambda x: torch.cat([x[:, 1:], x[:, :1]], 1)),
    "split in halves": (
        3,
        lambda x: torch.cat(x.split([x.shape[1] // 2, (x.shape[1] + 1) // 2], 1)[::-1], 1),
    ),
    "split, rounded up": (3, lambda x: torch.cat(x.split((x.shape[1] + 1) // 2, 1)[::-1], 1)),
    "first chunk of an odd width": (5, lambda x: x.chunk(2, 1)[0]),
    "unequal tensor_split": (4, lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1)),
    "half beside all": (4, lambda x: torch.cat([x, x[:, : x.shape[1] // 2]], 1)),
}


class Cut(nn.Module):
    def __init__(self, width: int, middle: Middle) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Conv2d(3, width, 1), middle
        self.last, self.fc = nn.Conv2d(middle(torch.ones(1, width, 1, 1)).shape[1], 5, 1), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.last(self.middle(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("kind", BOUNDS)
def test_bounds_that_fit_some_cuts_only(kind: str) -> None:
    """Each cut alone, not only all groups together and not only four of them."""
    model = randomize(Cut(*BOUNDS[kind]))
    groups = discover(model, IMAGE)
    for group in groups.prunable:
        for count in range(1, group.size):
            for kept in itertools.combinations(range(group.size), count):
                plan = make_plan(groups, {group.name: kept})
                verify(model, plan, apply(model, plan), IMAGE)
