"""Where result files are, and how they are written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cria_prune.artifact.rebuild import provenance
from cria_prune.base.files import write_json

RESULTS = Path(__file__).parent / "results"


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


def on(name: str, device: str) -> str:
    """Return the name of a result file: that of a GPU stands beside the one of the CPU.

    >>> on("wide.json", "cpu"), on("wide.json", "cuda")
    ('wide.json', 'wide-cuda.json')
    """
    stem, _, ending = name.rpartition(".")
    return name if device == "cpu" else f"{stem}-{device.partition(':')[0]}.{ending}"


def finished(device: str) -> None:
    """Wait until a device has done what it was told: only then may a clock be read."""
    if device != "cpu":
        torch.cuda.synchronize(device)


class Rows:
    """A result file that grows row by row; a stopped benchmark goes on after the last row that is in it.

    Args:
        path: the file; what is there is kept, and not measured again.
        facts: what all rows are of. A file that says something else is refused.
        seed: of the rows.
        device: where they are measured.

    Raises:
        SystemExit: the file is of something else.
    """

    def __init__(self, path: Path, facts: dict[str, Any], seed: int = 0, device: str = "cpu") -> None:
        self._path, self._seed, self._device = path, seed, device
        self.values: dict[str, Any] = {**facts, "rows": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            differs = [name for name, value in facts.items() if found.get(name) != value]
            if differs:
                raise SystemExit(
                    f"{path.name} was measured with another {differs[0]}: remove it to begin anew"
                )
            self.values = found

    @property
    def rows(self) -> dict[str, Any]:
        return self.values["rows"]

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Write a row, with the commit that it was measured at: rows of one file may be of several."""
        origin = provenance(seed=self._seed, command=sys.argv, device=self._device)
        self.rows[name] = {**row, "commit": origin["commit"]}
        self.values["provenance"] = origin
        write(self._path, self.values)
