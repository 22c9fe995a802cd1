"""The requests of the commands, section by section, and the configurations that they give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from cria_prune.base.errors import ConfigError
from cria_prune.config import (
    ABSOLUTE,
    PRESETS,
    Choices,
    PlanConfig,
    PruneConfig,
    RecordConfig,
    RecoverConfig,
    ScoreConfig,
    StageConfig,
    option,
    preset,
)

if TYPE_CHECKING:
    import torch

    from cria_prune.tasks.folder import Texts
    from cria_prune.tasks.own import Own

CONFIGS = (PlanConfig, ScoreConfig, RecordConfig, PruneConfig, RecoverConfig)
REMOVE, SCORE, DATA, REPAIR, RECOVER = (config.group for config in CONFIGS)
MODEL, MEASURE, START = "Model", "What to measure", "Settings to start from"
RUNNING, OUTPUT, OWN = "Running", "Output", "A network of your own"
GROUPS = ("Arguments", REMOVE, SCORE, DATA, OWN, REPAIR, RECOVER, MODEL, MEASURE, START, RUNNING, OUTPUT)
"""Headings of --help, in their order."""

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": (
        "alike layers stay alike, so that plain from_pretrained loads it",
        {"vanilla": True, "uniform": True},
    ),
    "per-layer": (
        "layers compete, cria_prune.load loads it",
        {"vanilla": False, "uniform": False, "ranking": "global"},
    ),
}
"""Policy -> what it means, and what it says of the plan."""
POLICY = Choices({name: text for name, (text, _) in POLICIES.items()}, "policies")
PRESET = Choices({name: name for name in PRESETS}, "presets")
EXPORT = Choices({"padded": "filled up with zeros, it loads everywhere"}, "exports")
BETTER = Choices({"higher": "higher", "lower": "lower"}, "directions")


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """Return what was said of a field besides what pydantic knows: of its option, or that it is none."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def flags_of(name: str, field: FieldInfo) -> list[str]:
    """Return how an option is spelled, first as it is written in full."""
    return extra_of(field)["option"]["flags"] or [f"--{name.replace('_', '-')}"]


def argument(text: str) -> Any:
    """Return the field of what a command works on."""
    return Field(..., description=text, json_schema_extra={"argument": True})


def options(config: type[StageConfig], *only: str, but: tuple[str, ...] = ()) -> Any:
    """Return the field for the options of a configuration: all, `only` some, or all `but` some."""
    names = [
        name
        for name, field in config.model_fields.items()
        if "option" in extra_of(field) and name in (only or config.model_fields) and name not in but
    ]
    return Field(config.model_construct(), json_schema_extra={"options": list[Any](names)})


def several(section: type[StageConfig | Request], name: str, text: str, shown: str = "") -> Any:
    """Return the field of an option that is given once or more, spelled and grouped as that of a section."""
    return option((), text, *flags_of(name, section.model_fields[name]), shown=shown, group=section.group)


class Request(BaseModel):
    """What a command was asked. The text of a command's own class is that of its --help.

    Attributes:
        group: under which heading of --help the options are that a class adds; Output where it says nothing.
        work: module beside this one and function in it that does the work: `commands.run`.
        shared: it can be shared out over several processes.
        command: the command with the options that were given, as it would be typed.
    """

    model_config = ConfigDict(frozen=True)
    group: ClassVar[str] = OUTPUT
    work: ClassVar[str] = ""
    shared: ClassVar[bool] = False

    command: list[str] = []
    quiet: bool = option(False, "Print the last line, the JSON object, and nothing else", "--quiet", "-q")


class OfTarget(Request):
    """What most commands work on."""

    target: str = argument(
        "A recipe, the folder of a checkpoint or of a Hugging Face model, a model of the hub, or "
        "package.module:function that makes your own."
    )


