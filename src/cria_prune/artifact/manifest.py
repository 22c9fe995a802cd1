"""What a saved model says of itself: its plan, how its weights are stored, where it comes from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn

from cria_prune.base.errors import ArtifactError, ConfigError
from cria_prune.base.files import MANIFEST
from cria_prune.planning.plan import Plan

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


FORMAT, VERSION = "cria-pretrained", 1
Policy = Literal["vanilla", "per-layer", "padded"]
"""How a folder stores a model: as a smaller one of its class, layer by layer, or padded with zeros."""


def render_manifest(
    model: nn.Module,
    plan: Plan,
    policy: Policy,
    config: BaseModel | Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
) -> str:
    """Return the text of the manifest. Raises an ArtifactError where something in it is no JSON."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "policy": policy,
        "architecture": type(model).__name__,
        "plan": plan.to_dict(),
        "config": config.model_dump(mode="json") if isinstance(config, BaseModel) else config,
        "provenance": provenance,
        "results": results,
    }
    try:
        return json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"Writing {MANIFEST}", f"something in it is no JSON, {error}", "Pass plain finite values"
        ) from error


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest in the folder of a saved model; its plan is not checked yet.

    Raises:
        ArtifactError: there is no `cria.json` that this Cria reads.
    """
    asked, todo = f"Reading {Path(path) / MANIFEST}", "Give a folder that save_pretrained wrote"
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(asked, f"it cannot be read, {error}", todo) from error
    said = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if said != (FORMAT, VERSION):
        raise ArtifactError(asked, f"found {said}, this Cria reads {(FORMAT, VERSION)}", todo)
    manifest.setdefault("policy", "vanilla")  # before there were others
    if manifest["policy"] not in get_args(Policy):
        raise ArtifactError(asked, f"found the policy {str(manifest['policy'])[:40]!r}", todo)
    return manifest


def read_plan(path: str | Path) -> Plan:
    """Return the plan in the folder of a saved model: what was removed from the dense one.

    Raises:
        ArtifactError: there is no `cria.json` that this Cria reads.
    """
    return Plan.from_dict(read_manifest(path).get("plan"))


def check_policy(policy: str) -> None:
    """Raise a ConfigError for a policy that `save_pretrained` does not have."""
    if policy not in ("vanilla", "per-layer"):
        raise ConfigError(
            f"Saving with policy={policy!r}",
            "found no such policy",
            'Use "vanilla" or "per-layer"; save_padded pads with zeros',
        )
