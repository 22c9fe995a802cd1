"""What a command calibrates on: rows, examples and tokens, and samples of a layer against its units."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cria_prune.base.batches import Batch, batch_size, by_name
from cria_prune.config import RecordConfig
from cria_prune.recording.sampling import tokens_drawn
from cria_prune.structure.groups import UnitGroups
from cria_prune.tasks.base import Task


def used(task: Task, batches: Iterable[Batch], groups: UnitGroups, config: RecordConfig) -> dict[str, Any]:
    """Return what a network is calibrated on, as plain JSON; of files their names alone.

    Args:
        task: whose data they are.
        batches: that are calibrated on.
        groups: units that can be removed; the widest group needs most samples.
        config: how many tokens of a text are drawn.

    Returns:
        `sources` and `rows` where the user gave data, `examples`; of texts also `tokens`, and `samples` that
        are drawn of a layer to score its units, of which the widest has `widest`.
    """
    examples, lengths = 0, list[int]()
    for batch in batches:
        examples += batch_size(batch)
        given = by_name(batch)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:
            seen = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
            lengths += seen.sum(1).tolist()
    found: dict[str, Any] = {"examples": examples}
    sources = getattr(getattr(task, "texts", None), "sources", ())
    if sources:
        found |= {"sources": [_name(source) for source in sources], "rows": task.count(task.split("train"))}
    if lengths:
        samples = sum(tokens_drawn(int(length), config.tokens) for length in lengths)
        widest = max((group.size for group in groups.prunable), default=0)
        found |= {"tokens": int(sum(lengths)), "samples": samples, "widest": widest}
    return found


def _name(source: str) -> str:
    """Return the name of a source without the place where it lies on this machine."""
    return Path(source).name if Path(source).exists() else source


def said(found: dict[str, Any]) -> str:
    """Return it as a sentence.

    >>> said({"examples": 8, "tokens": 900, "samples": 128, "widest": 64, "sources": ["x.csv"], "rows": 99})
    '8 of 99 examples of x.csv: 900 tokens, 128 samples of each layer for 64 units at most (2.0 each)'
    """
    text = f"{found['examples']:,} examples"
    if "sources" in found:
        text = f"{found['examples']:,} of {found['rows']:,} examples of {', '.join(found['sources'])}"
    if "tokens" in found:
        each = found["samples"] / max(found["widest"], 1)
        text += (
            f": {found['tokens']:,} tokens, {found['samples']:,} samples of each layer for "
            f"{found['widest']:,} units at most ({each:.1f} each)"
        )
    return text
