"""What gradients say of each unit: first-order Taylor importance, and Fisher's, per example."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import CriterionError
from cria_prune.base.metrics import Loss
from cria_prune.structure.groups import ParameterSlice, Site, Tap, UnitGroup


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
        # No `.grad` is written: the caller's own gradients stay. A branch that did not run gives None.
        gradients = torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
        products = {
            name: parameter.detach().double() * gradient.double()
            for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True)
            if gradient is not None
        }
        for name, slices in self._slices.items():
            # All parameters of the unit are added before the square:
            # their sum is what the loss changes by, to first order.
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


class FisherSums:
    """Adds up, over examples, (Σ x · ∂L/∂x)² of each unit: its gate's empirical Fisher information.

    Theis et al. 2018 (arXiv 1801.05787) and Liu et al. 2021 ("Group Fisher Pruning", arXiv
    2108.00708): the sum is over all positions and features of the unit before the square, and
    over examples after it. x is the input-side signal, the one whose Σ g·w `TaylorSums` takes: with
    batches of one example both are equal. The cited works put the gate behind the activation; before and
    behind a ReLU x · ∂L/∂x is the same.

    Per-example gradients come from one backward pass of the batch: an example's positions of x act on its
    own loss alone, as the model runs in evaluation mode. The loss has to be a mean over the examples, so an
    example's gradient is B times that of the batch; of a mean over tokens, each example takes its part.

    Args:
        groups: the groups to score.
    """

    def __init__(self, groups: Iterable[UnitGroup]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._taps: dict[tuple[str, Site], list[tuple[str, Tap]]] = {}
        for group in groups:
            self.sums[group.name] = torch.zeros(group.size, dtype=torch.float64)
            for tap in group.inputs:
                self._taps.setdefault((tap.tensor, tap.site), []).append((group.name, tap))
        self.begin(1)

    def begin(self, examples: int) -> None:
        """Say how many examples come next."""
        self._examples = examples
        self._firsts: dict[str, Tensor] = {}  # group -> (B, d) float64, Σ x · ∂L/∂x of each example

    def watch(self, name: str, site: Site, signal: Tensor) -> Tensor:
        """Keep a signal that has just been made, (rows, ...), until its gradient comes.

        Returns:
            A copy for the model to go on with: an activation may overwrite it in place, and of a view, as
            a linear layer of tokens returns, no hook would then be called.

        Raises:
            CriterionError: the rows of the signal do not go by examples.
        """
        if (name, site) not in self._taps or not signal.requires_grad:
            return signal
        if len(signal) % self._examples:
            raise CriterionError(
                f"Per-example gradients at {name!r}",
                f"the signal has {len(signal)} rows for {self._examples} examples: they share it",
                "Pass batches of one example, or use 'taylor', which takes the gradient of a batch",
            )
        # With tokens first and examples second, a row would be the same token of all examples.
        if signal.ndim > 2 and len(signal) != self._examples == signal.shape[1]:
            raise CriterionError(
                f"Per-example gradients at {name!r}",
                f"the signal is {tuple(signal.shape)}: its second dimension goes by the "
                f"{self._examples} examples",
                "Use a layout with the examples first, or 'taylor', which takes the gradient of a batch",
            )
        # The signal itself cannot be kept: an activation may
        # overwrite it, and x · ∂L/∂x needs both as they were.
        held, copy = signal.detach(), signal.clone()
        copy.register_hook(lambda gradient: self._add(name, site, held, gradient))
        return copy

    def finish(self) -> None:
        """Square what the backward pass of the batch has left, and forget it."""
        for name, first in self._firsts.items():
            # The loss is a mean over the batch, so each example's own gradient is B times what came back.
            self.sums[name] += (first * self._examples).square().sum(dim=0)
        self._firsts = {}

    def _add(self, name: str, site: Site, signal: Tensor, gradient: Tensor) -> None:
        """Add Σ x · ∂L/∂x over positions and features to every group that reads this signal."""
        if signal.dtype not in (torch.float32, torch.float64):
            signal, gradient = signal.float(), gradient.float()
        product = signal * gradient
        by_dim: dict[int, Tensor] = {}
        for group, tap in self._taps[name, site]:
            # Groups may read one signal along one dimension: its sums over positions are taken once.
            if tap.dim not in by_dim:
                rows = product.movedim(tap.dim, 1)
                rows = rows.reshape(self._examples, len(rows) // self._examples, rows.shape[1], -1)
                by_dim[tap.dim] = rows.sum(dim=(1, 3), dtype=torch.float64).cpu()
            first = by_dim[tap.dim][:, torch.from_numpy(tap.positions)].sum(dim=2)
            self._firsts[group] = self._firsts[group] + first if group in self._firsts else first