class Data(Request):
    """The user's own data."""

    group = DATA

    calibration: tuple[str, ...] = option(
        (), "Data for a Hugging Face model to look at: a file (text, csv, tsv, json, jsonl, parquet), a "
        "folder of them, of images or of recordings, or a data set of the hub; several are mixed",
    )  # fmt: skip
    dataset: str | None = option(None, "The same, of one source, in place of --calibration")
    text: Path | None = option(None, "Data to measure on, all of them", shown="some of the other, kept apart")
    task: str | None = option(
        None, "Task of the model, as in text-classification", shown="what its class says"
    )
    text_column: str | None = option(None, "Column of the texts, words or questions", shown="the usual names")
    pair_column: str | None = option(None, "Column of the second texts: pairs, contexts, answers")
    label_column: str | None = option(None, "Column of the labels, tags, targets or transcripts")
    chat: bool = option(False, "Write texts or messages by the tokenizer's chat template")
    max_length: int | None = option(None, "Tokens of an example at most", shown="what suits the task", ge=1)

    @property
    def texts(self) -> Texts:
        """The data that were given. Raises a ConfigError where two of them are for the same."""
        from cria_prune.tasks.columns import Reading
        from cria_prune.tasks.folder import Texts

        if self.calibration and self.dataset is not None:
            found = "both --calibration and --dataset were given"
            raise ConfigError("Data to calibrate on", found, "Give one of the two")
        columns = self.text_column, self.label_column, self.pair_column
        reading = Reading(*columns, self.chat, self.max_length)
        return Texts(self.calibration, self.dataset, self.text, reading, self.task)


class OfOwn(Request):
    """A network of the user's own, and its batches."""

    group = OWN

    factory: str | None = option(
        None, "package.module:function that makes the dense network, for a checkpoint of it"
    )
    loader: str | None = option(
        None, "package.module:function that returns the batches to calibrate and train on, as a DataLoader"
    )  # fmt: skip
    inputs: str | None = option(
        None,
        "Which items of a batch are inputs where that is not plain: their number, or names like left,right",
    )

    @property
    def given_inputs(self) -> Any:
        """The items of a batch that are inputs: a number, or names."""
        text = self.inputs
        if text is None or text.strip().isdecimal():
            return None if text is None else int(text)
        return tuple(word.strip() for word in text.split(","))

    def own(self, **more: Any) -> Own:
        """Return what was given of the network, and what else is known of it."""
        from cria_prune.tasks.own import Own

        names = [name for name in Own.__dataclass_fields__ if name in type(self).model_fields]
        given = {name: getattr(self, name) for name in names if name not in ("inputs", "seed")}
        return Own(**given, inputs=self.given_inputs, **more)


class Trained(OfOwn):
    """A trained network of the user's own, with its loss."""

    group = OWN

    weights: Path | None = option(
        None, "Its trained weights, a file of safetensors", shown="those it is made with"
    )
    loss: str | None = option(
        None, "package.module:function of (outputs, targets) or (model, batch) that returns a scalar",
        shown="cross-entropy",
    )  # fmt: skip


class Measured(Trained):
    """A network of the user's own, with what measures it."""

    group = OWN

    evaluate: str | None = option(
        None, "package.module:function of (model) or (model, loader) that returns a number: its metric"
    )
    test_loader: str | None = option(
        None, "package.module:function that gives the batches that are measured on", shown="those of --loader"
    )
    better: Annotated[str | None, BETTER] = option(
        None, "Which numbers of --evaluate are better", shown="lower for a loss or an error, else higher"
    )


