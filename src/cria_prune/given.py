"""What a caller gives: calibration batches and a model, looked at before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from cria_prune.batches import Batch, batch_size, describe, move
from cria_prune.errors import DataError, SignalError, StructureError
from cria_prune.record.collect import cut

EXAMPLES = 2
"""Examples in the batch that captures and verifies a model."""


def shortened(batch: Batch, device: torch.device) -> Batch:
    """Return the first two examples of a batch, on the device."""
    return move(cut(batch, batch_size(batch), EXAMPLES), device)


def again(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Return batches that can be gone through once per round; an iterator is read into a list."""
    if isinstance(batches, (torch.Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise DataError(
            "Calibration batches", f"found {describe(batches)}", "Pass a list or loader of batches"
        )
    return list(batches) if iter(batches) is batches else batches


def first_examples(batches: Iterable[Batch], device: torch.device) -> Batch:
    """Return the first examples of the first batch, on the device.

    Raises:
        DataError: there is no batch.
    """
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws from the global generator
        for batch in batches:
            return shortened(batch, device)
    raise DataError(
        "Calibration batches", "found none", "Pass at least one batch; a used-up iterator has none"
    )


def check_finite(model: nn.Module) -> None:
    """Raise SignalError, naming the tensor, if a parameter or buffer holds NaN or infinity.

    Raises:
        StructureError: a tensor has no values, as in a model that is offloaded.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise StructureError(
                f"Pruning {type(model).__name__} in memory", f"{name!r} has no values there",
                "Load the model into memory, or prune its folder with prune_offloaded (cria prune --offload)",
            )  # fmt: skip
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SignalError(
                f"The weights of {name!r}", "found NaN or infinity", "Prune a model whose weights are finite"
            )
