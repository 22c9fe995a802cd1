"""From the options of a command to the configurations of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.config import (
    PlanConfig,
    PruneConfig,
    RecordConfig,
    RecoverConfig,
    ScoreConfig,
    StageConfig,
    preset,
)
from cria_prune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from cria_prune.tasks import Texts

Params = Mapping[str, Any]

STEPS = ("compensate", "batch_norm")
SECTIONS: dict[str, type[StageConfig]] = {"record": RecordConfig, "score": ScoreConfig, "plan": PlanConfig}
OPTIONS = {
    "record": ("examples", "positions", "seed"),
    "score": ("criterion", "seed"),
    "plan": ("reduction", "of", "rounds", "ranking", "residual", "floor", "units", "uniform", "multiple"),
    "recover": ("epochs", "lr", "distill", "lora", "compile", "fsdp", "seed"),
}
POLICIES: dict[str, dict[str, Any]] = {
    "uniform": {"vanilla": True, "uniform": True},
    "per-layer": {"vanilla": False, "uniform": False, "ranking": "global"},
}


def prune_config(params: Params, defaults: Mapping[str, Any] | None = None) -> PruneConfig:
    """Return the configuration of a command: the task's, preset, file, then the options that were given.

    Raises:
        ConfigError: a preset, a key or a value is not valid, or the file cannot be read.
        CriterionError: no such criterion.
        TargetError: the reduction is not between 0 and 1.
    """
    from cria_prune.criteria.score import find_criterion
    from cria_prune.plan.select import check_share

    layers: list[dict[str, Any]] = [dict(defaults or {})]
    if params.get("preset") is not None:
        layers.append(preset(params["preset"]).model_dump(exclude_unset=True))
    if params.get("config") is not None:
        layers.append(_read(params["config"]).model_dump(exclude_unset=True))
    layers.append({"plan": policy(params.get("policy"))})
    layers.append({section: given(params, section) for section in SECTIONS})
    layers.append({key: params[key] for key in STEPS if params.get(key) is not None})
    values: dict[str, Any] = {key: layer[key] for layer in layers for key in layer if key not in SECTIONS}
    for section, kind in SECTIONS.items():
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.get(section, {})
        values[section] = kind(**merged)
    config = PruneConfig(**values)
    find_criterion(config.score.criterion)
    check_share(config.plan.reduction)
    return config


def policy(name: str | None) -> dict[str, Any]:
    """Return what a save policy says of the plan; nothing for None.

    Raises:
        ConfigError: no such policy.
    """
    if name is not None and name not in POLICIES:
        raise ConfigError("A save policy", f"found {name!r}", f"Known policies: {', '.join(POLICIES)}")
    return {} if name is None else dict(POLICIES[name])


def recover_config(params: Params, defaults: RecoverConfig) -> RecoverConfig:
    """Return the configuration of the fine-tune: the task's, then the options that were given.

    Raises:
        ConfigError: a value is not valid, or the processes and the device cannot train so.
    """
    from cria_prune.recover.fit import check_possible

    config = RecoverConfig(**{**defaults.model_dump(), **given(params, "recover")})
    check_possible(config, pick_device(params["device"]))  # before the long work, not after it
    return config


def given(params: Params, section: str) -> dict[str, Any]:
    """Return the options of a section that were given on the command line."""
    return {name: params[name] for name in OPTIONS[section] if params.get(name) is not None}


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


def texts_of(params: Params) -> Texts:
    """Return the data that were given."""
    from cria_prune.tasks import Texts

    if params["calibration"] is not None and params["dataset"] is not None:
        raise ConfigError(
            "Texts to calibrate on", "both --calibration and --dataset were given", "Give one of the two"
        )
    return Texts(params["calibration"], params["dataset"], params["text"])
