"""Packed sequences as operations that torch.export can follow.

How many rows a packed sequence has, and how many examples each step, depends on the lengths, which are data.
Inside `PackedRows` the functions behind `torch.nn.utils.rnn` give as many rows as there are at most, examples
times steps: those of the packed sequence first, then zeros. So the captured operations compute what the
forward does, in tensors whose sizes are known; only sequences that are all shorter than their tensor are
padded to its length again, and not to that of the longest.

Legend: B = examples, T = steps, F = features, L = layers, D = directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional
from torch.overrides import TorchFunctionMode

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FUNCTIONS: dict[Any, str] = {getattr(torch, name): name for name in KINDS}
PACK, PAD = (
    torch._C._VariableFunctions._pack_padded_sequence,
    torch._C._VariableFunctions._pad_packed_sequence,
)

REPLACED = {PACK, PAD, Tensor.__getitem__, *FUNCTIONS}


@custom_op("cria_prune::pack_rows", mutates_args=())
def pack_rows(data: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Return the rows (B·T, F) of sequences, and the examples at each step (T,)."""
    rows, sizes = PACK(data, lengths, batch_first)
    steps = data.shape[1 if batch_first else 0]
    return _filled(rows, data.shape[0] * data.shape[1]), functional.pad(sizes, (0, steps - len(sizes)))


@pack_rows.register_fake
def _(data: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    steps = data.shape[1 if batch_first else 0]
    rows = data.new_empty(data.shape[0] * data.shape[1], *data.shape[2:])
    return rows, torch.empty(steps, dtype=torch.int64, device="cpu")


@custom_op("cria_prune::pad_rows", mutates_args=())
def pad_rows(
    rows: Tensor, sizes: Tensor, batch_first: bool, padding: float, total: int
) -> tuple[Tensor, Tensor]:
    """Return the sequences (B, T, F) or (T, B, F), at least `total` steps, and their lengths (B,)."""
    found = sizes[sizes > 0]
    padded, lengths = PAD(rows[: int(found.sum())], found, batch_first, padding, max(total, len(sizes)))
    return padded, lengths


@pad_rows.register_fake
def _(rows: Tensor, sizes: Tensor, batch_first: bool, padding: float, total: int) -> tuple[Tensor, Tensor]:
    steps, examples = max(total, sizes.shape[0]), rows.shape[0] // sizes.shape[0]
    shape = (examples, steps) if batch_first else (steps, examples)
    lengths = torch.empty(examples, dtype=torch.int64, device="cpu")
    return rows.new_empty(*shape, *rows.shape[1:]), lengths


@custom_op("cria_prune::recurrent_rows", mutates_args=())
def recurrent_rows(
    kind: str, rows: Tensor, sizes: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor],
    biased: bool, layers: int, both: bool,
) -> list[Tensor]:  # fmt: skip
    """Run a recurrent layer (one of `KINDS`) over packed rows; return its outputs and its last states."""
    found = sizes[sizes > 0]
    given = tuple(states) if kind == "lstm" else states[0]
    made, *last = getattr(torch, kind)(
        rows[: int(found.sum())], found, given, list(weights), biased, layers, 0.0, False, both
    )
    return [_filled(made, len(rows)), *last]


@recurrent_rows.register_fake
def _(
    kind: str, rows: Tensor, sizes: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor],
    biased: bool, layers: int, both: bool,
) -> list[Tensor]:  # fmt: skip
    width = states[0].shape[-1] * (2 if both else 1)
    return [rows.new_empty(rows.shape[0], width), *(torch.empty_like(item) for item in states)]


def _filled(rows: Tensor, count: int) -> Tensor:
    """Return the rows with rows of zeros after them."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


class PackedRows(TorchFunctionMode):
    """Inside, packing, padding, and recurrent layers over packed sequences, are the operations above."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[
            tuple[Tensor, int]
        ] = []  # the examples at each step, and how many examples there are

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, or what stands for it."""
        if func in REPLACED:
            found = self._replaced(func, args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def _replaced(self, func: Any, args: Sequence[Any]) -> Any:
        if func == PACK:
            data, _, batch_first = args
            rows, sizes = pack_rows(*args)
            self._sizes.append((sizes, data.shape[0 if batch_first else 1]))
            return rows, sizes
        place = 1 if func == PAD or func in FUNCTIONS else 0
        examples = next((count for sizes, count in self._sizes if sizes is args[place]), None)
        if examples is None:
            return None
        if func == PAD:
            return pad_rows(*args[:3], float(args[3]), args[4])
        if func in FUNCTIONS:
            rows, sizes, states, weights, biased, layers, _, _, both = args
            states = list(states) if isinstance(states, (list, tuple)) else [states]
            kind = FUNCTIONS[func]
            return tuple(recurrent_rows(kind, rows, sizes, states, list(weights), biased, layers, both))
        # The first step has all examples: the initial states take their number from there.
        return examples if isinstance(args[1], int) and args[1] == 0 else None
