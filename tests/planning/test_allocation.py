"""Shares by measured losses: against all combinations, in closed form, and every error."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from tests.planning.test_budget import piece, random_groups
from tests.planning.test_selection import two_layers

from cria_prune.base.errors import SignalError, StructureError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.allocation import allocate, loss_curve
from cria_prune.planning.budget import Budget
from cria_prune.planning.stairs import stairs
from cria_prune.structure.groups import UnitGroup, UnitGroups, shrink

FREE = PlanConfig(floor=0.0)


def chain(sizes: list[int], widths: list[int]) -> UnitGroups:
    """Layers one after another: the weight between two groups costs the product of both."""
    groups, shapes = [], {}
    for number, size in enumerate(sizes):
        after = piece(f"w{number + 1}", 1, size)
        groups.append(UnitGroup(f"g{number}", "neuron", size, size, (piece(f"w{number}", 0, size), after)))
    for number, (one, two) in enumerate(zip([*sizes, widths[1]], [widths[0], *sizes], strict=True)):
        shapes[f"w{number}"] = (one, two)
    return UnitGroups(tuple(groups), shapes, tuple(shapes), dict.fromkeys(shapes, 1.0))


def random_losses(groups: UnitGroups, rng, convex: bool = False) -> dict[str, dict[int, float]]:
    losses = {}
    for group in groups.prunable:
        steps = rng.uniform(0, 1, group.size - 1)
        values = np.cumsum(np.sort(steps) if convex else steps)
        losses[group.name] = {group.size - 1 - i: float(value) for i, value in enumerate(values)}
    return losses


def best_of_all(made, losses, budget, groups, target):
    """The slow twin: every combination of numbers. Returns the least loss and its numbers."""
    curves, ledger = [loss_curve(stair, losses) for stair in made], budget.ledger(groups)
    found = []
    for steps in product(*(range(len(stair.counts)) for stair in made)):
        kept = {n: int(s.counts[i]) for s, i in zip(made, steps, strict=True) for n in s.names}
        if budget.share(ledger.count(kept)) >= target - 1e-12:
            loss = sum(curve[i] for curve, i in zip(curves, steps, strict=True))
            found.append((loss, steps, kept))
    return min(found, key=lambda item: item[:2])


def total_loss(made, losses, kept) -> float:
    return sum(loss_curve(s, losses)[s.counts.tolist().index(kept[s.names[0]])] for s in made)


@pytest.mark.parametrize("seed", range(8))
def test_where_costs_add_up_it_is_the_best_of_all_combinations(seed):
    rng = np.random.default_rng(seed)
    groups = two_layers(9, 7, cost=int(rng.integers(1, 5)))
    made, losses, budget = stairs(groups, FREE), random_losses(groups, rng), Budget(groups)
    for target in (0.2, 0.5, 0.7):
        kept = allocate(made, losses, budget.ledger(groups), budget.total, target)
        best, *_ = best_of_all(made, losses, budget, groups, target)
        assert total_loss(made, losses, kept) == pytest.approx(best, abs=1e-12)
        assert budget.reduction(groups, kept) >= target - 1e-12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("of", ["parameters", "macs"])
def test_where_costs_are_products_it_is_near_the_best(seed, of):
    rng = np.random.default_rng(seed)
    groups = chain([6, 5, 7, 4], [5, 3])
    made, losses, budget = stairs(groups, FREE), random_losses(groups, rng, convex=True), Budget(groups, of)
    target = float(rng.uniform(0.2, 0.8))
    kept = allocate(made, losses, budget.ledger(groups), budget.total, target)
    best, *_ = best_of_all(made, losses, budget, groups, target)
    assert budget.reduction(groups, kept) >= target - 1e-12
    assert total_loss(made, losses, kept) <= 1.1 * best


@pytest.mark.parametrize("seed", range(12))
def test_prices_are_differences_of_counts(seed):
    rng = np.random.default_rng(seed)
    groups = random_groups(rng)
    ledger = Budget(groups).ledger(groups)
    kept = {group.name: int(rng.integers(1, group.size + 1)) for group in groups.prunable}
    for group in groups.prunable:
        counts = np.arange(1, group.size + 1)
        slow = np.array([ledger.count({**kept, group.name: int(count)}) for count in counts])
        assert np.diff(ledger.along([group.name], counts, kept)) == pytest.approx(np.diff(slow), abs=1e-9)


def test_quadratic_losses_meet_where_their_slopes_are_equal():
    # min a x^2 + b y^2 with x + c y = F: x = F / (1 + c^2 a / b), from a x = b y / c
    a, b, c, size = 1.0, 3.0, 2, 400
    groups = two_layers(size, size, cost=c)
    losses = {
        "a": {size - x: a * x**2 for x in range(1, size)},
        "b": {size - x: b * x**2 for x in range(1, size)},
    }
    kept = allocate(stairs(groups, FREE), losses, Budget(groups).ledger(groups), size * (1 + c), 0.3)
    freed = 0.3 * size * (1 + c)
    assert size - kept["a"] == pytest.approx(freed / (1 + c**2 * a / b), abs=2)
    assert size - kept["a"] + c * (size - kept["b"]) == pytest.approx(freed, abs=1)


def test_wide_stairs_and_few_measured_levels_end_near_the_target():
    groups = chain([4096, 11008, 11008], [64, 64])
    levels = [round(group * (1 - n / 8)) for group in (4096, 11008, 11008) for n in range(1, 8)]
    losses = {
        f"g{i}": {k: (i + 1) * (1 - k / size) ** 2 for k in [*levels[7 * i : 7 * i + 7], 1]}
        for i, size in enumerate((4096, 11008, 11008))
    }
    budget = Budget(groups)
    kept = allocate(stairs(groups, FREE), losses, budget.ledger(groups), budget.total, 0.5)
    assert 0.5 <= budget.reduction(groups, kept) < 0.5001
    assert kept["g1"] / 11008 > kept["g0"] / 4096 or kept["g2"] > kept["g1"]


def test_rounds_go_on_from_what_is_gone():
    groups = chain([16, 16, 16], [16, 16])
    losses, budget = random_losses(groups, np.random.default_rng(3), convex=True), Budget(groups)
    first = allocate(stairs(groups, FREE), losses, budget.ledger(groups), budget.total, 0.3)
    smaller = shrink(groups, {name: np.arange(count) for name, count in first.items()})
    second = allocate(stairs(smaller, FREE), losses, budget.ledger(smaller), budget.total, 0.6)
    assert all(second[name] <= first[name] for name in first)
    assert 0.6 <= budget.reduction(smaller, second) < 0.63


def test_a_class_goes_down_together_by_the_sum_of_its_losses():
    groups = chain([8, 8], [8, 8])
    made = stairs(groups, PlanConfig(floor=0.0, uniform=True, multiple=2))
    losses = {"g0": {1: 1.0, 2: 1.0}, "g1": {1: 2.0, 2: 1.0}}
    assert [stair.names for stair in made] == [("g0", "g1")]
    assert loss_curve(made[0], losses)[-1] == pytest.approx(2.0)
    kept = allocate(made, losses, Budget(groups).ledger(groups), Budget(groups).total, 0.5)
    assert kept == {"g0": 4, "g1": 4}


def test_losses_are_made_monotone_and_joined_without_wiggles():
    (stair,) = [item for item in stairs(two_layers(16, 2), FREE) if item.names == ("a",)]
    curve = loss_curve(stair, {"a": {12: 0.5, 8: 0.2, 4: 0.5, 1: 4.0}})
    assert curve[[4, 8, 12, 15]] == pytest.approx([0.5, 0.5, 0.5, 4.0])
    assert curve[0] == 0.0 and (np.diff(curve) >= 0).all()
    assert curve[5:12] == pytest.approx(0.5)


def test_ties_are_told_apart_the_same_way_every_time():
    groups = two_layers(8, 8)
    flat = {name: dict.fromkeys(range(1, 8), 0.0) for name in "ab"}
    found = [allocate(stairs(groups, FREE), flat, Budget(groups).ledger(groups), 16, 0.25) for _ in range(2)]
    assert found[0] == found[1] and sum(found[0].values()) == 12


def test_what_is_wrong_is_said():
    groups = two_layers(8, 8)
    made, budget = stairs(groups, PlanConfig(floor=0.25)), Budget(groups)
    losses = {name: {2: 1.0} for name in "ab"}

    def ask(values, target=0.5):
        return allocate(made, values, budget.ledger(groups), budget.total, target)

    assert sum(ask(losses, 0.75).values()) == 4
    with pytest.raises(
        TargetError, match=r"Removing 76\.00%.* at most 75\.00% can be removed. Ask for 0\.75"
    ):
        ask(losses, 0.76)
    with pytest.raises(StructureError, match=r"group 'b': found no losses for it, only for \['a'\]"):
        ask({"a": {2: 1.0}})
    with pytest.raises(StructureError, match=r"down to 2 units of group 'a'.*known for \[3, 8\] units"):
        ask({**losses, "a": {3: 1.0}})
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SignalError, match=f"the loss at 2 units is {wrong:g}"):
            ask({**losses, "a": {2: wrong}})
