"""A run as one HTML page that holds everything: no scripts, no other files, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cria_prune.base.files import write_text
from cria_prune.base.metrics import metric
from cria_prune.config import OF, REPAIRED
from cria_prune.graph.graph import Graph, largest_piece
from cria_prune.repair.fidelity import Fidelity
from cria_prune.report.curves import plot_ablation, plot_tradeoff
from cria_prune.report.html import (
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
from cria_prune.report.pictures import (
    DRAWN_EDGES,
    plot_neuron_graph,
    plot_rounds,
    plot_scores,
    plot_spectrum,
    plot_widths,
)
from cria_prune.result import fidelity_rows

Result = Mapping[str, Any]
PLOTS = 48  # small pictures of a kind; further layers are left out, and the page says so
SMALL = (2.0, 1.3)  # inches: two side by side on a telephone, and their numbers still legible
OPEN = 12  # so many are seen at once, the others unfold


def all_scores(result: Result) -> str:
    """Return how the scores of every layer are spread, and where the cut lies."""
    groups = result.get("scores") or {}
    if not groups:
        return ""
    chosen, said = spread(list(groups), PLOTS)
    found = [_score_picture(name, groups[name], escape(str(name))) for name in chosen]
    legend = (
        "<p>Units by score: <span class=kept>kept</span>, <span class=gone>removed</span>; "
        f"the dashed line is the lowest score that stays.{said}</p>"
    )
    return legend + folded(found)


def all_spectra(result: Result) -> str:
    """Return the top of every layer's spectrum."""
    spectra = {name: found for name, found in (result.get("spectra") or {}).items() if any(found.values())}
    if not spectra:
        return ""
    chosen, said = spread(list(spectra), PLOTS)
    found = [_spectrum_picture(name, spectra[name]) for name in chosen]
    rounds = dict.fromkeys(title for found in spectra.values() for title in found)
    titles = "; ".join(f"{mark} {title}" for mark, title in zip("●×", rounds, strict=False)) + "."
    words = (
        "<p>The largest eigenvalues z of L<sub>in</sub> v = z L<sub>out</sub> v, at most 32: how much a "
        "direction among the neurons is stretched between the graph before the activation and the graph "
        f"after it. On the dotted line, z = 1, nothing changes. {titles}{said}</p>"
    )
    return words + folded(found)


def one_layer(result: Result) -> str:
    """Return one layer looked at closely.

    `result["layer"]` holds `name`, `graphs` (NeuronGraphs or None), `removed` (units that left in the end,
    of the dense layer) and `rounds` (one entry per round: `scores`, `kept`).
    """
    layer = result.get("layer")
    if not layer:
        return ""
    parts = []
    graphs, removed = layer["graphs"], set(layer["removed"])
    if graphs is not None:
        gone = [place for place, unit in enumerate(graphs.units.tolist()) if unit in removed]
        sides = (("before", graphs.input), ("after", graphs.output))
        parts.append(
            "<p>Its neurons in the dense network, at the first two eigenvectors of their graph's Laplacian "
            "(taken against the degrees, after the constant one): what fires alike stands together. "
            f"Of each neuron the {DRAWN_EDGES} strongest edges are drawn.</p>"
        )
        drawn = [_graph_picture(side, graph, gone, layer["name"]) for side, graph in sides]
        parts.append(pictures("pair", drawn))
        dead = layer["units"] - len(graphs.units)
        if dead:
            who = "1 dead unit" if dead == 1 else f"{dead} dead units"
            parts.append(f"<p>In no graph: {who} (constant after the activation).</p>")
    rounds = layer["rounds"]
    if rounds:
        parts.append("<p>Its scores, round by round.</p>")
        named = [(f"round {number}", entry) for number, entry in enumerate(rounds, start=1)]
        parts.append(folded([_score_picture(layer["name"], entry, title) for title, entry in named]))
    return "".join(parts)


