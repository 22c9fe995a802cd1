"""Data, metric and dense model of the recipes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from cria_prune.base.errors import ConfigError
from cria_prune.recipes.cifar10 import cifar10_task
from cria_prune.recipes.digits import digits_task
from cria_prune.recipes.shakespeare import ShakespeareTask
from cria_prune.recipes.sst2 import Sst2Task
from cria_prune.tasks.base import Task

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
