"""One validated, frozen configuration per stage; to and from JSON and YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cria_prune.base.optional import needed
from cria_prune.errors import ConfigError


class StageConfig(BaseModel):
    """Base of the configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(
                f"A {type(self).__name__}",
                "; ".join(
                    f"{'.'.join(map(str, item['loc']))}: {item['msg']} (found {item['input']!r})"
                    for item in error.errors()
                ),
                f"Known keys: {', '.join(type(self).model_fields)}",
            ) from error

    def to_json(self) -> str:
        """Return the configuration as indented JSON."""
        return self.model_dump_json(indent=2)

    def to_yaml(self) -> str:
        """Return the configuration as YAML.

        Raises:
            PackageError: pyyaml is not installed.
        """
        with needed("recipes", f"A {type(self).__name__} as YAML"):
            import yaml
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a configuration from JSON or YAML.

        Raises:
            ConfigError: the text is not a mapping, or a key or value is not valid.
            PackageError: it is no JSON, and pyyaml is not installed.
        """
        asked = f"A {cls.__name__} from text"
        try:
            values = json.loads(text)
        except ValueError:
            values = _from_yaml(text, asked)
        if not isinstance(values, dict):
            raise ConfigError(asked, f"found {type(values).__name__}", "Write a mapping")
        return cls(**values)


def _from_yaml(text: str, asked: str) -> Any:
    with needed("recipes", f"{asked} that is no JSON"):
        import yaml
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(asked, str(error), "Write valid YAML or JSON") from error


class RecordConfig(StageConfig):
    """How the neurons' signals are recorded."""

    examples: int = Field(1024, ge=1, description="calibration examples used at most")
    positions: int = Field(8, ge=1, description="spatial positions drawn per image and layer")
    tokens: int | None = Field(
        16, ge=1, description="tokens drawn per text and layer, or one in eight if that is more; all if null"
    )
    exact_units: int = Field(2048, ge=1, description="up to this many units the exact Gram matrix is kept")
    sketch_columns: int = Field(2048, ge=2, description="columns of the countsketch above that")
    seed: int = 0


Setting = Literal["neighbors", "ridge", "pairs", "sketch"]
"""What some criteria read of a `ScoreConfig` and others do not."""
SETTINGS: tuple[Setting, ...] = ("neighbors", "ridge", "pairs", "sketch")
BOUNDS: dict[str, tuple[float, float]] = {"neighbors": (1, 2**14), "ridge": (1e-8, 1e3), "sketch": (1, 2**16)}
PAIRS, SHARE = (1, 2**16), (1e-6, 1.0)
"""The pairs of a pencil, as a number and as a share of the units."""


class ScoreConfig(StageConfig):
    """How units are scored; a criterion says which settings it reads, and others are an error there."""

    criterion: str = "innovation"
    neighbors: int = Field(32, description="nearest neighbours per unit above 64 units")
    ridge: float | None = Field(
        None,
        description="the criterion's own if null: of distortions 0.01 mean degrees on both Laplacians, of "
        "innovation 0.0001 mean variances of noise on every unit",
    )
    pairs: int | float | Literal["all"] = Field(
        "all", description="eigenpairs: all, a number, or a share of the units"
    )
    sketch: int = Field(256, description="sign vectors for the scores over all pairs at scale")
    split_half: bool = True
    seed: int = 0

    @field_validator("neighbors", "ridge", "sketch")
    @classmethod
    def _within_bounds(cls, value: float | None, info: Any) -> float | None:
        low, high = BOUNDS[info.field_name]
        if value is not None and not low <= value <= high:  # NaN is not between them either
            raise ValueError(f"must be between {low:g} and {high:g}")
        return value

    @field_validator("pairs")
    @classmethod
    def _some_pairs(cls, value: float | str) -> float | str:
        low, high = SHARE if isinstance(value, float) else PAIRS
        if not isinstance(value, str) and not low <= value <= high:
            raise ValueError(
                f'must be "all", a whole number from {PAIRS[0]} to {PAIRS[1]}, or a share from {SHARE[0]:g} '
                f"to {SHARE[1]:g}"
            )
        return value

    def given(self) -> tuple[Setting, ...]:
        """Return the settings that are not as they are without being given."""
        return tuple(
            name for name in SETTINGS if getattr(self, name) != type(self).model_fields[name].default
        )


