"""First-order Taylor importance: what the gradients say of each unit.

Legend: d = units of a group, w = its parameters, g = their gradients.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from cria_prune.batches import Batch
from cria_prune.errors import CriterionError
from cria_prune.loss import Loss
from cria_prune.structure.groups import ParameterSlice, UnitGroup


class TaylorSums:
    """Adds up (Σ g·w)² per unit over batches: the change of the loss if its signal were zero, squared.

    This is the first-order importance of Molchanov et al., "Importance Estimation for Neural Network
    Pruning", CVPR 2019 (arXiv 1906.10771, sections 3.1 and 3.2), summed over a unit's parameters before the
    square, and the squares over batches. The parameters are those of the operation that gives the unit's
    input-side signal: scale and shift of its batch norm where it has one, else weight and bias of its
    layer. Their Σ g·w is Σ (∂loss/∂x) x over that signal x; with both layers' it would count twice.

    Args:
        model: the live model; `requires_grad` of the parameters is switched on, the caller puts it back.
        groups: the groups to score.
        loss: (model, batch) to a scalar.
    """

    def __init__(self, model: nn.Module, groups: Iterable[UnitGroup], loss: Loss) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        groups = tuple(groups)
        self._model, self._loss = model, loss
        self._slices = {group.name: _signal_slices(group, parameters) for group in groups}
        names = dict.fromkeys(item.tensor for slices in self._slices.values() for item in slices)
        # A signal that no parameter makes last (a batch norm without scale): its gradient is computed only
        # on the way to the layer before it.
        bare = [group for group in groups if any(tap.tensor not in parameters for tap in group.inputs)]
        names |= dict.fromkeys(
            item.tensor for group in bare for item in group.producers if item.tensor in parameters
        )
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


def _signal_slices(group: UnitGroup, parameters: Container[str]) -> list[ParameterSlice]:
    """Return the slices of the parameters that last make the group's input-side signals."""
    makers = {tap.tensor.rpartition(".")[0] for tap in group.inputs}
    return [
        item
        for item in group.slices
        if item.role != "consumes" and item.tensor in parameters and item.tensor.rpartition(".")[0] in makers
    ]
