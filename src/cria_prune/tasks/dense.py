"""The dense model of a recipe: trained once, kept in a folder of the user, read again by the next run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.errors import ArtifactError
from cria_prune.base.files import atomic
from cria_prune.base.metrics import metric
from cria_prune.base.progress import Progress
from cria_prune.base.ranks import world
from cria_prune.config import RecoverConfig
from cria_prune.recovery.tune import recover
from cria_prune.tasks.base import Task, fingerprint

FORMAT = 1


def cache_root() -> Path:
    """Return the folder: CRIA_CACHE, or `cria` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("CRIA_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cria"


def cache_file(name: str, made_from: Mapping[str, Any]) -> Path:
    """Return where a model is kept that was made from all this: plain JSON, any change is another file."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return cache_root() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def fetch(model: nn.Module, path: Path) -> bool:
    """Read kept weights into the model and say whether it worked; the model is as it was if not.

    A missing, damaged or foreign file is no error: the model is then trained again.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_model(model, path)
    except (OSError, RuntimeError, SafetensorError):
        model.load_state_dict(before)
        return False
    return True


def keep(model: nn.Module, path: Path) -> None:
    """Write the model's weights; readers see the whole file or none. A folder that refuses is no error."""
    from safetensors.torch import save_model

    with suppress(OSError, ArtifactError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_model(model, str(temporary))


def trained(
    task: Task, model: nn.Module, config: RecoverConfig, progress: Progress | None = None, kept: bool = True
) -> nn.Module:
    """Return the model trained on the task, in eval mode on the CPU.

    The best epoch on the validation split is kept, in memory and in a file of `cache_root`. The file's name
    stands for the start weights, the data, the fine-tune and the device's type, so nothing else is
    read back. The training runs on CUDA where there is one; of several processes in the first alone, and the
    others get its weights.

    Args:
        task: gives batches and metric.
        model: the start; it changes in place.
        config: the training; its seed shuffles the batches.
        progress: where to show how far it is; silent if None.
        kept: write and read the file; False for a training of seconds, which is done on the CPU.
    """
    device = torch.device("cuda" if kept and torch.cuda.is_available() else "cpu")
    path = None
    if kept:
        made_from = {
            "start": fingerprint(*model.state_dict().values()),
            "data": task.fingerprint("train", "validation"),
            "training": config.model_dump(mode="json", exclude_unset=True),
            "device": device.type,
        }
        path = cache_file(task.name, made_from)

    def train() -> None:
        if path is not None and fetch(model, path):
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
        if path is not None:
            keep(model, path)

    here = world()
    here.lead("The dense model", train)
    here.spread(value for value in model.state_dict().values() if isinstance(value, Tensor))
    return model.eval()
