"""What a run keeps so that its report can be made again, and from a folder to its page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cria_prune.artifact.checkpoint import MANIFEST, read_checkpoint_manifest
from cria_prune.artifact.facts import is_ours, side_by_side
from cria_prune.artifact.rebuild import read_manifest
from cria_prune.base.errors import ArtifactError, ConfigError, CriaError
from cria_prune.base.files import MANIFEST as PRETRAINED
from cria_prune.base.files import Layout, is_plain_file, readable, without_places
from cria_prune.base.metrics import percent
from cria_prune.config import OF
from cria_prune.graph.graph import NeuronGraphs, choose_layer
from cria_prune.planning.plan import Plan
from cria_prune.recipes.registry import TASKS, task
from cria_prune.report.bench_page import read_bench, render_bench
from cria_prune.report.run_page import render
from cria_prune.result import PruneResult, Round, unreached_said
from cria_prune.resume.rounds import (
    RoundFacts,
    facts_of,
    graph_tensors,
    graphs_of,
    ridges_of,
    round_of,
    tensors_of,
)
from cria_prune.resume.store import State
from cria_prune.spectrum.pencil import solve_pencil

RUN, TENSORS = "run.json", "run.tensors"
LAYOUT = Layout(
    "cria-run", 1, RUN, "what a run of Cria keeps",
    "Copy the folder again from where it was made, or run the command again", TENSORS,
)  # fmt: skip
FILES = (RUN, TENSORS)


@dataclass(frozen=True, eq=False)
class History:
    """What a run keeps.

    Attributes:
        page: what `write_report` takes, plain JSON; numbers that are not finite are None.
        rounds: what each round did. Of a run of Cria 0.1 the reports, the verifications and the repairs are
            not known; `page` has the figures of its table.
        graphs: of the dense model's neurons, group name -> both sides.
    """

    page: dict[str, Any]
    rounds: tuple[Round, ...]
    graphs: Mapping[str, NeuronGraphs]


class RunPage(BaseModel):
    """The part of `run.json` that the page reads; further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")

    title: str | None = None
    metric: str | None = None
    rounds: list[dict[str, Any]] = []
    widths: dict[str, tuple[int, int]] = {}
    frozen: dict[str, str] = {}
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    provenance: dict[str, Any] = {}
    earlier: list[dict[str, Any]] = []
    diagnosis: list[dict[str, dict[str, Any]]] = []


def history_of(
    result: PruneResult, results: Mapping[str, Any], metric: str, origin: Mapping[str, Any]
) -> History:
    """Return what a run keeps for its page."""
    cost = OF.texts[results["of"]]
    page = {
        **results,
        "title": f"{results['recipe'] or results['model']}: {percent(results['reduction'])} of the {cost} "
        "removed",
        "metric": metric,
        "rounds": [
            {
                "round": item.number,
                "parameters": item.report["parameters"],
                "reduction": item.report["reached"],
                "metric": item.metric,
                "masked_equals_pruned": None if item.verification is None else item.verification.difference,
                "seconds": dict(item.seconds),
            }
            for item in result.rounds
        ],
        "widths": {
            group.name: [group.size, result.groups[group.name].size] for group in result.dense.prunable
        },
        "frozen": {group.name: group.frozen for group in result.dense if group.frozen is not None},
        "provenance": dict(origin),
        "config": result.config.model_dump(mode="json"),
    }
    return History(page, result.rounds, result.graphs or {})


def write_run(
    folder: Path, page: Mapping[str, Any], rounds: Sequence[Round], graphs: Mapping[str, NeuronGraphs]
) -> None:
    """Write `run.json` and `run.tensors` into a folder, in place of those there; JSON last.

    Args:
        folder: where.
        page: as in `History`; a row of its `rounds` gets all that the round says.
        rounds, graphs: as in `History`.

    Raises:
        ArtifactError: the system refuses, or something is no JSON.
    """
    names = [name for item in rounds for name in (*item.scores, *item.kept)]
    groups = {name: place for place, name in enumerate(dict.fromkeys([*names, *graphs]))}
    tensors: State = {}
    for item in rounds:
        for key, found in tensors_of(item).items():  # a name may be anything, a number stays one
            tensors |= {f"{item.number}/{groups[name]}/{key}": units for name, units in found.items()}
    for name, both in graphs.items():
        tensors |= graph_tensors(both, f"graph/{groups[name]}/", short=True)
    page = without_places(page)
    rows = [*page.get("rounds", ()), *({} for _ in rounds)][: len(rounds)]
    said = {
        "rounds": [{**row, **facts_of(item, ["diagnosis"])} for row, item in zip(rows, rounds, strict=True)],
        "diagnosis": [dict(item.diagnosis) for item in rounds],
    }
    known = LAYOUT.said({
        "groups": list(groups),
        "ridges": {name: ridges_of(both) for name, both in graphs.items()},
        "sha256": "",
        "page": _finite({**page, **said}),
    })  # fmt: skip
    LAYOUT.write(folder, known, {name: value.cpu().contiguous() for name, value in tensors.items()})


