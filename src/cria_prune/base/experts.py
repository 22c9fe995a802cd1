"""The grouped experts of transformers, run as operations that export, name their weights and take any type.

transformers keeps the weights of a layer's experts in tensors of three dimensions and has several ways to run
them. None of them serves here: one loops over the experts that the data reaches, which no export follows; the
grouped product sorts the tokens by expert, so that their order says nothing any more, and takes neither
float64 nor widths that are not aligned; the batched one copies the weights of an expert for every token. So
while a model is captured, recorded or compared its experts run in one more way: every token stays in its
place, and one operation multiplies it with the weight of its expert.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

NAME = "cria_prune_routed"
MODULE = "transformers.integrations.moe"
WATCH: ContextVar[Callable[[Any, Tensor, Tensor, Tensor], None] | None] = ContextVar("watch", default=None)
ALIGNED = 16
"""Bytes that the strides of a grouped product have to be a multiple of."""


@torch.library.custom_op("cria_prune::routed_mm", mutates_args=())
def routed_mm(input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply every row with the weight of its expert, and add its bias.

    Args:
        input: (rows ..., inputs).
        weight: (experts, inputs, outputs).
        experts: (rows ...) int64, which expert each row goes to.
        bias: (experts, outputs).

    Returns:
        (rows ..., outputs), in the order of the input.
    """
    flat, result = _rows(input), input.new_empty(*experts.shape, weight.shape[2])
    out = _rows(result)
    for number, rows in _places(experts, len(weight)):
        product = flat[rows] @ weight[number]
        out[rows] = product if bias is None else product + bias[number]
    return result


@routed_mm.register_fake
def _(input: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*experts.shape, weight.shape[2])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, experts = ctx.saved_tensors
    flat, back, to_weight = _rows(input), _rows(gradient), torch.zeros_like(weight)
    to_bias = gradient.new_zeros(weight.shape[0], weight.shape[2]) if ctx.biased else None
    for number, rows in _places(experts, len(weight)):
        to_weight[number] = flat[rows].mT @ back[rows]
        if to_bias is not None:
            to_bias[number] = back[rows].sum(dim=0)
    return routed_mm(gradient.contiguous(), weight.mT, experts), to_weight, None, to_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.biased = inputs[3] is not None


routed_mm.register_autograd(_backward, setup_context=_setup)


def _rows(item: Tensor) -> Tensor:
    return item.reshape(-1, item.shape[-1])


def _places(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the experts that are reached, and the rows that go to each."""
    flat = experts.reshape(-1)
    sizes = torch.bincount(flat, minlength=count).tolist()
    for number, rows in enumerate(flat.argsort(stable=True).split(sizes)):
        if len(rows):
            yield number, rows


def experts_forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return what the experts of one layer of transformers make of its tokens.

    Args:
        module: the experts, as `use_experts_implementation` of transformers declares them.
        hidden: (tokens, width).
        index: (tokens, k), the experts that each token goes to; weights: (tokens, k), with which weights.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = _product(module, up, hidden[:, None].expand(-1, index.shape[1], -1), index)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = _product(module, "down_proj", rows, index)
    watch = WATCH.get()
    if watch is not None:
        watch(module, index, weights, rows)
    return (rows * weights[..., None]).sum(dim=1).to(hidden.dtype)


def _product(module: Any, name: str, rows: Tensor, index: Tensor) -> Tensor:
    weight = getattr(module, name)
    turned = weight if module.is_transposed else weight.transpose(-2, -1)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return routed_mm(rows.to(weight.dtype), turned, index, bias)


@contextmanager
def watched_experts(watch: Callable[[Any, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Hand over what `experts_forward` does: the module, index and weights (T, k), rows (T, k, width)."""
    token = WATCH.set(watch)
    try:
        yield
    finally:
        WATCH.reset(token)


def grouped_experts(model: nn.Module) -> list[Any]:
    """Return the modules of a model that dispatch their experts as transformers does."""
    interface = getattr(sys.modules.get(MODULE), "ALL_EXPERTS_FUNCTIONS", None)
    if interface is None:  # transformers was never asked for experts, or is too old
        return []
    return [item for item in model.modules() if _dispatches(type(item)) is interface]


def _dispatches(kind: Any) -> Any:
    # The decorator of transformers leaves the table that its forward looks into in a closure.
    forward = kind.forward
    found = hasattr(forward, "__wrapped__") and "experts_interface" in forward.__code__.co_freevars
    return inspect.getclosurevars(forward).nonlocals.get("experts_interface") if found else None


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Let the grouped experts of a model run as `experts_forward`, and put their way back on leaving."""
    found = grouped_experts(model)
    configs = {id(item.config): item.config for item in found}.values()
    before = [(config, config._experts_implementation_internal) for config in configs]
    if found:
        _register()
    try:
        for config, _ in before:
            config._experts_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._experts_implementation_internal = name


def _register() -> None:
    """Add the way above to those of transformers, and let its grouped product fall back where it has to."""
    moe: Any = sys.modules[MODULE]
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    usual = getattr(moe, "_can_use_grouped_mm", None)
    if usual is None or hasattr(usual, "__wrapped__"):
        return

    # The kernel stops with an error at float64 and at strides that are not aligned, which both come up
    # when a network is pruned. transformers has a product to fall back to, and takes it in neither case.
    def can_use(input: Tensor, weight: Tensor, offs: Tensor) -> bool:
        return _has_kernel(weight) and usual(input, weight, offs)

    can_use.__wrapped__ = usual  # type: ignore[attr-defined]
    moe._can_use_grouped_mm = can_use


def _has_kernel(weight: Tensor) -> bool:
    """Say whether there is a grouped product for the type and widths of (experts, inputs, outputs), forwards
    and backwards."""
    known = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and all(size * weight.element_size() % ALIGNED == 0 for size in weight.shape[1:])
