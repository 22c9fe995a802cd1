"""Splits and merges of a dimension: which factor holds the units."""

from __future__ import annotations

import numpy as np
import pytest

from cria_prune.structure.axes import Units, common_factors


def classes(units: Units, atoms: np.ndarray) -> list[int]:
    """The unit of each atom, numbered in the order of their first appearance."""
    found = units.resolve().classes[atoms]
    _, first, numbers = np.unique(found, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[numbers].tolist()


def reasons(units: Units, atoms: np.ndarray) -> list[str | None]:
    resolved = units.resolve()
    return [resolved.frozen.get(unit) for unit in resolved.classes[atoms].tolist()]


def test_a_fixed_inner_factor_leaves_the_outer_one_as_heads() -> None:
    units = Units()
    flat = units.fresh(6)
    _, size = units.split(flat, [3, 2])
    units.fix(size, "is summed over")
    assert classes(units, flat) == [0, 0, 1, 1, 2, 2]
    assert reasons(units, flat) == [None] * 6


def test_a_fixed_outer_factor_leaves_the_inner_one_as_in_a_channel_shuffle() -> None:
    units = Units()
    flat = units.fresh(6)
    two, three = units.split(flat, [2, 3])
    shuffled = units.merge([three, two], [3, 2])
    assert classes(units, flat) == [0, 1, 2, 0, 1, 2]  # both are free: the longest holds the units
    assert classes(units, shuffled) == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(
        units.resolve().classes[shuffled], units.resolve().classes[flat][[0, 3, 1, 4, 2, 5]]
    )


def test_fused_projection_couples_its_three_parts() -> None:
    units = Units()
    flat = units.fresh(12)
    three, heads, size = units.split(flat, [3, 2, 2])
    units.fix(three, "is taken apart")
    units.fix(size, "is summed over")
    assert classes(units, flat) == [0, 0, 1, 1] * 3
    assert units.resolve().classes[heads].tolist() == units.resolve().classes[flat[[0, 2]]].tolist()


def test_grouped_heads_couple_a_key_head_with_its_query_heads() -> None:
    units = Units()
    q, k = units.fresh(8), units.fresh(4)
    q_heads, q_size = units.split(q, [4, 2])
    k_heads, k_size = units.split(k, [2, 2])
    for size in (q_size, k_size):
        units.fix(size, "is summed over")
    units.tie(q_heads, units.merge([k_heads, None], [2, 2]), "")
    assert classes(units, np.concatenate([q, k])) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]


def test_values_follow_the_heads_although_their_size_is_free() -> None:
    units = Units()
    q, v = units.fresh(6), units.fresh(24)
    q_heads, q_size = units.split(q, [3, 2])
    v_heads, v_size = units.split(v, [3, 8])  # 8 is longer than 3, but 3 is what the queries chose
    units.fix(q_size, "is summed over")
    units.tie(q_heads, v_heads, "")
    out = units.merge([v_heads, v_size], [3, 8])
    assert classes(units, v) == classes(units, out) == np.repeat([0, 1, 2], 8).tolist()


def test_a_frozen_grid_gives_its_strong_reason_in_both_directions() -> None:
    units = Units()
    flat, other = units.fresh(6), units.fresh(6)
    heads, size = units.split(flat, [3, 2])
    units.fix(size, "is summed over")
    units.freeze(heads, "meets a mask")
    assert set(reasons(units, flat)) == {"meets a mask"}
    heads, size = units.split(other, [3, 2])
    units.freeze(other, "is the output")
    assert {*reasons(units, heads), *reasons(units, size)} == {"is the output"}


def test_one_frozen_head_of_several_keeps_only_itself() -> None:
    units = Units()
    flat = units.fresh(6)
    heads, size = units.split(flat, [3, 2])
    units.fix(size, "is summed over")
    units.freeze(heads[1:2], "meets a mask")
    assert reasons(units, flat) == [None, None, "meets a mask", "meets a mask", None, None]


def test_a_factor_along_which_nothing_changes_is_fixed() -> None:
    units = Units()
    heads = units.fresh(3)
    folded = units.merge([None, heads], [2, 3])  # batch × heads, as a batched product takes it
    batch, again = units.split(folded, [2, 3])
    assert batch is None and np.array_equal(again, heads)


@pytest.mark.parametrize(
    ("before", "after", "factors"),
    [
        ([12], [3, 4], [(3, 0, 0), (4, 0, 1)]),
        ([2, 12], [6, 4], [(2, 0, 0), (3, 1, 0), (4, 1, 1)]),
        ([4, 3, 2], [4, 6], [(4, 0, 0), (3, 1, 1), (2, 2, 1)]),
        ([4, 6], [6, 4], None),
    ],
)
def test_common_factors(
    before: list[int], after: list[int], factors: list[tuple[int, int, int]] | None
) -> None:
    assert common_factors(before, after) == factors
