"""Image classification from arrays in memory: batches, augmentation, splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune.base.batches import Batch
from cria_prune.base.events import passed
from cria_prune.base.progress import Progress
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import Task


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


@dataclass(eq=False)
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

    images: Images
    scaling: Scaling
    index: Tensor
    batch_size: int
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        chunks = self.index.to(self.images.pixels.device).split(self.batch_size)
        self.chunks = [chunk for chunk in chunks if len(chunk)]

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

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the trained dense model in eval mode."""
        passed("dense", task=self.name, seed=seed)
        return self.make_dense(self, seed, progress).eval()

    def training(self, device: torch.device | str) -> Images:
        """Return the train split on the device."""
        images: Images = self.split("train")
        return images.to(device)

    def epoch(self, data: Images, seed: int, batch_size: int, augment: bool) -> Iterable[Batch]:
        """Return shuffled batches; a rest of one example is left out (batch norm needs two)."""
        index = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        if len(index) % batch_size == 1 and len(index) > 1:
            index = index[:-1]
        return ImageBatches(data, self.scaling, index, batch_size, self._augment if augment else None, seed)

    def _augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        return augment(pixels, self.shift, self.flip, generator)

    def chosen(self, data: Images, index: Tensor, seed: int | None = None) -> Iterable[Batch]:
        """Return batches of 128 examples to calibrate on, of 500 to measure on."""
        return ImageBatches(data, self.scaling, index, 500 if seed is None else 128)

    def tensors(self, data: Images) -> Iterable[Tensor]:
        """Return the pixels and the labels."""
        return data.pixels, data.labels
