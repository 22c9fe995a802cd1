"""What a task is: data in three splits, a metric, and a dense model to start from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, batch_target, describe, model_inputs, move
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.metrics import Loss, logits_of
from cria_prune.base.modules import device_of, modes_kept
from cria_prune.base.progress import Progress, track
from cria_prune.config import RecoverConfig
from cria_prune.recovery.guard import channels_last
from cria_prune.tasks.models import build

SPLITS = ("train", "validation", "test")
EpochBatches = Callable[[int], Iterable[Batch]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Task(ABC):
    """Data, metric and dense model of a recipe.

    Three splits that share no example: `train` for the fine-tune and the calibration, `validation` to choose
    the best epoch, `test` for the final figures only.

    Attributes:
        name: the task's name in `TASKS`.
        architecture: the dense model's name in `ARCHITECTURES`.
        load: split name -> that split, and others that come with it.
        batch_size: examples per batch of the fine-tune.
        example: inputs for capturing the model, (2, ...) each.
        metric: name of what `evaluate` returns; `base.metrics.metric` knows its direction.
        recover_defaults: the fine-tune that suits the task.
        prune_defaults: section of a PruneConfig -> values that suit the task better than its own.
        tokenizer: of the model; None where it reads no text.
        loss: (model, batch) -> scalar, of a fine-tune and of gradients; None: `base.metrics.cross_entropy`.
        pretrained: the model is one of transformers: results are saved as its folders.
        embeds: it is an encoder, which learns from the dense one alone; `loss` asks that one.
        reductions: shares that a run removes where none is asked for; the configuration's if empty.
        options: how this task differs from the recipe of its name, plain JSON: `task(name, **options)`
            makes it again.
        lacking: why nothing is measured where that is so, and what to do.
        notes: what a user has to know of the data, a line each.
        named: options that a command on a checkpoint needs, to know the task again.
    """

    name: str
    architecture: str
    load: Callable[[str], Mapping[str, Any]]
    batch_size: int
    example: Batch
    metric: str
    recover_defaults: RecoverConfig
    prune_defaults: Mapping[str, Mapping[str, Any]] = NOTHING
    options: Mapping[str, Any] = NOTHING
    tokenizer: Any = None
    loss: Loss | None = None
    pretrained: bool = False
    embeds: bool = False
    reductions: tuple[float, ...] = ()
    lacking: tuple[str, str] = ("the texts have no labels", "Give --dataset with a column label")
    notes: tuple[str, ...] = ()
    named: str = ""

    @abstractmethod
    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the trained dense model in eval mode: loaded, or trained from the seed on the spot."""

    def split(self, name: str) -> Any:
        """Return the examples of "train", "validation" or "test", of the kind that `load` gives.

        Raises:
            DataError: no such split, or its data are missing or of another kind.
        """
        if name not in SPLITS:
            raise DataError(f"A split of {self.name}", f"found {name!r}", f"Known: {', '.join(SPLITS)}")
        if name not in self._splits:
            self._splits.update(self.load(name))
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def epoch(self, data: Any, seed: int, batch_size: int, augment: bool) -> Iterable[Batch]:
        """Return shuffled batches of the train split, changed if `augment`; see `train_batches`."""

    @abstractmethod
    def chosen(self, data: Any, index: Tensor, seed: int | None = None) -> Iterable[Batch]:
        """Return batches of the examples `index` of a split, as they are.

        Args:
            data: the split.
            index: (examples,) int64.
            seed: that these examples were drawn by, to calibrate on; None to measure on them.
        """

    @abstractmethod
    def tensors(self, data: Any) -> Iterable[Tensor]:
        """Return what a fingerprint of a split is made of."""

    def count(self, data: Any) -> int:
        """Return how many examples a split has."""
        return len(data)

    def training(self, device: torch.device | str) -> Any:
        """Return the train split, on the device where that is worth its while."""
        return self.split("train")

    def train_batches(
        self,
        seed: int = 0,
        batch_size: int | None = None,
        augment: bool = True,
        device: torch.device | str = "cpu",
    ) -> EpochBatches:
        """Return a function from the epoch to its shuffled batches; the same seed gives the same batches.

        Args:
            seed: of the order and the augmentation.
            batch_size: examples; the task's own if None.
            augment: whether to change the examples from epoch to epoch.
            device: where images are moved and mirrored, with the same values; other batches are small, and
                come from the CPU.
        """
        size, data = batch_size or self.batch_size, cache(partial(self.training, device))
        return lambda epoch: self.epoch(data(), seed * 100_003 + epoch, size, augment)

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return the first `examples` of a seeded permutation of the train split, as they are.

        Raises:
            DataError: there are not so many.
        """
        data = self.split("train")
        return list(self.chosen(data, self.drawn(self.count(data), examples, seed), seed))

    def drawn(self, count: int, examples: int, seed: int) -> Tensor:
        """Return (examples,) int64, the first of a seeded permutation of `count` examples; see above."""
        passed("calibration", task=self.name, examples=examples)
        if not 1 <= examples <= count:
            raise DataError(
                f"{examples} calibration examples", f"{self.name} has {count}", "Ask for 1 to that many"
            )
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:examples]

    def validation_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the validation split, or its first `limit` examples; sentences with the short ones first."""
        return self._first("validation", limit)

    def test_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the test split, or its first `limit` examples; sentences with the short ones first."""
        return self._first("test", limit)

    def _first(self, name: str, limit: int | None) -> Iterable[Batch]:
        data = self.split(name)
        return self.chosen(data, torch.arange(self.count(data))[:limit])

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the splits' inputs and targets (of all three if none is named)."""
        parts = [self.split(name) for name in splits or SPLITS]
        return fingerprint(*(tensor for part in parts for tensor in self.tensors(part)))

    def compare_with(self, dense: nn.Module) -> None:
        """Take a network as the dense one that others are compared with, where the task does that."""
        return None

    @property
    def measured(self) -> bool:
        """Whether the test split can be measured on: it has what the metric needs."""
        return True

    @property
    def trainable(self) -> bool:
        """Whether there is what a fine-tune needs."""
        return self.measured

    @property
    def tested_on(self) -> str:
        """What the test split is, in words."""
        return "all test examples"

    def blank(self) -> nn.Module | None:
        """Return the dense network that a checkpoint is loaded into; None where the checkpoint names it."""
        return None

    def untrained(self) -> nn.Module:
        """Return a network of the dense model's structure, without waiting for a training."""
        return build(self.architecture).eval()

    def pretrained_source(self, scratch: Path) -> Path | None:
        """Return a folder with the tokenizer of the dense model, made in `scratch` if need be."""
        if self.tokenizer is None:
            return None
        self.tokenizer.save_pretrained(scratch)
        return scratch

    def real_example(self) -> Batch | None:
        """Return two examples of the data that a saved folder is certified on; None: made-up ones will do."""
        return None

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], progress: Progress | None = None) -> float:
        """Return the metric of the model on the batches."""
        return evaluate(model, batches, progress=progress)

    def further(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float | str]:
        """Return what else there is to say of a model: other metrics on the test split, a sample of text."""
        return {}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the accuracy of a classifier as a share of one.

    The model runs in eval mode without gradients; its modes are put back.

    Args:
        model: maps inputs to logits (batch, classes).
        batches: (inputs, target) pairs or mappings with labels, targets (batch,).
        device: where the batches go; where the model is if None. The model is not moved.
        progress: where to show how far it is; silent if None.

    Raises:
        DataError: there is no batch, or a batch has no target.
    """
    passed("evaluate", model=model)
    place = torch.device(device or device_of(model))
    right = seen = 0
    with modes_kept(model), channels_last(model) if place.type == "cpu" else nullcontext():
        model.eval()
        for batch in track(batches, label="evaluate", progress=progress):
            target = batch_target(batch)
            if target is None:
                raise DataError(
                    "An accuracy", f"found no target in {describe(batch)}", "Pass (inputs, target)"
                )
            args, kwargs = model_inputs(move(batch, place))
            found = logits_of(model(*args, **kwargs)).argmax(dim=-1)
            right += int((found == target.to(found.device)).sum())
            seen += target.numel()
    if not seen:
        raise DataError("An accuracy", "found no examples", "Pass at least one batch; an iterator runs out")
    return right / seen


def fingerprint(*tensors: Tensor) -> str:
    """Return the SHA-256, in hex, of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_root() -> Path:
    """Return the folder of data and models: the environment's CRIA_DATA, or ../shared."""
    return Path(os.environ.get("CRIA_DATA") or "../shared")


def data_file(relative: str, layout: str) -> Path:
    """Return the path of a data file under `data_root`; see `data_files`."""
    return data_files(relative, layout)[0]


def data_files(pattern: str, layout: str) -> list[Path]:
    """Return the files under `data_root` that fit a pattern, sorted.

    Args:
        pattern: path below the root; a `*` in the last part stands for anything.
        layout: how to get the files, for the error.

    Raises:
        DataError: there is no such file.
    """
    folder = data_root() / pattern
    found = sorted(path for path in folder.parent.glob(folder.name) if path.is_file())
    if not found:
        raise DataError(
            f"The file {pattern}",
            f"not found under {data_root()}",
            f"Set CRIA_DATA to a folder that holds it. {layout}",
        )
    return found
