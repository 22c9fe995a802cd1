"""Rules of recurrent layers, fused over their steps or one step at a time, and of packed sequences.

Legend: G = gates (4 in an LSTM, 3 in a GRU, 1 in a plain one), H = hidden units, P = what the next step and
the readers see of them (H, or the size of the projection), L = layers, D = directions, F = input features.
weight_ih (G·H, F), weight_hh (G·H, P), biases (G·H,), weight_hr (P, H) where there is a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch.fx import Node

from cria_prune.structure.axes import Axes, Dim
from cria_prune.structure.rules.core import (
    Context,
    argument,
    freeze_all,
    no_rule,
    operation_name,
    rule,
    shape,
)
from cria_prune.structure.rules.layers import follow_units

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Fused:
    """The arguments of a recurrent operation over all layers, directions and steps.

    Attributes:
        data: input, (steps, examples, F), examples first, or packed (rows, F).
        sizes: examples at each step, of packed data; None otherwise.
        states: the initial ones, (L·D, examples, P), of an LSTM also (L·D, examples, H).
        weights: of each layer, of each of its directions: weight_ih, weight_hh, biases, weight_hr; those that
            are not there are None.
        examples_first: the layout of the input.
    """

    data: Any
    sizes: Any
    states: Sequence[Any]
    weights: Sequence[Sequence[tuple[Any, Any, Any, Any, Any]]]
    examples_first: bool

    @classmethod
    def of(cls, args: Sequence[Any]) -> Fused:
        """Read the arguments, positional as `torch.nn` gives them."""
        packed = not isinstance(args[2], (list, tuple)) or isinstance(args[3], (list, tuple))
        data, sizes, rest = (args[0], args[1], args[2:]) if packed else (args[0], None, args[1:])
        states, flat, biased, layers, _, _, both = rest[:7]
        first = bool(rest[7]) if not packed else False
        states = list(states) if isinstance(states, (list, tuple)) else [states]
        directions = 2 if both else 1
        each = len(flat) // (layers * directions)
        cells = [_cell(flat[start : start + each], biased) for start in range(0, len(flat), each)]
        weights = [cells[start : start + directions] for start in range(0, len(cells), directions)]
        return cls(data, sizes, states, weights, first)


def _cell(flat: Sequence[Any], biased: bool) -> tuple[Any, Any, Any, Any, Any]:
    biases = flat[2:4] if biased else (None, None)
    projection = flat[4 if biased else 2 :]
    return (flat[0], flat[1], biases[0], biases[1], projection[0] if len(projection) else None)


@rule(*GATES)
def recurrent(node: Node, context: Context) -> Any:
    """A recurrent layer as `torch.nn` calls it."""
    return _layers(node, context, Fused.of(node.args), GATES[operation_name(node)])


@rule("recurrent_rows")
def recurrent_rows(node: Node, context: Context) -> Any:
    """A recurrent layer over packed sequences, as `structure.packed` writes it."""
    kind, rows, sizes, states, weights, biased, layers, both = node.args
    call = Fused.of((rows, sizes, states, weights, biased, layers, 0.0, False, both))
    return _layers(node, context, call, GATES[str(kind)])


def _layers(node: Node, context: Context, call: Fused, gates: int) -> Any:
    """All layers and directions: the gate rows of a unit leave together, and with them who reads it."""
    axes = context.of(call.data)
    # What comes before or after, and beside, is another step or example: no width that units lie along.
    freeze_all(axes[:-1], context, f"is a step or an example in {context.where(node)}")
    positions = float(np.prod(shape(call.data)[:-1]))
    entering, made = axes[-1], list[tuple[np.ndarray, np.ndarray]]()
    for layer in call.weights:
        for weights in layer:
            units = _units(node, context, entering, weights, gates, positions)
            if units is None:
                return _computed(node, context, [item for part in call.weights for item in part], positions)
            made.append(units)
        entering = np.concatenate([state for _, state in made[-len(layer) :]])
    hidden, state = made[0]
    # One number says how wide all layers and directions are, and one tensor holds their states. So unit i of
    # each leaves with unit i of the others. Groups that lose equally many, each its own, would keep more of
    # what the network does; the dimension of the states cannot say that.
    for others in made[1:]:
        context.units.tie(hidden, others[0], "")
        context.units.tie(state, others[1], "")
    kept = [
        _initial(node, context, item, units)
        for item, units in zip(call.states, (state, hidden), strict=False)
    ]
    return [[*[None] * (len(axes) - 1), entering], *([None, None, units] for units in kept)]


@rule(*(f"{name}_cell" for name in GATES))
def cell(node: Node, context: Context) -> Any:
    """One step: the input and the last states, (examples, F) and (examples, P)."""
    data, states, *weights = node.args
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    axes = context.of(data)
    freeze_all(axes[:-1], context, f"is an example in {context.where(node)}")
    biases = [argument(node, place, name) for place, name in ((4, "b_ih"), (5, "b_hh"))]
    positions = float(np.prod(shape(cast(Node, data))[:-1]))
    gates = GATES[operation_name(node).removesuffix("_cell")]
    call = (*weights[:2], *biases, None)
    made = _units(node, context, axes[-1], call, gates, positions)
    if made is None:
        return _computed(node, context, [call], positions)
    kept = [[*[None] * (len(axes) - 1), _initial(node, context, item, made[0])] for item in states]
    return kept if operation_name(node) == "lstm_cell" else kept[0]


def _units(
    node: Node,
    context: Context,
    entering: Dim,
    cell: tuple[Any, Any, Any, Any, Any],
    gates: int,
    positions: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tie what belongs to the units of one layer in one direction.

    Returns:
        The units (H,), and what is read of them (P,); None where the weights have no atoms.
    """
    inputs, states, *biases, projection = cell
    weights = [context.of(item) for item in (inputs, states, projection) if item is not None]
    (rows, columns), (also, read) = weights[:2]
    projected = rows if projection is None else weights[2][0]
    if rows is None or projected is None or any(dim is None for axes in weights for dim in axes):
        return None
    hidden = rows.reshape(gates, -1)[0]
    # Gate g of unit h is row g·H + h: the rows of a unit are H apart, and none of its gates works alone.
    context.units.tie(np.tile(hidden, gates), rows, "")
    context.units.tie(rows, also, "")
    follow_units(context, node, rows, *biases)
    context.units.tie(entering, columns, context.fixed_by(cast(Node, node.args[0])))
    state = hidden if projection is None else projected
    context.units.tie(state, read, "")
    context.use(node, inputs, (1, 0), -1, entering, rows, positions)
    # Both weights make the gates, which are one signal: it is read at the first of them.
    context.use(node, states, (1, 0), -1, state, None, positions)
    if projection is not None:
        # Torch takes no projection to as many numbers as there are hidden units, or more, and a plan does not
        # keep one group below another. So the projection is cut, and the hidden units behind it stay.
        context.units.tie(hidden, weights[2][1], "")
        context.units.freeze(hidden, f"has to stay larger than the projection in {context.where(node)}")
        context.use(node, projection, (1, 0), -1, None, state, positions)
    return hidden, state


