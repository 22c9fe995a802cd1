"""A bench: a folder of result files, one per cell: criterion, reduction, seed, and the settings around."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cria_prune.artifact.folders import is_plain_file

VARIED = ("criterion", "reduction", "seed", "network")
"""Keys of a cell that are no setting: a table of one setting has them as rows, columns, repeats and title."""

Setting = tuple[tuple[str, str], ...]
"""Names and values of all other keys of a cell, sorted."""
Points = dict[float, dict[int, float]]
"""Reduction -> seed -> value."""


class Cell(BaseModel):
    """Where a result stands in the grid; further keys are settings."""

    model_config = ConfigDict(extra="allow")

    criterion: str
    reduction: float
    seed: int = 0
    dense_seed: int | None = None
    network: str = ""

    def setting(self) -> Setting:
        """Return all that is neither criterion, reduction, seed nor network."""
        rest = {key: value for key, value in self.model_dump().items() if key not in VARIED}
        return tuple(sorted((key, _text(value)) for key, value in rest.items() if value is not None))


def _text(value: Any) -> str:
    """Return the value of a setting as text, several of them with their names.

    >>> _text(4), _text({"lr": 0.1, "distill": 0.5})
    ('4', 'distill 0.5, lr 0.1')
    """
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key} {value[key]}" for key in sorted(value))


class CellFile(BaseModel):
    """One result file."""

    model_config = ConfigDict(extra="ignore")

    cell: Cell
    metric: str = "accuracy"  # files from before there were others do not name it
    pruned: float | None = None
    recovered: float | None = None
    report: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    provenance: dict[str, Any] = {}


@dataclass
class Bench:
    """A bench as its files say it.

    Attributes:
        cells: all result files, by name.
        dense: seed -> metric of the dense model.
        left: names of other JSON files, with the reason.
    """

    cells: list[CellFile] = field(default_factory=list)
    dense: dict[int, float] = field(default_factory=dict)
    origins: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def settings(self) -> list[Setting]:
        """Return the settings that occur, sorted; numbers by value."""
        found = {item.cell.setting() for item in self.cells}
        return sorted(found, key=lambda setting: [(key, _order(value)) for key, value in setting])

    def values(self, setting: Setting, key: str) -> dict[str, Points]:
        """Return criterion -> reduction -> seed -> value of "pruned" or "recovered", where there is one."""
        found: dict[str, Points] = {}
        for item in self.cells:
            value = getattr(item, key)
            if item.cell.setting() == setting and value is not None and math.isfinite(value):
                points = found.setdefault(item.cell.criterion, {})
                points.setdefault(item.cell.reduction, {})[item.cell.seed] = value
        return found

    def of(self, setting: Setting) -> list[CellFile]:
        """Return the cells of a setting."""
        return [item for item in self.cells if item.cell.setting() == setting]

    def dense_of(self, setting: Setting) -> list[float]:
        """Return the figures of the dense models that the cells of a setting start from, each value once."""
        cells = [item.cell for item in self.of(setting)]
        seeds = {cell.seed if cell.dense_seed is None else cell.dense_seed for cell in cells}
        return sorted({self.dense[seed] for seed in seeds if seed in self.dense})

    @property
    def criteria(self) -> list[str]:
        """All criteria, sorted."""
        return sorted({item.cell.criterion for item in self.cells})


def read_bench(folder: Path) -> Bench:
    """Read the result files of a folder, not those of folders in it; a file that is none is named in `left`.

    A cell is JSON with `cell`; the figure of a dense model JSON with `dense` and a seed in its provenance.
    """
    bench = Bench()
    for path in sorted(folder.glob("*.json")):
        if not is_plain_file(path):
            bench.left.append(f"{path.name}: no regular file")
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(said, dict) and "cell" in said:
                bench.cells.append(CellFile.model_validate(said))
            elif isinstance(said, dict) and isinstance(said.get("dense"), (int, float)):
                origin = said.get("provenance") or {}
                bench.dense[int(origin.get("seed") or 0)] = float(said["dense"])
                bench.origins.append(dict(origin))
            else:
                bench.left.append(f"{path.name}: no cell of a bench")
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            bench.left.append(f"{path.name}: its {where!r} is damaged")
        except (OSError, ValueError, TypeError, RecursionError):
            bench.left.append(f"{path.name}: it cannot be read")
    bench.origins += [item.provenance for item in bench.cells]
    return bench


def curve(points: Points) -> list[tuple[float, list[float]]]:
    """Return the points as the pictures take them: (reduction, values in the order of the seeds)."""
    return [(share, [seeds[seed] for seed in sorted(seeds)]) for share, seeds in sorted(points.items())]


def distinct(origins: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the different values of a key of several provenances, sorted."""
    return sorted({str(item[key]) for item in origins if item.get(key) is not None})


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value
