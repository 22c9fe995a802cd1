"""A network as onnxruntime has one: tensors in, named tensors out; and such a file as a module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from cria_prune.base.batches import ALONE, Batch, model_inputs, names_along
from cria_prune.base.errors import ConfigError, DataError, needed, said

"""The name of an output that is one tensor."""
EXTRA = "onnx"
TOKENS, MASK = "input_ids", "attention_mask"


class Flat(nn.Module):
    """A network whose forward takes the tensors of a batch one by one, and gives a mapping of tensors.

    Attributes:
        network: what it runs, with what else the batch holds (numbers, flags) as it was in the example.
        names: of the tensors that it takes, in their order: the arguments of the network's forward.
    """

    def __init__(self, network: nn.Module, example: Batch) -> None:
        super().__init__()
        self.network = network
        leaves, self._form = tree_flatten(model_inputs(example))
        self._fixed = [None if isinstance(item, Tensor) else item for item in leaves]
        self._places = [place for place, item in enumerate(leaves) if isinstance(item, Tensor)]
        self.names = _input_names(network, example)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the network's output by their names."""
        leaves = list[Any](self._fixed)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._form)
        found = dict(named(self.network(*args, **kwargs)))
        return {name if name not in self.names else f"{name}_out": item for name, item in found.items()}


class OnnxModule(nn.Module):
    """An ONNX file as a module: a batch in, by the names or the order of its inputs; named tensors out.

    Args:
        path: the file.
        order: names of the tensors that a batch without names holds; those of the file's inputs if None.
        threads: of onnxruntime; as many as it likes if None.
        device: `cpu`, or `cuda` where onnxruntime has a provider for it.

    Raises:
        PackageError: onnxruntime is not installed.
        ConfigError: onnxruntime has no provider for the device.
    """

    def __init__(
        self, path: str | Path, order: Sequence[str] | None = None, threads: int | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        runtime: Any = runtime_for("Running an ONNX file")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = runtime.InferenceSession(str(path), options, providers=[provider(runtime, device)])
        self.names = [item.name for item in self.session.get_inputs()]
        self.order = self.names if order is None else list(order)
        self.gives = [item.name for item in self.session.get_outputs()]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the outputs for a batch.

        Raises:
            DataError: it lacks what the file reads, or holds what the file was not exported with.
        """
        given: dict[str, Any] = dict(zip(self.order, filter(_is_tensor, tree_leaves(args)), strict=False))
        given |= {name: item for name, item in kwargs.items() if _is_tensor(item)}
        if MASK in self.names and MASK not in given and TOKENS in given:
            given[MASK] = torch.ones_like(given[TOKENS])  # as transformers takes it where there is none
        for names, what in (
            ([name for name in self.names if name not in given], "it lacks"),
            ([name for name in given if name not in (*self.order, *self.names)], "the file does not read"),
        ):
            if names:
                raise DataError(
                    "A batch for an ONNX file", f"{what} {', '.join(names)}",
                    "Export with an example that has the inputs of the batches",
                )  # fmt: skip
        feed = {name: given[name].detach().cpu().numpy() for name in self.names}
        found = self.session.run(None, feed)
        return {name: torch.from_numpy(item) for name, item in zip(self.gives, found, strict=True)}


def runtime_for(asked: str) -> Any:
    """Return the module onnxruntime. Raises a PackageError, about what was asked, where it is missing."""
    with needed(EXTRA, asked):
        import onnxruntime
    return onnxruntime


def provider(runtime: Any, device: str) -> str:
    """Return the provider of onnxruntime for a device. Raises a ConfigError where there is none."""
    name = (
        "CPUExecutionProvider" if device == "cpu" else f"{device.partition(':')[0].upper()}ExecutionProvider"
    )
    known = runtime.get_available_providers()
    if name not in known:
        raise ConfigError(
            f"onnxruntime on {device}", f"it has {', '.join(known)} here",
            "Install the onnxruntime of that device, or measure it on the CPU",
        )  # fmt: skip
    return name


def named(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an output by their names, as `repair.fidelity` calls them."""
    leaves, _ = tree_flatten_with_path(output)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            yield ".".join(names_along(path)) or ALONE, leaf


def tensors_of(example: Batch) -> list[Tensor]:
    """Return the tensors of a batch's inputs, in the order of `Flat`.

    Raises:
        DataError: there is none.
    """
    found = [item for item in tree_leaves(model_inputs(example)) if isinstance(item, Tensor)]
    if not found:
        raise DataError("An example of the inputs", "it holds no tensor", "Pass one with a tensor")
    return found


def ran(network: nn.Module, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what a network gives for tensors, which it may write into."""
    with torch.no_grad():
        found: dict[str, Tensor] = network(*(item.clone() for item in tensors))
    return found


def tried(network: nn.Module, tensors: Sequence[Tensor]) -> str:
    """Run a network and return what it raised, in words; empty where it ran."""
    try:
        ran(network, tensors)
    except Exception as error:  # whatever the user's forward raises
        return said(error)
    return ""


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


def _input_names(network: nn.Module, example: Batch) -> list[str]:
    """Return the names of the tensors of an example, as the network's forward has them."""
    args, kwargs = model_inputs(example)
    try:
        places = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):
        places = []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    titles = [item.name for item in places if item.kind in plain]
    leaves, _ = tree_flatten_with_path((args, kwargs))
    found = list[str]()
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        first, *rest = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]]
        by_place = not getattr(path[0], "idx", 1)
        if by_place:
            first = titles[int(first)] if int(first) < len(titles) else f"input_{first}"
        found.append(".".join([first, *rest]))
    return found
