"""One validated, frozen configuration per stage; to and from JSON and YAML.

A setting stands here alone: its default, its bounds, its text, the values it can take, and whether the
command line has an option for it (`option`). `cli.options` makes the commands' options from these fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from cria_prune.base.errors import ConfigError, needed


@dataclass(frozen=True, eq=False)  # hashed by identity: typing keeps what annotates a field in sets
class Choices:
    """The values that a setting can take, each with a text; annotates the type of a field.

    Attributes:
        texts: value -> what it means, in a few words.
        plural: what an error calls them.
    """

    texts: Mapping[str, str]
    plural: str = "values"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.texts))


OF = Choices(
    {
        "parameters": "parameters",
        "prunable": "prunable parameters",
        "non-embedding": "parameters without embeddings",
        "macs": "MACs",
        "latency": "seconds of a batch",
    }
)
RANKING = Choices(
    {
        "auto": "measured for macs and latency where layers may differ, else uniform",
        "measured": "shares of the layers from measured losses",
        "uniform": "the same share of every group",
        "global": "groups compete by scores relative to what their group has left",
        "loss": "groups compete by the scores as they are",
    }
)
UNITS = Choices(
    {
        "all": "whatever can be removed",
        "neurons": "feed-forward neurons and channels alone",
        "heads": "heads and KV groups alone",
        "experts": "whole experts alone",
    }
)
PROTECT = Choices(
    {
        "none": "none",
        "ends": "the first and the last, with their blocks",
        "first": "the first with its block",
        "last": "the last with its block",
    }
)
SERVE = Choices(
    {
        "any": "no server in particular",
        "vllm": "vllm",
        "llama.cpp": "llama.cpp",
        "transformers4": "transformers of version 4",
    },
    "servers",
)
REPAIR = Choices(
    {
        "walk": "consumers refitted one after another in the order of the data, towards the dense network",
        "once": "all consumers at once, from what was recorded before the cut",
        "none": "none",
    },
    "repairs",
)
REPAIRED = {"walk": "repaired by the walk", "once": "repaired at once", "none": "without repair"}
"""Repair -> what a result says of a network that was cut with it."""
OPTIMIZER = Choices({"sgd": "with momentum", "adamw": "with momentum as its first decay rate"})
SCHEDULE = Choices({"cosine": "falls like half a cosine", "linear": "falls in a straight line"})
PRECISION = Choices({"float32": "of everything", "auto": "bfloat16 autocast where a CUDA device has it"})


def option(default: Any, text: str, *flags: str, shown: str = "", group: str = "", **bounds: Any) -> Any:
    """Return the field of a setting that is an option of the command line too.

    Args:
        default: its value where nothing else is said; `...` for none.
        text: what it is, as --help has it, but for the full stop, the choices and the default.
        flags: how the option is spelled; `--` and the name of the field where none is given.
        shown: what --help says of the default, where the value does not tell.
        group: under which heading --help has it; that of the section if empty.
        bounds: `ge`, `gt`, `le`, `lt` and what else `pydantic.Field` takes.
    """
    said: dict[str, Any] = {"flags": list(flags), "shown": shown, "group": group}
    return Field(default, description=text, json_schema_extra={"option": said}, **bounds)


class StageConfig(BaseModel):
    """Base of the configurations: frozen, and an unknown key is an error.

    Attributes:
        group: under which heading `cria COMMAND --help` has its options.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    group: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._refused(error) from error

    @classmethod
    def _refused(cls, error: ValidationError, *name: str) -> ConfigError:
        found = (
            f"{'.'.join(map(str, [*name, *item['loc']]))}: {cls._wrong(item, *name)} "
            f"(found {item['input']!r})"
            for item in error.errors()
        )
        todo = f"Known keys: {', '.join(cls.model_fields)}"
        return ConfigError(f"A {cls.__name__}", "; ".join(found), todo)

    @classmethod
    def _wrong(cls, item: Any, *name: str) -> str:
        """Return what is wrong with a value: the whole range, where it has two ends."""
        field = cls.model_fields.get(".".join(map(str, [*name, *item["loc"]])))
        ends = [getattr(bound, end) for bound in field.metadata if (end := _end(bound))] if field else []
        if item["type"] in ("greater_than_equal", "less_than_equal") and len(ends) == 2:
            return f"must be between {min(ends):g} and {max(ends):g}"
        return str(item["msg"]).removeprefix("Value error, ")

    @classmethod
    def setting(cls, name: str, value: Any) -> Any:
        """Return the value of one setting, checked alone and read from a text where it is one.

        Raises:
            ConfigError: it is out of bounds or none of its choices.
        """
        try:
            return TypeAdapter(cls.model_fields[name].rebuild_annotation()).validate_python(value)
        except ValidationError as error:
            raise cls._refused(error, name) from error

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, by name: those that are not at their default by themselves."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }

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


