"""The signals inside a recurrent layer, whose operation is one for all of its layers, steps and gates.

Legend: as in `structure.rules.recurrent`; B = examples, T = steps.

The input side of a hidden unit is what its gates are given before their activation, W_ih x + b_ih + W_hh h +
b_hh with h the state of the step before: G numbers, which are features of the unit (of a GRU the last one is
taken with its reset gate open). The output side is what is read of it: the states, at weight_hh those of the
step before each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cria_prune.structure.groups import Site
from cria_prune.structure.rules.recurrent import GATES, Fused

FUSED = {getattr(torch, name) for name in GATES}
CELLS = {getattr(torch, f"{name}_cell") for name in GATES}


class Signal(NamedTuple):
    """What one weight reads (`input`) or helps to make (`output`); a function, for it may be dear."""

    weight: Tensor
    site: Site
    read: Callable[[], Tensor]


def is_recurrent(function: Any) -> bool:
    """Say whether a function of torch is a recurrent layer or cell."""
    return function in FUSED or function in CELLS


def signals(function: Any, args: Sequence[Any], result: Any) -> Iterator[Signal]:
    """Yield a call's signals, examples first: (B, T, features); of packed data and cells (rows, features).

    Args:
        function: of torch.
        args: of its call, all positional.
        result: of its call.
    """
    if function in CELLS:
        data, states, *rest = args
        last = states[0] if isinstance(states, (list, tuple)) else states
        yield from _of_layer(data, lambda: last, (*rest, None, None)[:4])
        return
    call = Fused.of(args)
    sequence, directions = call.data, len(call.weights[0])
    for number, layer in enumerate(call.weights):
        begun = [item[number * directions : (number + 1) * directions] for item in call.states]
        # The operation does not give what is between its layers, so they are run once more, one by one.
        last = number == len(call.weights) - 1
        outputs = result[0] if last else _one_layer(function, args, sequence, begun, layer)
        given = outputs.chunk(directions, -1)
        data = _examples_first(sequence, call)
        for place, weights in enumerate(layer):
            before = partial(_before, call, given[place], begun[0][place], back=place == 1)
            yield from _of_layer(data, before, weights[:4])
            if weights[4] is not None:
                yield Signal(weights[4], "output", partial(_examples_first, given[place], call))
        sequence = outputs


def _of_layer(data: Tensor, before: Callable[[], Tensor], weights: Sequence[Any]) -> Iterator[Signal]:
    """Yield the signals of one layer in one direction, from what it reads and its states before each step."""
    inputs, states, one, other = weights

    def gates() -> Tensor:
        return functional.linear(data, inputs, one) + functional.linear(before(), states, other)

    yield Signal(inputs, "input", lambda: data)
    yield Signal(inputs, "output", gates)
    yield Signal(states, "input", before)


def _one_layer(
    function: Any,
    args: Sequence[Any],
    sequence: Tensor,
    begun: Sequence[Tensor],
    layer: Sequence[Sequence[Any]],
) -> Tensor:
    """Run one layer in all of its directions; return its outputs."""
    call = Fused.of(args)
    flat = [item for weights in layer for item in weights if item is not None]
    states = tuple(begun) if len(begun) > 1 else begun[0]
    head = (sequence, states, flat) if call.sizes is None else (sequence, call.sizes, states, flat)
    biased, _, *rest = args[len(head) :]
    return function(*head, biased, 1, *rest)[0]


def _examples_first(sequence: Tensor, call: Fused) -> Tensor:
    """Return a sequence (B, T, features); packed rows stay as they are."""
    return sequence if call.sizes is not None or call.examples_first else sequence.transpose(0, 1)


def _before(call: Fused, given: Tensor, first: Tensor, *, back: bool) -> Tensor:
    """Return the states before each step, from those that it gives and the initial ones (B, P)."""
    if call.sizes is None:
        time = 1 if call.examples_first else 0
        kept = given.narrow(time, 1 if back else 0, given.shape[time] - 1)
        begun = first.unsqueeze(time)
        return _examples_first(torch.cat([kept, begun] if back else [begun, kept], dim=time), call)
    # The examples that have a step are the first ones of those that had the step before.
    sizes = [int(size) for size in call.sizes]
    steps = given.split(sizes)
    if not back:
        return torch.cat(
            [first[: sizes[0]], *(step[:size] for step, size in zip(steps, sizes[1:], strict=False))]
        )
    parts = [
        item for step, size in zip(steps[1:], sizes, strict=False) for item in (step, first[len(step) : size])
    ]
    return torch.cat([*parts, first[: sizes[-1]]])
