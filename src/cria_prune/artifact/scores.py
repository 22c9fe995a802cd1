"""Scores in a folder: `scores.json` says of what and how, `scores.safetensors` holds the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cria_prune.base.errors import ArtifactError
from cria_prune.base.files import (
    atomic,
    is_plain_file,
    new_folder,
    reading,
    refused,
    sha256,
    write_json,
)
from cria_prune.config import PruneConfig, score_of_before
from cria_prune.resume.rounds import diagnoses_of, importances_of, moment_tensors, moments_of
from cria_prune.scores import Scored

FORMAT, VERSION = "cria-scores", 2
READS = (1, VERSION)
"""Version 1 says settings that its criterion did not read."""
SCORES, TENSORS = "scores.json", "scores.safetensors"


class ScoresFile(BaseModel):
    """`scores.json`; further keys are left alone.

    Attributes:
        groups: name of every group that has scores; its place is its number in the tensors.
        diagnosis: group name -> `Diagnosis` as a mapping.
        consumed: group name -> weight of a consumer -> samples; None where there are no moments.
    """

    model_config = ConfigDict(extra="ignore")

    format: str
    version: int
    sha256: str
    weights: str
    config: dict[str, Any]
    groups: list[str]
    diagnosis: dict[str, dict[str, Any]]
    consumed: dict[str, dict[str, int]] | None


def save_scores(
    path: str | Path, scored: Scored, *, overwrite: bool = False, said: Mapping[str, Any] | None = None
) -> Path:
    """Write scores into a folder and return its path.

    Args:
        path: the folder; it must not hold files unless `overwrite`.
        scored: what `score_once` returned.
        overwrite: replace the scores that are there already.
        said: further entries of `scores.json`, plain JSON, such as the provenance.

    Raises:
        ArtifactError: the folder is not empty, something is no JSON, or the system refuses.
    """
    names = list(scored.importances)
    tensors = {f"{place}/scores": scored.importances[name].scores for place, name in enumerate(names)}
    consumed: dict[str, dict[str, int]] = {}
    for name, by_weight in (scored.consumed or {}).items():
        consumed[name] = {weight: moments.samples for weight, moments in by_weight.items()}
        for number, moments in enumerate(by_weight.values()):
            tensors |= moment_tensors(moments, f"{names.index(name)}/consumed/{number}/")
    folder = new_folder(path, overwrite)
    try:
        (folder / SCORES).unlink(missing_ok=True)  # an interrupted overwrite leaves no half that looks whole
        with atomic(folder / TENSORS) as temporary:
            # Copies, for a safetensors file takes no two views of one storage.
            save_file({name: item.cpu().contiguous().clone() for name, item in tensors.items()}, temporary)
        kept = ScoresFile(
            format=FORMAT,
            version=VERSION,
            sha256=sha256(folder / TENSORS),
            weights=scored.weights,
            config=scored.config.model_dump(mode="json"),
            groups=names,
            diagnosis=diagnoses_of(scored.importances),
            consumed=None if scored.consumed is None else consumed,
        )
        write_json(folder / SCORES, {**(said or {}), **kept.model_dump()})
    except (OSError, SafetensorError) as error:
        raise refused(f"Writing scores to {folder}", error) from error
    return folder


def load_scores(path: str | Path) -> Scored:
    """Read scores from a folder.

    Raises:
        ArtifactError: a file is missing, damaged, foreign or of a newer format.
    """
    folder, todo = Path(path), "Score again with cria score --output, or name the folder that it wrote"
    asked = f"Reading the scores in {folder}"
    if not is_plain_file(folder / SCORES):
        raise ArtifactError(asked, f"it holds no {SCORES}", todo)
    with reading(asked, todo):
        kept = ScoresFile.model_validate(json.loads((folder / SCORES).read_text(encoding="utf-8")))
        if kept.format != FORMAT or kept.version not in READS:
            found = (
                f"its format is {kept.format!r} version {kept.version}, this Cria reads {FORMAT!r} {VERSION}"
            )
            raise ArtifactError(asked, found, todo)
        if not is_plain_file(folder / TENSORS) or sha256(folder / TENSORS) != kept.sha256:
            raise ArtifactError(asked, f"{TENSORS} beside {SCORES} is missing or another", todo)
        return _scored(kept, load_file(folder / TENSORS))


def _scored(kept: ScoresFile, tensors: Mapping[str, Tensor]) -> Scored:
    places = {name: place for place, name in enumerate(kept.groups)}
    scores = {name: tensors[f"{place}/scores"] for name, place in places.items()}
    consumed = None
    if kept.consumed is not None:
        consumed = {
            name: {
                weight: moments_of(samples, tensors, f"{places[name]}/consumed/{number}/")
                for number, (weight, samples) in enumerate(by_weight.items())
            }
            for name, by_weight in kept.consumed.items()
        }
    record = {"tokens": None, **kept.config.get("record", {})}  # scores from before there was a choice
    said_of = kept.config.get("score", {})
    how = score_of_before(said_of) if kept.version == 1 else said_of
    config = PruneConfig(**{**kept.config, "record": record, "score": how})
    return Scored(importances_of(kept.diagnosis, scores), consumed, config, kept.weights)