def ablation_curves(result: Result) -> str:
    """Return what taking units out of the network by their scores does; nothing where it was not measured."""
    ablation = result.get("ablation")
    if not ablation:
        return ""
    drawn = figure(partial(plot_ablation, ablation), (4.2, 2.9), "Metric against the share removed")
    curves = ablation["curves"].items()
    seeds = {name: max((len(found) for _, found in curve), default=0) for name, curve in curves}
    said = ", ".join(f"{escape(str(name))} {number}" for name, number in seeds.items())

    def said_of(key: str, otherwise: str) -> str:
        return escape(str(ablation.get(key) or otherwise))

    how = str(ablation.get("repair") or "none")
    repaired = REPAIRED.get(how, f"repair {how}")
    words = (
        f"<p>Units taken out of {said_of('target', 'the trained network')} by their score (criterion "
        f"{said_of('criterion', 'not known')}), {escape(repaired)}, no training after it, measured on "
        f"{said_of('tested_on', 'what the file does not say')}. Seeds: {said}. "
        "Lines are means, bands their 95 % t-intervals where there are at least two seeds. A criterion is "
        "worth its name where its lowest scores first lies above random, and highest first below it "
        "(the other way round where lower is better).</p>"
    )
    return words + pictures("pair", [drawn, f"<div>{origin(ablation.get('provenance'))}</div>"])


def spread(names: Sequence[str], most: int) -> tuple[list[str], str]:
    """Return at most `most` names, evenly over the depth, and the sentence that says so."""
    if len(names) <= most:
        return list(names), ""
    places = np.linspace(0, len(names) - 1, most).round().astype(int)
    text = f" {most} of {len(names)} layers are shown, evenly over the depth; --layer shows any other."
    return [names[place] for place in places], text


def folded(found: Sequence[str], seen: int = OPEN, kind: str = "many", title: str = "") -> str:
    """Return pictures; those beyond so many that are seen at once unfold, under a title."""
    rest, title = pictures(kind, found[seen:]), title or f"{len(found) - seen} more"
    more = f"<details><summary>{title}</summary>{rest}</details>" if rest else ""
    return pictures(kind, found[:seen]) + more


def _score_picture(name: str, entry: Mapping[str, Any], title: str) -> str:
    """A histogram; `title` is HTML."""
    kept, size = len(entry["kept"]), len(entry["scores"])
    draw = partial(plot_scores, entry["scores"], entry["kept"])
    return figure(draw, SMALL, f"Scores of {name}", f"<b>{title}</b><br>{kept} of {size} stay")


def _spectrum_picture(name: str, values: Mapping[str, Sequence[float]]) -> str:
    known = {title: found for title, found in values.items() if len(found)}
    top = max(found[0] for found in known.values())
    caption = f"<b>{escape(str(name))}</b><br>largest z {top:.4g}"
    return figure(partial(plot_spectrum, known, names=False), SMALL, f"Spectrum of {name}", caption)


def _graph_picture(side: str, graph: Graph, gone: Sequence[int], name: str) -> str:
    units, edges, outside = graph.units, len(graph.rows), graph.units - len(largest_piece(graph))
    left = f"; {count(outside)} units outside its largest piece are not drawn" if outside else ""
    caption = f"<b>{side} the activation</b><br>{count(units)} neurons, {count(edges)} edges{left}"
    label = f"Neuron graph of {name} {side} the activation"
    return figure(partial(plot_neuron_graph, graph, gone), (4.2, 3.6), label, caption)


SEEN = 10  # repaired layers that are seen at once
ROWS = 60  # layers in one picture of widths


