"""`cria.json` of a saved model: its plan, how its weights are stored, and what the caller says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel
from torch import nn

from cria_prune.artifact.folders import MANIFEST
from cria_prune.errors import ArtifactError, ConfigError
from cria_prune.plan.plan import Plan

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
