"""First-order Taylor importance: what the gradients say of each unit.

Legend: d = units of a group, w = its parameters, g = their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune.batches import Batch, batch_target, model_inputs
from cria_prune.errors import CriterionError
from cria_prune.structure.groups import UnitGroup

Loss = Callable[[nn.Module, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the model's logits and the batch's target, the default loss.

    The logits are the model's output, its `logits`, or the first item of a tuple.

    Raises:
        CriterionError: the batch has no target.
    """
    target = batch_target(batch)
    if target is None:
        raise CriterionError(
            "Recording with gradients",
            "a batch has no target for the default loss, cross-entropy",
            "Pass (inputs, target) batches, or your own loss=f(model, batch)",
        )
    args, kwargs = model_inputs(batch)
    output = model(*args, **kwargs)
    logits: Any = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    return functional.cross_entropy(logits, target)


class TaylorSums:
    """Adds up (Σ g·w)² per unit over batches: the loss that zeroing all its parameters would change, squared.

    This is the first-order importance of Molchanov et al., "Importance Estimation for Neural Network
    Pruning", CVPR 2019 (arXiv 1906.10771, section 3.1), in its group form: the parameters of a unit
    are summed before the square, and the squares over batches. A unit's parameters are those that
    produce it or follow it (filters, biases, batch norm scale and shift), not its consumers'.

    Args:
        model: the live model; `requires_grad` of the parameters is switched on, the caller puts it back.
        groups: the groups to score.
        loss: (model, batch) to a scalar.
    """

    def __init__(self, model: nn.Module, groups: Iterable[UnitGroup], loss: Loss) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._model, self._loss = model, loss
        self._slices = {
            group.name: [
                item for item in group.slices if item.role != "consumes" and item.tensor in parameters
            ]
            for group in groups
        }
        names = dict.fromkeys(item.tensor for slices in self._slices.values() for item in slices)
        self._parameters = {name: parameters[name].requires_grad_(True) for name in names}
        self.sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}

    def add(self, batch: Batch) -> None:
        """Run the loss of a batch backwards and add its squares; no `.grad` is written.

        Raises:
            CriterionError: the loss is not one number that depends on the parameters.
        """
        value = self._loss(self._model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise CriterionError(
                "Recording with gradients",
                "the loss is not a tensor of one element with a gradient",
                "Return the scalar loss of the batch, computed without torch.no_grad()",
            )
        gradients = torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
        products = {
            name: parameter.detach().double() * gradient.double()
            for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True)
            if gradient is not None
        }
        for name, slices in self._slices.items():
            total = torch.zeros_like(self.sums[name])
            for item in slices:
                if item.tensor in products:
                    product = products[item.tensor].movedim(item.dim, 0)
                    line = product.reshape(len(product), -1).sum(1).cpu()
                    total += line[torch.from_numpy(item.positions)].sum(1)
            self.sums[name] += total.square()