def read_run(folder: Path) -> History | None:
    """Return what `write_run` was given; None where there is no `run.json`.

    Raises:
        ArtifactError: one of the two files is missing, damaged, foreign or of a newer format.
    """
    if not is_plain_file(folder / RUN):
        return None
    with readable(f"Reading {folder / RUN}", LAYOUT.todo):
        known = LAYOUT.read(folder)
        page = RunPage.model_validate(known["page"])
        groups, ridges = [str(name) for name in known["groups"]], known["ridges"]
        tensors = LAYOUT.read_tensors(folder, str(known["sha256"]))
        graphs = {
            name: graphs_of(both, tensors, f"graph/{groups.index(name)}/") for name, both in ridges.items()
        }
        return History(page.model_dump(), _rounds(page, tensors, groups), graphs)


def _rounds(page: RunPage, tensors: State, groups: Sequence[str]) -> tuple[Round, ...]:
    """Return the rounds of which there are tensors, by number."""
    units: dict[int, dict[str, State]] = {}
    for key in sorted(tensors):
        first, _, rest = key.partition("/")
        if first != "graph":
            place, kind = rest.split("/")
            by_kind = units.setdefault(int(first), {"scores": {}, "kept": {}})
            by_kind[kind][groups[int(place)]] = tensors[key]
    unknown: RoundFacts = {"report": {}, "seconds": {}, "verification": None, "metric": None}
    rows, diagnoses = dict(enumerate(page.rounds)), dict(enumerate(page.diagnosis))
    found = []
    for index, number in enumerate(sorted(units)):
        facts = {**unknown, **rows.get(index, {}), "number": number, "diagnosis": diagnoses.get(index, {})}
        numbers = {
            kind: {name: by_name[name] for name in groups if name in by_name}
            for kind, by_name in units[number].items()
        }
        for name, scores in numbers["scores"].items():
            kept = numbers["kept"][name]
            kinds = scores.is_floating_point() and not kept.is_floating_point()
            flat = kinds and scores.ndim == kept.ndim == 1
            if not flat or (len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(scores)):
                raise ValueError(f"the scores of {name} do not fit the units that stayed")
        found.append(round_of(facts, **numbers, kind=Round))
    return tuple(found)


def _finite(value: Any) -> Any:
    """Return plain JSON values with None for NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    repair: str = "none"  # files from before there was a choice do not say it
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
    result, path = {**found.page, "ablation": None}, folder / ABLATION
    if is_ours(folder):
        result["side_by_side"] = side_by_side(folder)
    if is_plain_file(path):
        with readable(f"Reading {path}", "Make it again with cria ablate, or remove it"):
            ablation = Ablation.model_validate(json.loads(path.read_text(encoding="utf-8")))
        result["ablation"] = ablation.model_dump()
    else:
        missing.append(f"No {ABLATION} lies in this folder, so there are no ablation curves.")
    if rounds:
        result["scores"] = {name: _units(rounds[-1], name) for name in rounds[-1].scores}
        result["unreached"] = unreached_said(rounds[-1].diagnosis)
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
    ends = {"first round": diagnosis[0], "last round": diagnosis[-1]} if len(diagnosis) > 1 else {}
    found: dict[str, dict[str, list[float]]] = {}
    for name, first in diagnosis[0].items() if diagnosis else ():
        known = {title: _numbers(end.get(name, {})) for title, end in ends.items()}
        known = known or {"first round": _numbers(first)}
        both = graphs.get(name)
        solved = both is not None and both.output.ridge > 0 and len(both.units) <= SOLVED_UNITS
        if both is not None and solved and not known["first round"]:
            values = solve_pencil(both.input, both.output).values
            known["first round"] = values[:SHOWN_VALUES].tolist()
        found[name] = {title: values for title, values in known.items() if values}
    return found


def _numbers(diagnosis: Mapping[str, Any]) -> list[float]:
    values = diagnosis.get("values")
    numbers = values if isinstance(values, list) else []
    return [float(item) for item in numbers if isinstance(item, (int, float))]


def _from_manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a pruned model says of its run."""
    own = is_plain_file(folder / MANIFEST)
    manifest = read_checkpoint_manifest(folder) if own else read_manifest(folder)
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
    with suppress(CriaError):  # the recipe needs a library that is not here; the number is shown all the same
        if results.get("recipe") in TASKS:
            return task(str(results["recipe"])).metric
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
