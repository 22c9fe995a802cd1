"""Which positions and tokens are looked at, what numbers their samples, and how they become moments.

Legend: B = examples of a batch, P = places drawn per example, T = tokens, S =
samples, n = features of an activation.

docs/method.md section 1 says what a sample is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cria_prune.base.errors import SignalError
from cria_prune.config import RecordConfig
from cria_prune.graph.moments import MomentAccumulator

# Both together fill an int64: every stream has 2³⁶ numbers of its own.
SPAN = 2**36  # numbers of one stream, about
STREAMS = 2**27
ONE_IN = 8  # tokens of a long text: neighbours say much the same

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def _mix(state: np.ndarray) -> np.ndarray:
    """Scramble uint64 (SplitMix64; Steele, Lea and Flood 2014): a generator that can start anywhere."""
    state = state + _STEP
    for shift, factor in _MIX:
        state = (state ^ (state >> shift)) * factor
    return state ^ (state >> np.uint64(31))


def draw_positions(seed: int, first: int, examples: int, shape: Sequence[int], count: int) -> np.ndarray:
    """Draw distinct spatial positions, the same for an example however the examples are batched.

    The flattened positions are cut into `count` pieces of equal length (up to one), and one is drawn
    from each. The draw depends only on the seed, the example's index and the spatial shape, so an
    input side and an output side of equal shape are read at the same places.

    Args:
        seed: the recording's seed.
        first: index of the first example in the whole stream.
        examples: B.
        shape: the spatial shape, (H, W) for an image.
        count: positions per example; all of them are returned where there are no more.

    Returns:
        (B, min(count, H·W)) int64, flat positions in ascending order.

    >>> draw_positions(0, first=0, examples=3, shape=(2, 2), count=8)[0].tolist()
    [0, 1, 2, 3]
    >>> both = draw_positions(0, first=0, examples=3, shape=(8, 8), count=4)
    >>> bool((draw_positions(0, first=2, examples=1, shape=(8, 8), count=4) == both[2]).all())
    True
    """
    total = int(np.prod(shape))
    if total <= count:
        return np.tile(np.arange(total), (examples, 1))
    # One position of each piece covers an image more evenly than free draws. Seed,
    # shape and index of the example are all that it depends on: batches and processes
    # change nothing, and both sides of a layer are read at the same places.
    key = np.array([seed % 2**64], dtype=np.uint64)
    for length in shape:
        key = _mix(key ^ np.uint64(length))
    rows = _mix(key + np.arange(first, first + examples, dtype=np.uint64))[:, None]
    noise = _mix(rows + np.arange(count, dtype=np.uint64))
    bounds = np.arange(count + 1) * total // count
    return bounds[:-1] + (noise % np.diff(bounds).astype(np.uint64)).astype(np.int64)


def draw_tokens(seed: int, first: int, mask: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw distinct tokens of each example, the same for an example however it is batched and padded.

    The tokens of an example are cut into pieces of equal length, `tokens_drawn` of them, and one is drawn
    from each.

    Args:
        seed: the recording's seed.
        first: index of the first example in the whole stream.
        mask: (B, T) bool, the tokens that count; T are padded.
        least: tokens per example, at least; all where there are no more.

    Returns:
        Places (B, P) int64 among T, P = tokens_drawn(T, least), and (B, P) bool, which are to be taken.

    >>> mask = np.array([[True] * 6, [True, True, False, False, False, False]])
    >>> places, taken = draw_tokens(0, first=0, mask=mask, least=3)
    >>> taken.sum(axis=1).tolist(), places[1][taken[1]].tolist()
    ([3, 2], [0, 1])
    """
    # Ranks are drawn among the tokens that count, not places: padding, left or right, changes nothing.
    lengths = mask.sum(axis=1, keepdims=True)
    pieces = np.array([[max(1, tokens_drawn(int(length), least))] for length in lengths[:, 0]])
    place = np.arange(tokens_drawn(mask.shape[1], least) + 1)
    examples = np.arange(first, first + len(mask), dtype=np.uint64)
    rows = _mix(_mix(np.array([seed % 2**64], np.uint64)) + examples)
    noise = _mix(rows[:, None] + place[:-1].astype(np.uint64))
    bounds = np.minimum(place, pieces) * lengths // pieces
    widths = np.diff(bounds)
    ranks = bounds[:, :-1] + (noise % np.maximum(widths, 1).astype(np.uint64)).astype(np.int64)
    order = np.argsort(~mask, axis=1, kind="stable")  # the tokens that count come first
    return np.take_along_axis(order, np.minimum(ranks, mask.shape[1] - 1), axis=1), widths > 0


