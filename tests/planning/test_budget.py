"""Counting against closed forms and against arrays that are really built and cut."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cria_prune.base.errors import StructureError, TargetError
from cria_prune.planning.budget import (
    Budget,
    Ledger,
    count_macs,
    count_parameters,
    largest_reachable,
)
from cria_prune.structure.groups import (
    ParameterSlice,
    UnitGroup,
    UnitGroups,
    removed_positions,
    shrink,
)


def piece(tensor, dim, units, width=1, role="produces", start=0):
    positions = start + np.arange(units * width, dtype=np.int64).reshape(units, width)
    return ParameterSlice(tensor, dim, positions, role)


def convnet() -> UnitGroups:
    """conv 3->8 (3x3, 16 positions), batch norm, conv 8->6 (3x3, 4 positions), flatten 2x2, fc 24->10."""
    a = UnitGroup(
        "a",
        "channel",
        8,
        8,
        (
            piece("a.weight", 0, 8),
            piece("bn.weight", 0, 8, role="follows"),
            piece("bn.mean", 0, 8, role="follows"),
            piece("b.weight", 1, 8, role="consumes"),
        ),
    )
    b = UnitGroup(
        "b", "channel", 6, 6, (piece("b.weight", 0, 6), piece("fc.weight", 1, 6, width=4, role="consumes"))
    )
    out = UnitGroup("fc", "neuron", 10, 10, (piece("fc.weight", 0, 10),), frozen="it is the model's output")
    shapes = {
        "a.weight": (8, 3, 3, 3),
        "bn.weight": (8,),
        "bn.mean": (8,),
        "b.weight": (6, 8, 3, 3),
        "fc.weight": (10, 24),
        "scale": (),
        "table": (5, 7),
    }
    parameters = ("a.weight", "bn.weight", "b.weight", "fc.weight", "scale", "table")
    return UnitGroups((a, b, out), shapes, parameters, {"a.weight": 16.0, "b.weight": 4.0, "fc.weight": 1.0})


def random_groups(rng: np.random.Generator) -> UnitGroups:
    """A chain of layers; some weights are read by two groups along one dimension (a concatenation)."""
    sizes = rng.integers(2, 9, size=5)
    groups, shapes = [], {}
    for number, size in enumerate(sizes):
        size, width = int(size), int(rng.integers(1, 4))
        slices = [
            piece(f"w{number}", 0, size, width),
            piece(f"bias{number}", 0, size, width, "follows"),
            piece(f"w{number + 1}", 1, size, width, "consumes"),
            piece("cat", 1, size, 1, "consumes", start=int(sizes[:number].sum())),
        ]
        frozen = "random" if rng.random() < 0.2 else None
        groups.append(UnitGroup(f"g{number}", "neuron", size, size, tuple(slices), frozen=frozen))
        shapes[f"bias{number}"] = (size * width,)
        shapes[f"w{number}"] = (size * width, shapes.get(f"w{number}", (0, 3))[1])
        shapes[f"w{number + 1}"] = (4, size * width)
    shapes["cat"] = (4, int(sizes.sum()))
    positions = {name: float(rng.integers(1, 50)) for name in shapes if name.startswith("w")}
    return UnitGroups(tuple(groups), shapes, tuple(shapes), positions)


def random_kept(groups: UnitGroups, rng: np.random.Generator, least: int = 1) -> dict[str, np.ndarray]:
    return {
        g.name: np.sort(rng.choice(g.size, int(rng.integers(least, g.size + 1)), replace=False))
        for g in groups.prunable
    }


def slow_shapes(groups: UnitGroups, kept: dict[str, np.ndarray]) -> dict[str, int]:
    """Slow twin: build every array, delete what leaves, count what is left."""
    arrays = {name: np.zeros(shape) for name, shape in groups.shapes.items()}
    for (tensor, dim), gone in removed_positions(groups.groups, kept).items():
        arrays[tensor] = np.delete(arrays[tensor], gone, axis=dim)
    return {name: array.size for name, array in arrays.items()}


def counts(kept):
    return {name: len(stays) for name, stays in kept.items()}


def test_closed_form():
    groups = convnet()
    assert count_parameters(groups) == 216 + 8 + 432 + 240 + 1 + 35
    assert count_macs(groups) == 16 * 216 + 4 * 432 + 240
    # 5 of a's 8 and 2 of b's 6 channels stay.
    kept = {"a": 5, "b": 2}
    assert count_parameters(groups, kept) == 5 * 27 + 5 + 2 * 5 * 9 + 10 * 8 + 36
    assert count_macs(groups, kept) == 16 * 135 + 4 * 90 + 80
    assert Budget(groups, "prunable").total == 216 + 8 + 432 + 240
    assert Budget(groups, "prunable").reduction(groups, kept) == 1 - (135 + 5 + 90 + 80) / 896
    # the floor: ceil(0.1 * 8) = 1, ceil(0.1 * 6) = 1
    assert largest_reachable(groups, 0.1, "prunable") == 1 - (27 + 1 + 9 + 40) / 896
    assert largest_reachable(groups, 0.5, "prunable") == 1 - (4 * 27 + 4 + 3 * 4 * 9 + 120) / 896
    assert largest_reachable(groups, 1.0, "parameters") == 0


@pytest.mark.parametrize("seed", range(30))
def test_counts_equal_arrays_that_are_cut(seed):
    rng = np.random.default_rng(seed)
    groups = random_groups(rng)
    kept = random_kept(groups, rng)
    left = slow_shapes(groups, kept)
    assert count_parameters(groups, counts(kept)) == sum(left[name] for name in groups.parameters)
    macs = math.fsum(groups.positions[name] * left[name] for name in groups.positions)
    assert count_macs(groups, counts(kept)) == pytest.approx(macs, rel=1e-14)
    touched = {item.tensor for group in groups.prunable for item in group.slices}
    expected = sum(left[name] for name in groups.parameters if name in touched)
    assert Budget(groups, "prunable").amount(groups, counts(kept)) == expected


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("of", ["parameters", "prunable", "macs"])
def test_the_dense_network_stays_the_denominator(seed, of):
    rng = np.random.default_rng(seed)
    dense = random_groups(rng)
    if not dense.prunable:
        pytest.skip("all frozen")
    kept = random_kept(dense, rng)
    budget, smaller = Budget(dense, of), shrink(dense, kept)
    assert budget.reduction(smaller) == pytest.approx(budget.reduction(dense, counts(kept)), abs=1e-15)
    again = random_kept(smaller, rng)
    assert budget.amount(smaller, counts(again)) == budget.amount(shrink(smaller, again))


def test_a_weight_used_twice_counts_once():
    group = UnitGroup("g", "neuron", 4, 4, (piece("w", 0, 4), piece("w", 0, 4), piece("w", 1, 4)))
    groups = UnitGroups((group,), {"w": (4, 4)}, ("w",), {})
    assert count_parameters(groups, {"g": 3}) == 9


def test_shared_positions_are_an_error():
    groups = tuple(UnitGroup(name, "neuron", 4, 4, (piece("w", 0, 4),)) for name in "ab")
    with pytest.raises(StructureError, match=r"\['a', 'b'\] share positions of 'w' along dimension 0"):
        count_parameters(UnitGroups(groups, {"w": (4, 4)}, ("w",), {}))


@pytest.mark.parametrize(
    ("kept", "found"),
    [({"a": 0}, "found 8 units"), ({"a": 9}, "found 8 units"), ({"fc": 3}, "no such"), ({"x": 1}, "no such")],
)
def test_impossible_counts(kept, found):
    with pytest.raises(StructureError, match=found):
        count_parameters(convnet(), kept)


def test_errors_of_a_budget():
    with pytest.raises(TargetError, match="Known: parameters, prunable, non-embedding, macs, latency"):
        Budget(convnet(), "watts")
    with pytest.raises(TargetError, match=r"seconds of a batch: nothing was measured. Give a table"):
        Budget(convnet(), "latency")
    empty = UnitGroups((), {}, (), {})
    with pytest.raises(TargetError, match="the dense network has 0"):
        Budget(empty, "macs").reduction(empty)
    assert Ledger(empty, {}).count() == 0
