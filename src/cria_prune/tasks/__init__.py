"""Data, metric and dense model of the recipes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cria_prune.errors import ConfigError
from cria_prune.tasks.base import Task, evaluate, fingerprint
from cria_prune.tasks.cifar10 import cifar10_task
from cria_prune.tasks.digits import digits_task
from cria_prune.tasks.models import ARCHITECTURES, build

TASKS: dict[str, Callable[[], Task]] = {
    "digits": digits_task,
    "cifar10-resnet20": partial(cifar10_task, 20),
    "cifar10-resnet56": partial(cifar10_task, 56),
}


def task(name: str) -> Task:
    """Return a fresh task by its name in `TASKS`; its data are loaded when first asked for.

    Raises:
        ConfigError: no such task.
    """
    if name not in TASKS:
        raise ConfigError("A task", f"found {name!r}", f"Known tasks: {', '.join(TASKS)}")
    return TASKS[name]()


__all__ = ["ARCHITECTURES", "TASKS", "Task", "build", "evaluate", "fingerprint", "task"]
