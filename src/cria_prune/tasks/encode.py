"""The tokens of a long text, made a piece at a time and equal to those of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

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
