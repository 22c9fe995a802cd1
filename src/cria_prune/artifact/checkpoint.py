"""A checkpoint is a folder: model.safetensors and manifest.json.

The manifest says how the smaller network came to be (architecture, plan, config, provenance,
results) and what the tensors are (names, shapes, types, hash of the file). Loading starts from the
dense architecture, replays the plan and checks every tensor. Nothing is pickled, and nothing in
a manifest is used as a path or run as code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor, nn, strided

from cria_prune.artifact.rebuild import load_folder, replay
from cria_prune.base.errors import ArtifactError, some
from cria_prune.base.files import Layout, new_folder, strict_json, without_places
from cria_prune.base.kinds import of_plain_models, unwrap
from cria_prune.base.modules import first_names
from cria_prune.planning.plan import Plan
from cria_prune.tasks.loading import CONFIG

WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
LAYOUT = Layout(
    "cria-checkpoint", 1, MANIFEST, "the manifest of a Cria checkpoint",
    "Give the folder of a checkpoint that Cria saved", WEIGHTS, weights=True,
)  # fmt: skip
KINDS: dict[str, type | tuple[type, ...]] = {
    "architecture": (str, type(None)), "plan": dict, "tensors": dict, "aliases": dict, "sha256": str,
}  # fmt: skip
"""What a manifest has to hold, and of which type."""


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


@of_plain_models
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
        config, provenance, results: kept in the manifest, without the folders of absolute paths; they must be
            plain JSON.
        overwrite: replace the two files of a checkpoint that is there already.

    Raises:
        ArtifactError: the folder is not empty, something is no tensor or no JSON, or the system refuses.
    """
    state = _checked(model.state_dict())
    same = first_names(state)
    # Copies: views of one storage would be refused.
    tensors = {
        name: state[name].detach().cpu().contiguous().clone() for name, first in same.items() if name == first
    }
    manifest = LAYOUT.said({
        "architecture": architecture,
        "plan": plan.to_dict(),
        "tensors": {name: describe(value) for name, value in state.items()},
        "aliases": {name: first for name, first in same.items() if name != first},
        "sha256": "",
        "config": without_places(config.model_dump(mode="json") if isinstance(config, BaseModel) else config),
        "provenance": without_places(provenance),
        "results": without_places(results),
    })  # fmt: skip
    strict_json(manifest, "Writing the manifest")
    folder = new_folder(path, overwrite)
    LAYOUT.write(folder, manifest, tensors)
    return folder


def load(path: str | Path, model: nn.Module | None = None) -> LoadedCheckpoint:
    """Read a checkpoint folder, or one of a Hugging Face model that `save_pretrained` or `save_padded` wrote.

    Args:
        path: the folder.
        model: an instance of the dense architecture, with any weights; it stays as it is. None takes the
            architecture of the manifest from `cria_prune.tasks.models.ARCHITECTURES`, or that of config.json.
            One in DataParallel or torch.compile is given back in the same wrapping; names are plain ones.

    Raises:
        ArtifactError: a file is missing, damaged, foreign or of a newer format, or the tensors
            are not those of the plan applied to the dense architecture; the text says what was found.
    """
    folder, wrap = Path(path), None
    if model is not None:
        model, wrap, _ = unwrap(model)
    if (folder / CONFIG).exists() and not (folder / MANIFEST).exists():
        found = LoadedCheckpoint(*load_folder(folder, model))
        return found if wrap is None else replace(found, model=wrap(found.model))
    manifest = read_checkpoint_manifest(folder)
    plan = Plan.from_dict(manifest["plan"])
    stored = LAYOUT.read_tensors(folder, manifest["sha256"])
    _compare(
        f"Reading {folder / WEIGHTS}",
        {name: value for name, value in manifest["tensors"].items() if name not in manifest["aliases"]},
        {name: describe(value) for name, value in stored.items()},
        ("the manifest", "the file"),
    )
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
    smaller.eval()
    return LoadedCheckpoint(smaller if wrap is None else wrap(smaller), plan, manifest)


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return shape and type of a tensor as in a manifest."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _checked(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != strided:
            raise ArtifactError(
                f"Saving {name!r} of the model",
                f"found {type(value).__name__} without plain values",
                "Save a model whose state holds dense tensors with values only",
            )
    return state


def read_checkpoint_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; its plan and its tensors are not checked yet.

    Raises:
        ArtifactError: it cannot be read, is foreign, or of a newer format.
    """
    manifest, asked = LAYOUT.read(folder), f"Reading {folder / MANIFEST}"
    for key, kind in KINDS.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise ArtifactError(asked, f"{key!r} is missing or of the wrong type", LAYOUT.todo)
    entries, aliases = manifest["tensors"], manifest["aliases"]
    for name, target in aliases.items():
        known = isinstance(target, str) and target not in aliases
        if not known or name not in entries or entries[name] != entries.get(target):
            found = f"{name!r} as another name of {target!r} does not fit the tensors"
            raise ArtifactError(asked, found, LAYOUT.todo)
    return manifest


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
        todo = "Use the same dense architecture and an unchanged checkpoint"
        raise ArtifactError(asked, some(found, 4, "; "), todo)


def _dense(architecture: str | None) -> nn.Module:
    from cria_prune.tasks.models import ARCHITECTURES

    if architecture not in ARCHITECTURES:
        raise ArtifactError(
            "Building the dense architecture of a checkpoint",
            f"the manifest names {architecture!r}, known are {', '.join(sorted(ARCHITECTURES))}",
            "Pass an instance of the dense architecture as `model`",
        )
    return ARCHITECTURES[architecture]()
