"""One small rule per operation: how units pass through it.

A rule takes the node and a `Context` and returns the axes of its output (a list per output
where there are several). An operation without a rule freezes what touches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.fx import Node

from cria_prune.base.sizes import Operation
from cria_prune.structure.account import NO_RULE
from cria_prune.structure.axes import Axes, Dim, Units
from cria_prune.structure.weights import VIEWS, ViewNumbers, main_tensor

MODEL_INPUT = "is part of the model's input"
Rule = Callable[[Node, "Context"], Any]
RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Signal:
    """A dimension of an activation along which units lie.

    Attributes:
        dim: of the activation.
        atoms: along it.
    """

    dim: int
    atoms: np.ndarray


@dataclass(frozen=True)
class WeightUse:
    """One call of an operation that sums over a weight: where its units come in and go out.

    Attributes:
        node: the call.
        weight: the parameter that the weight is, is a view of, or is mainly computed from.
        view: its number, of the views of this parameter that layers read.
        consumed, produced: (parameter, dimension) pairs that lie along what the call sums over, and along
            what it makes.
        entering, leaving: the signals.
        per_element: multiplications per element of `weight`.
        read: whether the output of the model depends on it.
    """

    node: Node
    weight: str
    view: int
    consumed: tuple[tuple[str, int], ...]
    produced: tuple[tuple[str, int], ...]
    entering: tuple[Signal, ...]
    leaving: tuple[Signal, ...]
    per_element: float
    read: bool = True


@dataclass(frozen=True)
class Counted:
    """A number in the captured operations that counts atoms: a module may hold it as an attribute."""

    node: Node
    module: str
    value: int
    atoms: np.ndarray
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Addition:
    """A sum of branches: the atoms along one dimension of it, and the sources of each branch."""

    atoms: np.ndarray
    branches: tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """One of the dimensions (atoms) that a reshape makes of the dimensions `of` of its tensor."""

    atoms: Dim
    of: tuple[int, ...]


Given = Factor | tuple[int, ...] | None
"""What says a size of a result: a factor, the dimensions of the tensor whose sizes make it, or nothing."""


@dataclass(frozen=True)
class Sized:
    """An operation that asks for sizes, whose call can be given others (`base.sizes`).

    Attributes:
        module: the module whose code calls it.
        operation: `reshape`, `expand` or `split`.
        takes: atoms of each dimension of the tensor.
        gives: of each dimension of the result, or of each part.
        mixed: the dimensions of the tensor whose units are one with a fixed factor, such as the examples.
        dim: the dimension that is split, else -1.
    """

    module: str
    operation: Operation
    takes: tuple[Dim, ...]
    gives: tuple[Given, ...]
    mixed: frozenset[int]
    dim: int = -1


@dataclass
class Context:
    """What the rules know.

    Attributes:
        units: the atoms.
        labels: parameter or buffer -> the atoms of its dimensions.
        axes: the axes of each node so far.
        names: placeholder -> the parameter or buffer that it is.
        outer: placeholder of a wrapper's graph -> the node that is given for it.
        data: nodes that depend on the model's inputs.
        statistics: node -> (dimension counted from the back, atoms) pairs that it is a statistic over.
        dropped: the same of a statistic whose dimension is gone, and will be put back.
        weight_ties: node that no input reaches -> the numbers of the ties that it made.
        views: of the parameters that layers read.
        sources: node -> the layers that produced it, with no other layer between: one bit for each of
            their uses, see `structure/skips.py`.
        upstream: node -> all uses of weights that it depends on, likewise.
        additions: the sums of outputs of different layers.
        lost: node -> the operation without a rule that its values come from, with no layer between.
        values: nodes that are a constant of the code, with its value; integer buffers too.
        picks: (buffer, dimension) whose values are the positions of the units that they stand beside.
        points: node whose values are positions of units, such as the experts that a router picks -> these
            units (n,) in their order.
        ranked: units, and how many of them are picked for each row: so many have to stay.
        uses: the uses of weights.
        counted: numbers that count atoms.
        sized: operations that ask for sizes.
    """

    units: Units
    labels: dict[str, list[np.ndarray]] = field(default_factory=dict)
    axes: dict[Node, Any] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    outer: dict[Node, Node] = field(default_factory=dict)
    data: set[Node] = field(default_factory=set)
    statistics: dict[Node, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    dropped: dict[Node, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    weight_ties: dict[Node, range] = field(default_factory=dict)
    views: ViewNumbers = field(default_factory=ViewNumbers)
    sources: dict[Node, int] = field(default_factory=dict)
    upstream: dict[Node, int] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    lost: dict[Node, str] = field(default_factory=dict)
    values: dict[Node, Tensor] = field(default_factory=dict)
    picks: set[tuple[str, int]] = field(default_factory=set)
    points: dict[Node, np.ndarray] = field(default_factory=dict)
    ranked: list[tuple[np.ndarray, int]] = field(default_factory=list)
    uses: list[WeightUse] = field(default_factory=list)
    counted: list[Counted] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)

    def of(self, node: Any) -> Axes:
        """Return the axes of a tensor argument."""
        return list(self.axes[node])

    def where(self, node: Node) -> str:
        """Say where a node is, for a reason."""
        return f"{operation_name(node)} in {module_path(node) or 'the model'}"

    def fixed_by(self, node: Node) -> str:
        """Say why a dimension of a layer's input has no units."""
        return self.lost.get(node, MODEL_INPUT)

    def count(self, node: Node, value: int, atoms: Dim, *names: str) -> None:
        """Note that the number `value` in this operation counts these atoms."""
        if atoms is not None and value > 0:
            self.counted.append(Counted(node, module_path(node), int(value), atoms, names))

    def size(
        self, node: Node, operation: Operation, takes: Axes, gives: Sequence[Given], dim: int = -1
    ) -> None:
        """Note that an operation asks for sizes."""
        if any(item is not None for item in gives):
            mixed = frozenset(
                place for place, item in enumerate(takes) if item is not None and self.units.is_mixed(item)
            )
            self.sized.append(Sized(module_path(node), operation, tuple(takes), tuple(gives), mixed, dim))

    def is_weight(self, node: Node) -> bool:
        """Say whether a node is a parameter or is computed from some, and from no input."""
        return node not in self.data and any(item in self.names for item in self.made_from(node))

    def made_from(self, node: Node) -> list[Node]:
        """Return a node and all that it depends on; what depends on the input is left out."""
        found, waiting = {node: None}, [node]
        while waiting:
            item = waiting.pop()
            before = [self.outer[item]] if item in self.outer else item.all_input_nodes
            fresh = [other for other in before if other not in found and other not in self.data]
            found |= dict.fromkeys(fresh)
            waiting += fresh
        return [*found]

    def use(
        self, node: Node, weight: Node, dims: tuple[int | None, int | None],
        channel: int, entering: Dim, leaving: Dim, positions: float,
    ) -> None:  # fmt: skip
        """Note a use of a weight whose axes `dims` are summed over and produced, see `use_along`."""
        summed, made = ((() if dim is None else (dim,)) for dim in dims)
        into, out = (() if atoms is None else (Signal(channel, atoms),) for atoms in (entering, leaving))
        self.use_along(node, weight, (summed, made), into, out, positions)

    def use_along(
        self, node: Node, weight: Node, dims: tuple[Sequence[int], Sequence[int]],
        entering: Sequence[Signal], leaving: Sequence[Signal], positions: float,
    ) -> None:  # fmt: skip
        """Note a use of a weight: a parameter, a view of one, or what is computed from some.

        Args:
            node: the call; weight: what it reads.
            dims: the dimensions of the weight that are summed over, and those that are produced.
            entering, leaving: the signals; those that are fixed are left out.
            positions: multiplications per element of the weight.
        """
        before = self.made_from(weight)
        names = [self.names[item] for item in before if item in self.names]
        if not names:
            reason = f"the weight of {self.where(node)} is a constant"
            for signal in (*entering, *leaving):
                self.units.freeze(signal.atoms, reason)
            return
        order = {name: tuple(map(len, self.labels[name])) for name in self.labels if name in names}
        main = main_tensor(order)
        # What scales one side alone (the lengths of a weight norm) follows the units, as a bias does.
        parts = [name for name, sizes in order.items() if name == main or sum(size > 1 for size in sizes) > 1]
        ties = [number for item in before for number in self.weight_ties.get(item, ())]
        consumed, produced = (
            self._origins([self.axes[weight][dim] for dim in places], ties, parts) for places in dims
        )
        # What is only moved can be zeroed, and refitted, in the parameter. Where more is done to it,
        # only the operations themselves say what becomes of the others when some leave.
        if any(item.op == "call_function" and operation_name(item) not in VIEWS for item in before):
            for signal in (*entering, *leaving):
                self.units.mark(signal.atoms, "normed")
        share = math.prod(shape(weight)) / max(math.prod(order[main]), 1)
        view = self.views.of(main, weight.meta["val"], dims[0])
        self.uses.append(
            WeightUse(
                node,
                main,
                view,
                consumed,
                produced,
                tuple(entering),
                tuple(leaving),
                positions * share,
                not self.units.unread,
            )
        )

    def _origins(
        self, axes: Sequence[Dim], ties: Sequence[int], names: Iterable[str]
    ) -> tuple[tuple[str, int], ...]:
        """Return the dimensions of parameters that some dimensions of a weight come from."""
        found = [self.units.origins(item, ties) for item in axes if item is not None]
        blocks = frozenset().union(*found)
        return tuple(
            (name, dim)
            for name in names
            for dim, atoms in enumerate(self.labels[name])
            if len(atoms) and int(atoms[0]) in blocks
        )


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by their base name."""

    def register(function: Rule) -> Rule:
        RULES.update({name.rstrip("_") or name: function for name in names})  # as `operation_name` has it
        return function

    return register


def shape(node: Node) -> list[int]:
    """Return the shape that a node's tensor had in the capture."""
    return [int(size) for size in node.meta["val"].shape]