def write_report(path: str | Path, result: Result) -> Path:
    """Write the report of a run and return the path of the page.

    Args:
        path: the file, or an existing folder that gets `report.html`.
        result: `title`, `metric` (its name), `dense`, `pruned`, `recovered` (its values; accuracy as
            a share), `parameters_dense`, `parameters`, `macs_dense`, `macs`, `reduction`, `asked`,
            `reachable` (shares) and `of`, `rounds` (a list of `round`, `parameters`, `reduction`,
            `metric`, `seconds`, `fidelity` by stage, `repairs` and `unrepaired` as in `Round`), `widths`
            (group -> before, after), `scores` (group -> `scores`, `kept`), `spectra` (group -> name of a
            round -> z), `layer` (see `one_layer`), `ablation`, `frozen` (group -> reason),
            `side_by_side` (rows of `artifact.facts.side_by_side`), `seconds` (stage -> seconds), `unreached`
            (lines on experts that the calibration never reaches), `memory` (what -> bytes at most),
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
        ("Dense beside pruned", _side_by_side),
        ("Rounds", _rounds),
        ("Distance from the dense network", _fidelity),
        ("Repair of every layer", _repairs),
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
    for line in result.get("unreached") or ():
        lines.append(f"{escape(line[:1].upper() + line[1:])}.")
    return f"<p class=lead>{' '.join(lines)}</p>" if lines else ""


def _models(result: Result) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return name, metric, parameters and MACs of the models; None for what is no number."""
    ends = {"dense": "_dense", "pruned": "", "recovered": ""}
    keys = {name: (name, f"parameters{end}", f"macs{end}") for name, end in ends.items()}
    return [(name, *(number(result.get(key)) for key in three)) for name, three in keys.items()]  # type: ignore[misc]


def _outcome(result: Result) -> str:
    known, models = _metric(result), _models(result)
    rows = [
        [name, metric_text(value, known), count(size), brief(macs)]
        for name, value, size, macs in models
        if value is not None or (name != "recovered" and (size or macs))
    ]
    if not rows:
        return ""
    (_, dense, *before), (_, pruned, *after), _ = models
    if all((*before, *after)):
        last = number(result["recovered"]) if "recovered" in result else pruned
        left = [share(new / old) for old, new in zip(before, after, strict=True)]  # type: ignore[operator]
        rows.append(["to dense", metric(known).change(dense, last), *left])
    figures = table(["", known, "parameters", "MACs"], rows)
    return pictures("pair", [f"<div>{figures}</div>", _tradeoff(result)])


def _side_by_side(result: Result) -> str:
    """All that was measured of the dense model and of what was made of it."""
    rows = result.get("side_by_side") or []
    return table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def _tradeoff(result: Result) -> str:
    """The metric against the size; a single model would make no picture."""
    known, series = _metric(result), dict[str, list[tuple[float, float]]]()
    measured = [
        ("after a round (validation)", number(row.get("metric")), number(row.get("parameters")))
        for row in _round_rows(result)
    ]
    for name, value, size in (*((name, value, size) for name, value, size, _ in _models(result)), *measured):
        if size is not None and value is not None:
            series.setdefault(name, []).append((size, value))
    if sum(map(len, series.values())) < 2:
        return ""
    return figure(partial(plot_tradeoff, series, metric=known), (4.2, 2.7), f"{known} against parameters")


def _metric(result: Result) -> str:
    return str(result.get("metric") or "metric")


def _round_rows(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result.get("rounds") or [] if isinstance(row, Mapping)]


def _rounds(result: Result) -> str:
    rounds = _round_rows(result)
    if not rounds:
        return ""
    known, last = _metric(result), rounds[-1]
    history: list[Mapping[str, Any]] = [*rounds]
    if number(result.get("pruned")) is not None:
        history[-1] = {**last, "metric": result["pruned"]}
    if number(result.get("parameters_dense")) is not None:
        dense = {"round": "dense", "parameters": result["parameters_dense"], "metric": result.get("dense")}
        history.insert(0, dense)
    if number(result.get("recovered")) is not None:
        end = {"round": "recovered", "parameters": last.get("parameters"), "metric": result["recovered"]}
        history.append(end)
    columns = {
        "round": [str(row.get("round", "")) for row in rounds],
        "parameters": [few(row.get("parameters")) for row in rounds],
        "removed": [share(row.get("reduction")) for row in rounds],
        known: [metric_text(row.get("metric"), known) for row in rounds],
        "time": [seconds_text(sum(_stages(row).values())) if _stages(row) else "–" for row in rounds],
    }
    if all(number(row.get("metric")) is None for row in rounds):  # no round was measured: no empty column
        del columns[known]
    figures = table(list(columns), list(zip(*columns.values(), strict=True)))
    draw = partial(plot_rounds, history, metric=known)
    picture = figure(draw, (4.2, 2.7), "Parameters and metric over rounds")
    return f"<div class=pair>{picture}<div>{figures}</div></div>"


