"""Uniform plans: alike groups keep the same number, in multiples and among allowed numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.test_budget import counts, piece

from cria_prune.base.errors import ConfigError, StructureError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import Budget, largest_reachable
from cria_prune.planning.plan import compose, identity_plan, make_plan, plan
from cria_prune.planning.selection import reachable, select
from cria_prune.planning.stairs import stairs
from cria_prune.structure.groups import (
    Count,
    UnitGroup,
    UnitGroups,
    alike,
    counted_together,
    least_kept,
    shrink,
)

KINDS = ("neuron", "gated", "channel", "head", "kv group")


def blocks(parts: list[tuple[str, int, int]], number: int) -> UnitGroups:
    """`number` blocks of parts (kind, units, parameters per unit), and a layer that fits no block."""
    groups, shapes = [], {}
    for block in range(number):
        for part, (kind, size, cost) in enumerate(parts):
            name = f"block.{block}.{'abc'[part]}"
            groups.append(UnitGroup(name, kind, size, size, (piece(name, 0, size),)))
            shapes[name] = (size, cost)
    groups.append(UnitGroup("pooler", "neuron", 9, 9, (piece("pooler", 0, 9),)))
    shapes["pooler"] = (9, 2)
    return UnitGroups(tuple(groups), shapes, tuple(shapes), dict.fromkeys(shapes, 2.0))


@st.composite
def networks(draw: st.DrawFn) -> UnitGroups:
    part = st.tuples(st.sampled_from(KINDS), st.integers(2, 40), st.integers(1, 9))
    return blocks(draw(st.lists(part, min_size=1, max_size=3)), draw(st.integers(1, 3)))


def options(**given_) -> st.SearchStrategy[PlanConfig]:
    values = {
        "uniform": st.just(True),
        "ranking": st.sampled_from(["uniform", "global", "loss"]),
        "multiple": st.sampled_from([1, 2, 3, 8]),
        "floor": st.sampled_from([0.0, 0.1, 0.35]),
        "of": st.sampled_from(["parameters", "macs"]),
    } | given_
    return st.builds(PlanConfig, **values)


def drawn_scores(groups: UnitGroups, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {group.name: rng.integers(0, 5, group.size).astype(float) for group in groups.prunable}


def drawn_allowed(groups: UnitGroups, seed: int) -> dict[str, list[int]]:
    """For some classes some of the numbers, the present one and one within reach of any floor in them."""
    rng = np.random.default_rng(seed)
    found = {}
    for names in alike(groups):
        size = groups[names[0]].size
        if rng.random() < 0.5:
            some = {size, *rng.integers(1, size + 1, 3).tolist()}
            found |= {name: sorted(some) for name in names}
    return found


def check_kept(groups: UnitGroups, kept, config: PlanConfig, allowed=None) -> None:
    for group in groups.prunable:
        stays = len(kept[group.name])
        assert least_kept(group, config.floor) <= stays <= group.size
        if group.kind in ("neuron", "gated", "channel"):
            assert stays % config.multiple == 0 or stays == group.size
        if group.name in (allowed or {}):
            assert stays in allowed[group.name]
    if config.uniform:
        for names in alike(groups.prunable):
            assert len({len(kept[name]) for name in names}) == 1


@settings(max_examples=150)
@given(networks(), options(uniform=st.booleans()), st.integers(0, 99), st.floats(0.01, 1), st.booleans())
def test_every_target_within_reach_is_reached_in_permitted_numbers(groups, config, seed, share, restrict):
    allowed = drawn_allowed(groups, seed) if restrict else None
    most = reachable(groups, config, allowed=allowed)
    assert most <= largest_reachable(groups, config.floor, config.of) + 1e-12
    scores = drawn_scores(groups, seed)
    if most == 0:
        with pytest.raises(TargetError, match=r"at most 0\.00% can be removed"):
            select(groups, scores, 0.5, config, allowed=allowed)
        return
    kept = select(groups, scores, share * most, config, allowed=allowed)
    check_kept(groups, kept, config, allowed)
    assert Budget(groups, config.of).reduction(groups, counts(kept)) >= share * most - 1e-9
    for group in groups.prunable:
        gone = np.setdiff1d(np.arange(group.size), kept[group.name])
        if len(gone):
            assert scores[group.name][gone].max() <= scores[group.name][kept[group.name]].min()
    with pytest.raises(TargetError, match="can be removed"):
        select(groups, scores, min(most + 1e-6, 0.999999), config, allowed=allowed)


@settings(max_examples=100)
@given(
    networks(),
    options(uniform=st.just(False)),
    st.integers(0, 99),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=5),
)
def test_a_larger_target_keeps_a_subset(groups, config, seed, shares):
    most, scores, before = reachable(groups, config), drawn_scores(groups, seed), None
    if most == 0:
        return
    for share in sorted(shares):
        kept = select(groups, scores, share * most, config)
        if before is not None:
            assert all(set(stays) <= set(before[name]) for name, stays in kept.items())
        before = kept


def slow_counts(groups: UnitGroups, scores, target: float, config: PlanConfig) -> dict[str, int]:
    """Slow twin: take the step of the lowest priority until the target is reached, in exact fractions.

    The last stair then may go no further than before its last step, if the walk ends nearer to the target.
    """
    budget = Budget(groups, config.of)
    made = stairs(groups, config)

    def kept(steps):
        return {n: int(item.counts[step]) for item, step in zip(made, steps, strict=True) for n in item.names}

    def priority(item, step):
        now, after = int(item.counts[step]), int(item.counts[step + 1])
        if config.ranking == "uniform":
            return Fraction(item.groups[0].original_size - after, item.groups[0].original_size)
        relative, freed = Fraction(0), Fraction(0)
        for group in item.groups:
            values = [Fraction(value) for value in sorted(scores[group.name])]
            whole, number = sum(values), len(values)
            places = range(group.size - now, group.size - after)
            # Over the mean, and over the squared share of the scores that are not gone yet.
            left = {place: max(sum(values[place:]) / whole, Fraction(1, number)) for place in places if whole}
            dear = [values[place] * number / whole / left[place] ** 2 if whole else 1 for place in places]
            relative += sum(dear, Fraction(0)) / len(places)
            freed += Fraction(budget.amount(groups)) - Fraction(
                budget.amount(groups, {group.name: group.size - 1})
            )
        return relative / freed

    def walked(limits):
        taken, last = [0] * len(made), None
        while budget.reduction(groups, kept(taken)) < target - 1e-12:
            open_steps = [
                (priority(item, step), number)
                for number, (item, step) in enumerate(zip(made, taken, strict=True))
                if step < limits[number]
            ]
            if not open_steps:
                return None, None
            last = min(open_steps)[1]
            taken[last] += 1
        return taken, last

    limits = [len(item.counts) - 1 for item in made]
    taken, last = walked(limits)
    while True:
        limits[last] = taken[last] - 1
        nearer, other = walked(limits)
        if (
            nearer is None
            or budget.reduction(groups, kept(nearer)) >= budget.reduction(groups, kept(taken)) - 1e-12
        ):
            return kept(taken)
        taken, last = nearer, other


def test_a_long_last_step_gives_way_to_short_ones():
    groups = blocks([("neuron", 40, 5), ("kv group", 2, 100)], 2)
    scores = {group.name: np.arange(group.size, dtype=float) for group in groups}
    config = PlanConfig(uniform=True, multiple=4, floor=0.1)
    # 818 parameters, 300 of them to go. By share, 20 of 40 neurons (200) and 1 of 2 KV groups (200) leave at
    # the same height: 400 and more. Without the KV groups 32 neurons of each block make 320.
    kept = counts(select(groups, scores, 300 / 818, config))
    assert kept["block.0.b"] == 2 and kept["block.0.a"] == 8
    # Where only the long step reaches far enough, it is taken.
    assert counts(select(groups, scores, 0.6, config))["block.0.b"] == 1


@settings(max_examples=60)
@given(networks(), options(ranking=st.just("uniform")), st.integers(0, 99), st.floats(0.01, 0.99))
def test_the_counts_are_those_of_a_slow_walk(groups, config, seed, share):
    target = share * reachable(groups, config)
    if target:
        kept = select(groups, drawn_scores(groups, seed), target, config)
        assert counts(kept) == slow_counts(groups, drawn_scores(groups, seed), target, config)


@settings(max_examples=60)
@given(networks(), options(ranking=st.just("global")), st.integers(0, 99), st.floats(0.01, 0.99))
def test_classes_compete_by_mean_relative_score_per_cost(groups, config, seed, share):
    target = share * reachable(groups, config)
    rng = np.random.default_rng(seed)  # no ties, which rounding may break in either way
    scores = {group.name: rng.random(group.size) for group in groups.prunable}
    if target:
        assert counts(select(groups, scores, target, config)) == slow_counts(groups, scores, target, config)


@settings(max_examples=60)
@given(networks(), options(), st.integers(0, 99), st.integers(1, 4))
def test_rounds_compose_to_one_uniform_plan(dense, config, seed, rounds):
    most = reachable(dense, config)
    if most == 0:
        return
    groups, total = dense, identity_plan(dense)
    for number in range(1, rounds + 1):
        scores, target = drawn_scores(groups, seed + number), 0.8 * most * number / rounds
        if not groups.prunable:
            break
        step = plan(groups, scores, config, dense=dense, target=target)
        assert step.report["reached"] >= target - 1e-9
        assert step.report["reachable"] >= step.report["reached"] - 1e-12
        total, groups = compose(total, step), shrink(groups, step.kept)
    check_kept(dense, total.kept, config)
    assert sorted(total.cuts, key=repr) == sorted(make_plan(dense, total.kept).cuts, key=repr)


def test_by_hand():
    groups = blocks([("neuron", 16, 1), ("head", 4, 3)], 2)
    scores = {group.name: np.arange(group.size, dtype=float) for group in groups}
    config = PlanConfig(uniform=True, multiple=4, of="parameters")
    # 74 parameters. 12 of 16 neurons and 3 of 4 heads: both at a quarter; pooler: 8 of 9 at a ninth.
    kept = select(groups, scores, 0.2, config)
    assert counts(kept) == {
        **{f"block.{n}.a": 12 for n in (0, 1)},
        **{f"block.{n}.b": 3 for n in (0, 1)},
        "pooler": 8,
    }
    assert kept["block.1.a"].tolist() == list(range(4, 16))
    # The foot: 4 neurons, 1 head, 4 of the pooler's.
    assert reachable(groups, config) == pytest.approx(1 - (2 * 4 + 2 * 3 + 4 * 2) / 74)
    assert largest_reachable(groups, 0.1, "parameters") == pytest.approx(1 - (2 * 2 + 2 * 3 + 2) / 74)
    with pytest.raises(TargetError, match=r"a floor of 0\.1 of each group, equal numbers.*, multiples of 4"):
        select(groups, scores, 0.9, config)


def test_a_class_smaller_than_the_multiple_keeps_all():
    groups = blocks([("neuron", 16, 1), ("head", 4, 1)], 1)
    for uniform in (False, True):
        made = stairs(groups, PlanConfig(uniform=uniform, multiple=16, floor=0))
        assert [item.counts.tolist() for item in made] == [[16], [4, 3, 2, 1], [9]]


def test_allowed_numbers():
    groups = blocks([("head", 12, 1)], 2)
    scores = {group.name: np.arange(group.size, dtype=float) for group in groups}
    heads = {name: [1, 3, 6, 12] for name in ("block.0.a", "block.1.a")}
    # 42 parameters; steps by share: the pooler's to 5 of 9, then heads to 6 of 12 before its fifth. Uniform,
    # these would be 12 heads for the one parameter that is missing: the pooler's fifth unit leaves instead.
    for uniform, expected in ((False, (6, 12, 5)), (True, (12, 12, 4))):
        config = PlanConfig(uniform=uniform)
        kept = counts(select(groups, scores, 0.2, config, allowed=heads))
        assert tuple(kept.values()) == expected
    uniform = PlanConfig(uniform=True)
    # One list of the class is enough; without the present number in it, some have to leave at once.
    kept = select(groups, scores, 0.01, uniform, allowed={"block.0.a": [6, 3]})
    assert len(kept["block.1.a"]) == 6


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        ({"x": [1]}, "found no group 'x'"),
        ({"pooler": [1.5]}, r"found \[1.5\] for group 'pooler'"),
        ({"pooler": 3}, "found 3 for group"),
        ({"pooler": [20]}, r"none of \[20\] fits: there are 9 units, 1 always stay"),
        ({"pooler": []}, "found \\[\\] for group"),
        ({"block.0.a": [2, 3], "block.1.a": [4]}, r"none of \[2, 3, 4\] fits"),
    ],
)
def test_allowed_numbers_that_do_not_fit(allowed, text):
    groups = blocks([("head", 12, 1)], 2)
    scores = {group.name: np.ones(group.size) for group in groups}
    with pytest.raises(StructureError, match=text):
        select(groups, scores, 0.5, PlanConfig(uniform=True), allowed=allowed)


@pytest.mark.parametrize("value", [0, 257, 1.5])
def test_multiples_out_of_range(value):
    with pytest.raises(ConfigError, match="multiple"):
        PlanConfig(multiple=value)


def test_alike_groups_have_kind_units_and_name_in_common():
    groups = [
        UnitGroup("h.0.fc", "neuron", 4, 4, ()),
        UnitGroup("h.1.fc", "gated", 4, 4, ()),
        UnitGroup("h.2.fc", "neuron", 3, 4, ()),
        UnitGroup("h.10.fc", "neuron", 4, 4, ()),
        UnitGroup("h.0.attn", "neuron", 4, 4, ()),
    ]
    assert alike(groups) == (("h.0.fc", "h.10.fc"), ("h.1.fc",), ("h.2.fc",), ("h.0.attn",))
    assert alike([]) == ()


def test_what_one_field_counts_is_one_class():
    def group(name, size, field, said=8):
        counted = (Count("", field, name, 1, size, said, True),)
        return UnitGroup(name, "neuron", size, size, (), counts=counted)

    groups = [
        group("encoder.0.wi", 8, "config.d_ff"),
        group("encoder.0.q", 8, "config.heads"),
        group("encoder.1.wi", 8, "config.d_ff"),
        group("decoder.0.wi", 8, "config.d_ff"),
        group("decoder.1.wo", 7, "config.d_ff"),
        group("decoder.2.wx", 8, "width"),
        group("decoder.2.wy", 8, "width"),
    ]
    assert counted_together(groups) == (
        ("encoder.0.wi", "encoder.1.wi", "decoder.0.wi"),
        ("encoder.0.q",),
        ("decoder.1.wo",),
        ("decoder.2.wx",),
        ("decoder.2.wy",),
    )


def test_embeddings_leave_the_denominator():
    fc = UnitGroup("fc", "neuron", 4, 4, (piece("fc", 0, 4),))
    groups = UnitGroups((fc,), {"wte": (100, 4), "fc": (4, 5)}, ("wte", "fc"), {}, embeddings=("wte",))
    budget = Budget(groups, "non-embedding")
    assert budget.total == 20 and budget.reduction(groups, {"fc": 2}) == 0.5
    kept = select(groups, {"fc": np.arange(4.0)}, 0.5, PlanConfig(of="non-embedding"))
    assert kept["fc"].tolist() == [2, 3]
    assert shrink(groups, kept).embeddings == ("wte",)
