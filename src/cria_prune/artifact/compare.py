"""How far two runs of one model are apart: outputs by name, tokens by their order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def distance(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest relative to the maximum of its output.

    Args:
        expected, found: outputs by name; the names and shapes in `expected` have to be in `found`.
    """
    difference = relative = 0.0
    for name, one in expected.items():
        if one.numel():
            one, other = one.double(), found[name].double()
            apart = (one - other).abs().masked_fill(one == other, 0.0)  # equal infinities are equal
            finite = one[one.isfinite()].abs()
            largest = float(finite.max()) if finite.numel() else 0.0
            worst = float(apart.nan_to_num(float("inf")).max())
            difference, relative = max(difference, worst), max(relative, worst / (largest or 1.0))
    return difference, relative


def same_tokens(one: Tensor | None, other: Tensor | None, tokens: int) -> int:
    """Return for how many of the last steps all examples go on with the same tokens."""
    if one is None or other is None or one.shape != other.shape:
        return 0
    agree = (one == other).all(0)[one.shape[1] - tokens :]
    return int(agree.int().cumprod(0).sum())
