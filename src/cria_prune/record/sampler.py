"""From an activation to the samples of both halves of the examples.

Legend: B = examples of a batch, n = features of an activation, S = samples, P = places per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cria_prune.config import RecordConfig
from cria_prune.errors import SignalError
from cria_prune.record.sampling import Origin, draw_positions, draw_tokens, gather_positions, tokens_drawn


class Sampler:
    """Draws the places of each batch, the same for all its activations of one shape.

    Args:
        config: positions, tokens and the seed.
    """

    def __init__(self, config: RecordConfig) -> None:
        self._config = config
        self.begin(0, 1, None)

    def begin(self, first: int, examples: int, mask: Tensor | None) -> None:
        """Say what comes next: the first example's index, how many, their attention mask (B, tokens)."""
        self._first, self._examples = first, examples
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._drawn: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._tokens: dict[tuple[int, int, bool, torch.device], tuple[Tensor, Tensor]] = {}

    def halves(
        self, activation: Tensor, dim: int, name: str, sketched: bool
    ) -> Iterator[tuple[int, Tensor, Origin | None]]:
        """Yield (half, samples (S, n), their origin) of an activation whose features lie along `dim`.

        Rows beyond one per example (windows, folded tokens) go with their example; where the rows are
        no multiple of the examples, each is dealt with as an example of its own.
        """
        if activation.ndim < 2:
            raise SignalError(
                f"Reading the signal at {name!r}",
                f"the activation has the shape {tuple(activation.shape)}",
                "Give the model batches with a leading batch dimension",
            )
        rows, dim = len(activation), dim % activation.ndim
        each = rows // self._examples if rows % self._examples == 0 else 1
        spatial = activation.ndim > 2 and dim == 1
        if spatial:
            samples = gather_positions(activation, self._positions(rows, each, activation))
        else:
            samples = activation.movedim(dim, -1).reshape(rows, -1, activation.shape[dim])
        samples = samples.reshape(rows // each, -1, samples.shape[2])
        mask = self._mask if self._mask is not None and self._mask.shape == samples.shape[:2] else None
        folded = activation.ndim > 2 and rows % self._examples == 0  # else rows may be routed tokens, or time
        if not spatial and (folded or mask is not None):
            samples, mask = self._some_tokens(samples, mask)
        if samples.dtype not in (torch.float32, torch.float64):
            samples = samples.float()
        for half in (0, 1):
            start = (half - self._first) % 2
            part = samples[start::2]
            taken = None if mask is None else mask[start::2]
            if taken is not None:
                part = part[taken.to(part.device)]
            if len(part):
                origin = self._origin(samples, start, taken) if sketched else None
                yield half, part.reshape(-1, part.shape[-1]), origin

    def taken(self, shape: Sequence[int], dim: int, examples: int) -> int:
        """Return how many samples `halves` gives of an activation of so many examples, without a mask."""
        rows, dim = shape[0], dim % len(shape)
        each = math.prod(shape) // max(shape[dim] * rows, 1)
        if len(shape) > 2 and dim == 1:
            return rows * min(each, self._config.positions)
        if len(shape) > 2 and rows % examples == 0:  # of a matrix all rows, if no mask fits
            return examples * tokens_drawn(rows // examples * each, self._config.tokens)
        return rows * each

    def _some_tokens(self, samples: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that are drawn of samples (examples, tokens, n), and their mask."""
        config, shape = self._config, (samples.shape[0], samples.shape[1])
        if config.tokens is None or tokens_drawn(shape[1], config.tokens) == shape[1]:
            return samples, mask
        key = (*shape, mask is not None, samples.device)
        if key not in self._tokens:
            counted = np.ones(shape, dtype=bool) if mask is None else mask.cpu().numpy()
            drawn = draw_tokens(config.seed, self._first, counted, config.tokens)
            places, taken = (torch.from_numpy(item).to(samples.device) for item in drawn)
            self._tokens[key] = places, taken
        places, taken = self._tokens[key]
        rows = torch.arange(len(places), device=places.device)[:, None]
        return samples[rows, places], None if mask is None else taken

    def _origin(self, samples: Tensor, start: int, mask: Tensor | None) -> Origin:
        """Return the origin of every second example of samples (examples, places, n), from `start` on."""
        count, places = samples.shape[:2]
        example = torch.arange(self._first + start, self._first + count, 2)[:, None].expand(-1, places)
        place = torch.arange(places).expand(len(example), -1)
        kept = slice(None) if mask is None else mask.cpu()
        # Rows that do not go by examples have no index that the next batch's would not have, too.
        alone = 0 if count == self._examples else self._first + 1
        return Origin(example[kept].reshape(-1), place[kept].reshape(-1), places, alone)

    def _positions(self, rows: int, each: int, activation: Tensor) -> Tensor:
        """Return the spatial positions (rows, P) of this batch for the shape of an activation."""
        shape, device = (rows, *activation.shape[2:]), activation.device
        if (shape, device) not in self._drawn:
            config = self._config
            drawn = draw_positions(config.seed, self._first * each, rows, shape[1:], config.positions)
            self._drawn[shape, device] = torch.from_numpy(drawn).to(device)
        return self._drawn[shape, device]
