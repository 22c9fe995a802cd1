"""A task of labelled sentences in three splits; the subclass says where they come from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cria_prune.base.batches import Batch
from cria_prune.tasks.base import Task
from cria_prune.tasks.text import SentenceBatches, Sentences, by_length

LONGEST = 128
"""Tokens per sentence; the rest is cut."""

AT_ONCE = 64
"""Sentences per batch where nothing is trained."""


class SentenceTask(Task):
    """Accuracy of a sentence classifier; a split is `Sentences`."""

    pretrained = True
    metric = "accuracy"
    batch_size = 32

    def tokenised(self, texts: list[str], labels: Tensor | None) -> Sentences:
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

    def epoch(self, data: Sentences, seed: int, batch_size: int, augment: bool) -> Iterable[Batch]:
        """Return shuffled batches of alike length; nothing is augmented."""
        return SentenceBatches(data, by_length(data.lengths(), batch_size, seed))

    def chosen(self, data: Sentences, index: Tensor, seed: int | None = None) -> Iterable[Batch]:
        """Return 64 sentences per batch, shuffled by the seed, or the short ones first."""
        data = data.rows(index)
        return SentenceBatches(data, by_length(data.lengths(), AT_ONCE, seed))

    def tensors(self, data: Sentences) -> Iterable[Tensor]:
        """Return the tokens, their lengths and the labels."""
        return data.flat()
