"""The picture of an ablation: a criterion against random, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cria_prune.artifact.plots import INK, KEPT, LINE, _axes, _legend
from cria_prune.metrics import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANDOM = "#7f8890"
WIDE = 20.0
"""Largest value / smallest value from which on the axis is logarithmic."""


def plot_ablation(result: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw the metric over the share of units removed: lowest first, highest first, and random.

    The random orders are a line through their means and a band from the lowest to the highest value. Metrics
    that are better when lower (perplexities), if they span a wide range, are drawn on a logarithmic axis.

    Args:
        result: what `Ablation.to_dict` gives, or `ablation.json` holds: `metric`, `dense`, `shares` and
            `curves`; `criterion`, `target` and `tested_on` are in the title where they are known. A value of
            None, which was no finite number, leaves a gap.
        ax: where to draw.
    """
    ax = _axes(ax, (5.2, 3.4))
    found = metric(result["metric"])
    factor = 100 if found.share else 1
    places = np.array([0.0, *result["shares"]]) * 100
    curves = {name: _values(result, name) * factor for name in ("lowest", "highest", "random")}
    means, low, high = (function(curves["random"], axis=1) for function in (np.mean, np.min, np.max))
    runs = curves["random"].shape[1]
    ax.plot(places, curves["lowest"][:, 0], "o-", color=KEPT, markersize=3.5, label="lowest first")
    label = f"random, {runs} seeds (mean and range)" if runs > 1 else "random, 1 seed"
    ax.fill_between(places, low, high, color=RANDOM, alpha=0.3, linewidth=0)
    ax.plot(places, means, "--", color=RANDOM, label=label)
    ax.plot(places, curves["highest"][:, 0], "s-", color=LINE, markersize=3.5, label="highest first")
    if found.share:
        ax.set_ylim(0, 103)
    everything = np.concatenate([values.ravel() for values in curves.values()])
    known = everything[np.isfinite(everything)]
    if not found.higher_is_better and len(known) and known.min() > 0 and known.max() > WIDE * known.min():
        ax.set_yscale("log")
    ax.set_xlim(0, places[-1] * 1.02)
    ax.set_xlabel("units removed from every group (%)")
    ax.set_ylabel(f"{found.name} (%)" if found.share else found.name, parse_math=False)
    ax.set_title(_title(result), fontsize=9, color=INK, pad=22, parse_math=False)
    _legend(ax, 3)
    return ax


def _values(result: Mapping[str, Any], name: str) -> np.ndarray:
    """(shares + 1, runs) values of a curve, the dense network first; NaN where there is none."""
    rows = [values for _, values in result["curves"][name]]
    rows = [[result["dense"]] * len(rows[0]), *rows]
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)


def _title(result: Mapping[str, Any]) -> str:
    said = ", ".join(str(result[key]) for key in ("target", "criterion") if result.get(key))
    return f"{said}\n{result['tested_on']}" if result.get("tested_on") else said