def tokens_drawn(tokens: int, least: int | None) -> int:
    """Return how many of an example's tokens are drawn: one in eight, `least` at least; all if None.

    >>> tokens_drawn(10, 16), tokens_drawn(100, 16), tokens_drawn(2048, 16), tokens_drawn(100, None)
    (10, 16, 256, 100)
    """
    return tokens if least is None else min(tokens, max(least, tokens // ONE_IN))


def gather_positions(activation: Tensor, positions: Tensor) -> Tensor:
    """Pick spatial positions: activation (B, C, ...) and positions (B, P) to (B, P, C), a copy."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return activation.flatten(2)[rows, :, positions]


def unit_signals(samples: Tensor, units: int) -> Tensor:
    """Turn samples (S, units·width) into signals (units, width·S); the features of a unit are in a row."""
    return samples.reshape(len(samples), units, -1).permute(1, 2, 0).reshape(units, -1)


class Origin(NamedTuple):
    """Where the samples (S,) of an activation come from.

    Attributes:
        example: (S,) int64, each one's example in the whole stream.
        place: (S,) int64, its place (position, token) in its example.
        places: places per example.
        alone: 0, or else what sets these examples apart from others of the same index.
    """

    example: Tensor
    place: Tensor
    places: int
    alone: int = 0

    def numbers(self, width: int, halves: int, taps: int, call: int, columns: int) -> Tensor:
        """Return the numbers of the unit signals that these samples become, for a sketch.

        They depend on nothing but the example, the place in it and the call, so on no other batch. Examples
        of one length and as many calls as taps are numbered without a gap, and their sketch is exact up to
        its columns; another length or further calls begin another stream of numbers, for two samples of one
        number would share bucket and sign.

        Args:
            width: features per unit.
            halves: 2 where this is every second example alone, else 1.
            taps: calls of one batch that are expected.
            call: calls of this batch before this one.
            columns: of the sketch.

        Returns:
            (width·S,) int64, in the order of `unit_signals`.
        """
        each = self.places * width
        # Examples of a half are every second one: divided by two they have numbers without gaps.
        # Then come the calls of a batch, the places of an example and the features of a unit.
        first = ((self.example // halves * taps + call % taps) * self.places + self.place) * width
        # The hash of whole numbers is the same in every process; that of a text would not
        # be. A stream is cut to whole deals, so that no deal has samples of two streams.
        stream = hash((each, call // taps, self.alone)) % STREAMS
        inside = (torch.arange(width)[:, None] + first).reshape(-1) % (SPAN // columns * columns)
        return stream * (SPAN // columns * columns) + inside


BUFFERED = 2**18  # numbers held back per side and half; small batches cost more calls than arithmetic


class Buffer:
    """Gathers small batches of signals into large ones for an accumulator.

    Args:
        total: where the signals go; complete only after `flush`.
        halves: 2 where only every second example comes here, else 1.
    """

    def __init__(self, total: MomentAccumulator, halves: int = 2) -> None:
        self.total, self._halves = total, halves
        self._batch, self._calls = -1, [0, 0]  # the batch at hand by its first example, its calls per half
        self._columns = max(1, BUFFERED // total.units)
        self._held: Tensor | None = None  # (columns, units), the first `_used` rows are signals
        self._numbers: list[Tensor] = []  # of the samples that are held
        self._used = 0

    def add(self, X: Tensor, numbers: Tensor | None = None) -> None:
        """Add signals X (units, S), with their numbers (S,) for a sketch; they are copied or used at once."""
        if self._used + X.shape[1] > self._columns:
            self.flush()
        # A batch that half fills the buffer is worth a product of its own, without a copy.
        if 2 * X.shape[1] > self._columns:
            self.total.add(X, numbers)
            return
        if self._held is None or self._held.dtype != X.dtype or self._held.device != X.device:
            self.flush()
            self._held = torch.empty(self._columns, len(X), dtype=X.dtype, device=X.device)
        self._held[self._used : self._used + X.shape[1]] = X.T
        self._used += X.shape[1]
        self._numbers += [] if numbers is None else [numbers]

    def holds(self, m: int, batches: int = 1) -> int:
        """Return the numbers that are held back at most of so many batches of m signals, if any are."""
        return 0 if 2 * m > self._columns else min(BUFFERED, m * self.total.units * batches)

    def adding_bytes(self, m: int) -> int:
        """Return the most that m signals ask for when they, or what was held back, go to the accumulator."""
        return self.total.adding_bytes(max(m, self._columns // 2) if self.holds(m) else m)

    def number(self, origin: Origin, half: int, first: int, width: int = 1, taps: int = 1) -> Tensor | None:
        """Return the numbers of the next signals for `add`, None where they are not asked for.

        Args:
            origin: of the samples.
            half: of the examples.
            first: the first example of the batch.
            width, taps: see `Origin.numbers`.
        """
        if self.total.exact:
            return None
        if first != self._batch:
            self._batch, self._calls = first, [0, 0]
        call = self._calls[half]
        self._calls[half] += 1
        return origin.numbers(width, self._halves, taps, call, self.total.columns)

    def flush(self) -> MomentAccumulator:
        """Hand over what is held back, and return the accumulator."""
        if self._held is not None and self._used:
            numbers = torch.cat(self._numbers) if self._numbers else None
            self.total.add(self._held[: self._used].T, numbers)
            self._used, self._numbers = 0, []
        return self.total


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
        dim = dim % activation.ndim
        if dim == 0:  # features first, as in W @ x.T: examples come next
            activation, dim = activation.movedim(0, -1), activation.ndim - 1
        rows = len(activation)
        # Windows and folded tokens are further rows of the same example. Rows
        # that do not divide may be routed tokens: each then counts as an example.
        each = rows // self._examples if rows % self._examples == 0 else 1
        spatial = activation.ndim > 2 and dim == 1
        if spatial:
            samples = gather_positions(activation, self._positions(rows, each, activation))
        else:
            samples = activation.movedim(dim, -1).reshape(rows, -1, activation.shape[dim])
        samples = samples.reshape(rows // each, -1, samples.shape[2])
        # A mask that does not fit this activation is another one's: a decoder has tokens of its own.
        mask = self._mask_of(rows, samples)
        folded = activation.ndim > 2 and rows % self._examples == 0  # else rows may be routed tokens, or time
        if not spatial and (folded or mask is not None):
            samples, mask = self._some_tokens(samples, mask)
        if samples.dtype not in (torch.float32, torch.float64):
            samples = samples.float()
        for half in (0, 1):
            # Even and odd go by the index in the whole stream,
            # so that the halves do not depend on the batches.
            start = (half - self._first) % 2
            part = samples[start::2]
            taken = None if mask is None else mask[start::2]
            if taken is not None:
                part = part[taken.to(part.device)]
            if len(part):
                origin = self._origin(samples, start, taken) if sketched else None
                yield half, part.reshape(-1, part.shape[-1]), origin

    def _mask_of(self, rows: int, samples: Tensor) -> Tensor | None:
        """Return the mask (examples, places) of samples (examples, places, n) that came in so many rows."""
        mask = self._mask
        if mask is None or mask.shape == samples.shape[:2]:
            return mask
        # A row for each token, and several places in each: experts that it was sent to.
        times = samples.shape[1] // mask.shape[1]
        fits = (
            rows == mask.numel() and len(samples) == len(mask) and times * mask.shape[1] == samples.shape[1]
        )
        return mask.repeat_interleave(times, dim=1) if fits else None

    def taken(self, shape: Sequence[int], dim: int, examples: int) -> int:
        """Return how many samples `halves` gives of an activation of so many examples, without a mask."""
        if dim % len(shape) == 0:
            shape, dim = (*shape[1:], shape[0]), -1
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