def _fidelity(result: Result) -> str:
    """A row and a bar for every round and stage: how far the network was from the dense one."""
    found = [
        (str(row.get("round", row.get("number", ""))), stage, Fidelity.from_dict(item))
        for row in _round_rows(result)
        for stage, item in (row.get("fidelity") or {}).items()
    ]
    if not found:
        return ""
    longest = max((item.loss for *_, item in found if math.isfinite(item.loss)), default=0.0) or 1.0
    cells = [{"round": number, **fidelity_rows({stage: item})[0]} for number, stage, item in found]
    columns = list(dict.fromkeys(key for row in cells for key in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in [*columns, found[-1][2].unit])
    rows = [
        f"<tr><th>{escape(row['round'])}</th>"
        + "".join(f"<td>{escape(row.get(key, '–'))}</td>" for key in columns[1:])
        + f'<td class=wide><i style="width:{100 * min(item.loss / longest, 1):.1f}%"></i></td></tr>'
        for row, (*_, item) in zip(cells, found, strict=True)
    ]
    words = (
        f"<p>On {count(found[-1][2].examples)} calibration examples that nothing was fitted on, without "
        "labels and before any training: the worst output after each step.</p>"
    )
    return f"{words}<div class=scroll><table class=fidelity><tr>{head}</tr>{''.join(rows)}</table></div>"


def _repairs(result: Result) -> str:
    """A row for every layer that was repaired in the last round, or should have been; the worst first."""
    rounds = _round_rows(result)
    # A folder without rounds knows what its run has said of the last one.
    last = rounds[-1] if rounds and "repairs" in rounds[-1] else result
    left, found = dict(last.get("unrepaired") or {}), list(last.get("repairs") or ())
    why = left.pop("", "")
    rows = [[name, "–", "–", "–", f"not repaired: {reason}"] for name, reason in left.items()]
    rows += [
        _repair_row(item) for item in sorted(found, key=lambda item: number(item.get("recovered")) or 0.0)
    ]
    said = f"<p>Nothing was repaired: {escape(str(why))}.</p>" if why else ""
    if not rows:
        return said
    words = (
        "<p>What each layer got back of what it had lost with the units that left, or since what it reads "
        "had changed; the worst first. Samples are those that it was fitted to, without repetitions, "
        "for each feature that it reads; with fewer than four, more examples help.</p>"
    )
    head, rest = ["layer", "given back", "samples", "examples to add", ""], rows[SEEN:]
    more = f"<details><summary>{len(rest)} more</summary>{table(head, rest, 'repairs')}</details>"
    return f"{said}{words}{table(head, rows[:SEEN], 'repairs')}{more if rest else ''}"


def _repair_row(item: Mapping[str, Any]) -> list[str]:
    samples, features = number(item.get("effective")), number(item.get("regressors"))
    each = "–" if samples is None or not features else f"{samples / features:.3g}"
    lacking = number(item.get("lacking"))
    notes = [
        *([] if item.get("cut", True) else ["read no unit that left"]),
        *(["no change was better"] if samples and not number(item.get("recovered")) else []),
    ]
    return [
        str(item.get("tensor")), share(item.get("recovered")), each, count(lacking) if lacking else "",
        ", ".join(notes),
    ]  # fmt: skip


def _widths(result: Result) -> str:
    widths = result.get("widths") or {}
    # Two columns of at most half the layers each stay readable on a telephone; very many are folded away.
    names = list(widths)
    half = len(names) if len(names) <= 16 else min(ROWS, math.ceil(len(names) / 2))
    found = []
    for start in range(0, len(names), half or 1):
        chosen = {name: widths[name] for name in names[start : start + half]}
        size = (4.2, 0.7 + 0.19 * max(len(chosen), 2))
        found.append(figure(partial(plot_widths, chosen), size, "Units before and after"))
    return folded(found, 2, "pair", f"{len(names) - 2 * half} more layers")


def _times(result: Result) -> str:
    stages = _stages(result)
    for row in () if stages else _round_rows(result):
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
    rows = [list(pair) for pair in (result.get("frozen") or {}).items()]
    return table(["group", "reason"], rows, "words") if rows else ""


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
