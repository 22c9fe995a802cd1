"""Runs the cells of a grid that have no result file yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.artifact.files import write_text
from cria_prune.artifact.provenance import provenance
from cria_prune.bench.cell import Cell, cells, config_of, file_name
from cria_prune.bench.peer import IMPORTANCES, prune_by_peer
from cria_prune.bench.suite import Grid
from cria_prune.config import PruneConfig
from cria_prune.errors import ArtifactError
from cria_prune.pipeline import PruneResult, prune
from cria_prune.progress import QUIET, Progress
from cria_prune.recover import recover
from cria_prune.tasks import Task, task


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    command: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    on_cell: Callable[[int, int, Cell, dict[str, Any]], None] | None = None,
) -> int:
    """Measure the missing cells of a grid, one result file each, and return how many were measured.

    A file of the same cell is kept if it was measured with the same configuration. Each file is written
    whole under a temporary name and renamed: a bench that is killed goes on with the same command.

    Args:
        grid: what to measure.
        folder: where the result files are; it is made.
        command: the command line, for the provenance.
        device: where the models run.
        progress: where to show long steps.
        on_cell: called after every cell with its number, how many there are, the cell and its values.

    Raises:
        ArtifactError: a file of the folder was measured with another configuration, or cannot be read.
        CriaError: each stage's own; the files that are there stay.
    """
    chosen = task(grid.network)
    progress = progress or QUIET
    missing = list(_missing(grid, chosen, folder))
    folder.mkdir(parents=True, exist_ok=True)
    data, models = chosen.fingerprint("test"), dict[int, nn.Module]()
    for number, (cell, config) in enumerate(missing, 1):
        seed = cell["seed"]
        if seed not in models:
            models = {seed: chosen.dense(seed, progress).to(device)}  # one at a time
            _dense(chosen, models[seed], seed, folder, data, progress)
        values = _measure(chosen, models[seed], cell, config, progress)
        origin = provenance(seed=seed, command=command, data_fingerprint=data, device=device)
        _write(folder / file_name(cell), {**values, "provenance": origin})
        if on_cell is not None:
            on_cell(number, len(missing), cell, values)
    return len(missing)


def _missing(grid: Grid, chosen: Task, folder: Path) -> Iterator[tuple[Cell, PruneConfig]]:
    """Yield the cells without a file, once those that have one are seen to be the same."""
    for cell in cells(grid):
        path, config = folder / file_name(cell), config_of(chosen, cell, grid.examples)
        if not path.exists():
            yield cell, config
            continue
        try:
            found = PruneConfig(**json.loads(path.read_text())["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"The result file {path}", f"{type(error).__name__}: {error}", "Remove it to measure again"
            ) from error
        if found != config:
            raise ArtifactError(
                f"The cell {path.stem}",
                f"{path.name} was measured with {_difference(found, config)}",
                "Choose another --output, or remove the file",
            )


def _difference(found: PruneConfig, asked: PruneConfig) -> str:
    """Say in which values two configurations differ."""
    one, other = (_flat(item.model_dump(mode="json")) for item in (found, asked))
    differing = [key for key in other if one.get(key) != other[key]]
    return ", ".join(f"{key} {one.get(key)!r}, asked is {other[key]!r}" for key in differing)


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat


def _dense(chosen: Task, model: nn.Module, seed: int, folder: Path, data: str, progress: Progress) -> None:
    """Measure the dense model of a seed, unless its file is there."""
    path = folder / f"dense-seed{seed}.json"
    if not path.exists():
        value = chosen.evaluate(model, chosen.test_batches(), progress)
        origin = provenance(seed=seed, data_fingerprint=data)
        _write(path, {"metric": chosen.metric, "dense": value, "provenance": origin})


def _measure(
    chosen: Task, model: nn.Module, cell: Cell, config: PruneConfig, progress: Progress
) -> dict[str, Any]:
    """Prune, measure, recover and measure again."""
    batches = chosen.calibration(config.record.examples, cell["seed"])
    start = time.perf_counter()
    if cell["criterion"] in IMPORTANCES:
        peer = prune_by_peer(cell["criterion"], model, batches, config)
        smaller, found = peer.model, {"report": peer.report, "difference": None}
        seconds = {"prune": round(time.perf_counter() - start, 4)}
    else:
        result = prune(model, batches, config, progress=progress)
        smaller, found, seconds = result.model, _found(result), _stage_seconds(result)
    figures = {
        "metric": chosen.metric,
        "pruned": chosen.evaluate(smaller, chosen.test_batches(), progress),
    }
    if cell["epochs"]:
        start = time.perf_counter()
        settings = chosen.recover_defaults.model_copy(update={"epochs": cell["epochs"], "seed": cell["seed"]})
        source = task(cell["network"], quick=True) if cell.get("quick") else chosen
        # No metric while training: some published weights have seen the validation split, so the last
        # epoch is what is reported.
        recover(smaller, source.train_batches(cell["seed"]), settings, progress=progress)
        seconds["recover"] = round(time.perf_counter() - start, 1)
        figures["recovered"] = chosen.evaluate(smaller, chosen.test_batches(), progress)
    return {"cell": cell, **figures, **found, "seconds": seconds, "config": config.model_dump(mode="json")}


def _found(result: PruneResult) -> dict[str, Any]:
    """Return what a cell keeps of a pruning beside its figures."""
    halves = [item["split_half"] for item in result.rounds[0].diagnosis.values()]
    known = [value for value in halves if value is not None]
    verification = result.rounds[-1].verification
    return {
        "report": dict(result.report),
        "difference": None if verification is None else verification.difference,
        "split_half": sum(known) / len(known) if known else None,
        "kept": {name: len(stays) for name, stays in result.plan.kept.items()},
    }


def _stage_seconds(result: PruneResult) -> dict[str, float]:
    total: dict[str, float] = {"discover": result.seconds}
    for item in result.rounds:
        for stage, seconds in item.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: round(seconds, 4) for stage, seconds in total.items()}


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")