def tensor_arguments(node: Node) -> list[Node]:
    """Return every argument node that carries a tensor, lists opened."""
    return [item for item in node.all_input_nodes if hasattr(item.meta.get("val"), "shape")]


NAMESPACES = {"aten", "cria_prune"}
SOFTMAX = ("softmax", "log_softmax", "_softmax")
EXPERTS = "experts"
"""The mark of units that are the experts of a layer, which a router picks some of for each row."""


def operation_name(node: Node) -> str:
    """Return the base name of a node's operation: `aten.relu_.default` is `relu`."""
    target = node.target
    name = target.__name__ if callable(target) and not hasattr(target, "_schema") else str(target)
    parts = name.split(".")
    base = parts[1] if parts[0] in NAMESPACES and len(parts) > 1 else parts[0]
    return base.rstrip("_") or base


def arrays_of(axes: object) -> Iterator[np.ndarray]:
    """Yield the arrays in what a node's axes are: one, or lists and tuples of them, nested."""
    if isinstance(axes, (list, tuple)):
        for item in axes:
            yield from arrays_of(item)
    elif isinstance(axes, np.ndarray):
        yield axes


def module_path(node: Node) -> str:
    """Return the qualified name of the module that a node runs in; `` for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str([value[0] for value in stack.values()][-1]) if stack else ""


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def no_rule(node: Node, context: Context) -> Any:
    """Freeze all that touches an operation that has no rule."""
    # An operation that is not known may mix, move or count
    # units. Freezing prunes less than could be, never wrongly.
    reason = f"{NO_RULE} {context.where(node)}"
    context.lost[node] = next(
        (context.lost[item] for item in node.all_input_nodes if item in context.lost), reason
    )
    for item in node.all_input_nodes:
        freeze_all(context.axes.get(item, []), context, reason)
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [[None] * len(getattr(item, "shape", ())) for item in value]
    return [None] * len(getattr(value, "shape", ()))


def freeze_all(axes: Iterable[Any], context: Context, reason: str) -> None:
    """Freeze each dimension in (possibly nested) axes."""
    for item in axes:
        if isinstance(item, list):
            freeze_all(item, context, reason)
        else:
            context.units.freeze(item, reason)


# Each position of the result comes from the same position of the inputs. Values play no part here, places do.
ELEMENTWISE = """
    __and__ __invert__ __or__ __xor__ _to_copy abs acos acosh add addcdiv addcmul alias alpha_dropout
    asin asinh atan atan2 atanh bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor celu clamp
    clamp_max clamp_min clone contiguous copysign cos cosh deg2rad detach digamma div dropout elu
    empty_like eq erf erfc erfinv exp exp2 expm1 feature_dropout float_power floor floor_divide fmax
    fmin fmod frac full_like ge gelu gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot
    isfinite isinf isnan isneginf isposinf le leaky_relu lerp lgamma lift_fresh_copy log log10 log1p
    log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit lt masked_fill
    maximum minimum mish mul nan_to_num ne neg ones_like positive pow rad2deg rand_like randn_like
    reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh
    softplus softshrink softsign special_entr special_erfcx special_log_ndtr special_ndtr special_xlog1py
    sqrt square sub tan tanh tanhshrink threshold to trunc type_as where xlogy zeros_like
