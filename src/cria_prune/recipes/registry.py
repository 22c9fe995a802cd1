"""Data, metric and dense model of the recipes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cria_prune.base.errors import ConfigError
from cria_prune.recipes.cifar10 import cifar10_task
from cria_prune.recipes.digits import digits_task
from cria_prune.recipes.shakespeare import ShakespeareTask
from cria_prune.recipes.sst2 import Sst2Task
from cria_prune.tasks.base import Task
from cria_prune.tasks.folder import FolderTask, SentenceFolder, TextFolder, Texts, with_weights

OPTIONS = ("quick", "base")

TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits_task,
    "cifar10-resnet20": partial(cifar10_task, 20),
    "cifar10-resnet56": partial(cifar10_task, 56),
    "sst2-minilm": Sst2Task,
    "llama-shakespeare": ShakespeareTask,
}


def task(name: str, **options: Any) -> Task:
    """Return a fresh task by its name in `TASKS`; its data are loaded when first asked for.

    Args:
        name: of the recipe.
        options: `quick` (a smaller training) and `base` (folder or hub name of a pretrained encoder),
            where the recipe has them.

    Raises:
        ConfigError: no such task, or it has no such option.
    """
    if name not in TASKS:
        raise ConfigError("A task", f"found {name!r}", f"Known tasks: {', '.join(TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in OPTIONS or option not in known:
            has = [word for word in OPTIONS if word in known]
            raise ConfigError(
                f"The recipe {name} with --{option}",
                "it has no such option",
                f"It has: {', '.join(has) or 'none'}",
            )
    return TASKS[name](**options)


def folder_task(folder: Path, texts: Texts, model: nn.Module | None = None) -> FolderTask:
    """Return the task of a causal language model or a sequence classifier in a folder.

    Args:
        folder: of the model; its tokenizer is read when texts are.
        texts: the data.
        model: the folder's model where it is already there, else it is read.

    Raises:
        ArtifactError: the folder holds no weights, pickles, quantized weights or a damaged file.
        ConfigError: its model is of another kind.
    """
    model = with_weights(folder) if model is None else model
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return SentenceFolder(folder, texts, model)
    if hasattr(model, "generate") and kind.endswith(("ForCausalLM", "LMHeadModel")):
        return TextFolder(folder, texts, model)
    raise ConfigError(
        f"The model in {folder}",
        f"it is a {kind}",
        "Give a causal language model or a sequence classifier; others by cria_prune.prune in Python",
    )
