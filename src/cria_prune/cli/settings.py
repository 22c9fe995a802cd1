"""From the options of a command to the configurations of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.base.errors import ConfigError
from cria_prune.cli.request import POLICIES, Data, Recover, Run, Scoring
from cria_prune.config import (
    PlanConfig,
    PruneConfig,
    RecordConfig,
    RecoverConfig,
    ScoreConfig,
    preset,
)

if TYPE_CHECKING:
    import torch

    from cria_prune.tasks.folder import Texts

SECTIONS = {"record": RecordConfig, "score": ScoreConfig, "plan": PlanConfig}


def prune_config(request: Scoring, defaults: Mapping[str, Any] | None = None, **plan: Any) -> PruneConfig:
    """Return the configuration of a command: the task's, preset, file, then the options that were given.

    Args:
        request: what was asked.
        defaults: of the task: section -> values.
        plan: settings of the plan that win over all of these.

    Raises:
        ConfigError: a preset, a key or a value is not valid, or the file cannot be read.
        CriterionError: no such criterion.
        TargetError: the reduction is not between 0 and 1.
    """
    from cria_prune.criteria.score import find_criterion
    from cria_prune.planning.selection import check_share

    layers: list[dict[str, Any]] = [dict(defaults or {})]
    if request.preset is not None:
        layers.append(preset(request.preset).model_dump(exclude_unset=True))
    if request.config is not None:
        layers.append(_read(request.config).model_dump(exclude_unset=True))
    layers.append({"plan": {} if request.policy is None else POLICIES[request.policy][1]})
    seed = {} if request.seed is None else {"seed": request.seed}
    layers.append({
        "record": {**seed, **request.record.given()},
        "score": {**seed, **request.score.given()},
        "plan": {**request.plan.given(), **plan},
        **request.repair.given(),
    })  # fmt: skip
    values: dict[str, Any] = {key: layer[key] for layer in layers for key in layer if key not in SECTIONS}
    for section, kind in SECTIONS.items():
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.get(section, {})
        values[section] = kind(**merged)
    config = PruneConfig(**values)
    find_criterion(config.score)
    check_share(config.plan.reduction)
    return config


def recover_config(request: Recover | Run, defaults: RecoverConfig) -> RecoverConfig:
    """Return the configuration of the fine-tune: the task's, then the options that were given.

    Raises:
        ConfigError: a value is not valid, or the processes and the device cannot train so.
    """
    from cria_prune.recovery.tune import check_possible

    seed = {} if request.seed is None else {"seed": request.seed}
    config = RecoverConfig(**{**defaults.model_dump(), **seed, **request.tune.given()})
    check_possible(config, pick_device(request.device))  # before the long work, not after it
    return config


def pick_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        found = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"The device {name!r}", found, "Give cpu, or a device that torch sees") from error
    return device


def _read(path: Path) -> PruneConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path}", str(error), "Give a YAML or JSON file") from error
    return PruneConfig.from_text(text)


def texts_of(request: Data) -> Texts:
    """Return the data that were given."""
    from cria_prune.tasks.folder import Texts

    if request.calibration is not None and request.dataset is not None:
        raise ConfigError(
            "Texts to calibrate on", "both --calibration and --dataset were given", "Give one of the two"
        )
    return Texts(request.calibration, request.dataset, request.text)
