"""Where a result comes from: versions, commit, device, seed, data, time."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

CODE = (":(top)*.py", ":(top)*.yaml", ":(top)*.toml")
"""What makes a result: a bench that adds to a tracked result file runs the same code as before."""


def provenance(
    seed: int | None,
    command: str | Sequence[str] | None = None,
    data_fingerprint: str | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return what a reader needs to repeat a result, ready for JSON.

    Args:
        seed: the seed of the run.
        command: the command line, if there was one; kept as it is given.
        data_fingerprint: hash of the data.
        device: where the model ran.

    Returns:
        `cria_prune`, `python`, `torch` and `numpy` versions; `commit` of the code and `dirty` (code
        differs from it) where it runs from a git checkout, else None; `platform`, `cpus`, `device`; `seed`,
        `command`, `data`; `time` in UTC (ISO 8601). No user, host or folder is named.
    """
    commit, dirty = _git()
    return {
        "cria_prune": _version("cria-prune"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit,
        "dirty": dirty,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": _device(device),
        "seed": seed,
        "command": command if command is None or isinstance(command, str) else list(command),
        "data": data_fingerprint,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory(device: torch.device | str | None = None) -> dict[str, int]:
    """Return the largest memory that was taken so far, in bytes: of this `process`, and of its CUDA `device`.

    A system that does not tell leaves the process out.
    """
    found = {}
    try:
        import resource
    except ImportError:  # there is none on Windows
        pass
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["process"] = peak if platform.system() == "Darwin" else 1024 * peak
    if device is not None and torch.device(device).type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _device(device: torch.device | str | None) -> str | None:
    if device is None:
        return None
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _git() -> tuple[str | None, bool | None]:
    """Commit of this file's checkout, and whether code differs from it; (None, None) where git has none."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD"), bool(
            git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
