"""Text as batches: sentences padded to the longest of their batch, and blocks of a long text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cria_prune.errors import DataError

BUCKET = 50
"""Batches whose sentences are sorted by length together."""


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences with their labels.

    Attributes:
        tokens: one list of token numbers per sentence.
        labels: (sentences,) int64; None where nobody labelled them.
        padding: token number that fills up a batch; the mask leaves it out.
    """

    tokens: Sequence[Sequence[int]] = field(repr=False)
    labels: Tensor | None = field(repr=False)
    padding: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> Sentences:
        """Return the sentences at `index`."""
        labels = None if self.labels is None else self.labels[index]
        return Sentences([self.tokens[row] for row in index.tolist()], labels, self.padding)

    def lengths(self) -> Tensor:
        """Return the number of tokens of every sentence, (sentences,) int64."""
        return torch.tensor([len(item) for item in self.tokens], dtype=torch.int64)

    def batch(self) -> dict[str, Tensor]:
        """Return all sentences as one batch: input_ids, attention_mask (sentences, longest), any labels."""
        longest = max(map(len, self.tokens))
        ids = torch.full((len(self), longest), self.padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(self.tokens):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"input_ids": ids, "attention_mask": mask, **labels}

    def flat(self) -> tuple[Tensor, ...]:
        """Return all tokens in one line, the lengths and the labels: what a fingerprint is made of."""
        tokens = torch.tensor([t for item in self.tokens for t in item])
        return (tokens, self.lengths(), *(() if self.labels is None else (self.labels,)))


class SentenceBatches:
    """Batches of sentences, each padded to its own longest; the same on every pass.

    Args:
        sentences: the split.
        chunks: rows of every batch, see `by_length`.
    """

    def __init__(self, sentences: Sentences, chunks: Sequence[Tensor]) -> None:
        self.sentences, self.chunks = sentences, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chunk in self.chunks:
            yield self.sentences.rows(chunk).batch()


def by_length(lengths: Tensor, batch_size: int, seed: int | None = None) -> list[Tensor]:
    """Cut rows into batches of alike length, so that little of a batch is padding.

    Args:
        lengths: (rows,) tokens per row.
        batch_size: rows per batch; the rest of a bucket is a smaller batch.
        seed: shuffles the rows, sorts within buckets of `BUCKET` batches, shuffles the batches. None sorts
            all rows, the short ones first.

    Returns:
        Row numbers per batch, every row once.

    >>> by_length(torch.tensor([5, 2, 9, 3]), 2)
    [tensor([1, 3]), tensor([0, 2])]
    """
    if seed is None:
        return list(lengths.argsort(stable=True).split(batch_size)) if len(lengths) else []
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator)
    chunks: list[Tensor] = []
    for bucket in shuffled.split(batch_size * BUCKET):
        chunks += bucket[lengths[bucket].argsort(stable=True)].split(batch_size)
    return [chunks[number] for number in torch.randperm(len(chunks), generator=generator).tolist()]


class BlockBatches:
    """Blocks of `length` tokens of one long text, as batches for a causal language model.

    Every batch is a mapping with `input_ids` and `labels` (batch, length), the same tensor: the model
    shifts the labels itself. Blocks do not overlap, and a last short one is dropped.

    Args:
        tokens: (tokens,) int64.
        length: tokens per block.
        batch_size: blocks per batch; the last batch holds the rest.
        order: which blocks, in this order; all of them as they follow one another if None.
        start: tokens left out at the beginning, so that epochs see different blocks.

    Raises:
        DataError: there are fewer tokens than one block.
    """

    def __init__(
        self, tokens: Tensor, length: int, batch_size: int, order: Tensor | None = None, start: int = 0
    ) -> None:
        self.blocks = blocks(tokens[start:], length)
        order = torch.arange(len(self.blocks)) if order is None else order
        self.chunks = [chunk for chunk in order.split(batch_size) if len(chunk)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chunk in self.chunks:
            rows = self.blocks[chunk]
            yield {"input_ids": rows, "labels": rows}


def blocks(tokens: Tensor, length: int) -> Tensor:
    """Return the non-overlapping blocks of a text, (blocks, length); the last short one is dropped.

    Raises:
        DataError: there are fewer tokens than one block.
    """
    if len(tokens) < length:
        raise DataError(
            f"Sequences of {length} tokens",
            f"the text has {len(tokens)} tokens, too few for one",
            "Give a longer text, or ask for shorter sequences",
        )
    return tokens[: len(tokens) // length * length].view(-1, length)
