"""A checkpoint is a folder: model.safetensors and manifest.json.

The manifest says how the smaller network came to be (architecture, plan, config, provenance,
results) and what the tensors are (names, shapes, types, hash of the file). Loading starts from the
dense architecture, replays the plan and checks every tensor. Nothing is pickled, and nothing in
a manifest is used as a path or run as code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, strided

from cria_prune.artifact.rebuild import load_folder, replay
from cria_prune.base.errors import ArtifactError
from cria_prune.base.files import atomic, new_folder, refused, sha256, write_text
from cria_prune.planning.plan import Plan
from cria_prune.tasks.loading import CONFIG

FORMAT, VERSION = "cria-checkpoint", 1
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds.

    Attributes:
        model: the smaller network with its weights, on the CPU, in evaluation mode. Of a padded folder, the
            network with its zeros, as transformers loads it.
        plan: what was removed, relative to the dense architecture.
        manifest: the whole manifest: config, provenance, results and the rest.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    manifest: Mapping[str, Any] = field(repr=False)


def save(
    path: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    architecture: str | None = None,
    config: BaseModel | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder and return its path.

    Args:
        path: the folder; it must not hold files unless `overwrite`.
        model: the smaller network. A tensor that has several names is written once.
        plan: what was removed, relative to the dense architecture.
        architecture: name in `cria_prune.tasks.models.ARCHITECTURES`, or None if the dense
            model comes from the caller's own code.
        config, provenance, results: kept in the manifest; they must be plain JSON.
        overwrite: replace the two files of a checkpoint that is there already.

    Raises:
        ArtifactError: the folder is not empty, something is no tensor or no JSON, or the system refuses.
    """
    tensors, aliases = _stored_tensors(model)
    entries = {name: describe(value) for name, value in model.state_dict().items()}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture,
        "plan": plan.to_dict(),
        "tensors": entries,
        "aliases": aliases,
        "sha256": "",
        "config": config.model_dump(mode="json") if isinstance(config, BaseModel) else config,
        "provenance": provenance,
        "results": results,
    }
    _to_json(manifest)
    folder = new_folder(path, overwrite)
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # an interrupted overwrite leaves no manifest
        with atomic(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        manifest["sha256"] = sha256(folder / WEIGHTS)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise refused(f"Saving {folder / WEIGHTS}", error) from error
    write_text(folder / MANIFEST, _to_json(manifest))
    return folder


def load(path: str | Path, model: nn.Module | None = None) -> LoadedCheckpoint:
    """Read a checkpoint folder, or one of a Hugging Face model that `save_pretrained` or `save_padded` wrote.

    Args:
        path: the folder.
        model: an instance of the dense architecture, with any weights; it stays as it is. None takes the
            architecture of the manifest from `cria_prune.tasks.models.ARCHITECTURES`, or that of config.json.

    Raises:
        ArtifactError: a file is missing, damaged, foreign or of a newer format, or the tensors
            are not those of the plan applied to the dense architecture; the text says what was found.
    """
    folder = Path(path)
    if (folder / CONFIG).exists() and not (folder / MANIFEST).exists():
        return LoadedCheckpoint(*load_folder(folder, model))
    manifest = read_checkpoint_manifest(folder / MANIFEST)
    plan = Plan.from_dict(manifest["plan"])
    stored = _read_weights(folder / WEIGHTS, manifest)
    dense = _dense(manifest["architecture"]) if model is None else model
    smaller = replay(dense, plan)
    _compare(
        f"Loading {folder} into the pruned {type(dense).__name__}",
        manifest["tensors"],
        {name: describe(value) for name, value in smaller.state_dict().items()},
        ("the checkpoint", "the pruned architecture"),
    )
    state = {name: stored[manifest["aliases"].get(name, name)] for name in manifest["tensors"]}
    smaller.load_state_dict(state, strict=True)
    return LoadedCheckpoint(smaller.eval(), plan, manifest)


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return shape and type of a tensor as in a manifest."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors by name, and the further names of tensors that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != strided:
            raise ArtifactError(
                f"Saving {name!r} of the model",
                f"found {type(value).__name__} without plain values",
                "Save a model whose state holds dense tensors with values only",
            )
        value = value.detach()
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        # A copy: views of one storage would be refused.
        tensors[name] = value.cpu().contiguous().clone()
    return tensors, aliases


def _to_json(manifest: Mapping[str, Any]) -> str:
    try:
        return json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            "Writing the manifest", f"something in it is no JSON, {error}", "Pass plain finite values"
        ) from error


