"""A run as one HTML page that holds everything: no scripts, no other files, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from cria_prune.artifact.files import write_text
from cria_prune.artifact.html import (
    brief,
    count,
    few,
    figure,
    json_text,
    metric_text,
    number,
    origin,
    page,
    pictures,
    seconds_text,
    share,
    table,
)
from cria_prune.artifact.plots import plot_rounds, plot_widths
from cria_prune.artifact.plots_metric import plot_tradeoff
from cria_prune.artifact.report_layers import ablation_curves, all_scores, all_spectra, one_layer
from cria_prune.config import OF
from cria_prune.metrics import metric

Result = Mapping[str, Any]
ROWS = 60  # layers in one picture of widths


def write_report(path: str | Path, result: Result) -> Path:
    """Write the report of a run and return the path of the page.

    Args:
        path: the file, or an existing folder that gets `report.html`.
        result: `title`, `metric` (its name), `dense`, `pruned`, `recovered` (its values; accuracy as
            a share), `parameters_dense`, `parameters`, `macs_dense`, `macs`, `reduction`, `asked`,
            `reachable` (shares) and `of`, `rounds` (a list of `round`, `parameters`, `reduction`,
            `metric`, `seconds`), `widths` (group -> before, after), `scores` (group -> `scores`,
            `kept`), `spectra` (group -> name of a round -> z), `layer` (see `one_layer`), `ablation`,
            `frozen` (group -> reason), `seconds` (stage -> seconds), `memory` (what -> bytes at most),
            `provenance`, `earlier` (provenances of the runs before), `config` and `missing` (what is not on
            the page, and why). A part whose keys are missing is left out.

    Raises:
        ArtifactError: the system refuses to write.
    """
    path = Path(path)
    return write_text(path / "report.html" if path.is_dir() else path, render(result))


def render(result: Result) -> str:
    """Return the page as text; see `write_report`."""
    layer = result.get("layer") or {}
    parts: list[tuple[str, Callable[[Result], str]]] = [
        ("Result", _outcome),
        ("Rounds", _rounds),
        ("Units of every layer", _widths),
        ("Scores of the last round", all_scores),
        ("Spectrum of every layer", all_spectra),
        (f"One layer: {layer.get('name')}", one_layer),
        ("Ablation", ablation_curves),
        ("Time and memory", _times),
        ("What could not be pruned", _frozen),
        ("Provenance", _provenance),
        ("Configuration", _config),
        ("Not on this page", _missing),
    ]
    title = str(result.get("title") or "Pruning report")
    return page(title, _lead(result), [(heading, part(result)) for heading, part in parts])


def _lead(result: Result) -> str:
    of = str(result.get("of") or "parameters")
    cost = escape(OF.texts.get(of, of))
    said = [
        f"{word} <b>{share(result[key])}</b>"
        for key, word in (("asked", "asked"), ("reduction", "removed"), ("reachable", "at most possible"))
        if number(result.get(key)) is not None
    ]
    lines = [f"Share of the {cost}: {', '.join(said)}."] if said else []
    if result.get("changed"):
        lines.append(f"Without training: {escape(str(result['changed']))}.")
    return f"<p class=lead>{' '.join(lines)}</p>" if lines else ""


def _outcome(result: Result) -> str:
    metric = str(result.get("metric") or "metric")
    before = (result.get("parameters_dense"), result.get("macs_dense"))
    after = (result.get("parameters"), result.get("macs"))
    rows = [
        [name, metric_text(result.get(key), metric), count(counts[0]), brief(counts[1])]
        for name, key, counts in (
            ("dense", "dense", before),
            ("pruned", "pruned", after),
            ("recovered", "recovered", after),
        )
        if number(result.get(key)) is not None or (name != "recovered" and any(counts))
    ]
    if not rows:
        return ""
    if all(number(value) for value in (*before, *after)):
        left = [share(new / old) for old, new in zip(before, after, strict=True)]  # type: ignore[operator]
        rows.append(["to dense", _left_metric(result), *left])
    return pictures(
        "pair", [f"<div>{table(['', metric, 'parameters', 'MACs'], rows)}</div>", _tradeoff(result)]
    )


def _tradeoff(result: Result) -> str:
    """The metric against the size; a single model would make no picture."""
    known = str(result.get("metric") or "metric")
    series: dict[str, list[tuple[float, float]]] = {}
    for name, key in (("dense", "parameters_dense"), ("pruned", "parameters"), ("recovered", "parameters")):
        size, value = number(result.get(key)), number(result.get(name))
        if size is not None and value is not None:
            series[name] = [(size, value)]
    watched = [
        (row["parameters"], row["metric"])
        for row in _round_rows(result)
        if number(row.get("metric")) is not None and number(row.get("parameters")) is not None
    ]
    if watched:
        series["after a round (validation)"] = watched
    if sum(map(len, series.values())) < 2:
        return ""
    return figure(partial(plot_tradeoff, series, metric=known), (4.2, 2.7), f"{known} against parameters")


def _round_rows(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result.get("rounds") or [] if isinstance(row, Mapping)]


def _left_metric(result: Result) -> str:
    """Difference of the last metric to the dense one."""
    dense = number(result.get("dense"))
    last = number(result.get("recovered", result.get("pruned")))
    if dense is None or last is None:
        return ""
    return metric(str(result.get("metric") or "metric")).change(dense, last)


def _rounds(result: Result) -> str:
    rounds = _round_rows(result)
    if not rounds:
        return ""
    metric = str(result.get("metric") or "metric")
    history: list[Mapping[str, Any]] = list(rounds)
    if number(result.get("parameters_dense")) is not None:
        dense = {"round": "dense", "parameters": result["parameters_dense"], "metric": result.get("dense")}
        history.insert(0, dense)
    if number(result.get("pruned")) is not None:
        history[-1] = {**history[-1], "metric": result["pruned"]}
    if number(result.get("recovered")) is not None:
        last = {
            "round": "recovered",
            "parameters": rounds[-1].get("parameters"),
            "metric": result["recovered"],
        }
        history.append(last)
    rows = [
        [
            str(row.get("round", "")),
            few(row.get("parameters")),
            share(row.get("reduction")),
            metric_text(row.get("metric"), metric),
            seconds_text(sum(_stages(row).values())) if _stages(row) else "–",
        ]
        for row in rounds
    ]
    head = ["round", "parameters", "removed", metric, "time"]
    if all(number(row.get("metric")) is None for row in rounds):  # no round was measured: no empty column
        head, rows = [*head[:3], head[4]], [[*row[:3], row[4]] for row in rows]
    figures = table(head, rows)
    picture = figure(
        partial(plot_rounds, history, metric=metric), (4.2, 2.7), "Parameters and metric over rounds"
    )
    return f"<div class=pair>{picture}<div>{figures}</div></div>"


def _widths(result: Result) -> str:
    widths = result.get("widths")
    if not widths:
        return ""
    # Two columns of at most half the layers each stay readable on a telephone; very many are folded away.
    names = list(widths)
    half = len(names) if len(names) <= 16 else min(ROWS, math.ceil(len(names) / 2))
    found = []
    for start in range(0, len(names), half):
        chosen = {name: widths[name] for name in names[start : start + half]}
        size = (4.2, 0.7 + 0.19 * max(len(chosen), 2))
        found.append(figure(partial(plot_widths, chosen), size, "Units before and after"))
    rest = pictures("pair", found[2:])
    more = f"<details><summary>{len(names) - 2 * half} more layers</summary>{rest}</details>" if rest else ""
    return pictures("pair", found[:2]) + more


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
        f"<tr><th>{escape(stage)}</th><td>{seconds_text(seconds)}</td>"
        f'<td class=wide><i style="width:{100 * seconds / (longest or 1):.1f}%"></i></td></tr>'
        for stage, seconds in stages.items()
    ]
    rows.append(f"<tr><th>together</th><td>{seconds_text(total)}</td><td></td></tr>")
    memory = [[what, brief(size, "B")] for what, size in (result.get("memory") or {}).items()]
    peak = f"<p>Memory at most:</p>{table(['', ''], memory)}" if memory else ""
    return f"<div class=scroll><table class=times>{''.join(rows)}</table></div>{peak}"


def _frozen(result: Result) -> str:
    frozen = result.get("frozen") or {}
    return (
        table(["group", "reason"], [[name, reason] for name, reason in frozen.items()], "words")
        if frozen
        else ""
    )


def _provenance(result: Result) -> str:
    before = "".join(f"<p>Of the run before:</p>{origin(item)}" for item in result.get("earlier") or [])
    return origin(result.get("provenance")) + before


def _config(result: Result) -> str:
    config = result.get("config")
    if not config:
        return ""
    return f"<details><summary>JSON</summary><pre>{escape(json_text(config, 2))}</pre></details>"


def _missing(result: Result) -> str:
    said = "".join(f"<li>{escape(str(words))}</li>" for words in result.get("missing") or [])
    return f"<ul>{said}</ul>" if said else ""


def _stages(row: Mapping[str, Any]) -> dict[str, float]:
    seconds = row.get("seconds") or {}
    return {str(stage): float(value) for stage, value in seconds.items() if number(value) is not None}
