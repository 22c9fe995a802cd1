"""What a model is worth on labelled batches, by the metric that its users expect.

Perplexity; accuracy and F1; F1 of the spans of tags; exact match and F1 of answers; mean IoU of maps; word
error rate; correlations of scores. Each function returns name -> value, the one that is reported first.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune.base.batches import Batch, model_inputs, move
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.metrics import logits_of
from cria_prune.base.modules import cache_off, device_of, modes_kept
from cria_prune.base.progress import Progress, track
from cria_prune.recovery.guard import channels_last
from cria_prune.tasks.encode import Encoder, pad
from cria_prune.tasks.text import IGNORED, perplexity

Figures = dict[str, float]
WORDS = 64
"""Tokens of a transcript at most."""


@torch.no_grad()
def outputs_of(
    model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield batches, on the model's device, with what the model gives for them, in evaluation mode.

    Raises:
        DataError: there are none.
    """
    passed("evaluate", model=model)
    place, seen = device_of(model), False
    with modes_kept(model), cache_off(model), channels_last(model) if place.type == "cpu" else nullcontext():
        model.eval()
        for batch in track(batches, label="evaluate", progress=progress):
            seen = True
            batch = move(batch, place)
            args, kwargs = model_inputs(batch)
            yield batch, model(*args, **kwargs)
    if not seen:
        raise DataError("A metric", "found no examples", "Give labelled rows")


