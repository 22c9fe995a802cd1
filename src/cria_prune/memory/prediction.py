"""What was predicted, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cria_prune.record.memory import GroupMemory

UNITS = ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB"))


@dataclass(frozen=True)
class Stage:
    """The largest moment of one stage.

    Attributes:
        name: `record` or `score`.
        parts: what it is made of, in bytes, beyond the model.
        group: the group that it is about, or empty.
    """

    name: str
    parts: Mapping[str, int]
    group: str = ""

    @property
    def peak(self) -> int:
        """All parts, in bytes."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class MemoryPrediction:
    """The memory that recording and scoring will take, in the first round; prints as a table.

    Attributes:
        model: bytes of its parameters and buffers.
        stages: recording, where the criterion or the repair needs it, and scoring; beyond the model.
        groups: what every group keeps; empty where nothing is recorded.
        passes: over the calibration data, of all rounds, with that for the batch norms.
        recorded: passes that record.
        gradients: of what the gradients are taken: `batch`, `example`, or None.
        batch: examples in the batch that was counted.
        device: type of the device that the prediction is for; `meta` counts as a CPU.
        savings: what can be changed, and the peak of the stages then; the most effective first.
    """

    model: int
    stages: tuple[Stage, ...]
    groups: tuple[GroupMemory, ...] = field(repr=False)
    passes: int
    recorded: int
    gradients: str | None
    batch: int
    device: str
    savings: tuple[tuple[str, int], ...] = ()

    @property
    def peak(self) -> int:
        """The most at any moment, the model counted in."""
        return self.model + max(stage.peak for stage in self.stages)

    @property
    def largest_group(self) -> GroupMemory | None:
        """The group that keeps most; None where nothing is recorded."""
        return max(self.groups, key=lambda item: max(item.while_recording, item.afterwards), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them, in bytes."""
        largest = self.largest_group
        return {
            "model": self.model,
            **{
                stage.name: {"peak": stage.peak, "parts": dict(stage.parts), "group": stage.group or None}
                for stage in self.stages
            },
            "peak": self.peak,
            "largest_group": None if largest is None else largest.name,
            "batch": self.batch,
            "savings": {text: self.model + size for text, size in self.savings},
        }

    def __str__(self) -> str:
        width = max(len(name) for stage in self.stages for name in ("model", *stage.parts))
        lines = []
        for stage in self.stages:
            about = f" (group {stage.group})" if stage.group else ""
            lines.append(f"{stage.name}: {amount(self.model + stage.peak)} at most{about}")
            parts = {"model": self.model, **stage.parts}
            lines += [f"  {name:{width}}  {amount(size):>9}" for name, size in parts.items() if size]
        return "\n".join([*lines, f"peak {amount(self.peak)}, batches of {self.batch} examples"])


def amount(size: float) -> str:
    """Return bytes as a person reads them.

    >>> amount(3 * 2**30), amount(1500), amount(12)
    ('3.00 GB', '1.46 kB', '12 B')
    """
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size >= 10 * unit else f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"
