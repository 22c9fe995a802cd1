"""Where result files are, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