"""
ADDITIONS = {"add", "sub", "rsub", "addcmul", "addcdiv", "lerp"}
ONE_TENSOR = {"to", "type_as"}  # the other tensor gives its type only


@rule(*ELEMENTWISE.split())
def elementwise(node: Node, context: Context) -> Axes:
    """Broadcast the arguments and tie what meets."""
    if isinstance(node.meta["val"], (tuple, list)):  # `where` of a condition alone gives places
        return no_rule(node, context)
    items = tensor_arguments(node)
    if operation_name(node) in ONE_TENSOR:
        items = items[:1]
    result = broadcast([(context.of(item), shape(item)) for item in items], len(shape(node)), node, context)
    _mark_branches(node, result, [item for item in items if item in context.data], context)
    meet_statistics(node, items, result, context)
    return result


def meet_statistics(node: Node, items: list[Node], result: Axes, context: Context) -> None:
    """A statistic over units is broadcast back over these units, or they are frozen."""
    for item in items:
        if item in context.dropped:
            context.dropped[node] = context.dropped[item]
        for back, atoms in context.statistics.get(item, ()):
            met = result[back]
            # Not met yet: a mean + eps, or its root, is still the statistic.
            if shape(node)[back] == 1:
                context.statistics.setdefault(node, []).append((back, atoms))
            # A norm's statistic comes back to the units that it was taken over, and the twin
            # of operations can leave units out of it. One that meets anything else (a gate,
            # a classifier) changes with every cut, so its units stay (docs/decisions/0006).
            elif met is None or len(met) != len(atoms):
                reason = f"has a statistic that meets other units in {context.where(node)}"
                context.units.freeze(atoms, reason)
            else:
                context.units.tie(met, atoms, "")


def _mark_branches(node: Node, result: Axes, branches: list[Node], context: Context) -> None:
    """Note what meets: sums of outputs of different layers, of which some may skip; and gated units."""
    name = operation_name(node)
    added = tuple(dict.fromkeys(_added(name, branches, context))) if name in ADDITIONS else ()
    # Where one term comes from all layers that the others come from, no layer is added by them: something
    # meets itself, scaled by other layers, as in x + x · gate(x), or a state space's D · x.
    if (len(added) < 2 or reduce(or_, added) in added) and name != "mul":
        return
    for back in range(1, len(result) + 1):
        held = [context.axes[item][-back] for item in branches if back <= len(shape(item))]
        # Equal atoms on both sides are one branch that meets itself, as in x · sigmoid(x).
        labelled = [item for item in held if item is not None]
        if any(not np.array_equal(labelled[0], other) for other in labelled[1:]):
            if name == "mul":
                context.units.mark(result[-back], "gated")
            elif not context.units.unread:
                context.additions.append(Addition(np.asarray(result[-back]).ravel(), added))


def _added(name: str, branches: list[Node], context: Context) -> list[int]:
    """Return the sources of each term of a sum."""
    sources = [context.sources.get(item, 0) for item in branches]
    if name == "lerp" and len(sources) == 3:  # (1 - w) x + w y
        return [sources[0] | sources[2], sources[1] | sources[2]]
    if name.startswith("addc") and len(sources) == 3:  # x + y z
        return [sources[0], sources[1] | sources[2]]
    return sources


def broadcast(items: list[tuple[Axes, list[int]]], rank: int, node: Node, context: Context) -> Axes:
    """Tie (axes, shape) pairs as broadcasting does; return `rank` axes."""
    result: Axes = [None] * rank
    for back in range(1, rank + 1):
        # A dimension of one is stretched over the others' units and ties nothing.
        present = [(axes[-back], sizes[-back]) for axes, sizes in items if back <= len(sizes)]
        meeting = [dim for dim, size in present if size != 1]
        if not meeting:  # a width of one, or nothing but broadcasting
            meeting = [dim for dim, _ in present if dim is not None]
        for number, dim in enumerate(meeting):
            fixed = f"meets a tensor of fixed size in {context.where(node)}"
            result[-back] = dim if number == 0 else context.units.tie(result[-back], dim, fixed)
    return result


@rule("_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size")
def nothing(node: Node, context: Context) -> Axes:
    """A check that export writes; it gives nothing."""
    return []


@rule(*[f"{prefix}{kind}" for prefix in ("", "new_") for kind in ("zeros", "ones", "full", "empty")])
def factory(node: Node, context: Context) -> Axes:
    """A new tensor: its sizes may be numbers that the code reads from somewhere, which a trial cut shows."""
    axes: Axes = [None] * len(shape(node))
    for dim, size in enumerate(shape(node)):
        if size > 1:
            # Its sizes may be the very numbers that count units elsewhere (T5's position bias),
            # so it has atoms like a parameter and may be tied to them (docs/decisions/0007).
            axes[dim] = context.units.fresh(size)
            context.count(node, size, axes[dim])
            context.units.assume(axes[dim], f"{context.where(node)} takes its sizes from its input")
    return axes


def argument_shape(node: Node, index: int = 0) -> list[int]:
    """Return the shape of a tensor argument given by position."""
    return shape(cast(Node, node.args[index]))


def sizes_argument(node: Node) -> list[int]:
    """Return the list of sizes that is the second argument."""
    return [int(size) for size in cast(list[int], node.args[1])]


def dim_argument(node: Node, index: int, name: str, rank: int, default: int = 0) -> int:
    """Return a dimension argument, counted from the front."""
    return int(argument(node, index, name, default)) % rank


def fixed_atoms(context: Context, size: int, reason: str) -> np.ndarray:
    """Return new atoms that are frozen."""
    atoms = context.units.fresh(size)
    context.units.freeze(atoms, reason)
    return atoms
