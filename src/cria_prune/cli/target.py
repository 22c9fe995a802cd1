"""What a command works on: a recipe's dense model, a checkpoint, a Hugging Face model, a function's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cria_prune.artifact.checkpoint import MANIFEST as CHECKPOINT
from cria_prune.artifact.checkpoint import load, read_checkpoint_manifest
from cria_prune.artifact.rebuild import Policy
from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, ConfigError
from cria_prune.base.files import MANIFEST
from cria_prune.base.metrics import Metric, metric
from cria_prune.base.progress import Progress
from cria_prune.base.sentences import encoder_folder
from cria_prune.cli.settings import OfOwn
from cria_prune.config import PruneConfig
from cria_prune.planning.plan import Plan
from cria_prune.recipes.registry import TASKS, task
from cria_prune.stages import Prepared, prepare
from cria_prune.tasks.base import Task
from cria_prune.tasks.folder import Texts, folder_task, with_weights
from cria_prune.tasks.functions import is_function
from cria_prune.tasks.loading import CONFIG, HUB_NAME, example_inputs, find_folder, load_pretrained
from cria_prune.tasks.own import Own, OwnTask, made


@dataclass
class Target:
    """A recipe, a checkpoint, or a Hugging Face model.

    Attributes:
        task: its data and metric.
        checkpoint: the folder that Cria saved, or None for a dense model.
        saved: the checkpoint's model, on the CPU; None for a dense model.
        plan: the checkpoint's plan relative to the dense architecture; None for a dense model.
        results: what the checkpoint says about itself; empty for a dense model.
        recipe: name of the recipe, None for the user's own model.
        base: name of the dense model for the card, where the user gave one.
        pretrained: results are saved as folders of transformers.
        policy: how these are saved.
    """

    task: Task
    checkpoint: Path | None = None
    saved: nn.Module | None = field(default=None, repr=False)
    plan: Plan | None = field(default=None, repr=False)
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)
    recipe: str | None = None
    base: str | None = None
    pretrained: bool = False
    policy: Policy = "vanilla"

    def model(self, device: torch.device, seed: int, progress: Progress) -> nn.Module:
        """Return the model to work on: the checkpoint's, or the dense one, trained or loaded."""
        found = self.task.dense(seed, progress) if self.saved is None else self.saved
        return found.to(device)

    def teacher(self, device: torch.device, progress: Progress) -> nn.Module:
        """Return the dense model that a checkpoint of a recipe came from.

        Raises:
            ConfigError: it came from the user's own model.
        """
        if isinstance(self.task, OwnTask):
            return own_teacher(self.task, self.results).to(device)
        if self.recipe is None:
            raise ConfigError(
                f"Distillation for {self.checkpoint}",
                "the folder does not hold the dense model",
                "Name it with --teacher FOLDER",
            )
        return self.task.dense(int(self.results.get("seed") or 0), progress).to(device)

    @property
    def metric(self) -> Metric:
        """The task's metric, with its direction."""
        return metric(self.task.metric)

    def prune_defaults(self) -> dict[str, Any]:
        """Return the task's defaults; layers that differ cannot be cut to what one configuration says."""
        values = {section: dict(given) for section, given in self.task.prune_defaults.items()}
        if self.checkpoint is not None and self.policy == "per-layer":
            values["plan"] = {**values.get("plan", {}), "vanilla": False, "uniform": False}
        return values

    def check_changeable(self) -> None:
        """Raise a ConfigError for a padded twin: its zeros belong to no plan."""
        if self.policy == "padded":
            raise ConfigError(
                f"Changing the model in {self.checkpoint}",
                "it is the twin that is padded with zeros",
                "Give the folder that was saved beside it, without -padded",
            )

    def named(self) -> dict[str, Any]:
        """Return the entries of a JSON answer that say what the target is."""
        return {"recipe": self.recipe} if self.recipe else {"recipe": None, "model": self.task.name}

    def untrained(self) -> nn.Module:
        """Return a network of the target's structure, without waiting for a training."""
        return self.task.untrained() if self.saved is None else self.saved

    def prepared(self, config: PruneConfig, device: torch.device, calibrated: bool = True) -> Prepared:
        """Prepare the network before a dense model is trained, to see what can be reached.

        One that has to be trained first is prepared untrained, and the trained one takes its place later
        (`Prepared.with_model`).

        Args:
            calibrated: read the calibration batches already, and capture the model with the first of them;
                else the task's example is taken, and there are no batches yet.
        """
        task, model = self.task, self.untrained().to(device)
        if calibrated:
            return prepare(model, task.calibration(config.record.examples, config.record.seed), config)
        return prepare(model, (), config, example=task.example)


