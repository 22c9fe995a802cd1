"""The training batches of a fine-tune: one collection for all epochs, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cria_prune.base.events import passed
from cria_prune.batches import Batch
from cria_prune.errors import DataError

Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]


class Source:
    """Batches of one epoch, always with a length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = list(batches) if isinstance(batches, Iterator) else batches

    def sized(self, epoch: int) -> tuple[Iterable[Batch], int]:
        """Return the batches of an epoch (from 0) and their number.

        Raises:
            DataError: there are none.
        """
        passed("epoch", epoch=epoch)
        batches = self.batches(epoch) if callable(self.batches) else self.batches
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            batches = list(batches)
            count = len(batches)
        if count == 0:
            raise DataError(
                "A fine-tune", f"epoch {epoch} has no batches", "Pass at least one training batch"
            )
        return batches, count
