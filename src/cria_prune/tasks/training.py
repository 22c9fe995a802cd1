"""The dense model of a recipe: trained once, kept, read again by the next run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cria_prune.config import RecoverConfig
from cria_prune.metrics import metric
from cria_prune.progress import Progress
from cria_prune.ranks import world
from cria_prune.recover import recover
from cria_prune.tasks.base import Task, fingerprint
from cria_prune.tasks.cache import cache_file, fetch, keep


def trained(
    task: Task, model: nn.Module, config: RecoverConfig, progress: Progress | None = None
) -> nn.Module:
    """Return the model trained on the task, in eval mode on the CPU.

    The best epoch on the validation split is kept, in memory and in a file of `cache_root`. The file's name
    stands for the start weights, the data, the fine-tune and the device's type, so nothing else is
    read back. The training runs on CUDA where there is one; of several processes in the first alone.

    Args:
        task: gives batches and metric.
        model: the start; it changes in place.
        config: the training; its seed shuffles the batches.
        progress: where to show how far it is; silent if None.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = fingerprint(*model.state_dict().values())
    path = cache_file(
        task.name,
        {
            "start": start,
            "data": task.fingerprint("train", "validation"),
            "training": config.model_dump(mode="json", exclude_unset=True),
            "device": device.type,
        },
    )

    def made() -> None:
        if fetch(model, path):
            return
        held = list(task.validation_batches())
        recover(
            model,
            task.train_batches(config.seed, device=device),
            config,
            evaluate=lambda network: task.evaluate(network, held),
            lower_is_better=not metric(task.metric).higher_is_better,
            device=device,
            progress=progress,
        )
        keep(model, path)

    led(model, made)
    return model.eval()


def led(model: nn.Module, train: Callable[[], None]) -> None:
    """Train a model in place: of several processes in the first alone, and the others get its weights."""
    here = world()
    here.lead("The dense model", train)
    here.spread(value for value in model.state_dict().values() if isinstance(value, Tensor))