def classified(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return accuracy and F1, the mean over the classes that occur."""
    found, right = list[Tensor](), list[Tensor]()
    for batch, output in outputs_of(model, batches, progress):
        found.append(logits_of(output).argmax(-1).cpu())
        right.append(batch["labels"].cpu())
    said, known = torch.cat(found), torch.cat(right)
    each = []
    for number in torch.cat([said, known]).unique():
        hits = int(((said == number) & (known == number)).sum())
        each.append(2 * hits / int((said == number).sum() + (known == number).sum()))
    return {"accuracy": float((said == known).float().mean()), "f1": float(np.mean(each))}


def several(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return F1 over all classes together, and the share of examples with all classes right."""
    hits = said = known = same = count = 0
    for batch, output in outputs_of(model, batches, progress):
        found, right = logits_of(output) > 0, batch["labels"] > 0.5
        hits, said, known = (
            hits + int((found & right).sum()),
            said + int(found.sum()),
            known + int(right.sum()),
        )
        same, count = same + int((found == right).all(-1).sum()), count + len(right)
    return {"f1": 2 * hits / max(said + known, 1), "accuracy": same / count}


def correlated(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return the rank correlation (Spearman) and that of the values (Pearson); 0 where one is constant."""
    from scipy.stats import pearsonr, spearmanr

    found, right = list[Tensor](), list[Tensor]()
    for batch, output in outputs_of(model, batches, progress):
        found.append(logits_of(output).reshape(-1).float().cpu())
        right.append(batch["labels"].reshape(-1).float().cpu())
    said, known = torch.cat(found).double().numpy(), torch.cat(right).double().numpy()
    if len(said) < 2 or np.ptp(said) == 0 or np.ptp(known) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    return {
        "spearman": float(spearmanr(said, known).statistic), "pearson": float(pearsonr(said, known).statistic)
    }  # fmt: skip


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (kind, first, one past the last) of what tags mark, as conlleval reads them (B-, I-, O).

    >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found, kind, first = set[tuple[str, int, int]](), "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        name = name or mark
        goes_on = kind and mark in ("I", "E") and name == kind
        if kind and not goes_on:
            found.add((kind, first, place))
        if not goes_on:
            kind, first = ("" if tag == "O" else name), place
    return found


def tagged(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return F1, precision and recall of whole spans where tags are B-, I-; and the accuracy of the tags."""
    names = {int(number): str(name) for number, name in encoder.config.id2label.items()}
    hits = said = known = right = count = 0
    for batch, output in outputs_of(model, batches, progress):
        found = logits_of(output).argmax(-1)
        for one, other in zip(found.tolist(), batch["labels"].tolist(), strict=True):
            pairs = [(mine, theirs) for mine, theirs in zip(one, other, strict=True) if theirs != IGNORED]
            right, count = right + sum(mine == theirs for mine, theirs in pairs), count + len(pairs)
            mine, theirs = (spans([names[pair[side]] for pair in pairs]) for side in (0, 1))
            hits, said, known = hits + len(mine & theirs), said + len(mine), known + len(theirs)
    if not count:
        raise DataError("A metric of tags", "no token has one", "Give words with a tag each")
    figures = {
        "f1": 2 * hits / max(said + known, 1),
        "precision": hits / max(said, 1),
        "recall": hits / max(known, 1),
    }  # fmt: skip
    accuracy = {"accuracy": right / count}
    return figures | accuracy if in_spans(names.values()) else accuracy


def in_spans(names: Iterable[str]) -> bool:
    """Say whether tags mark spans: some begin with `B-` or `I-`."""
    return any(name.startswith(("B-", "I-")) for name in names)


def _words(text: str) -> list[str]:
    """Return the words of an answer as SQuAD compares them: without case, punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(found: str, right: str) -> float:
    """Return F1 of the words of two answers.

    >>> round(overlap("the old sea", "an old, old sea."), 3)
    0.8
    """
    one, other = _words(found), _words(right)
    if not one or not other:
        return float(one == other)
    same = sum((Counter(one) & Counter(other)).values())
    return 2 * same / (len(one) + len(other))


def answered(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return F1 and exact match of the words of answers, as SQuAD counts them."""
    exact, words = list[float](), list[float]()
    for batch, output in outputs_of(model, batches, progress):
        hidden = batch["attention_mask"] == 0
        first, last = (
            item.float().masked_fill(hidden, -math.inf) for item in (output.start_logits, output.end_logits)
        )
        both = (first[:, :, None] + last[:, None, :]).masked_fill(
            torch.ones(first.shape[1], first.shape[1], device=first.device).tril(-1).bool(), -math.inf
        )
        best = both.flatten(1).argmax(1)
        mine = torch.stack([best // first.shape[1], best % first.shape[1]], 1)
        for ids, one, other in zip(batch["input_ids"], mine.tolist(), batch["labels"].tolist(), strict=True):
            found, right = (
                "" if end == 0 else encoder.tokenizer.decode(ids[start : end + 1], skip_special_tokens=True)
                for start, end in (one, other)
            )
            exact.append(float(_words(found) == _words(right)))
            words.append(overlap(found, right))
    return {"f1": float(np.mean(words)), "exact-match": float(np.mean(exact))}


def predicted(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return exp of the mean negative log-likelihood of the labels, each where the model says it."""
    total, count = 0.0, 0
    for batch, output in outputs_of(model, batches, progress):
        labels = batch["labels"].flatten()
        losses = functional.cross_entropy(
            logits_of(output).float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
        )
        total, count = total + float(losses.double()), count + int((labels != IGNORED).sum())
    if not count:
        raise DataError("A perplexity", "found nothing to predict", "Give longer texts")
    return {"perplexity": math.exp(min(total / count, 700))}


def told(encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None) -> Figures:
    """Return the perplexity of texts, each token from those before it."""
    return {"perplexity": perplexity(model, batches, progress)}


def mapped(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return the mean over classes of intersection over union, and the share of pixels that are right."""
    classes = int(encoder.config.num_labels)
    table = torch.zeros(classes, classes, dtype=torch.int64)
    ignored = int(getattr(encoder.config, "semantic_loss_ignore_index", 255))
    for batch, output in outputs_of(model, batches, progress):
        labels = batch["labels"]
        logits = functional.interpolate(
            logits_of(output).float(), size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
        seen = (labels != ignored) & (labels >= 0) & (labels < classes)
        pairs = labels[seen] * classes + logits.argmax(1)[seen]
        table += torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes)
    hits, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    there = union > 0
    return {
        "mean-iou": float((hits[there] / union[there]).mean()), "accuracy": float(hits.sum() / table.sum())
    }  # fmt: skip


def distance(found: Sequence[str], right: Sequence[str]) -> int:
    """Return how many words are to be put in, taken out or replaced (Levenshtein).

    >>> distance("the old sea".split(), "the new blue sea".split())
    2
    """
    row = list(range(len(right) + 1))
    for number, word in enumerate(found, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(right, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


@torch.no_grad()
def spoken(encoder: Encoder, model: Any, batches: Iterable[Batch], progress: Progress | None) -> Figures:
    """Return the word error rate of what a model hears: by what it writes, or by its likeliest letters."""
    passed("evaluate", model=model)
    wrong, words, place, tokenizer = 0, 0, device_of(model), encoder.tokenizer
    kind = next(item.dtype for item in model.parameters())
    with modes_kept(model):
        model.eval()
        for batch in track(batches, label="evaluate", progress=progress):
            batch = move(batch, place)
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "decoder_input_ids")}
            inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in inputs.items()}
            if "decoder_input_ids" in batch:
                ids = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False, num_beams=1)
            else:
                ids = logits_of(model(**inputs)).argmax(-1)
            fill = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            right = batch["labels"].masked_fill(batch["labels"] == IGNORED, fill)
            plain = {} if "decoder_input_ids" in batch else {"group_tokens": False}
            for one, other in zip(ids, right, strict=True):
                found = tokenizer.decode(one, skip_special_tokens=True).split()
                there = tokenizer.decode(other, skip_special_tokens=True, **plain).split()
                wrong, words = wrong + distance(found, there), words + len(there)
    if not words:
        raise DataError("A word error rate", "the transcripts hold no words", "Give transcripts")
    return {"wer": wrong / words}


def retrieved(
    encoder: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
) -> Figures:
    """Return how often, of all different texts, the one that belongs to an image is nearest to it.

    Where the texts are names of classes this is the accuracy without examples (zero-shot).
    """
    held: list[Any] = list(batches)
    if not held:
        raise DataError("A metric", "found no examples", "Give images with texts")
    fill = encoder.padding
    texts = list(dict.fromkeys(tuple(row.tolist()) for batch in held for row in _unpadded(batch, fill)))
    number = {text: place for place, text in enumerate(texts)}
    right = count = 0
    ids = [{"input_ids": list(text)} for text in texts]
    every = {key: value for key, value in pad(encoder, ids).items() if key in held[0]}
    asked = [{**batch, **every} for batch in held]
    for batch, (_, output) in zip(held, outputs_of(model, asked, progress), strict=True):
        found = output.logits_per_image.argmax(-1).tolist()
        for one, row in zip(found, _unpadded(batch, fill), strict=True):
            right, count = right + (one == number[tuple(row.tolist())]), count + 1
    return {"retrieval": right / count}


def _unpadded(batch: Any, fill: int) -> list[Tensor]:
    mask = batch.get("attention_mask")
    return [row if mask is None else row[mask[at] == 1] for at, row in enumerate(batch["input_ids"])]


# Losses of models whose forward gives none.


def span_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, in nats, of the first and the last token of answers."""
    args, kwargs = model_inputs(batch)
    output: Any = model(*args, **kwargs)
    labels = batch["labels"]  # type: ignore[index, call-overload]
    sides = (output.start_logits, output.end_logits)
    return sum(functional.cross_entropy(item, labels[:, at]) for at, item in enumerate(sides)) / 2  # type: ignore[return-value]


def contrast_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy, in nats, of finding the text of an image in its batch and the other way."""
    args, kwargs = model_inputs(batch)
    output: Any = model(*args, **kwargs)
    right = torch.arange(len(output.logits_per_image), device=output.logits_per_image.device)
    sides = (output.logits_per_image, output.logits_per_text)
    return sum(functional.cross_entropy(item, right) for item in sides) / 2  # type: ignore[return-value]