def find(name: str, texts: Texts | None = None, own: Own | None = None) -> Target:
    """Return what a name means: a recipe, a checkpoint, a Hugging Face model, or the user's own network.

    Args:
        name: of a recipe, a folder, a model of the hub (`organisation/model`), or `package.module:function`.
        texts: the user's data; a recipe and its checkpoints of Cria's own have theirs.
        own: what the user gave of a network of their own.

    Raises:
        ConfigError: there is nothing of that name, or data were given to what brings its own.
        ArtifactError: the folder holds no whole model, or one whose recipe is unknown.
    """
    is_own = is_function(name) or (own is not None and own.factory is not None)
    if is_own and texts:
        raise ConfigError(
            f"Texts for {name}", "it is a network of your own", "Give its batches with --loader"
        )
    if is_own:
        return own_network(name, own or Own())
    if own:
        raise ConfigError(
            f"Batches or functions for {name}", "it is no network of your own",
            "Leave them out; for a checkpoint of one name it with --factory package.module:function",
        )  # fmt: skip
    if name not in TASKS and not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise ConfigError(
            "A recipe, a checkpoint or a model",
            f"found {name!r}, which is neither a recipe nor a folder",
            f"Known recipes: {', '.join(TASKS)}",
        )
    folder = Path(name) if name in TASKS else find_folder(name)
    if name not in TASKS and (encoder_folder(folder) / CONFIG).is_file():
        return _pretrained(folder, name, texts)
    if texts:
        raise ConfigError(
            f"Texts for {name}", "it has data of its own", "Leave out --calibration, --dataset and --text"
        )
    return recipe(name) if name in TASKS else checkpoint(str(folder))


def recipe(name: str, **options: Any) -> Target:
    """Return the recipe of that name; options as in `recipes.registry.task`.

    Raises:
        ConfigError: no such recipe, or it has no such option.
    """
    if name not in TASKS:
        raise ConfigError("A recipe", f"found {name!r}", f"Known recipes: {', '.join(TASKS)}")
    made = task(name, **options)
    return Target(made, recipe=name, base=name, pretrained=made.pretrained)


def checkpoint(name: str) -> Target:
    """Return the checkpoint of Cria's own in the folder of that name.

    Raises:
        ArtifactError: the folder holds no whole checkpoint, or one whose recipe is unknown.
    """
    manifest = read_checkpoint_manifest(Path(name)) if (Path(name) / CHECKPOINT).is_file() else {}
    if manifest and manifest["architecture"] is None:
        maker = _mapping(_mapping(manifest.get("results")).get("options")).get("factory")
        raise ConfigError(
            f"The checkpoint {name}", "it is of a network of your own, and a file names no code to run",
            f"Name what makes the dense network with --factory {maker or 'package.module:function'}",
        )  # fmt: skip
    loaded = load(name)
    results = _mapping(loaded.manifest.get("results"))
    known = results.get("recipe") or loaded.manifest["architecture"]
    if known not in TASKS:
        raise ArtifactError(
            f"The recipe of the checkpoint {name}",
            f"its manifest names {known!r}",
            f"Known recipes: {', '.join(TASKS)}; use the Python interface for other networks",
        )
    made = task(known, **_mapping(results.get("options")))
    return Target(made, Path(name), loaded.model, loaded.plan, results, known, known)


def own_network(name: str, own: Own) -> Target:
    """Return the user's own network: dense, of a function, or a checkpoint and the function of its dense one.

    Raises:
        ConfigError: a function cannot be imported, or is not what it has to be.
        ArtifactError: the weights or the checkpoint cannot be read, or are of another network.
    """
    if is_function(name) and own.factory is None:
        return Target(OwnTask(name, own), base=name)
    if is_function(name):
        raise ConfigError(
            f"The model {name}", f"--factory {own.factory} was given too",
            "Give a checkpoint and its factory, or the factory alone",
        )  # fmt: skip
    made = OwnTask(own.factory or "", own)
    loaded = load(name, made.blank())
    results = _mapping(loaded.manifest.get("results"))
    if dense := _mapping(results.get("options")).get("dense"):  # whatever the function makes now
        made.options = {**made.options, "dense": dense}
    return Target(made, Path(name), loaded.model, loaded.plan, results)


def own_teacher(task: OwnTask, results: Mapping[str, Any]) -> nn.Module:
    """Return the dense network of the user's own that a checkpoint came from.

    Raises:
        ConfigError: the function makes one with other weights.
    """
    known = _mapping(results.get("options")).get("dense")
    if known is not None and known != task.weights:
        raise ConfigError(
            "Distillation from the dense network",
            f"{task.factory} gives other weights than those that were pruned",
            "Give them with --weights FILE.safetensors",
        )  # fmt: skip
    return task.model


