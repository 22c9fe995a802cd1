"""What a model's outputs are measured by: metrics with their direction, and the default loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from cria_prune.base.batches import Batch, batch_target, describe, model_inputs
from cria_prune.base.errors import DataError


def percent(share: float | None) -> str:
    """Return a share as per cent with two digits: 0.9339 is 93.39 %."""
    return "" if share is None else f"{share * 100:.2f} %"


@dataclass(frozen=True)
class Metric:
    """A metric by its name.

    Attributes:
        name: as in tables and JSON keys.
        higher_is_better: direction.
        share: whether its values are shares of one, written as per cent.
    """

    name: str
    higher_is_better: bool = True
    share: bool = False

    def better(self, new: float, old: float) -> bool:
        """Say whether `new` is at least as good as `old`."""
        return new >= old if self.higher_is_better else new <= old

    def text(self, value: float | None) -> str:
        """Return a value as a person reads it: `98.80 %`, or four digits; nothing for None."""
        return percent(value) if self.share or value is None else f"{value:.4g}"

    def change(self, before: float | None, after: float | None) -> str:
        """Return the way from one value to another: points for shares, a factor for perplexities.

        >>> metric("accuracy").change(0.9, 0.88), metric("perplexity-128").change(20.0, 25.0)
        ('-2.00 points', '1.250 times')
        """
        if before is None or after is None:
            return ""
        if self.share:
            return f"{(after - before) * 100:+.2f} points"
        factor = self.name.startswith("perplexity") and before > 0
        return f"{after / before:.3f} times" if factor else f"{after - before:+.4g}"


LOWER = " (lower is better)"
"""What the name of a metric of the user's ends with, where that is so."""


def metric(name: str) -> Metric:
    """Return what is known of a metric; of an unknown one, higher is better.

    `SHARES` are shares of one; a name that starts with one of `FALLING`, or ends with `LOWER`, is better when
    lower.
    """
    lower = name.startswith(FALLING) or name.endswith(LOWER)
    return Metric(name, higher_is_better=not lower, share=name in SHARES)


FALLING = ("perplexity", "loss", "wer")
SHARES = (
    "accuracy",
    "f1",
    "precision",
    "recall",
    "exact-match",
    "mean-iou",
    "retrieval",
    "wer",
    "neighbours",
)


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
    own = (
        isinstance(batch, Mapping)
        and "labels" in batch
        and "labels" in inspect.signature(model.forward).parameters
    )
    output = model(*args, **{**kwargs, **({"labels": target} if own else {})})
    found = getattr(output, "loss", None)
    if own and isinstance(found, Tensor):
        return found
    return functional.cross_entropy(logits_of(output), target)