class OnDevice(Request):
    """Where the work is done."""

    group = RUNNING

    device: str = option("auto", "One of cpu, cuda, cuda:1, ..., or auto: cuda where there is one")

    @property
    def torch_device(self) -> torch.device:
        """The device of that name. Raises a ConfigError where there is none here."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            asked, found = f"The device {self.device!r}", str(error).splitlines()[0].rstrip(".")
            raise ConfigError(asked, found, "Give cpu, or a device that torch sees") from error
        return device


class Running(OnDevice):
    """Where the work is done, with which random numbers."""

    group = RUNNING

    seed: int | None = option(None, "Of every random choice, the training of digits included", shown="0")

    @property
    def base_seed(self) -> int:
        """The seed of the dense training, and of what the configurations do not seed."""
        return self.seed or 0


class Saving(Request):
    """What is written."""

    output: Path | None = option(
        None, "Folder for the results", shown="the first free of runs/NAME, runs/NAME-2, ..."
    )
    overwrite: bool = option(False, "Replace results that are there already")


class Resuming(Saving, Running):
    """A long work, which can be gone on with."""

    resume: bool = option(False, "Go on with what an interrupted run of the same command left for --output")


class Watching(Request):
    """A look at every round."""

    group = RUNNING

    watch: bool = option(False, "Evaluate after every round, on the validation split")


class Scoring(Running):
    """Recording and scoring; what only a pruning is asked is there, and empty."""

    group = START

    reductions: tuple[float, ...] = ()
    plan: PlanConfig = options(PlanConfig, "residual", "experts")
    policy: str | None = None
    score: ScoreConfig = options(ScoreConfig)
    scores: Path | None = None
    record: RecordConfig = options(RecordConfig)
    repair: PruneConfig = PruneConfig.model_construct()
    preset: Annotated[str | None, PRESET] = option(None, "A named configuration")
    config: Path | None = option(None, "YAML or JSON file of a PruneConfig; options given here win over it")


class Pruning(Scoring):
    """All that a pruning can be asked."""

    plan: PlanConfig = options(PlanConfig)
    policy: Annotated[str | None, POLICY] = option(
        None, "How a model of transformers is cut and saved",
        shown="uniform for a folder, what suits the recipe else", group=REMOVE,
    )  # fmt: skip
    repair: PruneConfig = options(PruneConfig)


class FromScores(Pruning):
    """Pruning, by scores that were kept too."""

    scores: Path | None = option(
        None, "Folder of cria score: prune by these scores, in one round, without recording again",
        group=SCORE,
    )  # fmt: skip


class Tuning(Request):
    """The fine-tune."""

    tune: RecoverConfig = options(RecoverConfig)


class Run(Pruning, Tuning, Watching, Resuming):
    """Do a whole recipe: dense model, pruning, one recovery, checkpoint and report."""

    work, shared = "commands.run", True

    recipe: str = argument("digits, cifar10-resnet20, cifar10-resnet56, sst2-minilm or llama-shakespeare.")
    reductions: tuple[float, ...] = several(
        PlanConfig, "reduction", "Share to remove, between 0 and 1; several make a family", "the recipe's"
    )
    plan: PlanConfig = options(PlanConfig, but=("reduction",))
    quick: bool = option(
        False, "Train the dense model for less: 8,000 sentences, or one epoch of text", group=MODEL
    )
    base: str | None = option(
        None, "Folder or hub name of the pretrained encoder of sst2-minilm", group=MODEL
    )


class Inspect(OfOwn):
    """Show what can be removed from a network, what a unit costs, and why the rest cannot."""

    work = "inspect.inspect"

    model: str = argument(
        "A recipe, the folder of a checkpoint or of a Hugging Face model, or package.module:function "
        "(without arguments, gives a module or (module, example))."
    )
    example: str | None = option(
        None, "Shape of the (main) input, like 1,3,32,32", shown="what suits the model", group=MODEL
    )
    meta: bool = option(False, "Shapes alone: leave the weights, take no memory for them", group=MODEL)
    plan: PlanConfig = options(PlanConfig, "floor")
    tree: bool = option(False, "Along the modules in place of a table")
    all: bool = option(False, "Every group by itself, repeated layers too, names in full")
    as_json: bool = option(False, "Print everything as one JSON object, and no table", "--json")


class Score(OfTarget, Data, Trained, Scoring, Saving):
    """Score the units of every group and show how far the scores can be trusted; cut nothing.

    With --output the scores are kept, and what repair needs, to prune to any size later.
    """

    work, shared = "scores.score", True

    repair: PruneConfig = options(PruneConfig, "repair")
    output: Path | None = option(
        None, "Folder to keep the scores in, for cria prune --scores and cria sweep --scores"
    )


class Plan(OfTarget, Data, Trained, Pruning, Saving):
    """Show which units would stay after one round, and cut nothing; with --dry-run what it all would take.

    --dry-run runs no calibration: it says what is reachable, the passes over the data and the peak memory.
    """

    work = "plans.plan"

    dry_run: bool = option(
        False, "Predict memory and passes, and say what is reachable; score nothing", group=RUNNING
    )
    output: Path | None = option(None, "JSON file for the plan, or with --dry-run for what was predicted")


class Ablate(OfTarget, Data, Measured, Scoring, Saving):
    """Measure a criterion: remove the lowest-scored, the highest-scored and random units, share by share.

    Every network is repaired as a pruning would before it is measured.
    """

    group, work = MEASURE, "measure.ablate"

    repair: PruneConfig = options(PruneConfig, "repair")

    shares: str | None = option(
        None, "Shares of every group's units to remove, separated by commas", shown="0.1 to 0.9 by 0.1"
    )
    random_seeds: int = option(3, "Random orders to compare with")
    limit: int | None = option(None, "Test examples at most, for a quick look; results say so", shown="all")


class Prune(OfTarget, Data, Measured, FromScores, Watching, Resuming):
    """Cut a share out of a network and save it, without recovery; a checkpoint can be cut again.

    A Hugging Face model needs texts, --calibration or --dataset; plain transformers loads the result.
    """

    work, shared = "commands.prune", True

    offload: bool = option(
        False, "For a folder whose model is larger than the memory: layer by layer, in one round unless "
        "--rounds says more", group=RUNNING,
    )  # fmt: skip
    export: Annotated[str | None, EXPORT] = option(None, "Also write a twin in OUTPUT-padded")


class Sweep(OfTarget, Data, Measured, FromScores, Resuming):
    """Score a network once and prune it to several sizes, each in one round: a family, and its trade-off."""

    work, shared = "commands.sweep", True

    reductions: tuple[float, ...] = several(
        PlanConfig, "reduction", "Share to remove, between 0 and 1; one size for each", "0.1 to 0.7 by 0.1"
    )
    plan: PlanConfig = options(PlanConfig, but=("reduction", "rounds", "speedup", *ABSOLUTE))


class Recover(Data, Measured, Tuning, Resuming):
    """Fine-tune a checkpoint once and save the result."""

    work, shared = "commands.recover", True

    checkpoint: str = argument("The folder of a checkpoint.")
    record: RecordConfig = options(RecordConfig, "examples")
    teacher: str | None = option(None, "Folder or hub name of the dense model, for --distill", group=RECOVER)


class Report(Saving):
    """Make one HTML page of a run or a bench, from the files in its folder."""

    work = "report.report"

    folder: Path = argument("What cria run or cria prune wrote, or a folder of a bench's result files.")
    layer: str | None = option(
        None, "Whose neuron graphs are drawn", shown="the widest of at most 256 units that lost any"
    )
    output: Path | None = option(None, "HTML file for the page", shown="report.html in the folder")


class Bench(Measured, OnDevice):
    """Measure criteria against each other, one result file per cell; what is there is not measured again."""

    work = "report.bench"

    suite: str = argument(
        "digits, resnet20, resnet56, sst2-minilm or llama-shakespeare, a folder of YAML files, or "
        "package.module:function that makes a network of your own."
    )
    criteria: tuple[str, ...] = several(ScoreConfig, "criterion", "Only these criteria of the suite")
    reductions: tuple[float, ...] = several(PlanConfig, "reduction", "Only these reductions of the suite")
    seeds: tuple[int, ...] = several(Running, "seed", "Only these seeds of the suite")
    repair: tuple[str, ...] = several(PruneConfig, "repair", "Only these repairs of the suite")
    output: Path | None = option(None, "Folder for the result files", shown="bench/NETWORK", group=OUTPUT)


class Eval(OfTarget, Data, Measured, Running):
    """Evaluate a recipe's dense model or a checkpoint on the test split, any language model on a text."""

    group, work = MEASURE, "measure.evaluate"

    record: RecordConfig = options(RecordConfig, "examples")
    against: str | None = option(None, "Also measure how far it is from this model: the dense one")
    tasks: str | None = option(None, "Tasks of lm-eval, separated by commas, in place of a text")
    task_folder: Path | None = option(None, "Folder with further task files of lm-eval")
    limit: int | None = option(None, "Examples per task of lm-eval at most", shown="all")


