"""A task of one long text in three splits for a causal language model; the subclass says which text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from cria_prune.batches import Batch
from cria_prune.progress import Progress
from cria_prune.tasks.base import EpochBatches, Task, fingerprint
from cria_prune.tasks.language import BATCH_TOKENS, SHORT, perplexity
from cria_prune.tasks.text import BlockBatches, blocks

SPLITS = ("train", "validation", "test")
AT_ONCE = 32
"""Blocks per batch of the calibration."""


class LanguageTask(Task):
    """Perplexity of a causal language model, by blocks that do not overlap.

    Attributes:
        batch_size: blocks per batch of the fine-tune.
        longest: tokens per block of the fine-tune.
        short: tokens per block of the calibration and the evaluation; `metric` names it.
    """

    pretrained = True
    batch_size = 4
    longest: int
    short = SHORT

    @abstractmethod
    def tokens(self, split: str) -> Tensor:
        """Return the tokens of a split, (tokens,) int64.

        Raises:
            DataError: no such split, or the text is missing or too short.
        """

    def pretrained_source(self, scratch: Path) -> Path | None:
        """Return `scratch` with the tokenizer's files."""
        self.tokenizer.save_pretrained(scratch)
        return scratch

    def train_batches(
        self,
        seed: int = 0,
        batch_size: int | None = None,
        augment: bool = True,
        device: torch.device | str = "cpu",
    ) -> EpochBatches:
        """Return epoch -> shuffled blocks of `longest` tokens; with `augment` each epoch cuts elsewhere."""
        size = batch_size or self.batch_size

        def epoch_batches(epoch: int) -> Iterable[Batch]:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            tokens = self.tokens("train")
            # Always as many blocks: the schedule counts on equal epochs.
            count = len(blocks(tokens, self.longest)) - 1
            start = int(torch.randint(self.longest, (), generator=generator)) if augment else 0
            order = torch.randperm(max(count, 1), generator=generator)
            return BlockBatches(tokens, self.longest, size, order, start if count > 0 else 0)

        return epoch_batches

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return `examples` random blocks of `short` tokens of the train split, 32 per batch."""
        tokens = self.tokens("train")
        order = self.drawn(len(blocks(tokens, self.short)), examples, seed)
        return list(BlockBatches(tokens, self.short, AT_ONCE, order))

    def validation_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the validation split, or its first `limit` blocks of `short` tokens, in order."""
        return self._in_order("validation", limit)

    def test_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the test split, or its first `limit` blocks of `short` tokens, in order."""
        return self._in_order("test", limit)

    def _in_order(self, split: str, limit: int | None) -> Iterable[Batch]:
        tokens = self.tokens(split)
        order = torch.arange(len(blocks(tokens, self.short)))[:limit]
        return BlockBatches(tokens, self.short, max(1, BATCH_TOKENS // self.short), order)

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the splits' tokens (of all three if none is named)."""
        return fingerprint(*(self.tokens(split) for split in splits or SPLITS))

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], progress: Progress | None = None) -> float:
        """Return the perplexity of the model on the batches."""
        return perplexity(model, batches, progress=progress)
