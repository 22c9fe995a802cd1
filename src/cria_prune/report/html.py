"""The parts of a page: frame and style, pictures as inline SVG, tables, numbers as a person reads them."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.base.errors import needed
from cria_prune.base.metrics import metric
from cria_prune.report.pictures import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
"""The frame of a page, with its style: {title} and {body} are filled in."""


Part = tuple[str, str]
"""A heading and the HTML below it."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cria",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "text.color": "#333333",
    "text.parse_math": False,
}


def page(title: str, lead: str, parts: Sequence[Part]) -> str:
    """Return a whole page; `lead` and the bodies are HTML, the headings not. Empty bodies are left out."""
    body = [f"<header><h1>{escape(title)}</h1>{lead}</header>"]
    body += [
        f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in parts if content
    ]
    before, between, after = re.split(r"\{title\}|\{body\}", PAGE)
    return "".join([before, escape(title), between, "\n".join(body), after])


def is_page(text: str) -> bool:
    """Say whether a text begins as every page of Cria does."""
    return text.startswith(PAGE.split("{title}")[0])


def figure(draw: Callable[[Axes], Any], size: tuple[float, float], label: str, caption: str = "") -> str:
    """Draw on a new figure and return it as inline SVG whose text stays text.

    Args:
        draw: takes the axes.
        size: width and height in inches; a page shows 4.2 inches at the width of a telephone.
        label: what a reader without eyes is told.
        caption: HTML below the picture.
    """
    with needed("report", "The pictures of a report"):
        import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        ax, drawn = new_axes(size)
        draw(ax)
        drawn.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    inside = svg[svg.index(">") + 1 :]
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    return f"<figure>{head}{inside}{below}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """Return a table; the first cell of a row is its heading. `kind` is a class of the style sheet."""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(str(row[0]))}</th>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    head_row = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class=scroll><table class="{kind}">{head_row}<tbody>{body}</tbody></table></div>'


def pictures(kind: str, found: Sequence[str]) -> str:
    """Return pictures side by side as far as the width goes: "pair" or "many"; nothing for none."""
    return f"<div class={kind}>{''.join(found)}</div>" if found else ""


def origin(values: dict[str, Any] | Any) -> str:
    """Return a provenance as a table, without what is not known."""
    known = {key: value for key, value in (values or {}).items() if value is not None}
    rows = [[key, value if isinstance(value, str) else json_text(value)] for key, value in known.items()]
    return table(["", ""], rows, "words") if rows else ""


def number(value: Any) -> float | None:
    """Return a finite number as it is, and None for all else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def share(value: Any) -> str:
    """Return a share as per cent with two digits."""
    found = number(value)
    return "–" if found is None else f"{found * 100:.2f}\N{NO-BREAK SPACE}%"


def metric_text(value: Any, name: str) -> str:
    """Return a value of the metric of that name: 0.9339 of accuracy is 93.39 %."""
    found = number(value)
    if found is None:
        return "–"
    return share(found) if metric(name).share else f"{found:.4g}"


def count(value: Any) -> str:
    """Return a number with commas and without digits after the point."""
    found = number(value)
    return "–" if found is None else f"{found:,.0f}"


def few(value: Any) -> str:
    """Return a number in full, or with four digits where it has more than eight: for narrow columns."""
    found = number(value)
    return brief(found) if found is not None and found >= 1e8 else count(found)


def brief(value: Any, unit: str = "") -> str:
    """Return a large number with four digits and k, M, G or T."""
    found = number(value)
    if found is None:
        return "–"
    power = next((step for step in (12, 9, 6, 3) if found >= 10**step), 0)
    return f"{found / 10**power:.4g} { {12: 'T', 9: 'G', 6: 'M', 3: 'k', 0: ''}[power] }{unit}".rstrip()


def seconds_text(value: float) -> str:
    """Return a wall time in seconds, above two minutes in minutes and seconds."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON; what JSON has not, as Python prints it."""
    return json.dumps(value, indent=indent, default=str, ensure_ascii=False)
