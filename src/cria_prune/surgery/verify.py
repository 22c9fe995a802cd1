"""Masked equals pruned: the proof, part of every run, that surgery did what the plan says.

The masked twin is the dense model with the weights that read a removed unit set to zero: the same
as zeroing the unit at the input of every consumer. It shares no code with slicing. Where a
normalisation takes statistics over removed units, it is the twin of operations (`twin.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import (
    Batch,
    map_tensors,
    model_inputs,
    move,
    named_shortage,
    ran_out,
)
from cria_prune.base.errors import VerificationError
from cria_prune.base.events import passed
from cria_prune.base.modules import cache_off, copy_of, device_of, named_tensors, shared_copy
from cria_prune.planning.plan import Plan
from cria_prune.structure.capture import first_line
from cria_prune.structure.trace import Trace, trace
from cria_prune.surgery.twin import Twin

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
ROUNDED = 1e-6
"""Tolerance in float64 where the forward rounds to float32 on its way, as the norms of transformers' Llama
do: sums that differ in their last bit can round apart there."""


@dataclass(frozen=True)
class Verification:
    """How far the pruned model is from the masked one.

    Attributes:
        difference: largest absolute difference over the outputs, divided by the largest output.
        tolerance: what was allowed.
        dtype: the arithmetic of both passes.
        twin: the masked model: `weights` (weights that read a removed unit are zero) or `operations`
            (normalisations leave the removed units out).
    """

    difference: float
    tolerance: float
    dtype: str
    twin: str = "weights"


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the dense model in which no consumer reads a removed unit."""
    masked = copy_of(model)
    _zero_consumers(named_tensors(masked), plan)
    return masked


