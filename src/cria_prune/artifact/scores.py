"""Scores in a folder: `scores.json` says of what and how, `scores.safetensors` holds the numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cria_prune.artifact.files import atomic, new_folder, refused, sha256, write_json
from cria_prune.artifact.folders import is_plain_file
from cria_prune.config import PruneConfig
from cria_prune.errors import ArtifactError, CriaError
from cria_prune.graph import Moments
from cria_prune.scores import Scored
from cria_prune.spectrum import Diagnosis, Importance

FORMAT, VERSION = "cria-scores", 1
SCORES, TENSORS = "scores.json", "scores.safetensors"
FIELDS = ("mean", "variance", "covariance", "sketch", "positive")


class Kept(BaseModel):
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
            tensors |= _tensors(f"{names.index(name)}/consumed/{number}", moments)
    folder = new_folder(path, overwrite)
    try:
        (folder / SCORES).unlink(missing_ok=True)  # an interrupted overwrite leaves no half that looks whole
        with atomic(folder / TENSORS) as temporary:
            save_file({name: item.cpu().contiguous() for name, item in tensors.items()}, temporary)
        kept = Kept(
            format=FORMAT,
            version=VERSION,
            sha256=sha256(folder / TENSORS),
            weights=scored.weights,
            config=scored.config.model_dump(mode="json"),
            groups=names,
            diagnosis={name: item.diagnosis.to_dict() for name, item in scored.importances.items()},
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
    try:
        kept = Kept.model_validate(json.loads((folder / SCORES).read_text(encoding="utf-8")))
        if (kept.format, kept.version) != (FORMAT, VERSION):
            found = (
                f"its format is {kept.format!r} version {kept.version}, this Cria reads {FORMAT!r} {VERSION}"
            )
            raise ArtifactError(asked, found, todo)
        if not is_plain_file(folder / TENSORS) or sha256(folder / TENSORS) != kept.sha256:
            raise ArtifactError(asked, f"{TENSORS} beside {SCORES} is missing or another", todo)
        return _scored(kept, load_file(folder / TENSORS))
    except OSError as error:
        raise ArtifactError(asked, f"the system refused, {error}", todo) from error
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ArtifactError(asked, f"its {where!r} is damaged, {error.errors()[0]['msg']}", todo) from error
    except ArtifactError:
        raise
    except (SafetensorError, CriaError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(asked, f"it is damaged, {error!r}", todo) from error


def _scored(kept: Kept, tensors: Mapping[str, Tensor]) -> Scored:
    importances = {}
    for place, name in enumerate(kept.groups):
        scores = tensors[f"{place}/scores"]
        if scores.ndim != 1 or scores.dtype != torch.float64 or not torch.isfinite(scores).all():
            raise ValueError(f"the scores of {name} are no finite float64 (units,)")
        said: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in kept.diagnosis[name].items()
        }
        importances[name] = Importance(scores, Diagnosis(**said))
    consumed = None
    if kept.consumed is not None:
        consumed = {
            name: {
                weight: _moments(f"{kept.groups.index(name)}/consumed/{number}", samples, tensors)
                for number, (weight, samples) in enumerate(by_weight.items())
            }
            for name, by_weight in kept.consumed.items()
        }
    record = {"tokens": None, **kept.config.get("record", {})}  # scores from before there was a choice
    config = PruneConfig(**{**kept.config, "record": record})
    return Scored(importances, consumed, config, kept.weights)


def _tensors(place: str, moments: Moments) -> dict[str, Tensor]:
    found = {f"{place}/{part}": getattr(moments, part) for part in FIELDS}
    return {name: value.clone() for name, value in found.items() if value is not None}


def _moments(place: str, samples: int, tensors: Mapping[str, Tensor]) -> Moments:
    found = {part: tensors.get(f"{place}/{part}") for part in FIELDS}
    if found["mean"] is None or found["variance"] is None or samples < 1:
        raise ValueError(f"the moments at {place} are not whole")
    return Moments(samples, **found)  # type: ignore[arg-type]
