"""The default loss, and the logits that it needs from a model's output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from cria_prune.batches import Batch, batch_target, describe, model_inputs
from cria_prune.errors import DataError

Loss = Callable[[nn.Module, Batch], Tensor]


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, an object with `.logits`, or a tuple's first item.

    Raises:
        DataError: the output is of another kind.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise DataError(
        "The logits of the model",
        f"its output is {describe(output)}",
        "Return a tensor, an object with `.logits`, or a tuple that starts with the logits",
    )


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy (nats) of the logits (batch, classes) against targets (batch,).

    A model whose forward takes the `labels` of a mapping and gives a loss, as those of transformers do, is
    asked for its own: a causal language model shifts its labels and leaves out those of -100.

    Raises:
        DataError: the batch holds no target.
    """
    target = batch_target(batch)
    if target is None:
        raise DataError(
            "The cross-entropy of a batch",
            f"found no target in {describe(batch)}",
            "Pass (inputs, target) pairs or mappings with labels, or your own loss(model, batch)",
        )
    args, kwargs = model_inputs(batch)
    own = isinstance(batch, Mapping) and "labels" in batch and takes_labels(model)
    output = model(*args, **kwargs, **({"labels": target} if own else {}))
    found = getattr(output, "loss", None)
    if own and isinstance(found, Tensor):
        return found
    return functional.cross_entropy(logits_of(output), target)


def takes_labels(model: nn.Module) -> bool:
    """Say whether the model's forward has an argument `labels`."""
    return "labels" in inspect.signature(model.forward).parameters
