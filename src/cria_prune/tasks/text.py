"""Text as batches: its tokens made a piece at a time, sentences padded, blocks of a long text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cria_prune.base.errors import DataError

PIECE, OVERLAP, COMPARED = 2**18, 2**12, 64
"""Characters that are tokenised at a time, for a tokenizer needs some 200 bytes for each; characters that two
pieces have in common; tokens in which they have to agree there."""


def encode(tokenizer: Any, text: str) -> Tensor:
    """Return the tokens of a whole text, (tokens,) int64, with what the tokenizer itself adds at its ends.

    A long text goes through the tokenizer in pieces that overlap. Two of them are joined between two tokens
    where both have the same ones from there on; where they do not, the text is tokenised as a whole.
    """
    fast = getattr(tokenizer, "is_fast", False)  # others do not say where in the text a token is
    found = _in_pieces(tokenizer, text) if len(text) > PIECE and fast else None
    if found is None:
        ids = tokenizer(text, verbose=False)["input_ids"]  # not verbose: it would warn of a long text
        found = torch.tensor(ids, dtype=torch.int64)
    return found


def _in_pieces(tokenizer: Any, text: str) -> Tensor | None:
    """Return the tokens of a text, or None where its pieces do not agree."""
    parts, start, expected = [], 0, np.empty(0, dtype=np.int64)
    while True:
        first, last = max(0, start - OVERLAP), min(len(text), start + PIECE)
        head, ids, places, tail = _tokens(tokenizer, text[first:last])
        begin = int(np.searchsorted(places, start - first))
        # What follows a token may have a say in it, so the last characters of a piece are left to the next.
        end = len(ids) if last == len(text) else int(np.searchsorted(places, last - OVERLAP - first))
        fits = begin < len(ids) and places[begin] == start - first if start else True
        if not fits or not np.array_equal(ids[begin : begin + len(expected)], expected):
            return None
        parts += [*([] if start else [head]), ids[begin:end]]
        if last == len(text):
            return torch.from_numpy(np.concatenate([*parts, tail]))
        if end == len(ids) or (np.diff(places) < 0).any():
            return None
        start, expected = first + int(places[end]), ids[end : end + COMPARED]


def _tokens(tokenizer: Any, text: str) -> tuple[Any, Any, Any, Any]:
    """Return the tokens added before a text, its own, where each of these begins, those added after it."""
    found = tokenizer(text, verbose=False, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, added = (np.array(found[key], dtype=np.int64) for key in ("input_ids", "special_tokens_mask"))
    places = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    own = np.flatnonzero(added == 0)
    first, last = (own[0], own[-1] + 1) if len(own) else (0, 0)
    return ids[:first], ids[first:last], places[first:last], ids[last:]


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
