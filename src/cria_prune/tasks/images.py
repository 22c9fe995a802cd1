"""Image classification from arrays in memory: batches, augmentation, splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune.base.batches import Batch
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.progress import Progress
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import EpochBatches, Task, fingerprint

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Images:
    """Images of one split: `pixels` (examples, channels, height, width) uint8, `labels` (examples,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def rows(self, index: Tensor | slice) -> Images:
        """Return the images at `index`."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Scaling:
    """Pixel values as the model sees them: (pixel / top - mean) / std, per channel."""

    top: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 images (batch, channels, height, width) of uint8 pixels of that shape."""
        mean, std = (
            torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (self.mean, self.std)
        )
        top = torch.tensor(float(self.top), device=pixels.device)  # CUDA multiplies by 1 / a Python number
        return (pixels.float() / top - mean) / std


def augment(pixels: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Move every image by up to `shift` pixels (black comes in) and mirror half of them.

    Args:
        pixels: (batch, channels, height, width), any type, on any device.
        shift: largest move along each axis, in pixels.
        flip: whether to mirror left and right.
        generator: draws the moves and the mirrored images, on the CPU: the same ones for every device.
    """
    count, _, height, width = pixels.shape
    padded = functional.pad(pixels, (shift,) * 4)
    rows, columns = (
        torch.randint(2 * shift + 1, (count, 1), generator=generator) + torch.arange(size)
        for size in (height, width)
    )
    if flip:
        mirrored = torch.randint(2, (count, 1), generator=generator).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    example = torch.arange(count, device=pixels.device).view(-1, 1, 1)
    return padded[example, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ImageBatches:
    """Batches (images, labels) in the order of `index`, made anew on every pass.

    Args:
        images: the split, on the device where the batches are made.
        scaling: pixels to inputs.
        index: (examples,) rows to take, in this order.
        batch_size: examples per batch; the last batch holds the rest.
        change: applied to each batch's pixels with the generator of `seed`; None leaves them as they are.
        seed: of that generator, started anew on every pass.
    """

    def __init__(
        self,
        images: Images,
        scaling: Scaling,
        index: Tensor,
        batch_size: int,
        change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.scaling, self.change, self.seed = images, scaling, change, seed
        self.chunks = [chunk for chunk in index.to(images.pixels.device).split(batch_size) if len(chunk)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        for chunk in self.chunks:
            batch = self.images.rows(chunk)
            pixels = batch.pixels if self.change is None else self.change(batch.pixels, generator)
            yield self.scaling(pixels), batch.labels


@dataclass(eq=False)
class ImageTask(Task):
    """A task on images in memory; the splits are loaded when first asked for, and kept.

    Args:
        name: the task's name.
        architecture: the dense model's name in `ARCHITECTURES`.
        example: (2, channels, height, width) float32.
        scaling: pixels to inputs.
        load: split name -> that split, and others that come with it.
        make_dense: (task, seed, progress) -> the trained dense model.
        recover_defaults: the fine-tune that suits the task.
        batch_size: of training; evaluation takes 500.
        shift: augmentation, in pixels.
        flip: augmentation, mirrored images.
    """

    name: str
    architecture: str
    example: Tensor = field(repr=False)
    scaling: Scaling
    load: Callable[[str], dict[str, Images]] = field(repr=False)
    make_dense: Callable[[ImageTask, int, Progress | None], nn.Module] = field(repr=False)
    recover_defaults: RecoverConfig
    batch_size: int = 128
    shift: int = 0
    flip: bool = False
    metric: str = "accuracy"
    _splits: dict[str, Images] = field(default_factory=dict, repr=False)

    def split(self, name: str) -> Images:
        """Return the images of "train", "validation" or "test".

        Raises:
            DataError: no such split, or its files are missing or of another kind.
        """
        if name not in SPLITS:
            raise DataError(f"A split of {self.name}", f"found {name!r}", f"Known: {', '.join(SPLITS)}")
        if name not in self._splits:
            self._splits.update(self.load(name))
        return self._splits[name]

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the trained dense model in eval mode."""
        passed("dense", task=self.name, seed=seed)
        return self.make_dense(self, seed, progress).eval()

    def train_batches(
        self,
        seed: int = 0,
        batch_size: int | None = None,
        augment: bool = True,
        device: torch.device | str = "cpu",
    ) -> EpochBatches:
        """Return epoch -> shuffled batches; a rest of one example is left out (batch norm needs two)."""
        size = batch_size or self.batch_size

        @cache
        def there() -> Images:
            return self.split("train").to(device)

        def epoch_batches(epoch: int) -> Iterable[Batch]:
            images = there()
            key = seed * 100_003 + epoch
            index = torch.randperm(len(images), generator=torch.Generator().manual_seed(key))
            if len(index) % size == 1 and len(index) > 1:
                index = index[:-1]
            return ImageBatches(images, self.scaling, index, size, self._augment if augment else None, key)

        return epoch_batches

    def _augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        return augment(pixels, self.shift, self.flip, generator)

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return the first `examples` of a seeded permutation of the train split, 128 per batch."""
        images = self.split("train")
        index = self.drawn(len(images), examples, seed)
        return list(ImageBatches(images, self.scaling, index, 128))

    def validation_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the validation split, or its first `limit` examples, in order."""
        return self._in_order("validation", limit)

    def test_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the test split, or its first `limit` examples, in order."""
        return self._in_order("test", limit)

    def _in_order(self, name: str, limit: int | None) -> Iterable[Batch]:
        images = self.split(name)
        return ImageBatches(images, self.scaling, torch.arange(len(images))[:limit], 500)

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the splits' pixels and labels (of all three if none is named)."""
        parts = [self.split(name) for name in splits or SPLITS]
        return fingerprint(*(tensor for part in parts for tensor in (part.pixels, part.labels)))
