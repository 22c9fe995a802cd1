"""What a folder holds of a bench already: seen to be the same before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cria_prune.bench.cell import Cell, cells, config_of, file_name
from cria_prune.bench.suite import Grid
from cria_prune.config import PruneConfig, RecoverConfig, score_of_before
from cria_prune.errors import ArtifactError, CriaError
from cria_prune.tasks import Task


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
        said["config"] = {"compensate": False, "batch_norm": False, **said["config"]}
        said["config"]["record"].setdefault("tokens", None)
        said["config"]["score"] = score_of_before(said["config"]["score"])  # a cell sets none of its own
        found, measured = PruneConfig(**said["config"]), said["cell"]
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
