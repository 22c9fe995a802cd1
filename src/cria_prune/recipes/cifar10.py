"""CIFAR-10 from parquet files, and the published CIFAR ResNets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cria_prune.base.errors import ArtifactError, DataError, needed
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import data_file
from cria_prune.tasks.images import Images, ImageTask, Scaling
from cria_prune.tasks.models import build

TRAIN_FILES = tuple(f"data/cifar10/train-0000{part}-of-00003.parquet" for part in range(3))
TEST_FILES = ("data/cifar10/test-00000-of-00001.parquet",)
VALIDATION = 2000
SPLIT_SEED = 0

DATA_LAYOUT = (
    "Expected: data/cifar10/train-0000{0,1,2}-of-00003.parquet and data/cifar10/test-00000-of-00001.parquet "
    "with the columns img (PNG bytes) and label, as in the data set uoft-cs/cifar10 of the Hugging Face hub"
)
WEIGHTS_LAYOUT = (
    "Expected: models/cifar10-resnet20.safetensors or -resnet56.safetensors, the public CIFAR ResNets of "
    "Yerlan Idelbayev (pytorch_resnet_cifar10) with the names conv1, bn1, layer1.0.conv1, ..., linear"
)


def cifar10_task(depth: int) -> ImageTask:
    """Return the CIFAR-10 task with a ResNet of depth 20 or 56.

    48,000 train images, 2,000 validation images (a fixed random part of the published train split), 10,000
    test images (3, 32, 32). The published weights have seen the validation images, so the accuracy there is
    above that on the test split; it serves to compare epochs, not as a figure.
    """
    return ImageTask(
        name=f"cifar10-resnet{depth}",
        architecture=f"cifar10-resnet{depth}",
        example=torch.zeros(2, 3, 32, 32),
        scaling=Scaling(top=255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        load=_load,
        make_dense=lambda _task, _seed, _progress: dense_model(depth),
        recover_defaults=RecoverConfig(epochs=3, lr=0.05),
        batch_size=128,
        shift=4,
        flip=True,
    )


def dense_model(depth: int) -> nn.Module:
    """Return the published ResNet of depth 20 or 56 in eval mode.

    Raises:
        ConfigError: no such depth.
        DataError: the file of weights is not there.
        ArtifactError: the file is not safetensors, or its tensors are not this network's.
    """
    model = build(f"cifar10-resnet{depth}")
    load_weights(model, data_file(f"models/cifar10-resnet{depth}.safetensors", WEIGHTS_LAYOUT))
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a safetensors file into the model; names and shapes must match exactly.

    Raises:
        ArtifactError: the file is not safetensors, or its tensors are not this network's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ArtifactError(
            f"The weights in {path}",
            text if len(text) < 300 else f"{text[:300]} ...",
            f"Pass the file that belongs to {type(model).__name__}. {WEIGHTS_LAYOUT}",
        ) from error


def read_images(path: Path) -> Images:
    """Return the images of one parquet file, (examples, 3, 32, 32); about 13,000 a second.

    Raises:
        DataError: the file is not parquet, or its columns or images are not CIFAR-10's.
    """
    with needed("recipes", "The images of CIFAR-10"):
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

    try:
        table = pq.read_table(path, columns=["img", "label"])
        blobs = table["img"].combine_chunks().field("bytes").to_pylist()
        pixels = np.empty((len(blobs), 32, 32, 3), np.uint8)
        for row, blob in enumerate(blobs):
            with Image.open(io.BytesIO(blob), formats=["PNG"]) as image:
                if image.size != (32, 32):
                    raise ValueError(f"image {row} is {image.size[0]} x {image.size[1]} pixels, not 32 x 32")
                pixels[row] = np.asarray(image.convert("RGB"))
        labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
        if not len(labels) or labels.min() < 0 or labels.max() > 9:
            raise ValueError("the labels are not 0 to 9")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"CIFAR-10 images from {path}", str(error), DATA_LAYOUT) from error
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)


def _load(name: str) -> dict[str, Images]:
    files = TEST_FILES if name == "test" else TRAIN_FILES
    parts = [read_images(path) for path in [data_file(relative, DATA_LAYOUT) for relative in files]]
    images = Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))
    if name == "test":
        return {"test": images}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held = order[:-VALIDATION], order[-VALIDATION:]
    return {"train": images.rows(train), "validation": images.rows(held)}
