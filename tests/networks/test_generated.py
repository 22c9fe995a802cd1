"""Random networks: what discovery offers is cut rightly, and it offers much.

Eighty of them; `CRIA_GENERATED=300` tries as many (a multiple of 20, from seed 0).
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import generator_check
import pytest
import torch
from generator import FURTHER, KINDS, Program, network, shrunk
from generator_check import Outcome, check, coverage, same_failure
from torch import nn

from cria_prune import discover

FIRST, SIZE = 0, 20
CHUNKS = int(os.environ.get("CRIA_GENERATED", "80")) // SIZE
LEAST = {
    "image networks": 0.50,
    "sequence networks": 0.45,
    "token networks": 0.45,
    "attention": 0.35,
    "conformer": 0.65,
    "conv": 0.45,
    "embed": 0.30,
    "excite": 0.60,
    "experts": 0.75,
    "gated": 0.60,
    "linear": 0.60,
    "mlp": 0.65,
    "multihead": 0.60,
    "residual": 0.60,
    "transposed": 0.50,
}
"""Kind of network, or of block that produces a group -> the share of its groups that can be pruned."""


@cache
def outcome(seed: int) -> Outcome:
    return check(network(seed))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_networks_masked_equals_pruned(chunk: int) -> None:
    first = FIRST + chunk * SIZE
    failed = [item for item in map(outcome, range(first, first + SIZE)) if item.failure]
    if failed:
        worst = failed[0]
        small = shrunk(
            network(worst.seed), lambda item: same_failure(check(item).failure, worst.failure), 150
        )
        pytest.fail(f"seeds {[item.seed for item in failed]}; {worst.failure}\n\n{small}")


def test_much_can_be_pruned_and_pruning_moves_the_output() -> None:
    outcomes = [outcome(seed) for seed in range(FIRST, FIRST + CHUNKS * SIZE)]
    everything, prunable = coverage(outcomes)
    shares = {name: round(prunable[name] / max(everything[name], 1), 2) for name in LEAST}
    assert all(shares[name] >= least for name, least in LEAST.items()), shares
    assert sum(item.moved > 0 for item in outcomes) >= 0.9 * len(outcomes)


def test_trials_find_little_that_the_rules_do_not_know() -> None:
    """A wrong rule is caught by a trial cut, which freezes: no cut is wrong, but the rule is."""
    outcomes = [outcome(seed) for seed in range(FIRST, FIRST + CHUNKS * SIZE)]
    reasons = [str(frozen) for item in outcomes for *_, frozen in item.groups]
    # A layer norm without parameters keeps its size, for there is no tensor to read it from.
    surprises = [
        text for text in reasons if "its forward depends on" in text and "normalized_shape" not in text
    ]
    assert len(surprises) <= 0.015 * len(reasons), surprises


@pytest.mark.parametrize("seed", [*range(6), 40, 41, 42])
def test_the_printed_program_is_the_network(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "network.py"
    path.write_text(str(network(seed)))
    printed = runpy.run_path(str(path))
    model, example = network(seed).build()
    assert [*map(repr, discover(printed["model"], printed["example"]))] == [
        *map(repr, discover(model, example))
    ]
    for left, right in zip(printed["model"].parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_seeds_give_the_three_kinds_and_differ() -> None:
    programs = [network(seed) for seed in range(12)]
    assert {program.kind for program in programs} == set(KINDS)
    assert len({str(program) for program in programs}) == 12


def noisy(apply: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Cut, and move every weight of the smaller model a little."""

    def changed(model: nn.Module, plan: Any) -> nn.Module:
        smaller = apply(model, plan)
        with torch.no_grad():
            for tensor in smaller.parameters():
                tensor.mul_(1 + 1e-5)
        return smaller

    return changed


def test_a_wrong_cut_is_seen_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_check, "apply", noisy(generator_check.apply))
    failed = [check(network(seed)) for seed in range(9)]
    assert all("relative difference" in str(item.failure) for item in failed)
    first = failed[0].failure

    def fails(program: Program) -> bool:
        return same_failure(check(program).failure, first)

    small = shrunk(network(0), fails, tries=60)
    assert fails(small)
    assert len(small.live()) < len(network(0).live())


class Shaped(nn.Module):
    """What one layer gives takes the shape of what another layer gave, and nothing else ties them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(x))
        return self.head(torch.relu(self.two(x.flatten(0, 1))).view_as(x))


def test_layers_of_one_size_are_not_tried_at_one_size() -> None:
    groups = discover(Shaped().eval(), torch.randn(2, 5, 4))
    assert [group.name for group in groups.prunable] == []


@pytest.mark.parametrize("seed", [FURTHER, FURTHER + 2, FURTHER + 7])
def test_further_kinds(seed: int) -> None:
    outcome = check(network(seed))
    assert outcome.failure is None
    assert any(frozen is None for *_, frozen in outcome.groups)
