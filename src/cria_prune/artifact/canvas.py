"""Axes, colours and short names that all pictures share.

The colours are apart for all common kinds of colour blindness (after Okabe and Ito), and no picture tells
two things apart by colour alone: markers, dashes or places differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.artifact.files import atomic
from cria_prune.base.optional import needed
from cria_prune.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, GONE, LINE, INK = "#2a6f97", "#dfa27a", "#b3420f", "#333333"
GREY = "#8a8a8a"
MANY = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#333333", "#56b4e9", "#e69f00")
MARKS = "osD^vPX<>*h"
WIDE, NARROW = 4.2, 2.6
"""Widths in inches: a picture on a telephone, and one of two side by side there."""


def write_picture(path: Path, title: str, size: tuple[float, float], draw: Callable[[Axes], Any]) -> None:
    """Write a PNG, whole or not at all.

    Args:
        path: the file.
        title: above the picture.
        size: width and height in inches.
        draw: takes the axes.

    Raises:
        PackageError: matplotlib is not installed.
        ArtifactError: the system refuses.
    """
    with needed("report", f"The picture {path}"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=8, parse_math=False)
    draw(figure.subplots())
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the axes without its upper and right line, or new ones of `size` inches."""
    if ax is None:
        with needed("report", "A picture"):
            from matplotlib.figure import Figure

        ax = Figure(figsize=size, layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def legend(ax: Axes, columns: int) -> None:
    """Put the legend above the axes, so that it covers nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize=8)


def short(name: str, length: int = 22) -> str:
    """Keep the ends of a long name: the layer's number is often at one of them."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def common_prefix(names: Sequence[str]) -> str:
    """Return what all names begin with, up to a dot: said once, it leaves room for what differs.

    >>> common_prefix(["model.layers.0.up", "model.layers.11.up"])
    'model.layers.'
    """
    if len(names) < 2:
        return ""
    pairs = zip(min(names), max(names), strict=False)  # all others lie between the two
    shared = "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return shared[: shared.rfind(".") + 1]


def styles(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Return name -> (colour, marker, line): no two of up to 77 names are the same.

    >>> styles(["a", "b"])["b"]
    ('#d55e00', 's', '-')
    """
    lines = ["-"] * len(MANY) + ["--"] * len(MANY)
    three = zip(cycle(MANY), cycle(MARKS), cycle(lines), strict=False)
    return dict(zip(names, islice(three, len(names)), strict=True))


def metric_axis(ax: Axes, metric: Metric, values: Sequence[float]) -> float:
    """Name the axis y after a metric and choose its scale; return the factor for its values.

    Shares are drawn as per cent and never beyond 0 and 100; a metric of which lower is better on a
    logarithmic axis where the largest is over 10 times the smallest.

    Args:
        ax: where.
        metric: what is drawn.
        values: all that are drawn, as they are in files.
    """
    ax.set_ylabel(f"{metric.name} (%)" if metric.share else metric.name, parse_math=False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    if not metric.higher_is_better and values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        plain_numbers(ax)
    return 100.0 if metric.share else 1.0


def plain_numbers(ax: Axes) -> None:
    """Write the numbers of a logarithmic axis y as 0.5 or 200, at 1, 2 and 5 times the powers of ten.

    The usual ones are formulas, which the page does not set: names of layers may hold a dollar sign.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = ax.dataLim.intervaly
    wide = not (0 < low <= high < 50 * low)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def size_scale(largest: float) -> tuple[float, str]:
    """Return what to divide a number of parameters by, and the letter for it."""
    steps = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((step, letter) for step, letter in steps if largest >= step), (1.0, ""))
