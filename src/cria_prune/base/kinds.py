"""What a model may come as: taken out of what wraps it, and refused where its weights are not plain numbers.

===============================  =========================================================================
model                            what becomes of it
===============================  =========================================================================
DataParallel, torch.compile      worked on without it; the smaller model is given back in the same wrapping
SentenceTransformer              its encoder is worked on, which alone has units; the smaller one takes its
                                 place in the same pipeline
DistributedDataParallel          worked on without it; the smaller model is given back plain, for the
                                 wrapper's reducer holds the parameters as they were
quantised (torch.ao, torchao,    refused: prune before quantising, or dequantise
bitsandbytes, GPTQ, AWQ, FP8)
scripted or traced               refused: prune the module that was scripted
===============================  =========================================================================
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cria_prune.base.errors import StructureError

P = ParamSpec("P")
R = TypeVar("R")
Wrap = Callable[[nn.Module], nn.Module]

PACKED_NAMES = {"qweight", "weight", "weight_packed", "qzeros", "SCB"}
"""Buffers of linear layers of which no pruner can tell what their whole numbers stand for."""
TEXTS = 32
"""Texts of a batch, where they come in one list."""
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _compiled_class() -> type | tuple[()]:
    """Return the class of what torch.compile gives; importing it takes seconds, so only if it was used."""
    module = sys.modules.get("torch._dynamo.eval_frame")
    found: type | tuple[()] = getattr(module, "OptimizedModule", ())
    return found


def unwrap(model: nn.Module) -> tuple[nn.Module, Wrap | None, str]:
    """Take a model out of DistributedDataParallel, DataParallel and what torch.compile gives.

    Returns:
        The plain module; what wraps another one in the same way, None where there is nothing to wrap; and
        what was taken off, in words.
    """
    kinds, layers = list[str](), list[Wrap]()
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            kinds.append("DistributedDataParallel")
            model = model.module
        elif isinstance(model, nn.DataParallel):
            kinds.append("DataParallel")
            layers.append(
                functools.partial(
                    nn.DataParallel, device_ids=model.device_ids or None,
                    output_device=model.output_device if model.device_ids else None,
                    dim=getattr(model, "dim", 0),
                )
            )  # fmt: skip
            model = model.module
        elif isinstance(model, _compiled_class()):
            kinds.append("torch.compile")
            outer: Any = model
            kind: Any = type(outer)
            layers.append(functools.partial(kind, dynamo_ctx=outer.dynamo_ctx))
            model = outer._orig_mod
        elif is_sentence_encoder(model):
            kinds.append("SentenceTransformer")
            layers.append(functools.partial(_with_encoder, model))
            pipeline: Any = model
            model = pipeline[0].auto_model
        else:
            break
    if "DistributedDataParallel" in kinds:  # what is around it is of these processes too
        text = "the model is given back without DistributedDataParallel; wrap it again to train it"
        return model, None, text
    if not kinds:
        return model, None, ""

    def wrap(inner: nn.Module) -> nn.Module:
        for layer in reversed(layers):
            outer, inner = inner, layer(inner)
            inner.training = outer.training
        return inner

    return (
        model,
        wrap,
        (
            f"the model was taken out of {' and '.join(kinds)}, and is given back in the same wrapping; "
            "the names in the plan and in checkpoints are the plain ones"
        ),
    )


def is_sentence_encoder(model: Any) -> bool:
    """Say whether a model is a SentenceTransformer that begins with an encoder of transformers.

    By what it is called and has: the library itself is not imported.
    """
    named = any(
        kind.__name__ == "SentenceTransformer" and kind.__module__.startswith("sentence_transformers.")
        for kind in type(model).__mro__
    )
    return named and len(model) > 0 and isinstance(getattr(model[0], "auto_model", None), nn.Module)


def _with_encoder(pipeline: Any, encoder: nn.Module) -> nn.Module:
    """Return a SentenceTransformer with another encoder, and all else of the one that was given."""
    made, first = copy.copy(pipeline), copy.copy(pipeline[0])
    before = pipeline[0].auto_model
    first._modules = {
        name: encoder if item is before else item for name, item in pipeline[0]._modules.items()
    }
    names = list(pipeline._modules)
    made._modules = {**pipeline._modules, names[0]: first}
    return cast(nn.Module, made)


def of_texts(model: Any, batches: Any) -> Any:
    """Return batches for the encoder of a SentenceTransformer: texts as its own tokenizer writes them.

    Args:
        model: any; only where it is a SentenceTransformer is anything done.
        batches: a list of texts, lists of texts, or what its `tokenize` gives; others stay as they are.
    """
    if not is_sentence_encoder(model) or not isinstance(batches, Iterable):
        return batches
    return _Texts(model, batches)


class _Texts:
    """Batches of texts, tokenised on every pass."""

    def __init__(self, model: Any, source: Iterable[Any]) -> None:
        self._write = getattr(model, "preprocess", None) or model.tokenize
        items = source if isinstance(source, Sized) else list(source)
        if isinstance(items, (list, tuple)) and items and all(isinstance(item, str) for item in items):
            items = [items[start : start + TEXTS] for start in range(0, len(items), TEXTS)]
        self._source = items

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._source:
            if isinstance(batch, (list, tuple)) and batch and all(isinstance(item, str) for item in batch):
                batch = self._write(list(batch))
            if isinstance(batch, Mapping):  # it says of which kind it is, which the encoder does not take
                batch = {name: item for name, item in batch.items() if isinstance(item, Tensor)}
            yield batch


def plain(item: Any) -> Any:
    """Return a model without what wraps it; anything else as it is."""
    return unwrap(item)[0] if isinstance(item, nn.Module) else item


def of_plain_models(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function have every model that it is given without what wraps it.

    Its `batches` for a SentenceTransformer may be texts.
    """
    places = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        call: Any = function
        given = {**dict(zip(places, args, strict=False)), **kwargs}
        pipeline = next(filter(is_sentence_encoder, given.values()), None)
        if pipeline is not None and "batches" in given:
            given["batches"] = of_texts(pipeline, given["batches"])
        found: R = call(**{name: plain(item) for name, item in given.items()})
        return found

    return run