def _pretrained(folder: Path, name: str, texts: Texts | None) -> Target:
    """Return a Hugging Face model; what Cria saved goes on with its recipe, if no other texts are given."""
    texts = texts or Texts()
    base = name if HUB_NAME.fullmatch(name) and not Path(name).is_dir() else None
    if not (folder / MANIFEST).is_file():
        return Target(
            folder_task(folder, texts, with_weights(folder, texts.task)), base=base, pretrained=True
        )
    loaded = load(folder)
    results = _mapping(loaded.manifest.get("results"))
    known = results.get("recipe")
    own = isinstance(known, str) and known in TASKS and not texts
    options = _mapping(results.get("options"))
    made = task(str(known), **options) if own else folder_task(folder, texts, loaded.model)
    policy: Policy = loaded.manifest["policy"]
    return Target(
        made, folder, loaded.model, loaded.plan, results, known if own else None, known if own else base,
        pretrained=True, policy=policy,
    )  # fmt: skip


def own_of(request: OfOwn, examples: int | None = None) -> Own:
    """Return what a request says of a network of the user's own, with its seed and number of examples."""
    record, seed = getattr(request, "record", None), getattr(request, "seed", None)
    given = {} if record is None else record.given()
    return request.own(examples=given.get("examples", examples), seed=seed or 0)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


Kind = Literal["recipe", "checkpoint", "hugging-face", "factory"]


@dataclass(frozen=True)
class Source:
    """A model and what its forward takes.

    Attributes:
        model: in eval mode, on the CPU, the meta device or where the function put it; a recipe's is
            untrained.
        example: one batch, on the CPU or where the function made it.
        name: as the user typed it.
        kind: `recipe`, `checkpoint`, `hugging-face` or `factory`.
        target: task and plan of a recipe or checkpoint; None for the others.
    """

    model: nn.Module = field(repr=False)
    example: Batch = field(repr=False)
    name: str
    kind: Kind
    target: Target | None = field(default=None, repr=False)


def load_source(
    text: str, example: Sequence[int] | None = None, meta: bool = False, own: Own | None = None
) -> Source:
    """Return the model that a text names, with an example of its inputs.

    Args:
        text: a recipe (`digits`), a folder (of a Cria checkpoint, or with the config.json of a Hugging
            Face model), or `package.module:function`, which is imported and called without arguments;
            modules in the current folder are found too.
        example: shape of the model's (main) input, in place of the one that comes with the model.
        meta: leave the weights; every tensor is on the meta device and takes no memory.
        own: a loader that gives the example, and for a checkpoint what makes its dense network.

    Raises:
        ConfigError: the text names nothing of these, or the function does not give a model and example.
        ArtifactError: a folder holds no model that can be read.
        DataError: the example's shape does not suit the model.
    """
    folder, known = Path(text), text in TASKS
    if not known and folder.is_dir() and (encoder_folder(folder) / CONFIG).is_file():
        model = load_pretrained(folder, meta)
        return Source(model, example_inputs(model, example), text, "hugging-face")
    if not known and not folder.is_dir():
        if ":" not in text:
            raise ConfigError(
                "A model",
                f"found {text!r}, which is no recipe and no folder",
                f"Give a recipe ({', '.join(TASKS)}), the folder of a checkpoint or of a Hugging Face model, "
                "or package.module:function",
            )
        if own is not None and own.loader is not None and not meta:
            task = OwnTask(text, own)
            return Source(task.model, _example(text, task.example, example), text, "factory")
        model, given = made(text, meta)
        return Source(model, _example(text, given, example), text, "factory")
    found = find(text, own=own)
    model = found.untrained().to("meta") if meta else found.untrained()
    kind: Kind = "recipe" if found.checkpoint is None else "checkpoint"
    return Source(model, _example(text, found.task.example, example), text, kind, found)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Return the sizes of `1,3,32,32`; None stays None.

    Raises:
        ConfigError: it is no list of positive whole numbers.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError("The shape of an example", f"found {text!r}", "Give sizes like 1,3,32,32")
    return tuple(int(word) for word in words)


def _example(text: str, given: Batch | None, shape: Sequence[int] | None) -> Batch:
    if shape is not None:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    if given is None:
        raise ConfigError(
            f"An example of the inputs of {text}",
            "the function gave none",
            "Pass its shape, as in --example 1,3,32,32, or its --loader, or return (model, example) from the "
            "function",
        )
    return given
