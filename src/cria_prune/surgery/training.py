"""A training-mode forward of a model: does the code that only training runs still fit after a cut?

Batch norms take their statistics from the batch and dropout draws: what a seed does not make equal on both
sides is compared by its shapes alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import Batch, map_tensors, model_inputs, ran_out
from cria_prune.base.errors import said
from cria_prune.base.modules import cache_off, random_kept, shared_copy, state_kept

Difference = Callable[[list[Tensor], list[Tensor]], float]


def training_outputs(model: nn.Module, batch: Batch, seed: int = 0) -> list[Tensor]:
    """Return the tensors of a model's output in training mode, without gradients; the model is as before.

    Raises:
        Exception: whatever the forward raises.
    """
    args, kwargs = model_inputs(map_tensors(batch, torch.clone))  # a forward may write into its input
    running = shared_copy(model)  # buffers are its own
    with cache_off(running), random_kept(), torch.no_grad(), state_kept(running):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        found = running.train()(*args, **kwargs)
        # An output may be a weight, which is put back.
        return [item.clone() for item in tree_leaves(found) if isinstance(item, Tensor)]


class Training:
    """Whether and how a dense model runs in training mode.

    Args:
        model: the dense model.
        batches: examples; the first that its training-mode forward accepts is used.

    Attributes:
        batch: that one; None where it accepts none.
        reason: why it did not accept the first.
        chance: its outputs depend on a seed.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self.batch: Batch | None = None
        self.reason, self.chance = "", False
        for batch in batches:
            try:
                outputs = [training_outputs(model, batch, seed) for seed in (0, 1)]
            except Exception as error:  # whatever the forward raises where it lacks its targets
                if ran_out(error):
                    raise
                self.reason = self.reason or said(error)
                continue
            self.batch = batch
            pairs = zip(*outputs, strict=True)
            self.chance = not all(torch.equal(one, other) for one, other in pairs)
            break

    def is_sensitive(self, model: nn.Module, apart: float, difference: Difference) -> bool:
        """Say whether rounding alone can make a difference of this size.

        Where a batch norm sees two values of a channel, it makes 1 and -1 of them, however near they are.
        """
        assert self.batch is not None

        def moved(item: Tensor) -> Tensor:
            return item * (1 + 8 * torch.finfo(item.dtype).eps) if item.is_floating_point() else item

        dense, near = (training_outputs(model, item) for item in (self.batch, map_tensors(self.batch, moved)))
        return 1000 * difference(dense, near) > apart
