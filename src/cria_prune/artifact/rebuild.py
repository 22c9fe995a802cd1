"""A folder of a pruned Hugging Face model -> model, plan and manifest; and what the manifest says."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn

from cria_prune.artifact.layers import empty_model, fill, unlayered
from cria_prune.base.errors import ArtifactError, ConfigError, StructureError
from cria_prune.base.files import (
    CERTIFICATE,
    GENERATION,
    MANIFEST,
    hashes,
    readable,
    strict_json,
    without_places,
)
from cria_prune.base.sentences import MODULES, module_files
from cria_prune.planning.plan import Plan
from cria_prune.surgery.removal import apply
from cria_prune.tasks.loading import (
    INDEX,
    WEIGHTS,
    find_library,
    known_class,
    load_pretrained,
    read_config,
    reading,
    shards,
)

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
        command: the command line, if there was one; of absolute paths the last names alone are kept.
        data_fingerprint: hash of the data.
        device: where the model ran.

    Returns:
        `cria_prune`, `python`, `torch` and `numpy` versions; `commit` of the code and `dirty` (code
        differs from it) where it runs from a git checkout, else None; `platform`, `cpus`, `device`; `seed`,
        `command`, `data`; `time` in UTC (ISO 8601). No user, host or folder is named.
    """
    commit, dirty = _git()
    installed = None
    with suppress(PackageNotFoundError):
        installed = version("cria-prune")
    return {
        "cria_prune": installed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit,
        "dirty": dirty,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": _device(device),
        "seed": seed,
        "command": without_places(command),
        "data": data_fingerprint,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory(device: torch.device | str | None = None) -> dict[str, int]:
    """Return the largest memory that was taken so far, in bytes: of this `process`, and of its CUDA `device`.

    A system that does not tell leaves the process out.
    """
    found = {}
    with suppress(ImportError):  # there is none on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["process"] = peak if platform.system() == "Darwin" else 1024 * peak
    if device is not None and torch.device(device).type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


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
        "config": without_places(config.model_dump(mode="json") if isinstance(config, BaseModel) else config),
        "provenance": without_places(provenance),
        "results": without_places(results),
    }
    return strict_json(manifest, f"Writing {MANIFEST}")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest in the folder of a saved model; its plan is not checked yet.

    Raises:
        ArtifactError: there is no `cria.json` that this Cria reads.
    """
    asked, todo = f"Reading {Path(path) / MANIFEST}", "Give a folder that save_pretrained wrote"
    with readable(asked, todo):
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    said = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if said != (FORMAT, VERSION):
        raise ArtifactError(asked, f"found {said}, this Cria reads {(FORMAT, VERSION)}", todo)
    policy = manifest.setdefault("policy", "vanilla")  # before there were others
    if policy not in get_args(Policy):
        raise ArtifactError(asked, f"found the policy {str(policy)[:40]!r}", todo)
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


def load_folder(folder: Path, dense: nn.Module | None) -> tuple[nn.Module, Plan, Mapping[str, Any]]:
    """Return the model in a folder, in eval mode on the CPU, with its plan and manifest.

    Args:
        folder: what `save_pretrained` or `save_padded` wrote.
        dense: the dense model of a per-layer folder; None builds it from config.json.

    Raises:
        ArtifactError: a file is missing, changed, foreign or damaged, or the weights are not those of the
            plan applied to the dense model.
    """
    manifest = read_manifest(folder)
    plan = Plan.from_dict(manifest.get("plan"))
    asked = f"Loading {folder}"
    names = _weights(folder, asked)
    _check_hashes(folder, names, asked)
    if manifest["policy"] != "per-layer":
        return load_pretrained(folder), plan, manifest
    library = find_library(asked)
    with reading(library, asked):
        smaller = replay(_dense(library, folder, asked) if dense is None else dense, plan)
        tensors: dict[str, Tensor] = {}
        for name in names:
            with readable(f"Reading {folder / name}", "Copy the folder again"):
                tensors |= load_file(folder / name)
        fill(smaller, tensors)
        if smaller.can_generate() and (folder / GENERATION).is_file():  # type: ignore[operator]
            smaller.generation_config = library.GenerationConfig.from_pretrained(str(folder.resolve()))
    return smaller.eval(), plan, manifest


def replay(dense: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the dense model without what the plan removes.

    Raises:
        ArtifactError: the plan does not fit it.
    """
    try:
        smaller = apply(dense, plan)
    except StructureError as error:
        raise ArtifactError(
            f"Replaying the plan on {type(dense).__name__}",
            f"the plan does not fit it ({error})",
            "Use the dense architecture that was pruned",
        ) from error
    return copy.deepcopy(dense) if smaller is dense else smaller


def _dense(library: Any, folder: Path, asked: str) -> nn.Module:
    config = unlayered(read_config(library, folder))
    kind = known_class(library, config)
    if kind is None:
        raise ArtifactError(
            asked,
            f"transformers {library.__version__} has none of its architectures {config.architectures}",
            "Pass the dense model as `model`",
        )
    return empty_model(kind, config)


def _weights(folder: Path, asked: str) -> list[str]:
    """The files of weights, as the folder's index names them if it has one."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if (folder / INDEX).exists():
        return shards(folder / INDEX, asked)
    raise ArtifactError(asked, f"it has neither {WEIGHTS} nor {INDEX}", "Copy the folder again")


def _check_hashes(folder: Path, names: list[str], asked: str) -> None:
    """Compare the weights and the configuration with the hashes in the certificate."""
    todo = "Copy the folder again from where it was saved; after a change, save the model again"
    try:
        said = dict(json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(asked, f"{CERTIFICATE} cannot be read, {error}", todo) from error
    with readable(asked, todo):
        found = hashes(folder)
    # What a user put beside a folder that was saved without its modules is not vouched for, and was never.
    loose = set[str]() if MODULES in said else set(module_files(folder))
    for name in sorted({*names, *said, *found} - loose):
        if name not in found:
            raise ArtifactError(asked, f"{name} is missing", todo)
        if name not in said:
            raise ArtifactError(asked, f"{CERTIFICATE} does not vouch for {name}", todo)
        if found[name] != said[name]:
            raise ArtifactError(
                asked,
                f"{name} has SHA-256 {found[name][:12]}..., {CERTIFICATE} says {str(said[name])[:12]}...",
                todo,
            )
