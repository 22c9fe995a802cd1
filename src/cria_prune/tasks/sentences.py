"""A task of labelled sentences in three splits; the subclass says where they come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch

from cria_prune.base.batches import Batch
from cria_prune.tasks.base import EpochBatches, Task, fingerprint
from cria_prune.tasks.text import SentenceBatches, Sentences, by_length

LONGEST = 128
"""Tokens per sentence; the rest is cut."""

AT_ONCE = 64
"""Sentences per batch where nothing is trained."""


class SentenceTask(Task):
    """Accuracy of a sentence classifier.

    Attributes:
        batch_size: sentences per batch of the fine-tune.
    """

    pretrained = True
    metric = "accuracy"
    batch_size = 32

    @abstractmethod
    def split(self, name: str) -> Sentences:
        """Return the tokenised sentences of "train", "validation" or "test".

        Raises:
            DataError: no such split, or its data are missing or of another kind.
        """

    def tokenised(self, texts: list[str], labels: torch.Tensor | None) -> Sentences:
        """Return texts as the model's tokenizer writes them, at most `longest_sentence` tokens each."""
        found = self.tokenizer(texts, truncation=True, max_length=self.longest_sentence)["input_ids"]
        return Sentences(found, labels, self.padding)

    @property
    def longest_sentence(self) -> int:
        """Tokens per sentence; the rest is cut."""
        return LONGEST

    @property
    def padding(self) -> int:
        """The token that fills up a batch."""
        return int(self.tokenizer.pad_token_id)

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
        """Return epoch -> shuffled batches of alike length; nothing is augmented."""
        size = batch_size or self.batch_size

        def epoch_batches(epoch: int) -> Iterable[Batch]:
            sentences = self.split("train")
            return SentenceBatches(sentences, by_length(sentences.lengths(), size, seed * 100_003 + epoch))

        return epoch_batches

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return the first `examples` of a seeded permutation of the train split, 64 per batch."""
        sentences = self.split("train")
        chosen = sentences.rows(self.drawn(len(sentences), examples, seed))
        return list(SentenceBatches(chosen, by_length(chosen.lengths(), AT_ONCE, seed)))

    def validation_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the validation split, or its first `limit` sentences, the short ones first."""
        return self._all("validation", limit)

    def test_batches(self, limit: int | None = None) -> Iterable[Batch]:
        """Return the test split, or its first `limit` sentences, the short ones first."""
        return self._all("test", limit)

    def _all(self, name: str, limit: int | None) -> Iterable[Batch]:
        sentences = self.split(name)
        sentences = sentences if limit is None else sentences.rows(torch.arange(len(sentences))[:limit])
        return SentenceBatches(sentences, by_length(sentences.lengths(), AT_ONCE))

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the splits' tokens and labels (of all three if none is named)."""
        parts = [self.split(name) for name in splits or ("train", "validation", "test")]
        return fingerprint(*(tensor for part in parts for tensor in part.flat()))