def read_checkpoint_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; its plan and its tensors are not checked yet.

    Raises:
        ArtifactError: it cannot be read, is foreign, or of a newer format.
    """
    asked, todo = f"Reading {path}", "Give the folder of a checkpoint that Cria saved"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(asked, f"the system refused, {error}", todo) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(asked, f"it is no JSON, {error}", todo) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(asked, "it is not the manifest of a Cria checkpoint", todo)
    version = manifest.get("version")
    if version != VERSION:
        raise ArtifactError(
            asked,
            f"found format version {version!r}, this Cria reads {VERSION}",
            "Use the cria-prune that wrote it, or a newer one",
        )
    kinds: dict[str, type | tuple[type, ...]] = {
        "architecture": (str, type(None)),
        "plan": dict,
        "tensors": dict,
        "aliases": dict,
        "sha256": str,
    }
    for key, kind in kinds.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise ArtifactError(asked, f"{key!r} is missing or of the wrong type", todo)
    for name, target in manifest["aliases"].items():
        entries, known = manifest["tensors"], isinstance(target, str) and target not in manifest["aliases"]
        if not known or name not in entries or entries[name] != entries.get(target):
            raise ArtifactError(
                asked, f"{name!r} as another name of {target!r} does not fit the tensors", todo
            )
    return manifest


def _read_weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the stored tensors; hash, names, shapes and types must be the manifest's."""
    asked, todo = f"Reading {path}", "Copy the checkpoint again from where it was saved"
    try:
        found = sha256(path)
        if found != manifest["sha256"]:
            raise ArtifactError(
                asked, f"its SHA-256 is {found[:12]}..., the manifest says {manifest['sha256'][:12]}...", todo
            )
        stored = load_file(path)
    except OSError as error:
        raise ArtifactError(asked, f"the system refused, {error}", todo) from error
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(asked, f"it is no safetensors file, {error}", todo) from error
    _compare(
        asked,
        {name: value for name, value in manifest["tensors"].items() if name not in manifest["aliases"]},
        {name: describe(value) for name, value in stored.items()},
        ("the manifest", "the file"),
    )
    return stored


def _compare(asked: str, left: Mapping[str, Any], right: Mapping[str, Any], sides: tuple[str, str]) -> None:
    """Raise an ArtifactError that names the first tensors in which two descriptions differ."""
    found = [f"{name!r} only in {sides[0]}" for name in left if name not in right]
    found += [f"{name!r} only in {sides[1]}" for name in right if name not in left]
    found += [
        f"{name!r} is {value} in {sides[0]}, {right[name]} in {sides[1]}"
        for name, value in left.items()
        if name in right and value != right[name]
    ]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise ArtifactError(
            asked, "; ".join(found[:4]) + more, "Use the same dense architecture and an unchanged checkpoint"
        )


def _dense(architecture: str | None) -> nn.Module:
    from cria_prune.tasks.models import ARCHITECTURES

    if architecture not in ARCHITECTURES:
        raise ArtifactError(
            "Building the dense architecture of a checkpoint",
            f"the manifest names {architecture!r}, known are {', '.join(sorted(ARCHITECTURES))}",
            "Pass an instance of the dense architecture as `model`",
        )
    return ARCHITECTURES[architecture]()
