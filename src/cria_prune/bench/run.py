"""Runs the cells of grids that have no result file yet."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.artifact.rebuild import provenance
from cria_prune.base.errors import ArtifactError, CriaError
from cria_prune.base.events import passed
from cria_prune.base.files import write_json
from cria_prune.base.modules import device_of
from cria_prune.base.progress import QUIET, Progress
from cria_prune.bench.draw import Draw
from cria_prune.bench.peer import IMPORTANCES, prune_by_peer
from cria_prune.bench.suite import Cell, Grid, cells, config_of, dense_seed, file_name, task_of
from cria_prune.config import PruneConfig, RecoverConfig, repair_of_before, score_of_before
from cria_prune.recipes.registry import task
from cria_prune.recovery.loop import NAME as STATE
from cria_prune.recovery.tune import recover
from cria_prune.result import PruneResult, said_of
from cria_prune.resume.rounds import facts_of
from cria_prune.tasks.base import Task, fingerprint


def divide(
    grids: Sequence[Grid], chosen: Task, folder: Path, data: str
) -> tuple[list[tuple[Cell, PruneConfig]], list[Cell]]:
    """Divide the cells of grids into missing and measured.

    Args:
        grids: of one network.
        chosen: its task.
        folder: where the result files are.
        data: hash of the data, as the result files say it.

    Returns:
        The cells without a result file, with their configurations; those with one of the same configuration.

    Raises:
        ArtifactError: a file is of another network, configuration or data, or cannot be read.
    """
    missing, measured = [], []
    for grid in grids:
        for cell in cells(grid):
            config = config_of(chosen, cell, grid)
            if (folder / file_name(cell)).exists():
                _check(cell, config, chosen, folder, data)
                measured.append(cell)
            else:
                missing.append((cell, config))
    return missing, measured


def _check(cell: Cell, config: PruneConfig, chosen: Task, folder: Path, data: str) -> None:
    """See that the file of a cell was measured with the same configuration and data.

    Raises:
        ArtifactError: it was not, or cannot be read.
    """
    path = folder / file_name(cell)
    with reading(path):
        said = json.loads(path.read_text(encoding="utf-8"))
        # Files from before there was a choice, and from before there was repair at all.
        said["config"] = {"repair": "none", "batch_norm": False, **repair_of_before(said["config"])}
        said["config"]["record"].setdefault("tokens", None)
        said["config"]["score"] = score_of_before(said["config"]["score"])  # a cell sets none of its own
        found, measured = PruneConfig(**said["config"]), repair_of_before(said["cell"])
        known = said["provenance"].get("data") in (data, chosen.fingerprint("test"))
        tuned = None if said.get("recover") is None else RecoverConfig(**said["recover"])
    asked: dict[str, Any] = {"cell": cell, "config": config.model_dump(mode="json")}
    there: dict[str, Any] = {"cell": measured, "config": found.model_dump(mode="json")}
    if cell["epochs"] and tuned is not None:  # files of the first benches do not say it
        asked["recover"] = tuning(chosen, cell).model_dump(mode="json")
        there["recover"] = tuned.model_dump(mode="json")  # settings that came later too
    differs = _difference(there, asked)
    if differs or not known:
        raise ArtifactError(
            f"The cell {path.stem}",
            f"{path.name} was measured with {differs or 'other data'}",
            "Choose another --output, or remove the file",
        )


def state_of(folder: Path, cell: Cell) -> Path:
    """Return the hidden folder with the state of a cell's recovery."""
    return folder / f".{Path(file_name(cell)).stem}.recovery"


def tuning(chosen: Task, cell: Cell) -> RecoverConfig:
    """Return the recovery of a cell: the recipe's own, for the epochs and with the seed of the cell."""
    own = chosen.recover_defaults.model_dump()
    return RecoverConfig(**{**own, **cell.get("tune", {}), "epochs": cell["epochs"], "seed": cell["seed"]})


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the result file that is damaged, or holds something else, and what to do.

    Raises:
        ArtifactError: what is done inside fails for what the file holds.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CriaError) as error:
        raise ArtifactError(
            f"The result file {path}", f"{type(error).__name__}: {error}", "Remove it to measure again"
        ) from error


def _difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """Say in which values what was measured and what is asked differ."""
    one, other = _flat(found), _flat(asked)
    differing = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)!r}, asked is {other.get(key)!r}" for key in differing)


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat


LEFT_OUT = ("diagnosis", "repairs", "losses", "fidelity", "seconds")
"""Of a round, what a cell does not hold: what is long, and what the cell says itself, beside its rounds."""


