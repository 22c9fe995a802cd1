"""Batch-norm statistics, measured again after a cut: they were taken from signals that are no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cria_prune.batches import Batch, batch_size, forward, joined, move
from cria_prune.modules import copy_of, device_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
ENOUGH = 32
"""Examples in a batch whose own variance stands for all."""


def remeasure(model: nn.Module, batches: Iterable[Batch]) -> tuple[nn.Module, int]:
    """Return a copy of a model whose batch norms hold the mean statistics of these batches, and how many do.

    No weight changes. Every other module is in eval mode meanwhile, and a batch norm normalises by the batch
    itself, so that those behind it see what they will see. Batch norms that keep no statistics, synchronised
    ones, and those that no batch reaches are left alone; without any other the batches are not read. Fewer
    than 32 examples say less than the statistics that are there: then nothing is measured.

    Args:
        model: it is left as it was.
        batches: as its forward takes them. Small ones are joined to 32 examples where their shapes allow it,
            and left out otherwise.

    Raises:
        DataError: the forward refuses a batch.
    """
    measured = copy_of(model)
    norms: list[Any] = [item for item in measured.modules() if _keeps_statistics(item)]
    if not norms:
        return measured, 0
    modes = [item.training for item in measured.modules()]
    before = [(item.momentum, {key: getattr(item, key).clone() for key in STATISTICS}) for item in norms]
    measured.eval()
    for item in norms:
        item.reset_running_stats()
        item.momentum = None  # the plain mean over the batches
        item.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a shuffling loader draws from the generator
        for batch in joined(batches, ENOUGH):
            if batch_size(batch) >= ENOUGH:
                forward(measured, move(batch, device_of(measured)))
    reached = [bool(item.num_batches_tracked) for item in norms]
    for item, (momentum, kept), seen in zip(norms, before, reached, strict=True):
        item.momentum = momentum
        for key in STATISTICS[2:] if seen else STATISTICS:
            getattr(item, key).copy_(kept[key])
    for item, training in zip(measured.modules(), modes, strict=True):
        item.training = training
    return measured, sum(reached)


def _keeps_statistics(module: nn.Module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    return norm and module.running_mean is not None
