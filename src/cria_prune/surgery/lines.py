"""A consumer's weight by the features that it reads, whichever dimension they lie along."""

from __future__ import annotations

import torch
from torch import Tensor


class Lines:
    """The weights that read each feature; what is added goes into the weight itself.

    Args:
        weight: the consumer's weight.
        dim: along which the features lie.
        positions: (n,) int64, where along it feature 0, 1, ... lies.
    """

    def __init__(self, weight: Tensor, dim: int, positions: Tensor) -> None:
        self._view = weight.movedim(dim, 0)
        self._positions = positions.to(weight.device)
        self.shape = self._view.shape[1:]

    def read(self, features: Tensor, device: torch.device) -> Tensor:
        """Return the weights of features (b,): (b, outputs times kernel places) float64 on a device."""
        return self._view[self._where(features)].flatten(1).to(device, torch.float64)

    def add(self, features: Tensor, update: Tensor) -> None:
        """Add an update (b, outputs times kernel places) float64; each weight is rounded once."""
        total = self.read(features, update.device).add_(update)  # what is read is a copy
        self._view[self._where(features)] = total.reshape(len(features), *self.shape).to(self._view)

    def _where(self, features: Tensor) -> Tensor:
        return self._positions[features.to(self._positions.device)]
