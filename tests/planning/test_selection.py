"""Which units leave: order, floor, ties, targets and every error."""

from __future__ import annotations

import numpy as np
import pytest
from tests.planning.test_budget import convnet, counts, piece, random_groups, slow_shapes

from cria_prune.base.errors import SignalError, StructureError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import Budget, largest_reachable
from cria_prune.planning.selection import check_reachable, select
from cria_prune.structure.groups import UnitGroup, UnitGroups, least_kept, shrink


def two_layers(a: int = 10, b: int = 10, cost: int = 1) -> UnitGroups:
    """Two independent groups; a unit of `a` costs 1 parameter, one of `b` costs `cost`."""
    return UnitGroups(
        (
            UnitGroup("a", "neuron", a, a, (piece("wa", 0, a),)),
            UnitGroup("b", "neuron", b, b, (piece("wb", 0, b),)),
        ),
        {"wa": (a, 1), "wb": (b, cost)},
        ("wa", "wb"),
        {"wa": 1.0, "wb": 1.0},
    )


def chosen(groups, scores, target, dense=None, allowed=None, **options):
    return select(groups, scores, target, PlanConfig(**options), dense=dense, allowed=allowed)


def random_scores(groups, rng):
    return {group.name: rng.integers(0, 4, group.size).astype(float) for group in groups.prunable}


def test_uniform_takes_the_same_share_of_every_group():
    groups = two_layers(10, 20)
    scores = {"a": np.arange(10.0) * 1000, "b": np.arange(20.0)[::-1]}
    kept = chosen(groups, scores, 0.5, floor=0.0)
    assert kept["a"].tolist() == [5, 6, 7, 8, 9]
    assert kept["b"].tolist() == list(range(10))


def test_global_lets_units_of_all_groups_compete():
    groups = two_layers(4, 4)
    scores = {"a": np.array([1.0, 1, 1, 5]), "b": np.array([2.0, 2, 2, 2])}
    # relative: a = .5 .5 .5 2.5, b = 1 1 1 1
    assert {k: v.tolist() for k, v in chosen(groups, scores, 0.5, ranking="global").items()} == {
        "a": [3],
        "b": [1, 2, 3],
    }


def test_global_takes_first_what_frees_most():
    groups = two_layers(4, 4, cost=10)
    scores = {"a": np.ones(4), "b": np.ones(4)}
    kept = chosen(groups, scores, 0.5, ranking="global")
    assert kept["a"].tolist() == [0, 1, 2, 3]
    assert kept["b"].tolist() == [3]


def test_global_does_not_depend_on_the_scale_of_a_group():
    groups, rng = two_layers(), np.random.default_rng(0)
    scores = {"a": rng.random(10), "b": rng.random(10)}
    first = chosen(groups, scores, 0.4, ranking="global")
    second = chosen(groups, {"a": scores["a"] * 4096, "b": scores["b"]}, 0.4, ranking="global")
    assert all((first[name] == second[name]).all() for name in first)


