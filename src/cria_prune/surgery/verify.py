"""Masked equals pruned: the proof, part of every run, that surgery did what the plan says.

The masked twin is the dense model with the weights that read a removed unit set to zero: the same
as zeroing the unit at the input of every consumer. It shares no code with slicing. Where a
normalisation takes statistics over removed units, it is the twin of operations (`twin.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.batches import Batch, model_inputs
from cria_prune.errors import VerificationError
from cria_prune.modules import cache_off, copy_of, modes_kept, named_tensors
from cria_prune.plan.plan import Plan
from cria_prune.structure.capture import first_line
from cria_prune.surgery.twin import Twin

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


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
    tensors = named_tensors(masked)
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.role == "consumes":
                gone = torch.ones(cut.size, dtype=torch.bool)
                gone[list(cut.kept)] = False
                index = torch.nonzero(gone).ravel().to(tensors[cut.tensor].device)
                tensors[cut.tensor].index_fill_(cut.dim, index, 0)
    return masked


def verify(
    model: nn.Module, plan: Plan, smaller: nn.Module, example: Batch, *,
    dtype: torch.dtype = torch.float64, twin: Twin | None = None,
) -> Verification:  # fmt: skip
    """Compare the masked and the pruned model on one batch, in evaluation mode, on copies.

    Args:
        model: the dense model; smaller: the model that `apply` made of it.
        dtype: arithmetic of the comparison: float64 (relative tolerance 1e-10) or float32 (1e-4);
            float32 is taken too where the dense model does not run in float64.
        twin: the twin of operations of this model, example and type, if there is one already.

    Raises:
        VerificationError: they differ by more than the tolerance, or the smaller model does not run.
    """
    cut = copy_of(smaller).to(dtype)
    try:
        if plan.normed:
            twin = (
                twin if twin is not None and twin.dtype == dtype else operations_twin(model, example, dtype)
            )
            expected = twin.outputs(plan)
        else:
            expected = _run(mask(model, plan).to(dtype), *_cast(model_inputs(example), dtype))
    except Exception as error:
        if dtype is torch.float64:  # the forward makes tensors of its own type
            return verify(model, plan, smaller, example, dtype=torch.float32)
        raise VerificationError(
            f"A forward pass of the dense model in {str(dtype).removeprefix('torch.')}",
            f"{type(error).__name__}: {first_line(error)}",
            "Write its forward so that new tensors take the type of its input",
        ) from error
    try:
        found = _run(cut, *_cast(model_inputs(example), dtype))
    except Exception as error:
        raise VerificationError(
            "A forward pass of the pruned model", f"{type(error).__name__}: {first_line(error)}", ADVICE
        ) from error
    difference = _difference(expected, found)
    kind = "operations" if plan.normed else "weights"
    result = Verification(difference, TOLERANCE[dtype], str(dtype).removeprefix("torch."), kind)
    if not difference <= result.tolerance:
        raise VerificationError(
            f"Outputs of the pruned model equal to the masked model's within {result.tolerance:g}",
            f"the relative difference is {difference:.3g}",
            ADVICE,
        )
    return result


def operations_twin(model: nn.Module, example: Batch, dtype: torch.dtype = torch.float64) -> Twin:
    """Return the twin of operations of a model, to be used for several plans."""
    args, kwargs = _cast(model_inputs(example), dtype)
    return Twin(model, kwargs if kwargs else args[0], dtype)


ADVICE = (
    "The model's forward depends on a size in a way that its operations do not show; "
    "freeze the groups concerned, and please report the network"
)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with modes_kept(model), cache_off(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        model.eval()
        return [item for item in tree_leaves(model(*args, **kwargs)) if isinstance(item, Tensor)]


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    args, kwargs = inputs

    def cast(item: Any) -> Any:
        if isinstance(item, Tensor):
            # Always a copy: a forward may write into its input.
            return item.to(dtype if item.is_floating_point() else item.dtype, copy=True)
        return item

    return tuple(cast(item) for item in args), {key: cast(item) for key, item in kwargs.items()}


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference relative to the largest expected value; infinity where shapes differ."""
    if [item.shape for item in expected] != [item.shape for item in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.numel():
            if not one.is_complex():  # truth values and whole numbers too
                one, other = one.double(), other.double()
            sizes = one.abs()
            scale = float(sizes[sizes.isfinite()].max()) if sizes.isfinite().any() else 0.0
            apart = (one - other).abs().masked_fill(one == other, 0.0)  # equal infinities are equal
            distance = float(apart.max()) / (scale or 1.0)
            worst = max(worst, distance if distance == distance else float("inf"))
    return worst
