"""From a folder of Cria's, a run or a bench, to its page; from files alone, no model is built."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cria_prune.artifact.checkpoint import MANIFEST, read_checkpoint_manifest
from cria_prune.artifact.manifest import read_manifest
from cria_prune.base.errors import ArtifactError, ConfigError, CriaError
from cria_prune.base.files import MANIFEST as PRETRAINED
from cria_prune.base.files import is_plain_file, reading
from cria_prune.graph.sides import NeuronGraphs, choose_layer
from cria_prune.planning.plan import Plan
from cria_prune.recipes.registry import TASKS, task
from cria_prune.report.bench_page import read_bench, render_bench
from cria_prune.report.history import RUN, History, read_run
from cria_prune.report.run_page import render
from cria_prune.result import Round
from cria_prune.spectrum.pencil import solve_pencil

ABLATION = "ablation.json"
SHOWN_VALUES = 32
SOLVED_UNITS = 512  # of a kept graph that is solved for the report: about half a second


class Curves(BaseModel):
    """Points (share removed, one value per seed) of the three orders."""

    lowest: list[tuple[float, list[float]]] = []
    highest: list[tuple[float, list[float]]] = []
    random: list[tuple[float, list[float]]] = []


class Ablation(BaseModel):
    """`ablation.json`; further keys are left alone."""

    model_config = ConfigDict(extra="ignore")

    metric: str
    dense: float | None = None
    curves: Curves
    criterion: str | None = None
    target: str | None = None
    tested_on: str | None = None
    provenance: dict[str, Any] | None = None


def is_run(folder: Path) -> bool:
    """Say whether a folder holds what a run leaves: its record, or the manifest of a pruned model."""
    return any(is_plain_file(folder / name) for name in (RUN, MANIFEST, PRETRAINED))


def run_result(folder: Path, layer: str | None = None) -> dict[str, Any]:
    """Return what `write_report` takes, of the run in a folder.

    Args:
        folder: of a run, see `is_run`.
        layer: of which the neuron graphs are drawn; None takes the widest of at most 256 units that lost any.

    Raises:
        ArtifactError: a file in it is damaged or foreign.
        ConfigError: there is no such layer.
    """
    missing: list[str] = []
    found = read_run(folder)
    if found is None:
        found = History(_from_manifest(folder), (), {})
        missing.append(
            f"No {RUN} lies in this folder: the model was saved from Python, or by an older Cria. Rounds, "
            "scores, spectra and neuron graphs are not known."
        )
    rounds, graphs = found.rounds, found.graphs
    widths = found.page.get("widths") or {}
    result = {**found.page, "ablation": _ablation(folder)}
    if result["ablation"] is None:
        missing.append(f"No {ABLATION} lies in this folder, so there are no ablation curves.")
    if rounds:
        result["scores"] = {name: _units(rounds[-1], name) for name in rounds[-1].scores}
        result["spectra"] = _spectra([item.diagnosis for item in rounds], graphs)
        lacking = sum(not any(item.values()) for item in result["spectra"].values())
        if lacking:
            missing.append(
                f"The spectrum of {lacking} of {len(result['spectra'])} layers: the criterion solves no "
                "eigenproblem there, or scores all pairs of a wide layer without one."
            )
    chosen = _chosen(widths, bool(rounds), graphs, layer, folder)
    if chosen is not None:
        result["layer"] = _layer(chosen, widths, rounds, graphs)
        if result["layer"]["graphs"] is None:
            missing.append(
                f"The neuron graphs of {chosen}: the criterion records no signals, or the layer is beyond "
                "the bounds within which a run keeps graphs."
            )
    return {**result, "missing": missing}


def _chosen(
    widths: Mapping[str, Any],
    known: bool,
    graphs: Mapping[str, NeuronGraphs],
    layer: str | None,
    folder: Path,
) -> str | None:
    """Return the layer to look at; None where a run kept nothing of any."""
    if layer is not None and layer not in widths:
        raise ConfigError(
            f"The layer {layer!r} of {folder}",
            "there is none of that name that can be pruned",
            f"Known layers: {', '.join(widths) or 'none'}",
        )
    if layer is not None or not known:
        return layer if known else None
    cut = {name: both[0] for name, both in widths.items() if both[1] < both[0]}
    drawn = {name: len(graphs[name].units) for name in cut if name in graphs}  # dead units are not drawn
    return choose_layer(drawn or cut)


def _units(item: Round, name: str) -> dict[str, np.ndarray]:
    """Return the scores of a group's units in a round, and the indices of those that stayed."""
    return {"scores": np.array(item.scores[name]), "kept": np.array(item.kept[name], dtype=int)}


