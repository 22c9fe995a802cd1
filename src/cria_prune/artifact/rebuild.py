"""A folder of a pruned Hugging Face model -> model, plan and manifest.

A per-layer folder is read without the loader of transformers: its configuration builds the dense
architecture, the plan is replayed on it, and the weights fill it. The other policies are loaded by
transformers. No file is read whose SHA-256 is not the certificate's, and nothing in the folder is run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cria_prune.artifact.layers import empty_model, fill, unlayered
from cria_prune.artifact.manifest import read_manifest
from cria_prune.base.errors import ArtifactError, StructureError
from cria_prune.base.files import CERTIFICATE, GENERATION, hashes, refused
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
        fill(smaller, _tensors(folder, names))
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
        certificate = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        said = dict(certificate["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(asked, f"{CERTIFICATE} cannot be read, {error}", todo) from error
    try:
        found = hashes(folder)
    except OSError as error:
        raise refused(asked, error) from error
    for name in sorted({*names, *said, *found}):
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


def _tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except OSError as error:
            raise refused(f"Reading {folder / name}", error) from error
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"Reading {folder / name}", f"it is no safetensors file, {error}", "Copy the folder again"
            ) from error
    return tensors
