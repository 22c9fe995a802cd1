"""Scores in a folder: `scores.json` says of what and how, `scores.safetensors` holds the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from cria_prune.base.errors import ArtifactError
from cria_prune.base.files import Layout, is_plain_file, new_folder, readable
from cria_prune.config import PruneConfig, score_of_before
from cria_prune.resume.rounds import diagnoses_of, importances_of, moment_tensors, moments_of
from cria_prune.scores import Scored

SCORES, TENSORS = "scores.json", "scores.safetensors"
LAYOUT = Layout(
    "cria-scores", 2, SCORES, "what cria score keeps",
    "Score again with cria score --output, or name the folder that it wrote", TENSORS, earlier=(1,),
)  # fmt: skip
"""Version 1 says settings that its criterion did not read."""


class ScoresFile(BaseModel):
    """`scores.json`; further keys are left alone.

    Attributes:
        groups: name of every group that has scores; its place is its number in the tensors.
        diagnosis: group name -> `Diagnosis` as a mapping.
        consumed: group name -> weight of a consumer -> samples; None where there are no moments.
    """

    model_config = ConfigDict(extra="ignore")

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
    facts = LAYOUT.said({
        "sha256": "",
        "weights": scored.weights,
        "config": scored.config.model_dump(mode="json"),
        "groups": names,
        "diagnosis": diagnoses_of(scored.importances),
        "consumed": None if scored.consumed is None else consumed,
    })  # fmt: skip
    # Copies, for a safetensors file takes no two views of one storage.
    numbers = {name: item.cpu().contiguous().clone() for name, item in tensors.items()}
    LAYOUT.write(folder, {**(said or {}), **facts}, numbers, indent=1)
    return folder


def load_scores(path: str | Path) -> Scored:
    """Read scores from a folder.

    Raises:
        ArtifactError: a file is missing, damaged, foreign or of a newer format.
    """
    folder = Path(path)
    asked = f"Reading the scores in {folder}"
    if not is_plain_file(folder / SCORES):
        raise ArtifactError(asked, f"it holds no {SCORES}", LAYOUT.todo)
    with readable(asked, LAYOUT.todo):
        kept = ScoresFile.model_validate(LAYOUT.read(folder))
        return _scored(kept, LAYOUT.read_tensors(folder, kept.sha256))


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
