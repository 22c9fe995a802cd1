"""Batch-norm statistics, measured again after a cut: they were taken from signals that are no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cria_prune.batches import Batch, forward, move
from cria_prune.errors import DataError
from cria_prune.modules import copy_of, device_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def remeasure(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """Return a copy of a model whose batch norms hold the mean statistics of these batches.

    No weight changes. Every other module is in eval mode meanwhile, and a batch norm normalises by the batch
    itself, so that those behind it see what they will see. Batch norms that keep no statistics, and those
    that no batch reaches, are left alone; without any that keeps them the batches are not read.

    Args:
        model: it is left as it was.
        batches: as its forward takes them; of many examples each, for a batch's variance is what counts.

    Raises:
        DataError: there is no batch, a batch is too small to have a variance, or the forward refuses it.
    """
    measured = copy_of(model).eval()
    norms: list[Any] = [item for item in measured.modules() if _keeps_statistics(item)]
    if not norms:
        return measured.train(model.training)
    before = [(item.momentum, {key: getattr(item, key).clone() for key in STATISTICS}) for item in norms]
    for item in norms:
        item.reset_running_stats()
        item.momentum = None  # the plain mean over the batches
        item.train()
    seen = False
    with torch.no_grad():
        for batch in batches:
            forward(measured, move(batch, device_of(measured)))
            seen = True
    if not seen:
        raise DataError("Measuring batch norms again", "found no batch", "Pass at least one batch")
    for item, (momentum, kept) in zip(norms, before, strict=True):
        item.momentum = momentum
        reached = bool(item.num_batches_tracked)
        for key in STATISTICS if not reached else STATISTICS[2:]:
            getattr(item, key).copy_(kept[key])
    for old, new in zip(model.modules(), measured.modules(), strict=True):
        new.training = old.training
    return measured


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