def run_grids(
    grids: Sequence[Grid],
    folder: Path,
    *,
    command: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    on_cell: Callable[[int, int, Cell, dict[str, Any]], None] | None = None,
    chosen: Task | None = None,
) -> tuple[int, dict[str, CriaError]]:
    """Measure the missing cells of grids, one result file each.

    A file of the same cell is kept if it was measured with the same configuration and data. Each file is
    written whole under a temporary name and renamed: a bench that is killed goes on with the same command,
    also within the recovery of a cell, whose state is in a hidden folder until the cell is measured.
    A cell that cannot be measured is passed over.

    Args:
        grids: what to measure, on one network.
        folder: where the result files are; it is made.
        command: the command line, for the provenance.
        device: where the models run.
        progress: where to show long steps.
        on_cell: called after every cell with its number, how many there are, the cell and its values.
        chosen: the task of a network of the user's own; that of the recipe if None.

    Returns:
        How many cells were measured; file name -> why it could not be.

    Raises:
        ArtifactError: a file of the folder is of another network, configuration or data, or cannot be read.
    """
    chosen, progress = chosen or task_of(grids[0]), progress or QUIET
    data = chosen.fingerprint()
    missing, measured = divide(grids, chosen, folder, data)
    for cell in measured:  # a kill between a cell's file and the removal of its state
        shutil.rmtree(state_of(folder, cell), ignore_errors=True)
    origin = partial(provenance, command=command, data_fingerprint=data, device=device)
    failed: dict[str, CriaError] = {}
    folder.mkdir(parents=True, exist_ok=True)
    models: dict[int, tuple[nn.Module, float]] = {}  # one at a time, and one draw
    draws: dict[tuple[int, int, int], Draw] = {}
    for number, (cell, config) in enumerate(sorted(missing, key=_draw), 1):
        seed, drawn = dense_seed(cell), _draw((cell, config))
        if seed not in models:
            draws.clear()
            model = chosen.dense(seed, progress).to(device)
            models = {seed: (model, _dense(chosen, model, seed, folder, origin(seed=seed), progress))}
        model, dense = models[seed]
        state = state_of(folder, cell)
        try:
            if drawn not in draws:
                batches = chosen.calibration(config.record.examples, cell["seed"])
                draws = {drawn: Draw(model, batches, chosen.loss)}
            values = _measure(chosen, draws[drawn], cell, config, progress, state, data)
        except CriaError as error:
            failed[file_name(cell)] = error
            if not isinstance(error, ArtifactError):  # a state that is another's is for the user to remove
                shutil.rmtree(state, ignore_errors=True)
            continue
        values = {**values, "dense": dense, "provenance": origin(seed=cell["seed"])}
        write_json(folder / file_name(cell), values)
        shutil.rmtree(state, ignore_errors=True)
        if on_cell is not None:
            on_cell(number, len(missing), cell, values)
    return len(missing) - len(failed), failed


def _draw(item: tuple[Cell, PruneConfig]) -> tuple[int, int, int]:
    """Return what cells with the same dense model and the same calibration examples have in common."""
    cell, config = item
    return dense_seed(cell), cell["seed"], config.record.examples


def _dense(
    chosen: Task, model: nn.Module, seed: int, folder: Path, origin: dict[str, Any], progress: Progress
) -> float:
    """Return the metric of the dense model of a seed, once it is known that the folder's cells are of it.

    A training ends with other weights on another kind of processor, or with another number of threads. A
    file of the first benches has no hash of the weights: there the metric has to be the same.

    Raises:
        ArtifactError: it is another one.
    """
    path, weights = folder / f"dense-seed{seed}.json", fingerprint(*model.state_dict().values())
    said: dict[str, Any] = {}
    if path.exists():
        with reading(path):
            said = json.loads(path.read_text(encoding="utf-8"))
            float(said["dense"])
    if said.get("weights") == weights:
        return float(said["dense"])
    value = chosen.evaluate(model, chosen.test_batches(), progress)
    if said and ("weights" in said or not math.isclose(said["dense"], value, rel_tol=1e-6)):
        raise ArtifactError(
            f"Measuring on the dense model of seed {seed}",
            f"{path.name} is of another one: {chosen.metric} {said['dense']:.6g}, this one has {value:.6g}",
            "Cells of two dense models are no comparison: choose another --output or other seeds, or bring "
            "the model that was trained there (the folder CRIA_CACHE, by default ~/.cache/cria)",
        )
    if not said:
        said = {"metric": chosen.metric, "dense": value, "provenance": origin}
    write_json(path, {**said, "weights": weights})
    return float(said["dense"])


def _measure(
    chosen: Task,
    draw: Draw,
    cell: Cell,
    config: PruneConfig,
    progress: Progress,
    state: Path,
    data: str,
) -> dict[str, Any]:
    """Prune, measure, recover and measure again."""
    passed("cell", cell=cell)
    found: dict[str, Any]
    if cell["criterion"] in IMPORTANCES:
        peer = prune_by_peer(cell["criterion"], draw.ready(config), config)
        smaller, seconds = peer.model, peer.seconds
        found = {"report": peer.report, "difference": None, "kept": peer.kept}
        found["fidelity"] = draw.fidelity(smaller, config)
    else:
        result, seconds = draw.prune(config, progress)
        smaller, found = result.model, _found(result)
        seconds = {stage: round(spent, 4) for stage, spent in seconds.items()}
    found["gone"] = {
        kind: 1 - found["report"][kind] / found["report"][f"{kind}_dense"] for kind in ("parameters", "macs")
    }
    figures = {
        "metric": chosen.metric,
        "pruned": chosen.evaluate(smaller, chosen.test_batches(), progress),
    }
    if cell["epochs"]:
        start = time.perf_counter()
        settings = tuning(chosen, cell)
        found["recover"] = settings.model_dump(mode="json")
        if (state / STATE).exists():  # the seconds of the recovery are those of its end alone
            found["resumed"] = True
        source = task(cell["network"], quick=True) if cell.get("quick") else chosen
        # No metric while training: some published weights have seen the validation split, so the last
        # epoch is what is reported.
        training = source.train_batches(cell["seed"], device=device_of(smaller))
        teacher = draw.model if settings.distill else None
        recover(
            smaller, training, settings, teacher=teacher, loss=chosen.loss, device=device_of(smaller),
            progress=progress, state=state, data=data,
        )  # fmt: skip
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
        "fidelity": said_of(result.rounds[-1]),
        "rounds": [facts_of(item, LEFT_OUT) for item in result.rounds],
    }
