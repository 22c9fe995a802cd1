"""What a command works on: the dense model of a recipe, or a saved checkpoint and its recipe."""

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

    from cria_prune.plan import Plan
    from cria_prune.progress import Progress
    from cria_prune.tasks import Task


@dataclass
class Target:
    """A recipe or a checkpoint.

    Attributes:
        task: its data and metric.
        checkpoint: the folder, or None for a recipe's dense model.
        saved: the checkpoint's model, on the CPU; None for a recipe.
        plan: the checkpoint's plan relative to the dense architecture; None for a recipe.
        results: what the checkpoint says about itself; empty for a recipe.
    """

    task: Task
    checkpoint: Path | None = None
    saved: nn.Module | None = field(default=None, repr=False)
    plan: Plan | None = field(default=None, repr=False)
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def model(self, device: torch.device, seed: int, progress: Progress) -> nn.Module:
        """Return the model to work on: the checkpoint's, or the recipe's dense one, trained or loaded."""
        found = self.task.dense(seed, progress) if self.saved is None else self.saved
        return found.to(device)

    def teacher(self, device: torch.device, progress: Progress) -> nn.Module:
        """Return the dense model that a checkpoint came from."""
        return self.task.dense(int(self.results.get("seed") or 0), progress).to(device)

    @property
    def metric(self) -> Metric:
        """The task's metric, with its direction."""
        return metric(self.task.metric)

    def untrained(self) -> nn.Module:
        """Return a network of the target's structure, without waiting for a training."""
        from cria_prune.tasks import build

        return build(self.task.architecture).eval() if self.saved is None else self.saved


def find(name: str) -> Target:
    """Return the recipe of that name, or the checkpoint in the folder of that name.

    Raises:
        ConfigError: there is neither.
        ArtifactError: the folder holds no whole checkpoint, or one whose recipe is unknown.
    """
    from cria_prune.tasks import TASKS, task

    if name in TASKS:
        return Target(task(name))
    if not Path(name).is_dir():
        raise ConfigError(
            "A recipe or checkpoint",
            f"found {name!r}, which is neither a recipe nor a folder",
            f"Known recipes: {', '.join(TASKS)}",
        )
    return checkpoint(name)


def recipe(name: str, **options: Any) -> Target:
    """Return the recipe of that name; options as in `tasks.task`.

    Raises:
        ConfigError: no such recipe, or it has no such option.
    """
    from cria_prune.tasks import TASKS, task

    if name not in TASKS:
        raise ConfigError("A recipe", f"found {name!r}", f"Known recipes: {', '.join(TASKS)}")
    return Target(task(name, **options))


def checkpoint(name: str) -> Target:
    """Return the checkpoint in the folder of that name.

    Raises:
        ArtifactError: the folder holds no whole checkpoint, or one whose recipe is unknown.
    """
    from cria_prune.artifact.checkpoint import load
    from cria_prune.tasks import TASKS, task

    loaded = load(name)
    results = loaded.manifest.get("results")
    results = results if isinstance(results, dict) else {}
    known = results.get("recipe") or loaded.manifest["architecture"]
    if known not in TASKS:
        raise ArtifactError(
            f"The recipe of the checkpoint {name}",
            f"its manifest names {known!r}",
            f"Known recipes: {', '.join(TASKS)}; use the Python interface for other networks",
        )
    options = results.get("options")
    made = task(known, **(options if isinstance(options, dict) else {}))
    return Target(made, Path(name), loaded.model, loaded.plan, results)