def _zero_consumers(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.role == "consumes":
                gone = torch.ones(cut.size, dtype=torch.bool)
                gone[list(cut.kept)] = False
                index = torch.nonzero(gone).ravel().to(tensors[cut.tensor].device)
                tensors[cut.tensor].index_fill_(cut.dim, index, 0)


def verify(
    model: nn.Module, plan: Plan, smaller: nn.Module, example: Batch, *, dtype: torch.dtype = torch.float64
) -> Verification:
    """Compare the masked and the pruned model on one batch, in evaluation mode, on copies.

    A model whose weights changed otherwise (repair, batch norms measured again, recovery) differs from its
    dense one: `prune` compares each of its cuts.

    Args:
        model: the dense model; smaller: the model that `apply` made of it.
        dtype: arithmetic of the comparison: float64 (relative tolerance 1e-10, or 1e-6 where the forward
            itself rounds to float32 on its way) or float32 (1e-4); float32 is taken too where the dense
            model does not run in float64.

    Raises:
        VerificationError: they differ by more than the tolerance, or the smaller model does not run.
    """
    return Reference(model, example, dtype=dtype).compare(plan, smaller)


class _Rounding(TorchDispatchMode):
    """Notices whether an operation turns float64 into numbers of fewer bits."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        types_in, types_out = (
            {
                item.dtype
                for item in tree_leaves(side)
                if isinstance(item, Tensor) and item.is_floating_point()
            }
            for side in ((args, kwargs), out)
        )
        self.found = self.found or (torch.float64 in types_in and bool(types_out - {torch.float64}))
        return out


class Reference:
    """A copy of the dense model in one type, to be masked by several plans.

    Args:
        model: the dense model; it is left as it was.
        example: one batch.
        dtype: see `verify`.

    Attributes:
        model: the copy, dense between two calls.
        dtype: its type: `dtype`, or float32 once the model turned out not to run in float64.
    """

    def __init__(self, model: nn.Module, example: Batch, *, dtype: torch.dtype = torch.float64) -> None:
        passed("reference", model=model)
        self.dtype, self._example = dtype, move(example, device_of(model))
        with named_shortage("A copy of the model, to compare its cut with", LESS):
            self.model = _in_type(copy_of(model), dtype)
        self._trace: Trace | None = None

    def trace(self) -> Trace:
        """Return the copy's operations with the axes of each, captured once.

        Raises:
            CaptureError, DataError: see `capture`.
        """
        if self._trace is None:
            self._trace = trace(self.model, self._batch())
        return self._trace

    def take(self, model: nn.Module) -> None:
        """Hold the weights of another model of the same structure; nothing is captured again."""
        with torch.no_grad():
            theirs = named_tensors(model)
            for name, mine in named_tensors(self.model).items():
                value = theirs[name].to(mine.device, mine.dtype)
                if not torch.equal(mine, value):  # a buffer may be a view that cannot be written into
                    mine.copy_(value)

    def compare(self, plan: Plan, smaller: nn.Module) -> Verification:
        """Compare a pruned model, of any type, with the masked twin.

        Raises:
            VerificationError: they differ by more than the tolerance, or one of them does not run.
            ResourceError: the memory does not suffice.
        """
        passed("verify", plan=plan)
        with named_shortage("Comparing the pruned model with the masked one", LESS):
            return self._compared(plan, smaller)

    def _compared(self, plan: Plan, smaller: nn.Module) -> Verification:
        expected = self._expected(plan)
        try:
            same = _is_of(smaller, self.dtype)
            found = self._run(smaller if same else _in_type(copy_of(smaller), self.dtype))
        except Exception as error:
            if ran_out(error):
                raise
            raise VerificationError(
                "A forward pass of the pruned model", f"{type(error).__name__}: {first_line(error)}", ADVICE
            ) from error
        apart = difference(expected, found)
        result = Verification(
            apart,
            self._tolerance(apart),
            str(self.dtype).removeprefix("torch."),
            "operations" if plan.normed else "weights",
        )
        if not result.difference <= result.tolerance:
            raise VerificationError(
                f"Outputs of the pruned model equal to the masked model's within {result.tolerance:g}",
                f"the relative difference is {result.difference:.3g}",
                ADVICE,
            )
        return result

    def _tolerance(self, difference: float) -> float:
        """Return what is allowed; whether the forward rounds on its way is seen only where it matters."""
        usual = TOLERANCE[self.dtype]
        if difference <= usual or self.dtype is not torch.float64:
            return usual
        with _Rounding() as seen:
            self._run(self.model)
        return ROUNDED if seen.found else usual

    def _expected(self, plan: Plan) -> list[Tensor]:
        """Return the masked outputs; in float32 from now on if float64 does not run."""
        try:
            return self.masked_outputs(plan)
        except Exception as error:
            if self.dtype is torch.float64:  # the forward makes tensors of its own type, or memory is lacking
                self.dtype, self._trace = torch.float32, None
                self.model = _in_type(self.model, self.dtype)
                return self._expected(plan)
            if ran_out(error):
                raise
            raise VerificationError(
                f"A forward pass of the dense model in {str(self.dtype).removeprefix('torch.')}",
                f"{type(error).__name__}: {first_line(error)}",
                "Write its forward so that new tensors take the type of its input",
            ) from error

    def masked_outputs(self, plan: Plan) -> list[Tensor]:
        """Return the outputs of the masked twin."""
        if plan.normed:
            return Twin(self.trace(), self._batch()).outputs(plan)
        tensors = named_tensors(self.model)
        names = {cut.tensor for cut in plan.cuts if cut.role == "consumes"}
        before = {name: tensors[name].detach().clone() for name in names}
        _zero_consumers(tensors, plan)
        try:
            return self._run(self.model)
        finally:
            with torch.no_grad():
                for name, values in before.items():
                    tensors[name].copy_(values)

    def _batch(self) -> Batch:
        args, kwargs = _cast(model_inputs(self._example), self.dtype)
        return kwargs if kwargs else args[0]

    def _run(self, model: nn.Module) -> list[Tensor]:
        args, kwargs = _cast(model_inputs(self._example), self.dtype)
        model = shared_copy(model).eval()  # some forwards keep caches on their module
        with cache_off(model), torch.random.fork_rng(devices=[]), torch.no_grad():
            return [item for item in tree_leaves(model(*args, **kwargs)) if isinstance(item, Tensor)]


LESS = (
    "The check holds a copy of the model in float64: run on a device with more memory, with a shorter first "
    "example, or prune its folder with prune_offloaded (cria prune --offload)"
)
BLOCK, PIECE = 2**22, 2**20
"""Numbers that the usual size of an output is taken of; numbers that are compared at a time: 8 MB, held
several times."""
ADVICE = (
    "The model's forward depends on a size in a way that its operations do not show; "
    "freeze the groups concerned, and please report the network"
)


def _is_of(model: nn.Module, dtype: torch.dtype) -> bool:
    tensors = named_tensors(model).values()
    return all(item.dtype == _type_of(item, dtype) for item in tensors)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    # Always a copy: a forward may write into its input.
    return map_tensors(inputs, lambda item: item.to(_type_of(item, dtype), copy=True))


def _type_of(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor in a comparison in `dtype`; complex ones stay complex."""
    if tensor.is_complex():
        return torch.complex128 if dtype is torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


def _in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model._apply(lambda item: item.to(_type_of(item, dtype)))


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference, relative to the size of the outputs; infinity where shapes differ.

    The size is the largest value among those that are not exactly equal, and at least the median (up to
    one): a masked logit of -1e9 that is equal on both sides must not hide the others.
    """
    if [item.shape for item in expected] != [item.shape for item in found]:
        return float("inf")
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one.numel()]
    return max((_distance(one.reshape(-1), other.reshape(-1)) for one, other in pairs), default=0.0)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the difference of two outputs (n,), a block at a time: logits of a long text are large."""
    usual = one[:: -(-len(one) // BLOCK)]  # every output, or as many as a block holds
    usual = (usual if usual.is_complex() else usual.double()).abs()
    usual = usual[usual.isfinite()]
    scale, worst = min(float(usual.median()), 1.0) if len(usual) else 0.0, 0.0
    for a, b in zip(one.split(PIECE), other.split(PIECE), strict=True):
        if not a.is_complex():  # truth values and whole numbers too
            a, b = a.double(), b.double()
        equal, sizes = a == b, a.abs()
        apart = (a - b).abs().masked_fill_(equal, 0.0)  # equal infinities are equal
        if bool(apart.isnan().any()):
            return float("inf")
        differing = sizes[sizes.isfinite() & ~equal]
        scale = max(scale, float(differing.max()) if len(differing) else 0.0)
        worst = max(worst, float(apart.max()))
    return worst / (scale or 1.0)