class Deployed(OfTarget):
    """What is served: a model, its inputs, and the function of its dense network where that is needed."""

    group = MODEL

    factory: str | None = option(
        None, "package.module:function that makes the dense network, for a checkpoint of it"
    )
    example: str | None = option(
        None, "Shape of the (main) input, like 1,3,32,32", shown="what suits the model"
    )


class Export(Deployed, Data):
    """Export a model to ONNX, checked in onnxruntime against torch on other sizes; in int8 too.

    The batch may have any size, and the length where the model takes any. Names are those of optimum.
    """

    work = "deploy.export"

    onnx: Path | None = option(None, "Folder for model.onnx, configuration and tokenizer")
    int8: bool = option(False, "Also write model_quantized.onnx, and say how far it is from the float model")
    overwrite: bool = option(False, "Replace an export that is there already")


class Latency(Deployed, OnDevice):
    """Measure how fast a model is beside another one: medians in turns, in one run.

    A table by runtime and batch size; in a folder that Cria saved it is kept for the card and the report.
    """

    group, work = MEASURE, "deploy.latency"

    against: str | None = option(None, "The dense model: what the target can be too")
    batch: str = option("1,8,64", "Examples of a batch, separated by commas")
    runtime: str = option(
        "eager", "What runs them, separated by commas: eager, compiled, onnxruntime or int8"
    )
    threads: int | None = option(
        None, "That a forward may use", shown="as many as torch takes", group=RUNNING
    )
    seconds: float = option(5.0, "Of measuring for each runtime and batch size, both models together")
    output: Path | None = option(None, "JSON file for the table", group=OUTPUT)
    overwrite: bool = option(False, "Replace a file that is there already", group=OUTPUT)


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

    seed = {} if request.seed is None else {"seed": request.seed}
    layers: list[Mapping[str, Any]] = [
        defaults or {},
        {} if request.preset is None else preset(request.preset).model_dump(exclude_unset=True),
        {} if request.config is None else _read(request.config).model_dump(exclude_unset=True),
        {"plan": {} if request.policy is None else POLICIES[request.policy][1]},
        {
            "record": {**seed, **request.record.given()},
            "score": {**seed, **request.score.given()},
            "plan": {**request.plan.given(), **plan},
            **request.repair.given(),
        },
    ]
    values: dict[str, Any] = {}
    for key, value in (item for layer in layers for item in layer.items()):
        values[key] = {**values.get(key, {}), **value} if key in SECTIONS else value
    given = {**request.plan.given(), **plan}
    values["plan"] = _with_one_target(values["plan"], given, layers[2].get("plan", {}))
    costly = "speedup" in given or values["plan"].get("of") in ("macs", "latency")
    if request.policy == "per-layer" and costly and "ranking" not in given:
        values["plan"] |= {"ranking": "auto"}  # where layers may differ in these, they do by measured losses
    config = PruneConfig(**{**values, **{name: kind(**values[name]) for name, kind in SECTIONS.items()}})
    find_criterion(config.score)
    if not (config.plan.share or config.plan.keep):
        check_share(config.plan.reduction)
    return config


