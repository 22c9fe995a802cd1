"""Batch-norm statistics, measured again after a cut: they were taken from signals that are no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cria_prune.base.batches import Batch, batch_size, forward, joined, map_tensors
from cria_prune.base.errors import CriaError
from cria_prune.base.events import passed
from cria_prune.base.modules import copy_of, device_of, unchanged

ENOUGH = 32
"""Examples in a batch whose own variance stands for all."""


@dataclass(frozen=True)
class Remeasured:
    """What became of a model's batch norms.

    Attributes:
        model: a copy, with the new statistics; the model itself where it was left as it was.
        norms: how many have new ones.
        reason: why none has, where the model has some.
    """

    model: nn.Module
    norms: int
    reason: str = ""


def remeasure(model: nn.Module, batches: Iterable[Batch]) -> Remeasured:
    """Return a copy of a model whose batch norms hold the mean statistics of these batches.

    Nothing else changes. Every other module is in eval mode meanwhile, and a batch norm normalises by the
    batch itself, so that those behind it see what they will see. Batch norms that keep no statistics,
    synchronised ones, frozen ones and those that no batch reaches are left alone; without any other the
    batches are not read. Fewer than 32 examples say less than the statistics that are there: then nothing is
    measured, nor where a batch cannot be run so, for a norm that sees one value per channel or for memory.

    Args:
        model: it is left as it was.
        batches: as its forward takes them. Small ones are joined to 32 examples where their shapes allow it,
            and left out otherwise.
    """
    passed("norms", model=model)
    measured = copy_of(model)
    norms = batch_norms(measured)
    if not norms:
        return Remeasured(measured, 0)
    # The pass may write other buffers too (counters, caches):
    # all of them but the new statistics are put back.
    buffers = [(buffer, buffer.clone()) for buffer in measured.buffers()]
    momenta = [item.momentum for item in norms]
    reason = ""
    try:
        _measure(measured, norms, batches)
    except CriaError as error:
        reason = error.found
    reached = [] if reason else [item for item in norms if item.num_batches_tracked]
    new = {id(tensor) for item in reached for tensor in (item.running_mean, item.running_var)}
    for buffer, before in buffers:
        if id(buffer) not in new:
            buffer.copy_(before)
    for item, momentum in zip(norms, momenta, strict=True):
        item.momentum = momentum
    if not reached:
        reason = reason or f"there are no {ENOUGH} examples of one shape that reach them"
    return Remeasured(measured, len(reached), reason)


def _measure(model: nn.Module, norms: list[Any], batches: Iterable[Batch]) -> None:
    """Let the norms take the plain mean over the batches; a frozen one goes on with the statistics it has."""
    device = device_of(model)
    with unchanged(model), torch.no_grad():
        model.eval()
        for item in norms:
            item.num_batches_tracked.zero_()  # the first batch then replaces what is there
            # Without momentum a batch norm takes the plain mean over the batches, each as much as the others.
            item.momentum = None
            item.train()
        for batch in joined(batches, ENOUGH):
            # A smaller batch's variance would count as much as a whole one's.
            if batch_size(batch) >= ENOUGH:
                # A copy: a forward may write into its input.
                forward(model, map_tensors(batch, lambda item: item.to(device, copy=True)))


def batch_norms(model: nn.Module) -> list[Any]:
    """Return the batch norms of a model that keep statistics of their own process."""
    return [
        item
        for item in model.modules()
        if isinstance(item, nn.modules.batchnorm._BatchNorm)
        and not isinstance(item, nn.SyncBatchNorm)
        and item.running_mean is not None
        and item.num_batches_tracked is not None
    ]
