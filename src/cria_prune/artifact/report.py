"""A run as one HTML page that holds everything: no scripts, no other files, no network."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.artifact.files import write_text
from cria_prune.artifact.page import PAGE
from cria_prune.artifact.plots import plot_rounds, plot_scores, plot_widths
from cria_prune.metrics import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
SCORE_PLOTS = 96


def write_report(path: str | Path, result: Result) -> Path:
    """Write the report of a run and return the path of the page.

    Args:
        path: the file, or an existing folder that gets `report.html`.
        result: `title`, `metric` (its name), `dense`, `pruned`, `recovered` (its values; accuracy as
            a share), `parameters_dense`, `parameters`, `macs_dense`, `macs`, `reduction`, `asked`,
            `reachable` (shares) and `of`, `rounds` (a list of `round`, `parameters`, `reduction`,
            `metric`, `seconds`), `widths` (group -> before, after), `scores` (group -> `scores`,
            `kept`), `frozen` (group -> reason), `seconds` (stage -> seconds), `provenance` and
            `config`. A part whose keys are missing is left out.

    Raises:
        ArtifactError: the system refuses to write.
    """
    path = Path(path)
    return write_text(path / "report.html" if path.is_dir() else path, render(result))


def render(result: Result) -> str:
    """Return the page as text; see `write_report`."""
    parts: list[tuple[str, Callable[[Result], str]]] = [
        ("Result", _outcome),
        ("Rounds", _rounds),
        ("Units of every layer", _widths),
        ("Scores of the last round", _scores),
        ("Time", _times),
        ("What could not be pruned", _frozen),
        ("Provenance", _provenance),
        ("Configuration", _config),
    ]
    body = [_heading(result)]
    for title, part in parts:
        content = part(result)
        if content:
            body.append(f"<section><h2>{escape(title)}</h2>\n{content}</section>")
    title = escape(str(result.get("title") or "Pruning report"))
    before, between, after = re.split(r"\{title\}|\{body\}", PAGE)
    return "".join([before, title, between, "\n".join(body), after])


def _heading(result: Result) -> str:
    title = escape(str(result.get("title") or "Pruning report"))
    cost = escape(str(result.get("of") or "parameters"))
    said = [
        f"{word} <b>{_share(result[key])}</b>"
        for key, word in (("asked", "asked"), ("reduction", "removed"), ("reachable", "at most possible"))
        if _number(result.get(key)) is not None
    ]
    line = f"<p class=lead>Share of the {cost}: {', '.join(said)}.</p>" if said else ""
    return f"<header><h1>{title}</h1>{line}</header>"


def _outcome(result: Result) -> str:
    metric = str(result.get("metric") or "metric")
    before = (result.get("parameters_dense"), result.get("macs_dense"))
    after = (result.get("parameters"), result.get("macs"))
    rows = [
        [name, _metric(result.get(key), metric), _count(counts[0]), _brief(counts[1])]
        for name, key, counts in (
            ("dense", "dense", before),
            ("pruned", "pruned", after),
            ("recovered", "recovered", after),
        )
        if _number(result.get(key)) is not None or (name != "recovered" and any(counts))
    ]
    if not rows:
        return ""
    if all(_number(value) for value in (*before, *after)):
        left = [_share(new / old) for old, new in zip(before, after, strict=True)]  # type: ignore[operator]
        rows.append(["to dense", _left_metric(result), *left])
    return _table(["", metric, "parameters", "MACs"], rows)


def _left_metric(result: Result) -> str:
    """Difference of the last metric to the dense one."""
    dense = _number(result.get("dense"))
    last = _number(result.get("recovered", result.get("pruned")))
    if dense is None or last is None:
        return ""
    return metric(str(result.get("metric") or "metric")).change(dense, last)


def _rounds(result: Result) -> str:
    rounds = [row for row in result.get("rounds") or [] if isinstance(row, Mapping)]
    if not rounds:
        return ""
    metric = str(result.get("metric") or "metric")
    history: list[Mapping[str, Any]] = list(rounds)
    if _number(result.get("parameters_dense")) is not None:
        dense = {"round": "dense", "parameters": result["parameters_dense"], "metric": result.get("dense")}
        history.insert(0, dense)
    if _number(result.get("pruned")) is not None:
        history[-1] = {**history[-1], "metric": result["pruned"]}
    if _number(result.get("recovered")) is not None:
        last = {
            "round": "recovered",
            "parameters": rounds[-1].get("parameters"),
            "metric": result["recovered"],
        }
        history.append(last)
    rows = [
        [
            str(row.get("round", "")),
            _count(row.get("parameters")),
            _share(row.get("reduction")),
            _metric(row.get("metric"), metric),
            _seconds(sum(_stages(row).values())) if _stages(row) else "–",
        ]
        for row in rounds
    ]
    table = _table(["round", "parameters", "removed", metric, "time"], rows)
    picture = _figure(
        partial(plot_rounds, history, metric=metric), (4.2, 2.7), "Parameters and metric over rounds"
    )
    return f"<div class=pair>{picture}<div>{table}</div></div>"


def _widths(result: Result) -> str:
    widths = result.get("widths")
    if not widths:
        return ""
    # Two columns of at most half the layers each stay readable on a telephone.
    names = list(widths)
    half = len(names) if len(names) <= 16 else math.ceil(len(names) / 2)
    pictures = []
    for start in range(0, len(names), half):
        chosen = {name: widths[name] for name in names[start : start + half]}
        size = (4.2, 0.7 + 0.19 * max(half, 2))
        pictures.append(_figure(partial(plot_widths, chosen), size, "Units before and after"))
    return f"<div class=pair>{''.join(pictures)}</div>"


def _scores(result: Result) -> str:
    groups = dict(result.get("scores") or {})
    if not groups:
        return ""
    pictures = []
    for name, entry in list(groups.items())[:SCORE_PLOTS]:
        kept, size = len(entry["kept"]), len(entry["scores"])
        picture = _figure(
            partial(plot_scores, entry["scores"], entry["kept"]),
            (2.6, 1.5),
            f"Scores of {name}",
        )
        caption = f"<figcaption><b>{escape(str(name))}</b><br>{kept} of {size} stay</figcaption>"
        pictures.append(picture.replace("</figure>", f"{caption}</figure>"))
    more = f" The first {SCORE_PLOTS} of {len(groups)} groups are shown." if len(groups) > SCORE_PLOTS else ""
    legend = (
        "<p>Units by score: <span class=kept>kept</span>, <span class=gone>removed</span>; "
        f"the dashed line is the lowest score that stays.{more}</p>"
    )
    return f"{legend}<div class=many>{''.join(pictures)}</div>"


def _times(result: Result) -> str:
    stages = _stages(result)
    if not stages:
        for row in result.get("rounds") or []:
            for stage, seconds in _stages(row).items():
                stages[stage] = stages.get(stage, 0.0) + seconds
    if not stages:
        return ""
    longest, total = max(stages.values()), sum(stages.values())
    rows = [
        f"<tr><th>{escape(stage)}</th><td>{_seconds(seconds)}</td>"
        f'<td class=wide><i style="width:{100 * seconds / (longest or 1):.1f}%"></i></td></tr>'
        for stage, seconds in stages.items()
    ]
    rows.append(f"<tr><th>together</th><td>{_seconds(total)}</td><td></td></tr>")
    return f"<div class=scroll><table class=times>{''.join(rows)}</table></div>"


def _frozen(result: Result) -> str:
    frozen = result.get("frozen") or {}
    return (
        _table(["group", "reason"], [[name, reason] for name, reason in frozen.items()], "words")
        if frozen
        else ""
    )


def _provenance(result: Result) -> str:
    values = {key: value for key, value in (result.get("provenance") or {}).items() if value is not None}
    rows = [[key, value if isinstance(value, str) else _json(value)] for key, value in values.items()]
    return _table(["", ""], rows, "words") if rows else ""


def _config(result: Result) -> str:
    config = result.get("config")
    if not config:
        return ""
    return f"<details><summary>JSON</summary><pre>{escape(_json(config, 2))}</pre></details>"


def _figure(draw: Callable[[Axes], Any], size: tuple[float, float], label: str) -> str:
    """Draw on a new figure and return it as inline SVG whose text stays text."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cria",
        "font.family": "sans-serif",
        "font.size": 8.5,
        "axes.labelsize": 8.5,
        "text.color": "#333333",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    inside = svg[svg.index(">") + 1 :]
    return f'<figure><svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">{inside}</figure>'


def _table(head: list[str], rows: list[list[Any]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(str(row[0]))}</th>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    head_row = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class=scroll><table class="{kind}">{head_row}<tbody>{body}</tbody></table></div>'


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _share(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number * 100:.2f}\N{NO-BREAK SPACE}%"


def _metric(value: Any, name: str) -> str:
    number = _number(value)
    if number is None:
        return "–"
    return _share(number) if name == "accuracy" else f"{number:.4g}"


def _count(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:,.0f}"


def _brief(value: Any) -> str:
    number = _number(value)
    if number is None:
        return "–"
    power = next((step for step in (12, 9, 6, 3) if number >= 10**step), 0)
    return f"{number / 10**power:.4g}{ {12: ' T', 9: ' G', 6: ' M', 3: ' k', 0: ''}[power] }"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def _stages(row: Mapping[str, Any]) -> dict[str, float]:
    seconds = row.get("seconds") or {}
    return {str(stage): float(value) for stage, value in seconds.items() if _number(value) is not None}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=str, ensure_ascii=False)
