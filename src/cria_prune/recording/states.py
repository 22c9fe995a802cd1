"""What was recorded: the signals' moments of every group, with where they come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from cria_prune.base.progress import screenful
from cria_prune.graph.moments import DOUBLE, Moments, Total
from cria_prune.recording.routed import Routed

PIECE = 2**20  # numbers that are looked at as float64 at a time


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and variance of each feature of each unit; they merge exactly.

    The unit's own `Moments` hold all features of a unit as samples of one signal, so its variance counts
    the distances between their means, and no weight can be given to a feature.

    Attributes:
        samples: S, of each feature.
        mean: (d, width) float64.
        variance: (d, width) float64, mean of the squared centred samples (not unbiased).

    Examples:
        >>> one = FeatureMoments.from_samples(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), units=1)
        >>> one.mean.tolist(), one.variance.tolist()
        ([[2.0, 5.0]], [[1.0, 0.0]])
    """

    samples: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def from_samples(cls, samples: Tensor, units: int) -> Self:
        """Return the moments of samples (S, units·width), S >= 1, the features of a unit in a row."""
        total: Self | None = None
        for piece in samples.detach().split(max(1, PIECE // samples.shape[1])):
            wide = piece.to(torch.float64)
            mean = wide.mean(dim=0)
            variance = (wide - mean).square_().mean(dim=0)
            part = cls(len(piece), mean.reshape(units, -1), variance.reshape(units, -1))
            total = part if total is None else total.merge(part)
        assert total is not None
        return total

    def merge(self, other: Self) -> Self:
        """Return the moments of both sets of samples together (Chan, Golub and LeVeque's formula)."""
        total = self.samples + other.samples
        a, b = self.samples / total, other.samples / total
        step = other.mean - self.mean
        variance = a * self.variance + b * other.variance + a * b * step.square()
        return type(self)(total, self.mean + b * step, variance)


class FeatureSums:
    """Adds up the features that one consumer reads, the two halves of the examples apart.

    Args:
        units: d.
        width: features per unit.
    """

    def __init__(self, units: int, width: int) -> None:
        self._units, self._width = units, width
        self._halves: dict[int, FeatureMoments] = {}

    def add(self, half: int, samples: Tensor) -> None:
        """Add samples (S, d·width), S >= 1, on any device, to a half (0 or 1)."""
        part = FeatureMoments.from_samples(samples, self._units)
        self._halves[half] = self._halves[half].merge(part) if half in self._halves else part

    def held_bytes(self, halves: int = 2) -> int:
        """Return the bytes of the means and variances of the halves once samples have come."""
        return halves * 2 * DOUBLE * self._units * self._width

    def adding_bytes(self, samples: int) -> int:
        """Return the most that `add` of so many samples asks for: a piece as float64, centred, squared."""
        return 3 * DOUBLE * min(PIECE, samples * self._units * self._width)

    def pool(self, total: Total, device: torch.device | str) -> None:
        """Take in what all processes have added up; see `MomentAccumulator.pool`."""
        nothing = torch.zeros(self._units, self._width, dtype=torch.float64)
        for half in (0, 1):
            own = self._halves.get(half) or FeatureMoments(0, nothing, nothing)
            count = int(total(torch.tensor([own.samples])))
            if not count:
                continue
            mean = total(own.mean * own.samples) / count
            step = mean - own.mean.cpu()
            variance = total((own.variance.cpu() + step.square()) * own.samples) / count
            self._halves[half] = FeatureMoments(count, mean.to(device), variance.to(device))

    def moments(self, half: int | None) -> FeatureMoments | None:
        """Return the moments of a half, or of all samples (None), on the CPU; None where there are none."""
        parts = [self._halves[key] for key in sorted(self._halves) if half in (None, key)]
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
        return FeatureMoments(total.samples, total.mean.cpu(), total.variance.cpu())


Features = Mapping[str, FeatureMoments]
Read = Literal["input", "output", "positive"]
"""What can be recorded beyond the outputs' means and variances: the input side, the second moments between
the units on the output side, the share of the outputs above 0."""
EVERYTHING: frozenset[Read] = frozenset({"input", "output", "positive"})

BOTH: frozenset[Read] = frozenset({"input", "output"})
"""What the graphs of a group are learned from."""


def reads_of(needs: frozenset[str]) -> frozenset[Read]:
    """Return what has to be recorded for a criterion's `needs`; gradients per example are caught inside."""
    inside: frozenset[Read] = frozenset({"input"} if "examples" in needs else ())
    return (EVERYTHING & needs) | inside


def reads_for(group: str, reads: frozenset[Read], graphs: Collection[str]) -> frozenset[Read]:
    """Return what is recorded of one group: `reads`, and both sides where it is among the `graphs`."""
    return reads | BOTH if group in graphs else reads


@dataclass(frozen=True, repr=False)
class GroupStates:
    """The signals of one group. A half holds every second example: the even ones, then the odd ones.

    Attributes:
        name: the group.
        inputs: moments of the input side (before the activation), per half; None where it was not recorded.
        outputs: moments of the output side (what the consumers see), per half.
        input: moments of the input side, all examples; None where it was not recorded.
        output: moments of the output side, all examples.
        taylor: (units,) float64, first-order Taylor importance, or None where no gradients were taken.
        features: consumer's tensor -> moments of each feature that it reads, all examples, where a unit
            is several features wide to some consumer. Empty otherwise: the unit's `output` is it.
        features_by_half: the same of the even examples, then of the odd ones.
        consumed: consumer's tensor -> moments, second ones included, of all features that it reads
            (units times width, the features of a unit in a row); empty unless they were asked for.
        fisher: (units,) float64, Fisher importance, or None where no gradients per example were taken.
    """

    name: str
    inputs: tuple[Moments, Moments] | None
    outputs: tuple[Moments, Moments]
    input: Moments | None
    output: Moments
    taylor: Tensor | None = None
    features: Features = field(default_factory=dict)
    features_by_half: tuple[Features, Features] = field(default_factory=lambda: ({}, {}))
    consumed: Mapping[str, Moments] = field(default_factory=dict)
    fisher: Tensor | None = None

    def __repr__(self) -> str:
        return f"GroupStates({self.name!r}, input: {self.input!r}, output: {self.output!r})"

    @property
    def units(self) -> int:
        """Units of the group when it was recorded."""
        return self.output.units


@dataclass(frozen=True, repr=False)
class States:
    """The recorded groups of a model; prints as a table.

    Attributes:
        groups: group name -> its states, in the order of the network.
        examples: calibration examples that were used.
        batches: batches that they came in.
        positions: spatial positions drawn per image and layer, at most.
        seed: seed of the positions and the sketches.
        seconds: wall time of the pass.
        device: where the pass ran.
        gradients: whether Taylor importances were taken.
        per_example: whether Fisher importances were taken.
        reads: what was recorded beyond the outputs' means and variances.
        unreached: module of experts -> those of them that no example was sent to: what is said of
            their neurons are the signals of the other experts.
        routed: name of a group of whole experts -> what they did.
    """

    groups: Mapping[str, GroupStates]
    examples: int
    batches: int
    positions: int
    seed: int
    seconds: float
    device: str
    gradients: bool
    per_example: bool = False
    reads: frozenset[Read] = EVERYTHING
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    routed: Mapping[str, Routed] = field(default_factory=dict)

    def __getitem__(self, name: str) -> GroupStates:
        return self.groups[name]

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return f"States({len(self)} groups, {self.examples} examples)"

    def __str__(self) -> str:
        width = max([len("group"), *map(len, self.groups)])
        lines = [
            f"{self.examples} examples in {self.batches} batches, {self.seconds:.2f} s on {self.device}, "
            f"at most {self.positions} positions per image, seed {self.seed}"
            + (", with gradients" if self.gradients else ""),
            f"{'group':{width}}  units  samples in  samples out  second moments",
        ]
        for name, group in self.groups.items():
            kept = "none" if group.output.sketch is None else "sketch"
            kept = kept if group.output.covariance is None else "exact"
            before = 0 if group.input is None else group.input.samples
            counts = f"{group.units:5}  {before:10}  {group.output.samples:11}"
            lines.append(f"{name:{width}}  {counts}  {kept}")
        return "\n".join(screenful(lines))
