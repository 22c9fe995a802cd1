"""What the whole experts of a layer do: how many tokens each got, and what it gave them.

Legend: E = experts of a layer, T = tokens of a batch, k = experts that each is sent to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.experts import grouped_experts
from cria_prune.graph.moments import Total
from cria_prune.structure.groups import UnitGroup


@dataclass(frozen=True, eq=False)
class Routed:
    """The experts of one layer, of the even examples and then of the odd ones.

    Attributes:
        module: that holds their weights.
        tokens: (2, E) float64, how many each got.
        given: (2, E) float64, the sum over these of router weight · ‖what the expert gave‖.
    """

    module: str
    tokens: Tensor
    given: Tensor

    @property
    def unreached(self) -> tuple[int, ...]:
        """The experts that got no token."""
        return tuple(torch.nonzero(self.tokens.sum(dim=0) == 0).ravel().tolist())


class RoutedSums:
    """Adds up what the experts of a model's layers do, while it runs in the way of `base.experts`.

    Args:
        model: the live model; it is only looked at.
        groups: those of whole experts are recorded, the others passed over.
    """

    def __init__(self, model: nn.Module, groups: Iterable[UnitGroup]) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        experts = {paths[id(module)]: module for module in grouped_experts(model)}
        self._sums: dict[str, Routed] = {}
        self._groups: dict[int, str] = {}
        for group in groups:
            if group.kind == "experts":
                owners = {item.tensor.rpartition(".")[0] for item in group.slices}
                path = next(path for path in experts if path in owners)
                nothing = torch.zeros(2, group.size * group.producers[0].positions.shape[1]).double()
                self._sums[group.name] = Routed(path, nothing, nothing.clone())
                self._groups[id(experts[path])] = group.name
        self.begin(0, 1, None)

    def begin(self, first: int, examples: int, mask: Tensor | None) -> None:
        """Say what comes next: the first example's index, how many, their attention mask (B, tokens)."""
        self._first, self._examples, self._mask = first, examples, mask

    def receive(self, module: Any, index: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add the tokens of one call.

        Args:
            module: the experts; index, weights: (T, k), where each token goes and with which weight.
            rows: (T, k, width), what its experts give it.
        """
        name = self._groups.get(id(module))
        if name is None:
            return
        sums, tokens = self._sums[name], len(index)
        with torch.no_grad():
            gives = (weights.double().abs() * rows.double().norm(dim=-1)).cpu()
            index = index.cpu()
            # The tokens of an example follow one another; where they do not, each is one of its own.
            each = tokens // self._examples if tokens % self._examples == 0 else 1
            half = (torch.arange(tokens) // max(each, 1) + self._first) % 2
            used = torch.ones(tokens, dtype=torch.bool)
            if self._mask is not None and self._mask.numel() == tokens:
                used = self._mask.reshape(-1).bool().cpu()
            for number in (0, 1):
                chosen = used & (half == number)
                places = index[chosen].reshape(-1)
                sums.tokens[number].index_add_(0, places, torch.ones(len(places)).double())
                sums.given[number].index_add_(0, places, gives[chosen].reshape(-1))

    def pool(self, total: Total) -> None:
        """Take in what all processes have added up."""
        self._sums = {
            name: Routed(item.module, total(item.tokens).cpu(), total(item.given).cpu())
            for name, item in self._sums.items()
        }

    def found(self) -> dict[str, Routed]:
        """Return group name -> what its experts did."""
        return self._sums
