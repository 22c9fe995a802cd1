"""Small batches of signals, held back until they are worth a call of the accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from cria_prune.graph import MomentAccumulator
from cria_prune.record.sampling import Origin

BUFFERED = 2**18  # numbers held back per side and half; small batches cost more calls than arithmetic


class Buffer:
    """Gathers small batches of signals into large ones for an accumulator.

    Args:
        total: where the signals go; complete only after `flush`.
        halves: 2 where only every second example comes here, else 1.
    """

    def __init__(self, total: MomentAccumulator, halves: int = 2) -> None:
        self.total, self._halves = total, halves
        self._batch, self._calls = -1, [0, 0]  # the batch at hand by its first example, its calls per half
        self._columns = max(1, BUFFERED // total.units)
        self._held: Tensor | None = None  # (columns, units), the first `_used` rows are signals
        self._numbers: list[Tensor] = []  # of the samples that are held
        self._used = 0

    def add(self, X: Tensor, numbers: Tensor | None = None) -> None:
        """Add signals X (units, S), with their numbers (S,) for a sketch; they are copied or used at once."""
        if self._used + X.shape[1] > self._columns:
            self.flush()
        if 2 * X.shape[1] > self._columns:
            self.total.add(X, numbers)
            return
        if self._held is None or self._held.dtype != X.dtype or self._held.device != X.device:
            self.flush()
            self._held = torch.empty(self._columns, len(X), dtype=X.dtype, device=X.device)
        self._held[self._used : self._used + X.shape[1]] = X.T
        self._used += X.shape[1]
        self._numbers += [] if numbers is None else [numbers]

    def holds(self, m: int, batches: int = 1) -> int:
        """Return the numbers that are held back at most of so many batches of m signals, if any are."""
        return 0 if 2 * m > self._columns else min(BUFFERED, m * self.total.units * batches)

    def adding_bytes(self, m: int) -> int:
        """Return the most that m signals ask for when they, or what was held back, go to the accumulator."""
        return self.total.adding_bytes(max(m, self._columns // 2) if self.holds(m) else m)

    def number(self, origin: Origin, half: int, first: int, width: int = 1, taps: int = 1) -> Tensor | None:
        """Return the numbers of the next signals for `add`, None where they are not asked for.

        Args:
            origin: of the samples.
            half: of the examples.
            first: the first example of the batch.
            width, taps: see `Origin.numbers`.
        """
        if self.total.exact:
            return None
        if first != self._batch:
            self._batch, self._calls = first, [0, 0]
        call = self._calls[half]
        self._calls[half] += 1
        return origin.numbers(width, self._halves, taps, call, self.total.columns)

    def flush(self) -> MomentAccumulator:
        """Hand over what is held back, and return the accumulator."""
        if self._held is not None and self._used:
            numbers = torch.cat(self._numbers) if self._numbers else None
            self.total.add(self._held[: self._used].T, numbers)
            self._used, self._numbers = 0, []
        return self.total