def _end(bound: Any) -> str:
    """Return the attribute of an inclusive bound; empty for what is none."""
    return next((end for end in ("ge", "le") if hasattr(bound, end)), "")


def _all_is_none(value: Any) -> Any:
    return None if value == "all" else value


def _number_or_share(value: Any) -> Any:
    """Read a text as it is written: 1.0 is a share, 1 a number; pydantic would take both for a number."""
    if isinstance(value, bool):
        raise ValueError('must be "all" or a number')
    if isinstance(value, str) and value != "all":
        try:
            return int(value) if value.strip().isdecimal() else float(value)
        except ValueError:
            raise ValueError('must be "all" or a number') from None
    return value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    """Read PATTERN=NUMBER, once or several times."""
    if isinstance(value, Mapping):
        return value
    found: dict[str, str] = {}
    for text in _several(value):
        pattern, equal, number = str(text).rpartition("=")
        if not (pattern and equal):
            raise ValueError(f"must be PATTERN=NUMBER, like 'layers.*.mlp=0.3', and not {text!r}")
        if found.setdefault(pattern, number) != number:
            raise ValueError(f"{pattern!r} is given {found[pattern]} and {number}")
    return found


THOUSANDS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def _count(value: Any) -> Any:
    """Read a number as people write it: 5M, 1.2G, 300k, 5_000_000."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    factor = THOUSANDS.get(text[-1:], 1.0)
    try:
        return float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise ValueError("must be a number, like 5M, 1.2G or 300k") from None


class RecordConfig(StageConfig):
    """How the neurons' signals are recorded."""

    group = "Calibration data"

    examples: int = option(1024, "Calibration examples, at most", ge=1)
    positions: int = option(8, "Spatial positions drawn per image and layer", ge=1)
    tokens: Annotated[int | None, BeforeValidator(_all_is_none)] = option(
        16, "Tokens drawn per text and layer, or one in eight if that is more; all of them if `all`", ge=1
    )
    exact_units: int = Field(2048, ge=1, description="up to this many units the exact Gram matrix is kept")
    sketch_columns: int = Field(2048, ge=2, description="columns of the countsketch above that")
    seed: int = 0


Setting = Literal["neighbors", "ridge", "pairs", "sketch"]
"""What some criteria read of a `ScoreConfig` and others do not."""
SETTINGS: tuple[Setting, ...] = ("neighbors", "ridge", "pairs", "sketch")
PAIRS, SHARE = (1, 2**16), (1e-6, 1.0)
"""The pairs of a pencil, as a number and as a share of the units."""


class ScoreConfig(StageConfig):
    """How units are scored; a criterion says which settings it reads, and others are an error there."""

    group = "How to score"

    criterion: str = option("innovation", "Criterion by which units are scored")
    neighbors: int = option(32, "Nearest neighbours per unit above 64 units", ge=1, le=2**14)
    ridge: float | None = option(
        None,
        "Ridge: of distortions on both Laplacians, in mean degrees; of innovation noise on every unit, in "
        "mean variances",
        shown="the criterion's own: 0.01 or 0.0001",
        ge=1e-8,
        le=1e3,
    )
    pairs: Annotated[int | float | Literal["all"], BeforeValidator(_number_or_share)] = option(
        "all", "Eigenpairs: all, a number, or a share of the units"
    )
    sketch: int = option(256, "Sign vectors for the scores over all pairs at scale", ge=1, le=2**16)
    drop_unreached: bool = option(
        False, "Whole experts that no calibration token reaches count as dead, and leave first"
    )
    split_half: bool = True
    seed: int = 0

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

    def changed(self) -> tuple[Setting, ...]:
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


USUAL = 0.5
"""Share that is removed where nothing else is said."""
ABSOLUTE = {"to_parameters": "parameters", "to_macs": "macs"}
"""Target that is no share -> the cost that it is of."""
SERVING = ("serve", "tensor_parallel")
"""Settings of a server, which are kept only where one is named."""


