"""The parts of a run's page on its layers: scores, spectra, one layer looked at closely, ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np

from cria_prune.artifact.html import count, figure, origin, pictures
from cria_prune.artifact.plots import plot_scores
from cria_prune.artifact.plots_layer import DRAWN_EDGES, plot_neuron_graph, plot_spectrum
from cria_prune.artifact.plots_metric import plot_ablation
from cria_prune.graph import Graph, largest_piece

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

    words = (
        f"<p>Units taken out of {said_of('target', 'the trained network')} by their score (criterion "
        f"{said_of('criterion', 'not known')}), no training after it, measured on "
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


def folded(found: Sequence[str]) -> str:
    """Return small pictures; those beyond the first dozen unfold."""
    rest = len(found) - OPEN
    more = f"<details><summary>{rest} more</summary>{pictures('many', found[OPEN:])}</details>"
    return pictures("many", found[:OPEN]) + (more if rest > 0 else "")


def _score_picture(name: str, entry: Mapping[str, Any], title: str) -> str:
    """A histogram; `title` is HTML."""
    kept, size = len(entry["kept"]), len(entry["scores"])
    draw = partial(plot_scores, entry["scores"], entry["kept"])
    return figure(draw, SMALL, f"Scores of {name}", f"<b>{title}</b><br>{kept} of {size} stay")


def _spectrum_picture(name: str, values: Mapping[str, Sequence[float]]) -> str:
    known = {title: found for title, found in values.items() if len(found)}
    top = max(found[0] for found in known.values())
    caption = f"<b>{escape(str(name))}</b><br>largest z {top:.4g}"
    draw = partial(plot_spectrum, known, names=False)
    return figure(draw, SMALL, f"Spectrum of {name}", caption)


def _graph_picture(side: str, graph: Graph, gone: Sequence[int], name: str) -> str:
    outside = graph.units - len(largest_piece(graph))
    left = f"; {count(outside)} units outside its largest piece are not drawn" if outside else ""
    caption = (
        f"<b>{side} the activation</b><br>{count(graph.units)} neurons, {count(len(graph.rows))} edges{left}"
    )
    label = f"Neuron graph of {name} {side} the activation"
    return figure(partial(plot_neuron_graph, graph, gone), (4.2, 3.6), label, caption)
