"""What a run keeps so that its report can be made again from files alone, without the model.

`run.json` holds what the page says; `run.tensors` the scores and kept units of every round and the neuron
graphs of some layers, as safetensors. It is not called *.safetensors because programs that serve a model
read every file of that ending in its folder as weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cria_prune.artifact.files import atomic, refused, sha256, write_text
from cria_prune.artifact.folders import is_plain_file
from cria_prune.errors import ArtifactError
from cria_prune.graph import Graph, NeuronGraphs

FORMAT, VERSION = "cria-run", 1
RUN, TENSORS = "run.json", "run.tensors"
FILES = (RUN, TENSORS)
TINY = float(np.finfo(np.float32).tiny)  # a weight below it would come back as none

Scores = Mapping[str, Mapping[str, Any]]
"""Group name -> `scores` (units,) float64 and `kept` (n,) indices of those that stayed, of one round."""


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


def write_run(
    folder: Path, page: Mapping[str, Any], history: Sequence[Scores], graphs: Mapping[str, NeuronGraphs]
) -> None:
    """Write `run.json` and `run.tensors` into a folder, in place of those there; JSON last.

    Args:
        folder: where.
        page: what `write_report` takes, plain JSON; numbers that are not finite become null.
        history: the scores of every round.
        graphs: of the dense model's neurons, group name -> both sides.

    Raises:
        ArtifactError: the system refuses, or something is no JSON.
    """
    groups = list(dict.fromkeys(name for entries in history for name in entries))
    groups += [name for name in graphs if name not in groups]
    tensors: dict[str, np.ndarray] = {}
    for number, entries in enumerate(history, start=1):
        for name, entry in entries.items():
            place = f"{number}/{groups.index(name)}"  # a name may be anything, a number stays one
            tensors[f"{place}/scores"] = np.asarray(entry["scores"], dtype=np.float64)
            tensors[f"{place}/kept"] = np.asarray(entry["kept"], dtype=np.int32)
    for name, both in graphs.items():
        tensors |= _graph_tensors(f"graph/{groups.index(name)}", both)
    known: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "groups": groups,
        "ridges": {name: [both.input.ridge, both.output.ridge] for name, both in graphs.items()},
        "sha256": "",
        "page": _finite(dict(page)),
    }
    try:
        (folder / RUN).unlink(missing_ok=True)  # an interrupted write leaves no half that looks whole
        with atomic(folder / TENSORS) as temporary:
            save_file(tensors, temporary)
        known["sha256"] = sha256(folder / TENSORS)
        text = json.dumps(known, allow_nan=False)
    except (OSError, SafetensorError) as error:
        raise refused(f"Writing {folder / TENSORS}", error) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"Writing {folder / RUN}", f"something in it is no JSON, {error}", "Pass plain values"
        ) from error
    write_text(folder / RUN, text)


def read_run(folder: Path) -> tuple[dict[str, Any], list[Scores], dict[str, NeuronGraphs]] | None:
    """Return what `write_run` was given; None where there is no `run.json`.

    Raises:
        ArtifactError: one of the two files is missing, damaged, foreign or of a newer format.
    """
    path, todo = folder / RUN, "Copy the folder again from where it was made, or run the command again"
    if not is_plain_file(path):
        return None
    asked = f"Reading {path}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or known.get("format") != FORMAT:
            raise ArtifactError(asked, "it is not what a run of Cria keeps", todo)
        if known.get("version") != VERSION:
            raise ArtifactError(
                asked,
                f"found format version {known.get('version')!r}, this Cria reads {VERSION}",
                "Use the cria-prune that wrote it, or a newer one",
            )
        page = RunPage.model_validate(known["page"]).model_dump()
        groups, ridges = [str(name) for name in known["groups"]], known["ridges"]
        if not is_plain_file(folder / TENSORS) or sha256(folder / TENSORS) != known["sha256"]:
            raise ArtifactError(asked, f"{TENSORS} beside it is missing or another", todo)
        tensors = load_file(folder / TENSORS)
        return page, _history(tensors, groups), _graphs(tensors, groups, ridges)
    except OSError as error:
        raise ArtifactError(asked, f"the system refused, {error}", todo) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(asked, f"its {where!r} is damaged, {first['msg']}", todo) from error
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(asked, f"it is damaged, {error!r}", todo) from error


def _graph_tensors(place: str, both: NeuronGraphs) -> dict[str, np.ndarray]:
    """Nodes and edges in 32 bits, weights in 32 bits: 12 bytes an edge."""
    found = {f"{place}/units": both.units.numpy().astype(np.int32)}
    for side, graph in (("in", both.input), ("out", both.output)):
        found |= {
            f"{place}/{side}/rows": graph.rows.numpy().astype(np.int32),
            f"{place}/{side}/cols": graph.cols.numpy().astype(np.int32),
            f"{place}/{side}/weights": np.maximum(graph.weights.numpy(), TINY).astype(np.float32),
        }
    return found


def _history(tensors: Mapping[str, np.ndarray], groups: Sequence[str]) -> list[Scores]:
    rounds: dict[int, dict[str, Mapping[str, np.ndarray]]] = {}
    for key, scores in tensors.items():
        number, _, rest = key.partition("/")
        if number == "graph" or not rest.endswith("/scores"):
            continue
        kept = tensors[key.removesuffix("scores") + "kept"]
        flat = scores.ndim == kept.ndim == 1 and scores.dtype.kind == "f" and kept.dtype.kind == "i"
        if not flat or (kept.size and not 0 <= kept.min() <= kept.max() < len(scores)):
            raise ValueError(f"{key} does not fit the units that stayed")
        entry = {"scores": scores, "kept": kept}
        rounds.setdefault(int(number), {})[groups[int(rest.split("/")[0])]] = entry
    return [{name: rounds[key][name] for name in groups if name in rounds[key]} for key in sorted(rounds)]


def _graphs(
    tensors: Mapping[str, np.ndarray], groups: Sequence[str], ridges: Mapping[str, Sequence[float]]
) -> dict[str, NeuronGraphs]:
    return {name: _graph(tensors, f"graph/{groups.index(name)}", both) for name, both in ridges.items()}


def _graph(tensors: Mapping[str, np.ndarray], place: str, ridges: Sequence[float]) -> NeuronGraphs:
    units = torch.from_numpy(tensors[f"{place}/units"].astype(np.int64))
    sides = []
    for side, ridge in zip(("in", "out"), ridges, strict=True):
        rows, cols = (tensors[f"{place}/{side}/{end}"].astype(np.int64) for end in ("rows", "cols"))
        weights = tensors[f"{place}/{side}/weights"].astype(np.float64)
        fits = rows.shape == cols.shape == weights.shape and rows.ndim == 1
        if not fits or ((rows < 0) | (rows >= cols) | (cols >= len(units))).any() or not (weights > 0).all():
            raise ValueError(f"{place}/{side} is no graph of {len(units)} units")
        ends = (torch.from_numpy(rows), torch.from_numpy(cols))
        sides.append(Graph(len(units), *ends, torch.from_numpy(weights), float(ridge)))
    return NeuronGraphs(units, sides[0], sides[1])


def _finite(value: Any) -> Any:
    """Return plain JSON values with None for NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
