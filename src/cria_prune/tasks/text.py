"""Text as batches, and tasks on it: tokens, sentences, perplexity in both conventions, a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from cria_prune.base.batches import Batch, batch_target, describe, model_inputs, move
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.metrics import logits_of
from cria_prune.base.modules import cache_off, device_of, modes_kept
from cria_prune.base.progress import Progress, track
from cria_prune.tasks.base import Task
from cria_prune.tasks.loading import find_library

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
        rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in self.tokens]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.padding)
        mask = (torch.arange(ids.shape[1]) < self.lengths()[:, None]).long()
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


SHORT, LONG = 128, 2048
"""Tokens per sequence in the two conventions; the second is cut to what the model can read."""

BATCH_TOKENS = 4096
"""Tokens in a batch of the evaluation: 4,096 x 32,000 logits take half a gigabyte."""

PRUNE_TEXT: dict[str, dict[str, Any]] = {
    "plan": {"vanilla": True, "uniform": True, "multiple": 8}, "record": {"examples": 256},
}  # fmt: skip
"""Sections of a PruneConfig for models of transformers on text."""

IGNORED = -100
END = "<|endoftext|>"


@torch.no_grad()
def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> float:
    """Return exp of the mean negative log-likelihood, in nats, of every token that has one before it.

    In a sequence of L tokens the tokens 2 to L are predicted from those before them in the same
    sequence, so each gives L - 1 predictions; all predictions of all batches weigh the same. The model
    runs in eval mode without a cache; the log-likelihoods are summed in float64.

    Args:
        model: maps batches to logits (batch, tokens, vocabulary).
        batches: mappings with `input_ids` (batch, tokens). Where they have `labels`, tokens of label -100
            are not counted; where they have an `attention_mask`, tokens that it hides are not.
        progress: where to show how far it is; silent if None.

    Raises:
        DataError: nothing is predicted, or a batch has no `input_ids`.
    """
    passed("evaluate", model=model)
    place = device_of(model)
    total, count = 0.0, 0
    with modes_kept(model), cache_off(model):
        model.eval()
        for batch in track(batches, label="evaluate", progress=progress):
            batch = move(batch, place)
            labels = _labels(batch)[:, 1:].flatten()
            args, kwargs = model_inputs(batch)
            logits = logits_of(model(*args, **kwargs))[:, :-1].flatten(0, 1)
            losses = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
            total += float(losses.double().sum())
            count += int((labels != IGNORED).sum())
    if not count:
        raise DataError("A perplexity", "found nothing to predict", "Pass sequences of two tokens or more")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def perplexities(
    model: nn.Module,
    tokens: Tensor,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the perplexity of a text in both conventions, each under a name that says its length.

    The text is one line of tokens, as its tokenizer gives it, cut into blocks of L tokens that do not
    overlap; the last short block is dropped; see `perplexity` for what is summed. `perplexity-128` is
    the convention of LLM-Pruner and FLAP, `perplexity-2048` that of SparseGPT, Wanda and SliceGPT;
    figures of different lengths cannot be compared.

    Args:
        model: a causal language model of transformers.
        tokens: (tokens,) int64.
        lengths: tokens per sequence; 128, and 2,048 or the most that the model reads, if None.
        progress: where to show how far it is; silent if None.

    Raises:
        DataError: the text is too short for one sequence of one of the lengths.
    """
    wanted = conventions(model) if lengths is None else tuple(lengths)
    parts = {
        f"perplexity-{length}": BlockBatches(tokens, length, max(1, BATCH_TOKENS // length))
        for length in wanted
    }
    return {name: perplexity(model, batches, progress=progress) for name, batches in parts.items()}


def conventions(model: nn.Module) -> tuple[int, ...]:
    """Return 128 and 2,048 tokens, each cut to the most that the model reads; one length if they agree."""
    most = places(model)
    return tuple(dict.fromkeys(min(length, most or length) for length in (SHORT, LONG)))


def places(model: nn.Module) -> int | None:
    """Return how many tokens a model reads at most, by its table of positions; None if nothing says it."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tables = (item for name, item in model.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)  # RoBERTa counts from its padding on
    return None if not most else int(most) - (0 if padding is None else int(padding) + 1)


def train_tokenizer(text: str, vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer of at most `vocabulary` tokens, learned from a text.

    Any text can be written in it, for the 256 bytes are tokens; token 0 is the end of a text, and padding.
    The same text gives the same tokenizer.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        ArtifactError: transformers is not installed.
    """
    library = find_library("A tokenizer")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(text.splitlines(keepends=True), trainer)
    return library.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END, pad_token=END)


def sample_text(model: Any, tokenizer: Any, prompt: str, tokens: int = 60, seed: int = 0) -> str:
    """Return the prompt with `tokens` more, drawn from the model's 50 likeliest at temperature 0.8.

    The same seed gives the same text; torch's global generators are put back.

    Raises:
        DataError: the prompt is empty.
    """
    ids = encode(tokenizer, prompt)[None]
    if not ids.numel():
        raise DataError("A sample of text", "the prompt is empty", "Give at least one word to go on from")
    place = device_of(model)
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), modes_kept(model), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        out = model.generate(
            ids.to(place), attention_mask=torch.ones_like(ids).to(place), max_new_tokens=tokens,
            do_sample=True, top_k=50, temperature=0.8, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def _labels(batch: Batch) -> Tensor:
    """Return what is to be predicted, (batch, tokens), `IGNORED` where nothing is."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise DataError("A perplexity", f"found {describe(batch)}", "Pass mappings with input_ids")
    labels = batch_target(batch)
    labels = batch["input_ids"] if labels is None else labels
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)


AT_ONCE, SENTENCES = 32, 64
"""Blocks, and sentences, per batch where nothing is trained."""
LONGEST = 128
"""Tokens per sentence; the rest is cut."""


class LanguageTask(Task):
    """Perplexity of a causal language model, by blocks that do not overlap; a split is a line of tokens.

    Attributes:
        longest: tokens per block of the fine-tune.
        short: tokens per block of the calibration and the evaluation; `metric` names it.
    """

    pretrained = True
    batch_size = 4
    longest: int
    short = SHORT

    def tokens(self, split: str) -> Tensor:
        """Return the tokens of a split, (tokens,) int64; see `split`."""
        found: Tensor = self.split(split)
        return found

    def count(self, data: Tensor) -> int:
        """Return how many blocks of `short` tokens a split has."""
        return len(blocks(data, self.short))

    def epoch(self, data: Tensor, seed: int, batch_size: int, augment: bool) -> Iterable[Batch]:
        """Return shuffled blocks of `longest` tokens; with `augment` each epoch cuts elsewhere."""
        generator = torch.Generator().manual_seed(seed)
        # Always as many blocks: the schedule counts on equal epochs.
        count = len(blocks(data, self.longest)) - 1
        start = int(torch.randint(self.longest, (), generator=generator)) if augment else 0
        order = torch.randperm(max(count, 1), generator=generator)
        return BlockBatches(data, self.longest, batch_size, order, start if count > 0 else 0)

    def chosen(self, data: Tensor, index: Tensor, seed: int | None = None) -> Iterable[Batch]:
        """Return blocks of `short` tokens."""
        size = max(1, BATCH_TOKENS // self.short) if seed is None else AT_ONCE
        return BlockBatches(data, self.short, size, index)

    def tensors(self, data: Tensor) -> Iterable[Tensor]:
        """Return the tokens."""
        return (data,)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], progress: Progress | None = None) -> float:
        """Return the perplexity of the model on the batches."""
        return perplexity(model, batches, progress=progress)


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
        return SentenceBatches(data, by_length(data.lengths(), SENTENCES, seed))

    def tensors(self, data: Sentences) -> Iterable[Tensor]:
        """Return the tokens, their lengths and the labels."""
        return data.flat()
