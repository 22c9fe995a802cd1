"""An ONNX file with its weights in int8: onnxruntime's dynamic quantisation, compared by fidelity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, map_tensors
from cria_prune.base.errors import ArtifactError, needed, said
from cria_prune.base.inputs import like_a_mask
from cria_prune.base.modules import cache_off
from cria_prune.deploy.onnx import calm
from cria_prune.deploy.session import EXTRA, Flat, OnnxModule, tensors_of, tried
from cria_prune.repair.fidelity import Fidelity, fidelity

VARIED = 8
"""Batches that are made of one example, where there are no other data."""


@dataclass(frozen=True)
class Int8Export:
    """What was quantised, and how far it is from the float network; prints as one line.

    Attributes:
        bytes: of the file.
        layers: products that are computed in int8.
        fidelity: the distance from the network in torch.
        measured_on: what the distance was measured on, in words.
    """

    bytes: int
    layers: int
    fidelity: Fidelity
    measured_on: str

    def __str__(self) -> str:
        return (
            f"{self.layers} products in int8, {self.bytes:,} bytes; from the float network, on "
            f"{self.measured_on}: {self.fidelity}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        said = {"bytes": self.bytes, "layers": self.layers, "measured_on": self.measured_on}
        return {**said, "fidelity": self.fidelity.to_dict()}


def quantize_file(source: Path, path: Path) -> int:
    """Write an ONNX file with weights in int8, one scale for each output channel; return the products in it.

    The activations are quantised as they come, so that no data are needed. Embeddings are stored in int8 too.

    Raises:
        ArtifactError: onnxruntime stops at something, or nothing in the file can be quantised.
        PackageError: onnx or onnxruntime is not installed.
    """
    asked = "Quantising an ONNX file to int8"
    with needed(EXTRA, asked):
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    large = source.with_name(f"{source.name}.data").exists()
    try:
        with calm():
            quantize_dynamic(
                source, path, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=large
            )
        kinds = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    except Exception as error:  # whatever a quantiser meets in a graph
        raise ArtifactError(asked, f"onnxruntime stops with {said(error)}", "Serve the float file") from error
    layers = sum(
        kind in ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "QAttention") for kind in kinds
    )
    if not layers:
        path.unlink()
        raise ArtifactError(asked, "it holds no product of an input with weights", "Serve the float file")
    return layers


def compared(
    model: nn.Module, path: Path, example: Batch, batches: Iterable[Batch] | None
) -> tuple[Fidelity, str]:
    """Return how far a file is from the network it was made of, and what that was measured on.

    Args:
        model: in float32 on the CPU.
        path: of the file.
        example: as it was exported with; batches of its form are made of it where there are none.
        batches: as the network takes them.

    Raises:
        DataError, SignalError: see `repair.fidelity.fidelity`.
    """
    made = batches is None
    given = list(varied(model, example)) if batches is None else batches
    with cache_off(model):
        found = fidelity(model, OnnxModule(path, order=Flat(model, example).names), given)
    return found, f"{found.examples} examples" + (
        " made of the one that it was exported with" if made else ""
    )


def varied(model: nn.Module, example: Batch) -> Iterator[Batch]:
    """Yield batches like an example, their values in other places; masks stay. What does not run is left out.

    Values in other places are values that the network takes, tokens and pixels alike.
    """
    draw = torch.Generator().manual_seed(0)

    def shuffled(item: Tensor) -> Tensor:
        if item.numel() < 2 or like_a_mask(item):
            return item
        return item.flatten()[torch.randperm(item.numel(), generator=draw)].view(item.shape)

    yield example
    for _ in range(VARIED - 1):
        made = map_tensors(example, shuffled)
        if not tried(Flat(model, made), tensors_of(made)):
            yield made