def _with_one_target(
    plan: Mapping[str, Any], given: Mapping[str, Any], file: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of a plan with the target of the options in place of those of recipe and file.

    Args:
        plan: all of them.
        given: those of the options.
        file: those of a file.

    Raises:
        ConfigError: the options give several.
    """
    targets = [name for name in ("speedup", *ABSOLUTE, "reduction") if name in given]
    if len(targets) > 1:
        said = {
            "speedup": "a speed-up",
            "to_parameters": "parameters to be left",
            "to_macs": "MACs to be left",
        }
        found = " and ".join(said.get(name, "a share") for name in targets[:2])
        raise ConfigError("What to remove", f"{found} were given", "Give one of the two")
    if targets:
        others = {"speedup", "reduction", *ABSOLUTE} | (set() if targets[0] == "reduction" else {"of"})
        return {key: value for key, value in plan.items() if key in given or key not in others}
    if ("share" in given or "keep" in given) and not file.keys() & {"speedup", "reduction", *ABSOLUTE}:
        return {key: value for key, value in plan.items() if key != "reduction"}
    return dict(plan)


def recover_config(request: Recover | Run, defaults: RecoverConfig) -> RecoverConfig:
    """Return the configuration of the fine-tune: the task's, then the options that were given.

    Raises:
        ConfigError: a value is not valid, or the processes and the device cannot train so.
    """
    from cria_prune.recovery.tune import check_possible

    seed = {} if request.seed is None else {"seed": request.seed}
    config = RecoverConfig(**{**defaults.model_dump(), **seed, **request.tune.given()})
    check_possible(config, request.torch_device)  # before the long work, not after it
    return config


def _read(path: Path) -> PruneConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path}", str(error), "Give a YAML or JSON file") from error
    return PruneConfig.from_text(text)