def test_loss_takes_the_scores_as_they_are():
    groups = two_layers(4, 4)
    scores = {"a": np.array([1.0, 2, 3, 5]), "b": np.array([4.0, 6, 7, 8])}
    kept = chosen(groups, scores, 0.5, ranking="loss")
    assert {name: stays.tolist() for name, stays in kept.items()} == {"a": [3], "b": [1, 2, 3]}
    far = {"a": scores["a"] * 100, "b": scores["b"]}
    assert chosen(groups, far, 0.3, ranking="loss")["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(SignalError, match="negative"):
        chosen(groups, {"a": -scores["a"], "b": scores["b"]}, 0.5, ranking="loss")


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_ties_go_by_group_order_then_index(ranking):
    groups = two_layers()
    flat = {"a": np.ones(10), "b": np.ones(10)}
    kept = chosen(groups, flat, 0.25, ranking=ranking)
    expected = ([3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8, 9])
    assert (kept["a"].tolist(), kept["b"].tolist()) == expected
    zero = {"a": np.zeros(10), "b": np.zeros(10)}
    first = expected[0] if ranking == "uniform" else [5, 6, 7, 8, 9]
    assert chosen(groups, zero, 0.25, ranking=ranking)["a"].tolist() == first


def test_global_leaves_something_of_a_narrow_layer_whose_units_free_the_most():
    # 64 units of one parameter beside 16 of eight. By score for cost alone the narrow layer would go to its
    # floor before the wide one loses any. A unit of m that are left now counts (16 / m)² / 8, and one of k
    # (64 / k)²: the sixth last narrow one goes for 0.89, before any wide one; the fifth last for 1.28.
    kept = chosen(two_layers(64, 16, 8), {"a": np.ones(64), "b": np.ones(16)}, 0.5, ranking="global")
    assert (len(kept["a"]), len(kept["b"])) == (56, 5)


@pytest.mark.parametrize("of", ["parameters", "prunable", "macs"])
@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("seed", range(12))
def test_the_prefix_is_the_shortest_that_reaches(seed, ranking, of):
    """Reached, floor kept, ascending; against the arrays; and a smaller target gives a superset."""
    rng = np.random.default_rng(seed)
    groups = random_groups(rng)
    if not groups.prunable:
        pytest.skip("all frozen")
    scores, budget = random_scores(groups, rng), Budget(groups, of)
    reachable, floor = largest_reachable(groups, 0.2, of), 0.2
    before = None
    for target in np.linspace(reachable * 0.05, reachable * 0.999999, 7):
        kept = chosen(groups, scores, float(target), of=of, ranking=ranking, floor=floor)
        left = slow_shapes(groups, kept)
        slow = sum(weight * left[name] for name, weight in budget.weights.items())
        assert 1 - slow / budget.total >= target - 1e-9
        for group in groups.prunable:
            stays = kept[group.name]
            assert len(stays) >= max(1, np.ceil(floor * group.size))
            assert (np.diff(stays) > 0).all() and stays.dtype == np.int64
            gone = np.setdiff1d(np.arange(group.size), stays)
            if len(gone):
                assert scores[group.name][gone].max() <= scores[group.name][stays].min()
            if before is not None:
                assert set(stays) <= set(before[group.name])
        before = kept


def test_one_unit_fewer_would_not_reach():
    groups, budget = two_layers(), Budget(two_layers())
    scores = {"a": np.arange(10.0), "b": np.arange(10.0)}
    for target in (0.05, 0.051, 0.3, 0.7, 0.9):
        kept = counts(chosen(groups, scores, target))
        gone = 20 - sum(kept.values())
        assert gone == int(np.ceil(round(target * 20, 9)))
        assert budget.reduction(groups, kept) >= target - 1e-12


def test_rounds_end_where_one_round_ends_and_units_stay_even():
    dense = two_layers(16, 32)
    rng = np.random.default_rng(1)
    groups = dense
    for round_number in range(1, 5):
        scores = {group.name: rng.random(group.size) for group in groups.prunable}
        groups = shrink(groups, chosen(groups, scores, round_number * 0.5 / 4, dense=dense))
    assert [group.size for group in groups] == [8, 16]
    assert [group.original_size for group in groups] == [16, 32]
    # The target is met already: nothing more leaves.
    again = chosen(groups, {group.name: np.ones(group.size) for group in groups}, 0.5, dense=dense)
    assert [len(stays) for stays in again.values()] == [8, 16]


def test_the_floor_counts_original_units_over_rounds():
    dense = two_layers(10, 10)
    groups = shrink(dense, {"a": [0, 1, 2], "b": range(10)})
    scores = {"a": np.zeros(3), "b": np.ones(10)}
    kept = chosen(groups, scores, 0.6, dense=dense, floor=0.3)
    assert len(kept["a"]) == 3 and len(kept["b"]) == 5


def test_beyond_reach_prints_the_largest_share():
    scores = {"a": np.ones(10), "b": np.ones(10)}
    with pytest.raises(
        TargetError, match=r"Removing 80.00% of the parameters: at most 70.00% can be removed"
    ):
        chosen(two_layers(), scores, 0.8, floor=0.3)
    kept = chosen(two_layers(), scores, 0.7, floor=0.3)
    assert counts(kept) == {"a": 3, "b": 3}


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5, float("nan"), "0.5", True, None])
def test_targets_out_of_range(target):
    with pytest.raises(TargetError, match="not between 0 and 1"):
        chosen(two_layers(), {}, target)


