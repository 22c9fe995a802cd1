"""Where result files are, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cria_prune.artifact.files import write_json

RESULTS = Path(__file__).parent / "results"


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)
