"""What a command works on: a recipe's dense model, a saved checkpoint, or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.errors import ArtifactError, ConfigError
from cria_prune.metrics import Metric, metric

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cria_prune.artifact.manifest import Policy
    from cria_prune.plan import Plan
    from cria_prune.progress import Progress
    from cria_prune.tasks import Task, Texts


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


def find(name: str, texts: Texts | None = None) -> Target:
    """Return the recipe of that name, the checkpoint in the folder of that name, or a Hugging Face model.

    Args:
        name: of a recipe, a folder, or a model of the hub (`organisation/model`).
        texts: the user's data; a recipe and its checkpoints of Cria's own have theirs.

    Raises:
        ConfigError: there is nothing of that name, or texts were given to what brings its own.
        ArtifactError: the folder holds no whole model, or one whose recipe is unknown.
    """
    from cria_prune.tasks import TASKS
    from cria_prune.tasks.hub import HUB_NAME, find_folder
    from cria_prune.tasks.pretrained import CONFIG

    if name not in TASKS and not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise ConfigError(
            "A recipe, a checkpoint or a model",
            f"found {name!r}, which is neither a recipe nor a folder",
            f"Known recipes: {', '.join(TASKS)}",
        )
    folder = Path(name) if name in TASKS else find_folder(name)
    if name not in TASKS and (folder / CONFIG).is_file():
        return _pretrained(folder, name, texts)
    if texts:
        raise ConfigError(
            f"Texts for {name}", "it has data of its own", "Leave out --calibration, --dataset and --text"
        )
    return recipe(name) if name in TASKS else checkpoint(str(folder))


def recipe(name: str, **options: Any) -> Target:
    """Return the recipe of that name; options as in `tasks.task`.

    Raises:
        ConfigError: no such recipe, or it has no such option.
    """
    from cria_prune.tasks import TASKS, task

    if name not in TASKS:
        raise ConfigError("A recipe", f"found {name!r}", f"Known recipes: {', '.join(TASKS)}")
    made = task(name, **options)
    return Target(made, recipe=name, base=name, pretrained=made.pretrained)


def checkpoint(name: str) -> Target:
    """Return the checkpoint of Cria's own in the folder of that name.

    Raises:
        ArtifactError: the folder holds no whole checkpoint, or one whose recipe is unknown.
    """
    from cria_prune.artifact.checkpoint import load
    from cria_prune.tasks import TASKS, task

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


def _pretrained(folder: Path, name: str, texts: Texts | None) -> Target:
    """Return a Hugging Face model; what Cria saved goes on with its recipe, if no other texts are given."""
    from cria_prune.artifact.checkpoint import load
    from cria_prune.artifact.folders import MANIFEST
    from cria_prune.tasks import TASKS, Texts, folder_task, task, with_weights
    from cria_prune.tasks.hub import HUB_NAME

    texts = texts or Texts()
    base = name if HUB_NAME.fullmatch(name) and not Path(name).is_dir() else None
    if not (folder / MANIFEST).is_file():
        return Target(folder_task(folder, texts, with_weights(folder)), base=base, pretrained=True)
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


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
