"""The second way of capture: a model's operations by dispatch on one real run, where torch.export stops.

torch.export follows a forward without values, so it stops where Python asks for one: `float(tensor)`, a
branch on the data, NumPy. A run has values. What it reads of a constant is the same in every run; what it
reads of the data or of a weight is not, and the operations are then those of this run alone (`OneRun.reads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

VALUES = {"numpy", "__array__", "tolist", "__dlpack__"}
"""Methods of a tensor that hand its values out past the dispatch."""


@dataclass(frozen=True)
class Signature:
    """The part of torch.export's `ExportGraphSignature` that is used here."""

    inputs_to_parameters: Mapping[str, str]
    inputs_to_buffers: Mapping[str, str]
    user_outputs: tuple[str, ...]
    inputs_to_lifted_tensor_constants: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OneRun:
    """The operations of one run, with the attributes of an `ExportedProgram` that are used here.

    Attributes:
        graph: a placeholder for every parameter, buffer and tensor among the inputs, then the operations.
        graph_signature: which placeholder is what.
        constants: values of buffers that no canonical name reaches; there are none.
        at: where torch.export stopped: module and line.
        reads: values of the data or of weights were read by Python, so that another batch may run otherwise.
    """

    graph: Graph
    graph_signature: Signature
    at: str
    reads: bool
    constants: Mapping[str, Any] = field(default_factory=dict)


def one_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: str) -> OneRun:
    """Run a model on real inputs and return its operations, those that torch.export would give.

    Args:
        model: a copy, in the mode that it is to run in; its forward may leave on it what it likes.
        args, kwargs: its inputs; they may be written into.
        at: where torch.export stopped.

    Raises:
        Exception: whatever the forward raises, or torch where an operation cannot be followed.
    """
    names, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    leaves, structure = tree_flatten((args, kwargs))
    places = [place for place, item in enumerate(leaves) if isinstance(item, Tensor)]
    given = [leaves[place] for place in places]
    held = {**names, **buffers}

    def run(values: list[Tensor], inputs: list[Tensor]) -> list[Any]:
        filled = [*leaves]
        for place, item in zip(places, inputs, strict=True):
            filled[place] = item
        now_args, now_kwargs = tree_unflatten(filled, structure)
        state = dict(zip(held, values, strict=True))
        found = torch.func.functional_call(model, state, now_args, now_kwargs, tie_weights=True)
        return tree_leaves(found)

    # Some forwards write into weights: those of the user stay as they are.
    values = [item.detach().clone() for item in held.values()]
    with _module_paths(model), _Values() as past, torch.no_grad():
        made = make_fx(
            run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True,
            _error_on_data_dependent_ops=False,
        )(values, given)  # fmt: skip
    return _cleaned(made, [*held], set(names), at, past.read)


@contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Let every operation note the modules that it runs in, as torch.export does."""
    hooks = []

    def enter(path: str) -> Callable[..., None]:
        def pushed(module: nn.Module, *_: Any) -> None:
            stack = dict(fx_traceback.get_current_meta().get("nn_module_stack", {}))
            stack[f"{len(stack)}"] = (path, type(module).__qualname__)
            fx_traceback.get_current_meta()["nn_module_stack"] = stack

        return pushed

    def leave(*_: Any) -> None:
        stack = dict(fx_traceback.get_current_meta()["nn_module_stack"])
        stack.popitem()
        fx_traceback.get_current_meta()["nn_module_stack"] = stack

    try:
        for path, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(path), prepend=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Values(TorchFunctionMode):
    """Notices values that leave for Python or NumPy without an operation."""

    read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read = self.read or getattr(func, "__name__", "") in VALUES
        return func(*args, **(kwargs or {}))


def _written(node: Node) -> Iterator[Node]:
    """Yield an operation, and what it writes into with all that this is a view of."""
    yield node
    schema, item = getattr(node.target, "_schema", None), node
    while schema is not None and schema.is_mutable and item.args and isinstance(item.args[0], Node):
        item = item.args[0]
        yield item


def _cleaned(made: GraphModule, held: list[str], parameters: set[str], at: str, read: bool) -> OneRun:
    """Return the operations without what a run switches on and off around them."""
    graph, places = made.graph, [node for node in made.graph.nodes if node.op == "placeholder"]
    inputs = {node.name: name for node, name in zip(places, held, strict=False)}
    # A buffer is as constant as any other tensor that the model holds.
    depends = {node for node in places if inputs.get(node.name) not in {*held} - parameters}
    autocasts = list[tuple[Node, tuple[Any, ...]]]()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if not depends.isdisjoint(node.all_input_nodes):
            depends.update(_written(node))
        name, tags = getattr(node.target, "__name__", ""), getattr(node.target, "tags", ())
        if name == "_enter_autocast":
            autocasts.append((node, tuple(node.args[:3])))
        elif autocasts and name not in ("_exit_autocast", "_set_grad_enabled"):
            # Each operation carries its block: the blocks themselves could be left open between two of them.
            node.meta["autocast"] = autocasts[-1][1]
        elif name == "_exit_autocast":
            autocasts.pop()
        asks = torch.Tag.data_dependent_output in tags
        # The size of what these give is a value of the data too.
        if node in depends and (asks or torch.Tag.dynamic_output_shape in tags):
            read = True
        if (asks and not node.users) or name == "_set_grad_enabled":
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if getattr(node.target, "__name__", "") in ("_enter_autocast", "_exit_autocast"):
            graph.erase_node(node)
    output = next(node for node in graph.nodes if node.op == "output")
    users = tuple(item.name for item in tree_leaves(output.args) if isinstance(item, Node))
    signature = Signature(
        {node: name for node, name in inputs.items() if name in parameters},
        {node: name for node, name in inputs.items() if name not in parameters},
        users,
    )
    return OneRun(graph, signature, at, read)