def _layer(
    name: str, widths: Mapping[str, Any], history: Sequence[Round], graphs: Mapping[str, NeuronGraphs]
) -> dict[str, Any]:
    rounds = [_units(item, name) for item in history if name in item.scores]
    units = int(widths[name][0])
    alive = np.arange(units)
    for entry in rounds:
        if len(entry["scores"]) != len(alive):
            break  # the record of another network: mark nothing rather than the wrong ones
        alive = alive[entry["kept"]]
    removed = np.setdiff1d(np.arange(units), alive).tolist()
    return {"name": name, "units": units, "graphs": graphs.get(name), "removed": removed, "rounds": rounds}


def _spectra(
    diagnosis: Sequence[Mapping[str, dict[str, Any]]], graphs: Mapping[str, NeuronGraphs]
) -> dict[str, dict[str, list[float]]]:
    """Return group -> round -> z of the first and last round; the first from kept graphs, if need be."""
    ends = {"first round": diagnosis[0], "last round": diagnosis[-1]} if diagnosis else {}
    found: dict[str, dict[str, list[float]]] = {}
    for name in diagnosis[0] if diagnosis else ():
        known = {title: _numbers(end.get(name, {}).get("values")) for title, end in ends.items()}
        known = known if len(diagnosis) > 1 else {"first round": known["first round"]}
        both = graphs.get(name)
        if not known["first round"] and both is not None and len(both.units) <= SOLVED_UNITS:
            known["first round"] = _solved(both)
        found[name] = {title: values for title, values in known.items() if values}
    return found


def _solved(both: NeuronGraphs) -> list[float]:
    if both.output.ridge <= 0:
        return []
    values: list[float] = solve_pencil(both.input, both.output).values[:SHOWN_VALUES].tolist()
    return values


def _numbers(values: Any) -> list[float]:
    return (
        [float(item) for item in values if isinstance(item, (int, float))] if isinstance(values, list) else []
    )


def _ablation(folder: Path) -> dict[str, Any] | None:
    path = folder / ABLATION
    if not is_plain_file(path):
        return None
    with reading(f"Reading {path}", "Make it again with cria ablate, or remove it"):
        return Ablation.model_validate(json.loads(path.read_text(encoding="utf-8"))).model_dump()


def _from_manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a pruned model says of its run."""
    own = is_plain_file(folder / MANIFEST)
    manifest = read_checkpoint_manifest(folder / MANIFEST) if own else read_manifest(folder)
    plan = Plan.from_dict(manifest["plan"])
    results, config = manifest.get("results"), manifest.get("config")
    results = results if isinstance(results, dict) else {}
    name = results.get("recipe") or results.get("model") or manifest.get("architecture") or "A network"
    numbers = {key: value for key, value in plan.report.items() if key in ("parameters", "parameters_dense")}
    return {
        **numbers,
        **{key: value for key, value in results.items() if key != "rounds"},
        "title": f"{name}: what its manifest says",
        "metric": _metric(results),
        "widths": {group: (size, len(plan.kept[group])) for group, size in plan.sizes.items()},
        "provenance": manifest.get("provenance"),
        "config": config,
    }


def _metric(results: Mapping[str, Any]) -> str:
    """Return the name of a run's metric; manifests name the recipe only."""
    recipe = results.get("recipe")
    if recipe in TASKS:
        try:
            return task(str(recipe)).metric
        except CriaError:  # the recipe needs a library that is not here; the number is shown all the same
            pass
    return str(results.get("metric") or "metric")


@dataclass(frozen=True)
class FolderPage:
    """A page and what it is of.

    Attributes:
        kind: "run" or "bench".
        html: the page.
        layer: whose neuron graphs it shows; None for a bench, or where none is known.
    """

    kind: str
    html: str
    layer: str | None = None


def folder_page(folder: str | Path, layer: str | None = None) -> FolderPage:
    """Return the page of a run or of a bench, made from the files in its folder alone.

    Args:
        folder: what `cria run` or `cria prune` wrote, or a folder of a bench's result files.
        layer: of a run: whose neuron graphs are drawn; None chooses.

    Raises:
        ArtifactError: the folder is neither, or a file in it is damaged.
        ConfigError: there is no such layer.
    """
    folder = Path(folder)
    asked = f"A report of {folder}"
    todo = "Give the folder that cria run or cria prune wrote, or one of a bench's result files"
    if not folder.is_dir():
        raise ArtifactError(asked, "it is no folder" if folder.exists() else "it does not exist", todo)
    if is_run(folder):
        result = run_result(folder, layer)
        return FolderPage("run", render(result), (result.get("layer") or {}).get("name"))
    bench = read_bench(folder)
    if not bench.cells:
        runs = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_run(entry))
        if runs:
            todo = f"Give one of the runs in it: {', '.join(runs[:8])}{', ...' if len(runs) > 8 else ''}"
        found = "it holds neither a run (run.json, manifest.json or cria.json) nor cells of a bench"
        raise ArtifactError(asked, found, todo)
    if layer is not None:
        raise ConfigError(f"The layer {layer!r} of {folder}", "it is a bench", "Leave out --layer")
    return FolderPage("bench", render_bench(bench, folder.resolve().name))