def score_of_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score section of a file from before criteria said which settings they read.

    Such a file says ridge 0.01 whatever the criterion; only distortions read it, and `innovation` took its
    own. What was not read there is left out.
    """
    criterion = str(values.get("criterion", ""))
    read: tuple[str, ...] = SETTINGS if "distortion" in criterion else ()
    if criterion == "grounded-distortion" or values.get("ridge") == 1e-2:
        read = tuple(name for name in read if name != "ridge")
    return {key: value for key, value in values.items() if key not in SETTINGS or key in read}


class PlanConfig(StageConfig):
    """What to remove."""

    reduction: float = Field(0.5, description="share to remove, between 0 and 1")
    of: Literal["parameters", "prunable", "non-embedding", "macs"] = "parameters"
    rounds: int = Field(4, ge=1)
    ranking: Literal["uniform", "global", "loss"] = "uniform"
    residual: bool = Field(False, description="prune the width of residual streams too")
    floor: float = Field(0.1, ge=0, le=1, description="share of each group's units that always stays")
    units: Literal["all", "neurons", "heads"] = Field(
        "all",
        description="neurons: feed-forward neurons and channels alone; heads: heads and KV groups alone",
    )
    uniform: bool = Field(False, description="alike groups keep the same number of units")
    vanilla: bool = Field(
        False, description="only what a plain configuration of transformers can hold; uniform comes with it"
    )
    multiple: int = Field(
        1, ge=1, le=256, description="neurons and channels that stay are a multiple of it, or all"
    )

    @model_validator(mode="before")
    @classmethod
    def _vanilla_is_uniform(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("vanilla"):
            values = {"uniform": True, **values}
            if not values["uniform"]:
                raise ValueError("one configuration describes all layers alike, so vanilla needs uniform")
        return values


class RecoverConfig(StageConfig):
    """The one fine-tune after pruning."""

    epochs: int = Field(3, ge=0)
    lr: float = Field(0.05, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate too")
    weight_decay: float = Field(5e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps with a rising learning rate")
    schedule: Literal["cosine", "linear"] = "cosine"
    clip: float = Field(0.0, ge=0, description="largest norm of the gradients, 0 for no bound")
    precision: Literal["float32", "auto"] = Field(
        "float32", description="auto: bfloat16 autocast where a CUDA device has it"
    )
    distill: float = Field(0.0, ge=0, le=1, description="weight of the dense model's soft targets")
    temperature: float = Field(2.0, gt=0)
    lora: int = Field(
        0, ge=0, description="rank of the adapters trained in place of the linear layers' weights, 0 for none"
    )
    compile: bool = Field(
        False,
        description="train what torch.compile makes of model and teacher; on CUDA with graphs of kernels",
    )
    fsdp: bool = Field(
        False, description="share weights, gradients and the optimizer's tensors out over the processes"
    )
    seed: int = 0


class PruneConfig(StageConfig):
    """Everything `prune` needs to know."""

    record: RecordConfig = RecordConfig()
    score: ScoreConfig = ScoreConfig()
    plan: PlanConfig = PlanConfig()
    verify: bool = True
    compensate: bool = Field(
        True,
        description="repair the consumers in closed form after every cut; not in the paper",
    )
    batch_norm: bool = Field(
        True,
        description="measure batch norms again after the last cut, on 32 examples or more; not in the paper",
    )


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "score": {"criterion": "distortion", "pairs": "all"},
        "plan": {"ranking": "uniform", "rounds": 4},
        "compensate": False,
        "batch_norm": False,
    },
}


def preset(name: str, **plan: Any) -> PruneConfig:
    """Return a named configuration; keyword arguments go to its plan.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError("A preset", f"found {name!r}", f"Known presets: {', '.join(PRESETS)}")
    values = PRESETS[name]
    return PruneConfig(**{**values, "plan": {**values.get("plan", {}), **plan}})
