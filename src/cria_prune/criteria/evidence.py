"""What a criterion may look at: a group's weights, its signals, its gradients.

Legend: d = units of a group, n = positions along a tensor's dimension, width = features per unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cria_prune.base.errors import CriterionError, SignalError, StructureError
from cria_prune.graph.moments import DOUBLE, SINGLE, Moments
from cria_prune.recording.states import FeatureMoments
from cria_prune.structure.groups import ParameterSlice, UnitGroup

Steps = dict[str, int]
"""Step -> the most bytes that it holds beyond what was recorded; the steps follow one another."""


@dataclass(frozen=True)
class Sizes:
    """What is known of a group before anything is recorded: enough for the bytes that a criterion takes.

    Attributes:
        group: d units.
        shapes: of the model's tensors.
        columns: of the sketch of its signals; None where the covariance is kept.
    """

    group: UnitGroup
    shapes: Mapping[str, tuple[int, ...]]
    columns: int | None = None

    @property
    def units(self) -> int:
        """d."""
        return self.group.size

    def norms(self, *sides: Literal["producers", "consumers"]) -> int:
        """Return what norms of `UnitWeights` take: one weight in float64, a convolution's turned first."""
        most = 0
        for item in (item for side in sides for item in getattr(self.group, side)):
            shape = self.shapes[item.tensor]
            most = max(most, math.prod(shape) * (DOUBLE + (SINGLE if item.dim and len(shape) > 2 else 0)))
        return most


@dataclass(frozen=True, eq=False)
class ConsumerNorms:
    """The weights of one consumer, per feature that it reads.

    Attributes:
        item: the consumer's slice.
        square: (d, width) float64, ‖W[:, f]‖².
        mean_absolute: (d, width) float64, mean of |W[i, f]| over all else (output rows, kernel places).
    """

    item: ParameterSlice
    square: Tensor
    mean_absolute: Tensor


class UnitWeights:
    """The norms of a group's weights, per unit; computed when asked for, and once.

    Args:
        group: d units and their slices.
        tensors: name -> tensor of the live model; they are only read.
    """

    def __init__(self, group: UnitGroup, tensors: Mapping[str, Tensor]) -> None:
        self.group, self._tensors = group, tensors

    @cached_property
    def consumer_norm2(self) -> Tensor:
        """(d,) float64, ‖W_out[:, p]‖²: the squared weights of all consumers at each unit's positions."""
        return self._sum_powers(self.group.consumers, 2)

    @cached_property
    def producer_l1(self) -> Tensor:
        """(d,) float64, the sum of the absolute weights of each unit's producers."""
        return self._sum_powers(self.group.producers, 1)

    @cached_property
    def producer_l2(self) -> Tensor:
        """(d,) float64, the Euclidean norm of the weights of each unit's producers."""
        return self._sum_powers(self.group.producers, 2).sqrt()

    @cached_property
    def group_norm2(self) -> Tensor:
        """(d,) float64, the squared weights of a unit's producers, batch norms and consumers."""
        total = self._sum_powers(self.group.producers, 2) + self.consumer_norm2
        return total + self._sum_powers(self._batch_norm_scales, 2)

    @cached_property
    def batch_norm_scale(self) -> Tensor | None:
        """(d,) float64, the sum of |γ| over the batch norms that a unit passes; None without any."""
        scales = self._batch_norm_scales
        return self._sum_powers(scales, 1) if scales else None

    @cached_property
    def _batch_norm_scales(self) -> list[ParameterSlice]:
        """The scales of the batch norms that a unit passes.

        A batch norm is told by its running mean, which leaves with the unit as its scale does.
        """
        follow = {item.tensor: item for item in self.group.slices if item.role == "follows"}
        return [
            follow[name]
            for name in (f"{mean.removesuffix('running_mean')}weight" for mean in follow if _is_mean(mean))
            if name in follow
        ]

    def producer_rows(self) -> Iterator[Tensor]:
        """Yield the weights of each producer, (d, its weights per unit), as stored.

        The features of a unit lie in a row; biases are left out, as in the norms.
        """
        for item in self.group.producers:
            rows = self._rows(item)[torch.from_numpy(item.positions)].flatten(1)
            self._check_finite(item, rows)
            yield rows

    @cached_property
    def consumers(self) -> tuple[ConsumerNorms, ...]:
        """The norms of each consumer's weights, per feature."""
        found = []
        for item in self.group.consumers:
            square, absolute = (self._powers(item, order) for order in (2, 1))
            tensor = self._tensors[item.tensor]
            others = tensor.numel() // tensor.shape[item.dim]
            found.append(ConsumerNorms(item, square, absolute / others))
        return tuple(found)

    def _sum_powers(self, slices: Iterable[ParameterSlice], order: int) -> Tensor:
        """Sum |w|^order of each unit over slices: (d,) float64 on the CPU."""
        total = torch.zeros(self.group.size, dtype=torch.float64)
        for item in slices:
            total += self._powers(item, order).sum(dim=1)
        return total

    def _powers(self, item: ParameterSlice, order: int) -> Tensor:
        """Sum |w|^order at each position of a slice: (d, width) float64 on the CPU.

        Raises:
            StructureError: the slice does not fit the model.
            SignalError: a weight holds NaN or infinity.
        """
        # For all positions at once, then those of the units: a
        # copy of their rows would be as large as the weight.
        line = torch.linalg.vector_norm(self._rows(item), order, dim=1, dtype=torch.float64) ** order
        self._check_finite(item, line)
        return line.cpu()[torch.from_numpy(item.positions)]

    def _rows(self, item: ParameterSlice) -> Tensor:
        """Return all weights of a slice's tensor, (n, the rest): one row for each position, of any unit.

        Raises:
            StructureError: the slice does not fit the model.
        """
        tensor = self._tensors.get(item.tensor)
        if tensor is None or item.dim >= tensor.ndim or item.positions.max() >= tensor.shape[item.dim]:
            raise StructureError(
                f"The weights of group {self.group.name!r}",
                f"{item.tensor!r} is {None if tensor is None else tuple(tensor.shape)}, "
                f"and the group reaches position {item.positions.max()} of dimension {item.dim}",
                "Discover the unit groups of this model again",
            )
        return tensor.detach().movedim(item.dim, 0).reshape(tensor.shape[item.dim], -1)

    def _check_finite(self, item: ParameterSlice, values: Tensor) -> None:
        """Check numbers that were read off a slice.

        Raises:
            SignalError: a weight holds NaN or infinity.
        """
        if not torch.isfinite(values).all():
            raise SignalError(
                f"The weights of group {self.group.name!r}",
                f"{item.tensor!r} holds NaN or infinity",
                "Repair the checkpoint, or train it again",
            )