@pytest.mark.parametrize(
    ("scores", "error", "text"),
    [
        ({"a": np.ones(10)}, StructureError, r"group 'b'.*no scores for it, only for \['a'\]"),
        ({"a": np.ones(10), "b": np.ones(9)}, StructureError, r"10 units.*shape \(9,\)"),
        ({"a": np.ones(10), "b": np.r_[np.ones(9), np.nan]}, SignalError, "1 of 10 scores are NaN"),
        ({"a": np.ones(10), "b": np.r_[np.ones(9), np.inf]}, SignalError, "1 of 10 scores are NaN"),
        ({"a": np.ones(10), "b": -np.ones(10)}, SignalError, "negative scores, the lowest -1"),
    ],
)
def test_scores_that_do_not_fit(scores, error, text):
    with pytest.raises(error, match=text):
        chosen(two_layers(), scores, 0.5, ranking="global")


def test_nothing_to_prune_says_why():
    groups = convnet()
    only = UnitGroups(groups.groups[2:], groups.shapes, groups.parameters, groups.positions)
    with pytest.raises(StructureError, match="fc: it is the model's output"):
        chosen(only, {}, 0.5)


def test_groups_that_lost_more_before_lose_less_now():
    """Priorities count what is gone: rounds that began unevenly end evenly."""
    dense = two_layers(20, 20)
    groups = shrink(dense, {"a": list(range(10)), "b": list(range(18))})
    kept = chosen(groups, {"a": np.ones(10), "b": np.ones(18)}, 0.5, dense=dense)
    assert counts(kept) == {"a": 10, "b": 10}


def test_the_floor_is_a_share_of_the_dense_group():
    dense = two_layers(10, 10)
    groups = shrink(dense, {"a": [0, 1, 2, 3], "b": range(10)})
    # Both end at 3 of their 10 original units, although `a` has 4 now.
    assert largest_reachable(groups, 0.3, "parameters", dense=dense) == 0.7
    kept = chosen(groups, {"a": np.zeros(4), "b": np.ones(10)}, 0.7, dense=dense, floor=0.3)
    assert counts(kept) == {"a": 3, "b": 3}


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_ties_in_a_wide_group_leave_by_index(ranking):
    groups = two_layers(500, 500)
    values = np.random.default_rng(0).integers(0, 2, 500).astype(float)
    kept = chosen(groups, {"a": values, "b": values}, 0.2, ranking=ranking)
    zeros = np.flatnonzero(values == 0)
    for stays in kept.values():
        gone = np.setdiff1d(np.arange(500), stays)
        assert gone.tolist() == zeros[: len(gone)].tolist()


def test_targets_that_are_a_whole_number_of_units_take_just_these():
    """k / n of n units is k units, whatever the rounding of the shares."""
    for size in range(2, 40):
        groups = two_layers(size, 2)
        one = UnitGroups(groups.groups[:1], groups.shapes, ("wa",), {})
        for gone in range(1, size):
            for target in (gone / size, gone * (1 / size)):
                kept = chosen(one, {"a": np.arange(size, dtype=float)}, target, floor=0.0)
                assert len(kept["a"]) == size - gone


def test_reach_is_known_without_scores():
    assert check_reachable(two_layers(), 0.5, PlanConfig()) == pytest.approx(0.9)
    with pytest.raises(TargetError, match=r"at most 90\.00%"):
        check_reachable(two_layers(), 0.95, PlanConfig())


def test_a_floor_of_whole_units_is_not_rounded_up():
    """0.07 * 100 is 7.000000000000001 in floating point; 7 units stay, not 8."""
    group = two_layers(100, 1).groups[0]
    assert least_kept(group, 0.07) == 7
    assert [least_kept(group, floor) for floor in (0.0, 0.071, 1.0)] == [1, 8, 100]


def test_a_group_without_any_score_counts_as_its_own_mean():
    groups = two_layers(4, 4)
    scores = {"a": np.zeros(4), "b": np.array([1.0, 3, 1, 3])}
    kept = chosen(groups, scores, 0.25, ranking="global")
    assert (kept["a"].tolist(), kept["b"].tolist()) == ([0, 1, 2, 3], [1, 3])
