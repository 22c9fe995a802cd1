"""What was recorded: the signals' moments of every group, with where they come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from cria_prune.base.screen import screenful
from cria_prune.graph.moments import Moments
from cria_prune.record.features import FeatureMoments

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