def check_kind(model: Any) -> None:
    """Check that a model's weights and operations are there to be seen; cheap, and before any capture.

    Raises:
        StructureError: it is no module, is scripted or traced, or holds quantised weights.
    """
    asked = f"Pruning {type(model).__name__}"
    if not isinstance(model, nn.Module):
        raise StructureError(
            asked, "it is no torch.nn.Module", "Pass the network itself, such as the .model of a pipeline"
        )
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(
                asked, f"{where} is scripted or traced: its code is no longer Python's",
                "Prune the module before torch.jit.script or torch.jit.trace, and script the result",
            )  # fmt: skip
        packed = next(_packed(module), None)
        if packed is not None:
            raise StructureError(
                asked, f"it is a quantised model: {where} holds {packed}",
                "Prune before quantising, and quantise the result; or dequantise first (transformers: "
                "model.dequantize())",
            )  # fmt: skip


def _packed(module: nn.Module) -> Iterator[str]:
    """Yield what in a module itself shows that its weights are quantised."""
    own = type(module).__module__
    if ".nn.quantized" in own or ".nn.intrinsic.quantized" in own or own.startswith("torch.nn.quantized"):
        yield "packed weights"
    if isinstance(module, GraphModule):
        for node in module.graph.nodes:
            if "quantized_decomposed" in str(node.target):
                yield f"the operation {node.target}"
    for name, weight in module._parameters.items():
        if weight is not None and (_is_packed(weight) or _subclassed(weight)):
            yield f"{name!r} as {_kind(weight)}"
    for name, item in module._buffers.items():
        # Masks and tables are whole numbers too, under other names.
        named = name in PACKED_NAMES or item is None or item.is_quantized or item.is_floating_point()
        if item is not None and named and (_is_packed(item) or item.dtype in WHOLE):
            yield f"{name!r} as {_kind(item)}"


def _is_packed(tensor: Tensor) -> bool:
    """Say whether a tensor has numbers of a byte or less, which stand for others."""
    if tensor.is_floating_point():
        return tensor.dtype not in FLOATS
    return tensor.is_quantized or (tensor.ndim > 1 and tensor.dtype in (torch.uint8, torch.int8))


def _subclassed(tensor: Tensor) -> bool:
    """Say whether a tensor stands for another one, as those of torchao and bitsandbytes do."""
    own = type(tensor).__module__
    return own.partition(".")[0] in {"torchao", "bitsandbytes", "hqq", "quanto", "optimum"}


def _kind(tensor: Tensor) -> str:
    name = type(tensor).__name__
    return (
        f"{name} of {tensor.dtype}".replace("torch.", "")
        .replace("Parameter of ", "")
        .replace("Tensor of ", "")
    )
