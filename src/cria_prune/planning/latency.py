"""Seconds of a batch as a cost: a table of what was measured, and the additive model on it.

    seconds(kept) = seconds(dense) - together * sum over groups of saved_group(kept units)

What a group saves was measured with this group alone cut. Where a weight stands between two groups, both
count what its rows and columns save, and a network that waits for its kernels saves less twice than once. So
networks with all groups cut are measured too, and `together` is what they save over that sum. It is one
factor for all cuts: the network that is cut in the end is measured again. Measuring is `cria_prune.latency`.

What one narrow layer saves may be less than the clock can tell. A choice among hundreds of such numbers
takes those that noise made large, and its sum may pass the whole network. So each is drawn towards what its
multiply-accumulates let expect, the further the more of the spread is noise: see `drawn`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cria_prune.base.errors import ArtifactError, StructureError
from cria_prune.base.files import readable, write_text
from cria_prune.structure.groups import UnitGroups

Finite = Annotated[float, Field(allow_inf_nan=False)]
Units = Annotated[int, Field(ge=1)]
LEAST = 1e-3  # share of the dense seconds that is always foretold, for a sum may go beyond all of them


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timed(_Plain):
    """What seconds are of: they say nothing of anything else.

    Attributes:
        device: its name; threads: that a CPU computes with, 0 elsewhere.
        batch: examples; inputs: type and shape of every tensor of the batch.
        structure: digest of the dense network's groups and shapes, see `structure_digest`.
        torch: its version.
    """

    device: str
    threads: int
    batch: int
    inputs: tuple[str, ...]
    structure: str
    torch: str


class LatencyTable(_Plain):
    """Seconds of a batch on one device, and what every group saves of them; to and from JSON.

    Attributes:
        of: what was measured.
        dense: seconds of a batch of the dense network.
        sizes: group name -> its units in the dense network.
        saved: group name -> units kept -> seconds that are saved when only this group is cut, as measured and
            drawn towards the expected, see `drawn`: noise may make them negative, or fall.
        together: what all groups save when they are cut at once, over the sum of these; of files from before
            it was measured 1.
    """

    format: Literal["cria-latency"] = "cria-latency"
    version: Literal[1] = 1
    of: Timed
    dense: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sizes: dict[str, Units]
    saved: dict[str, dict[Units, Finite]]
    together: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def to_json(self) -> str:
        """Return the table as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "a table of latencies") -> Self:
        """Read what `to_json` gave.

        Raises:
            ArtifactError: it is no JSON, of another format or version, or a value is missing or wrong.
        """
        asked, todo = f"Reading {name}", "Give a file that --latency-table wrote, or measure again"
        try:
            table = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            found = f"{'.'.join(map(str, first['loc'])) or 'the text'}: {first['msg']}"
            raise ArtifactError(asked, found, todo) from error
        for group, counts in table.saved.items():
            if group not in table.sizes or not counts or max(counts) > table.sizes[group]:
                found = f"saved.{group} has no units, or more than the group"
                raise ArtifactError(asked, found, todo)
        return table

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file; errors as in `from_json`, and an ArtifactError where it cannot be read."""
        with readable(f"Reading the latencies in {path}", "Give a file that --latency-table wrote"):
            text = Path(path).read_text(encoding="utf-8")
        return cls.from_json(text, str(path))

    def write(self, path: str | Path) -> None:
        """Write a file."""
        write_text(path, self.to_json() + "\n")

    def check(self, here: Timed) -> None:
        """Raise an ArtifactError if the table is of another device, batch, network or version of torch."""
        different = [
            f"{name} {getattr(self.of, name)!r} and not {getattr(here, name)!r}"
            for name in Timed.model_fields
            if getattr(self.of, name) != getattr(here, name)
        ]
        if different:
            raise ArtifactError(
                "Using a table of latencies", f"it is of {', '.join(different)}",
                "Measure a table here (name a new file), or run as it was measured",
            )  # fmt: skip

    def ledger(self, groups: UnitGroups) -> Seconds:
        """Return the counter of seconds for the network as it is now.

        Raises:
            StructureError: a prunable group is not in the table.
        """
        lacking = [group.name for group in groups.prunable if group.name not in self.saved]
        if lacking:
            raise StructureError(
                "Counting the seconds of a batch", f"nothing was measured for group {lacking[0]!r}",
                "Measure a table with the same units allowed (units, residual, uniform)",
            )  # fmt: skip
        return Seconds(self, {group.name: group.size for group in groups.prunable})


class Seconds:
    """Counts seconds for any number of kept units; `sizes`: group name -> units now. See `budget.Cost`."""

    def __init__(self, table: LatencyTable, sizes: Mapping[str, int]) -> None:
        self._dense, self._sizes = table.dense, dict(sizes)
        self._curves = {
            name: _curve(table.sizes[name], found, table.together) for name, found in table.saved.items()
        }

    def count(self, kept: Mapping[str, int] | None = None) -> float:
        """Return the seconds when `kept` units of the named groups stay, and all of the others."""
        return max(self._dense - self.saved(kept or {}), LEAST * self._dense)

    def saved(self, kept: Mapping[str, int]) -> float:
        """Return the seconds that are saved of the dense ones then."""
        counts = {**self._sizes, **kept}
        return float(sum(np.interp(count, *self._curves[name]) for name, count in counts.items()))

    def along(self, names: Sequence[str], counts: np.ndarray, kept: Mapping[str, int]) -> np.ndarray:
        """Return (n,) the seconds with each number of units in the named groups, up to a constant."""
        del kept  # additive: what the others keep does not matter
        total = np.zeros(len(counts))
        for name in names:
            total -= np.interp(counts, *self._curves[name])
        return total


def _curve(size: int, saved: Mapping[int, float], factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return ascending units and what is saved with them, never rising: the nearest by least squares."""
    # scipy.optimize takes a third of a second to import, which other costs need not wait for.
    from scipy.optimize import isotonic_regression

    kept = np.array(sorted({*saved, size}))
    raw = np.array([0.0 if count == size else saved[int(count)] for count in kept])
    # Nothing cut saves nothing, and that is known: what was measured below it is noise.
    fitted = np.maximum(isotonic_regression(raw, increasing=False).x, 0.0) * (kept < size)
    return kept, factor * fitted