class PlanConfig(StageConfig):
    """What to remove."""

    group = "What to remove"

    reduction: float = option(USUAL, "Share to remove, between 0 and 1", "--reduction", "--reduce")
    of: Annotated[str, OF] = option("parameters", "What it is a share of")
    rounds: int = option(1, "Rounds of scoring and cutting", ge=1)
    ranking: Annotated[str, RANKING] = option("auto", "How groups share out what is removed")
    residual: bool = option(False, "Prune the width of residual streams too")
    experts: bool = option(False, "Prune whole experts of mixtures of experts too, with their router rows")
    floor: float = option(0.1, "Share of each group's units that always stays", ge=0, le=1)
    units: Annotated[str, UNITS] = option("all", "Kinds of units to remove")
    uniform: bool = option(False, "Alike groups keep the same number of units")
    vanilla: bool = Field(
        False, description="only what a plain configuration of transformers can hold; uniform comes with it"
    )
    multiple: int = option(
        1, "Neurons and channels that stay are a multiple of it, or all of them", "--multiple", "--round-to",
        ge=1, le=256,
    )  # fmt: skip
    ignore: Annotated[tuple[str, ...], BeforeValidator(_several)] = option(
        (), "PATTERN of groups to leave alone, by their names as cria inspect prints them; once or more",
        shown="none",
    )  # fmt: skip
    protect: Annotated[str, PROTECT] = option("none", "Layers to leave alone")
    share: Annotated[dict[str, Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_pairs)] = option(
        {}, "PATTERN=SHARE of the units of these groups that leaves; once or more. The others stay, unless a "
        "share of the whole is asked for too", shown="none",
    )  # fmt: skip
    keep: Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(_pairs)] = option(
        {}, "PATTERN=UNITS that stay in each of these groups; as --share", shown="none"
    )
    to_parameters: Annotated[float | None, BeforeValidator(_count)] = option(
        None, "How many parameters are left at most, like 5M, in place of a share",
        shown="what the share gives", gt=0,
    )  # fmt: skip
    to_macs: Annotated[float | None, BeforeValidator(_count)] = option(
        None, "How many MACs per example are left at most, like 1.2G, in place of a share",
        shown="what the share gives", gt=0,
    )  # fmt: skip
    speedup: float | None = option(
        None,
        "How many times as fast, in place of a share: it sets the cost to latency",
        shown="what the share gives",
        gt=1,
    )
    latency_batch: int | None = option(
        None, "Examples of the batch that is timed", shown="as the calibration batches have", ge=1
    )
    serve: Annotated[str, SERVE] = option(
        "any", "Cut only what this server loads of a folder of transformers"
    )
    tensor_parallel: int = option(1, "Devices that vllm shares heads and neurons out over", ge=1)
    latency_table: str | None = option(
        None, "File of measured latencies: used if it is there, else written", shown="none is kept"
    )

    @property
    def shared_by(self) -> str:
        """How groups share out what is removed: the ranking, decided where it is `auto`."""
        if self.ranking != "auto":
            return self.ranking
        # What a unit costs in MACs or seconds differs most between layers, and there measured
        # shares gain most; of parameters little (docs/method.md, section 4).
        differ = self.of in ("macs", "latency") and not (self.uniform or self.vanilla)
        return "measured" if differ else "uniform"

    @model_validator(mode="before")
    @classmethod
    def _speedup_is_a_share(cls, values: Any) -> Any:
        speedup = values.get("speedup") if isinstance(values, dict) else None
        if isinstance(speedup, (int, float)) and speedup > 1:  # the field itself refuses all others
            told = {"of": "latency", "reduction": 1 - 1 / speedup}
            for name in told:
                if values.get(name, told[name]) != told[name]:
                    raise ValueError(
                        f"a speed-up of {speedup:g} sets {name} to {told[name]}, and {values[name]} was "
                        f"given: leave out {name}, or the speed-up"
                    )
            values = {**values, **told, "speedup": None}
        return values

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        told = {name: of for name, of in ABSOLUTE.items() if values.get(name) is not None}
        if len(told) + (values.get("speedup") is not None) > 1:
            raise ValueError(f"{', '.join([*told, 'speedup'][:2])} are both given: give one target")
        for name, of in told.items():
            for other, usual in (("of", of), ("reduction", USUAL)):
                if values.get(other, usual) != usual:
                    raise ValueError(
                        f"{name} is given, and {other} {values[other]} too: leave out one of them"
                    )
            values = {**values, "of": of}
        whole = told or values.get("speedup") is not None
        if not whole and (values.get("share") or values.get("keep")):
            values = {"reduction": 0.0, **values}  # nothing beyond what these take
        return values

    @model_validator(mode="after")
    def _seconds_of_a_unit_are_noise(self) -> Self:
        if self.of == "latency" and self.ranking in ("global", "loss"):
            raise ValueError(
                f"the ranking of latency is measured or uniform and not {self.ranking}, for the seconds that "
                "a single unit takes are noise"
            )
        return self

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        # What names no server is kept as it was before there were any, and files of before fit it.
        return found if self.serve != "any" else {k: v for k, v in found.items() if k not in SERVING}

    @model_validator(mode="before")
    @classmethod
    def _served_is_vanilla(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("serve", "any") == "any":
            if values.get("tensor_parallel", 1) != 1:
                raise ValueError("a tensor-parallel size is of a server: name vllm with serve")
            return values
        for name in ("vanilla", "uniform"):
            if not values.get(name, True):
                raise ValueError(f"{values['serve']} loads layers that are alike, so it needs {name}")
        if values.get("residual"):
            raise ValueError(f"{values['serve']} is given the residual width as it is: leave out residual")
        if values.get("tensor_parallel", 1) != 1 and values["serve"] != "vllm":
            raise ValueError("a tensor-parallel size is of vllm alone")
        return {**values, "vanilla": True, "uniform": True}

    @model_validator(mode="before")
    @classmethod
    def _experts_alone_are_asked_for(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("units") == "experts":
            values = {"experts": True, **values}
            if not values["experts"]:
                raise ValueError("units are whole experts alone, so experts cannot be off")
        return values

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

    group = "Recovery"

    epochs: int = option(3, "Epochs of the recovery, 0 for none", shown="the recipe's", ge=0)
    lr: float = option(0.05, "Learning rate of the recovery", shown="the recipe's", gt=0)
    optimizer: Annotated[str, OPTIMIZER] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate too")
    weight_decay: float = Field(5e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps with a rising learning rate")
    schedule: Annotated[str, SCHEDULE] = "cosine"
    clip: float = Field(0.0, ge=0, description="largest norm of the gradients, 0 for no bound")
    precision: Annotated[str, PRECISION] = "float32"
    distill: float = option(0.0, "Weight of the dense model's soft targets, 0 to 1", ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    lora: int = option(
        0, "Rank of LoRA adapters to train and merge in place of the weights, 0 for none", ge=0
    )
    compile: bool = option(
        False, "Train what torch.compile makes of model and teacher; on CUDA with graphs of kernels"
    )
    fsdp: bool = option(
        False, "Under torchrun: share weights, gradients and the optimizer's state out over the processes"
    )
    seed: int = 0


def repair_of_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, or what says of a cell, from before there were several repairs, as said now.

    `compensate` stood there, true or false (or in a grid some of both), for the one repair that there was.
    """
    said: Any = values.get("compensate")
    several = isinstance(said, (list, tuple))
    flags: Sequence[Any] = said if several else [said]
    if "repair" in values or not all(isinstance(flag, bool) for flag in flags):
        return dict(values)
    found = ["once" if flag else "none" for flag in flags]
    rest = {key: value for key, value in values.items() if key != "compensate"}
    return {**rest, "repair": found if several else found[0]}


class PruneConfig(StageConfig):
    """Everything `prune` needs to know."""

    group = "Repair without training"

    record: RecordConfig = RecordConfig()
    score: ScoreConfig = ScoreConfig()
    plan: PlanConfig = PlanConfig()
    verify: bool = True
    repair: Annotated[str, REPAIR] = option(
        "walk", "Repair of the consumers in closed form after every cut, not in the paper"
    )
    batch_norm: bool = option(
        True,
        "Measure batch-norm statistics again after the last cut, on 32 examples or more, and keep them where "
        "the network is nearer to the dense one then; not in the paper",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_now(cls, values: Any) -> Any:
        return repair_of_before(values) if isinstance(values, Mapping) else values


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "score": {"criterion": "distortion", "pairs": "all"},
        "plan": {"ranking": "uniform", "rounds": 4},
        "repair": "none",
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