def _computed(node: Node, context: Context, cells: Sequence[Sequence[Any]], positions: float) -> Any:
    """Freeze all that touches a layer of whose weights one has no atoms; its parameters are still listed."""
    reason = f"a weight of {context.where(node)} is computed, not a parameter"
    for item in node.all_input_nodes:
        freeze_all(context.axes[item], context, reason)
    for weight in (item for cell in cells for item in (*cell[:2], cell[4]) if item is not None):
        context.use(node, weight, (1, 0), -1, None, None, positions)
    return no_rule(node, context)


def _initial(node: Node, context: Context, states: Any, units: np.ndarray) -> np.ndarray:
    """Tie an initial state to the units; return them. One that the caller gives is as wide as it is."""
    axes = context.of(states)
    freeze_all(axes[:-1], context, f"is a layer or an example in {context.where(node)}")
    made = "let the forward make it, as wide as the layer says"
    context.units.tie(
        units, axes[-1], f"begins with a state of a fixed width in {context.where(node)}: {made}"
    )
    return units


@rule("_pack_padded_sequence", "pack_rows")
def pack(node: Node, context: Context) -> list[Axes]:
    """Steps and examples become rows; features pass. Also gives the examples at each step."""
    axes = context.of(node.args[0])
    freeze_all(axes[:-1], context, f"is a sequence in {context.where(node)}")
    return [[None, axes[-1]], [None]]


@rule("_pad_packed_sequence", "pad_rows")
def unpack(node: Node, context: Context) -> list[Axes]:
    """Rows become steps and examples again."""
    return [[None, None, context.of(node.args[0])[-1]], [None]]