def _is_mean(tensor: str) -> bool:
    return tensor.rpartition(".")[2] == "running_mean"


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of one group, from all examples or from a half of them.

    Attributes:
        name: the group.
        weights: norms of its weights, lazily.
        input: moments of the signals before the activation; None where they were not recorded.
        output: moments of the signals that the consumers see; None without recorded states.
        taylor: (d,) float64, first-order Taylor importances; None where no gradients were recorded.
        features: consumer's tensor -> moments of each feature that it reads; empty where every unit is
            one feature wide.
        fisher: (d,) float64, Fisher importances; None where no gradients per example were recorded.
    """

    name: str
    weights: UnitWeights
    input: Moments | None = None
    output: Moments | None = None
    taylor: Tensor | None = None
    features: Mapping[str, FeatureMoments] = field(default_factory=dict)
    fisher: Tensor | None = None

    @property
    def units(self) -> int:
        """d."""
        return self.weights.group.size

    def output_side(self) -> Moments:
        """Return the moments of the output side.

        Raises:
            CriterionError: the criterion did not say that it needs them.
        """
        if self.output is None:
            raise self._unasked("output side", "states")
        return self.output

    def both_sides(self) -> tuple[Moments, Moments]:
        """Return the moments of the input and the output side; errors as in `output_side`."""
        if self.input is None:
            raise self._unasked("input side", "input")
        return self.input, self.output_side()

    def _unasked(self, what: str, need: str) -> CriterionError:
        return CriterionError(
            f"Scoring group {self.name!r}",
            f"the criterion reads the {what}, which was not recorded for it",
            f"Register it with {need!r} among its needs",
        )

    def read_features(self) -> Iterator[tuple[FeatureMoments, ConsumerNorms]]:
        """Yield, for each consumer, the moments of the features it reads and the norms of their weights.

        Both are (d, width), and place k of a unit is the same feature in both. The moments are (d, 1),
        those of the unit as a whole, where a unit is one feature wide, and where a weight's positions are
        not those of the signal that enters it (a grouped convolution, one weight for several channels).
        """
        output = self.output_side()
        whole = FeatureMoments(output.samples, output.mean[:, None].cpu(), output.variance[:, None].cpu())
        taps = {tap.tensor: tap for tap in self.weights.group.outputs}
        for norms in self.weights.consumers:
            tap = taps.get(norms.item.tensor)
            # Feature k of the signal is read by place k of the weight only where both lie alike.
            alike = tap is not None and np.array_equal(tap.positions, norms.item.positions)
            yield (self.features.get(norms.item.tensor, whole) if alike else whole), norms