def together(sums: Sequence[float], found: Sequence[float]) -> float:
    """Return the factor by which sums of savings become what was measured, by least squares through 0.

    Args:
        sums: of what the groups of a network save alone.
        found: what the network saves with all of them cut.

    Returns:
        At least 0.1, for noise must not say that nothing helps, and 1 where nothing was saved.

    >>> together([1.0, 2.0], [0.5, 1.0]), together([0.0], [0.0]), together([1.0], [-1.0])
    (0.5, 1.0, 0.1)
    """
    squares = sum(value * value for value in sums)
    if not squares:
        return 1.0
    return max(sum(one * other for one, other in zip(sums, found, strict=True)) / squares, 0.1)


def drawn(
    measured: Sequence[float], expected: Sequence[float], errors: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Return noisy values drawn towards what is expected of them, by empirical Bayes.

    The true values are taken to lie about the expected ones with one variance, which is what the spread of
    the measured ones has beyond the noise: Efron and Morris (1973), "Stein's estimation rule and its
    competitors", JASA 68.

    Args:
        measured: (n,) values.
        expected: (n,) of them.
        errors: (n,) standard errors of the measured ones. A few turns may agree by chance: none counts as
            less than the median one.

    Returns:
        (n,) the measured values where there is no noise, the expected ones where there is nothing else.

    >>> drawn([0.0, 4.0], [2.0, 2.0], [1.0, 1.0]).tolist(), drawn([1.0, 3.0], [2.0, 2.0], [0.0, 0.0]).tolist()
    ([0.5, 3.5], [1.0, 3.0])
    """
    away = np.asarray(measured, dtype=np.float64) - np.asarray(expected, dtype=np.float64)
    noise = np.square(np.maximum(errors, np.median(errors)))
    variance = max(float(np.mean(away**2 - noise)), 0.0)
    weight = np.where(noise > 0, variance / np.maximum(variance + noise, np.finfo(float).tiny), 1.0)
    return np.asarray(expected, dtype=np.float64) + weight * away


def structure_digest(groups: UnitGroups) -> str:
    """Return a digest of a network's groups and the shapes of its tensors."""
    facts = {
        "groups": [[group.name, group.kind, group.size] for group in groups],
        "shapes": {name: list(shape) for name, shape in sorted(groups.shapes.items())},
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
