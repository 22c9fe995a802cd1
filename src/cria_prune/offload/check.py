"""Masked equals pruned for a saved folder, both models loaded layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.events import passed
from cria_prune.base.optional import needed
from cria_prune.batches import Batch
from cria_prune.dispatched import changed
from cria_prune.errors import ArtifactError, VerificationError
from cria_prune.modules import give_back
from cria_prune.offload.chain import outputs
from cria_prune.offload.repair import Repaired
from cria_prune.plan import Plan
from cria_prune.surgery.verify import ADVICE, TOLERANCE, Verification, difference
from cria_prune.tasks.pretrained import load_pretrained


def load_dispatched(folder: Path, scratch: Path, device: torch.device) -> nn.Module:
    """Return the model of a Hugging Face folder with all of its weights on disk, read as its layers run.

    Args:
        folder: holds config.json and safetensors.
        scratch: for weights that transformers stores otherwise than the model holds them.
        device: where the layers run.

    Raises:
        ArtifactError: the folder holds no weights, or they cannot be read.
        PackageError: accelerate is not installed.
    """
    asked = f"Reading the Hugging Face model in {folder} layer by layer"
    with needed("offload", asked):
        import accelerate  # noqa: F401
    scratch.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_pretrained(folder, device_map={"": "disk"}, offload_folder=str(scratch))
    if not hasattr(model, "hf_device_map"):
        raise ArtifactError(asked, "there are no weights beside config.json", "Copy them into the folder")
    _run_on(model, device)
    return model


def _run_on(model: nn.Module, device: torch.device) -> None:
    """Let the layers of a dispatched model run on a device; transformers alone takes the CPU."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for item in getattr(hook, "hooks", (hook,)):
            if hasattr(item, "execution_device"):
                item.execution_device = device
        for name, value in module._buffers.items():
            if value is not None and not value.is_meta:
                module._buffers[name] = value.to(device)


def in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let a dispatched model compute in another type: each weight is converted when it is loaded.

    With a `dtype`, from_pretrained converts all of them first, and holds them meanwhile.
    """
    for module in model.modules():
        for name, item in module._parameters.items():
            if item is not None and item.is_floating_point():
                module._parameters[name] = nn.Parameter(item.detach().to(dtype), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None and value.is_floating_point():
                module._buffers[name] = value.to(dtype)
    return model


def verify_folder(
    source: Path, folder: Path, plan: Plan, repaired: Repaired, example: Batch, scratch: Path,
    dtype: torch.dtype, device: torch.device,
) -> Verification:  # fmt: skip
    """Compare what a folder computes with the dense model whose consumers read no removed unit.

    Args:
        source: folder of the dense model.
        folder: of the pruned one, loaded by transformers alone.
        plan: what stays.
        repaired: weights of the dense model, in dense shapes; those that were repaired take their place.
        example: one batch.
        scratch: see `load_dispatched`.
        dtype: arithmetic of the comparison.
        device: where the layers run.

    Raises:
        VerificationError: they differ by more than the tolerance.
        ArtifactError: the folder cannot be loaded.
    """
    passed("verify", plan=plan, source=source, folder=folder)
    gone: dict[str, list[tuple[int, Tensor]]] = {}
    for cut in plan.cuts:
        if cut.role == "consumes" and len(cut.kept) < cut.size:
            left = torch.ones(cut.size, dtype=torch.bool)
            left[list(cut.kept)] = False
            gone.setdefault(cut.tensor, []).append((cut.dim, left.nonzero().ravel()))

    def masked(name: str, value: Tensor) -> Tensor:
        give_back()
        if name not in gone and name not in repaired.paths:
            return value
        value = (repaired[name] if name in repaired.paths else value).to(value, copy=True)
        for dim, index in gone.get(name, ()):
            value.index_fill_(dim, index.to(value.device), 0)
        return value

    def plain(name: str, value: Tensor) -> Tensor:
        give_back()  # what the weight before took: it can be hundreds of megabytes after a few layers
        return value

    dense, pruned = (
        in_type(load_dispatched(path, scratch / name, device), dtype)
        for path, name in ((source, "dense"), (folder, "pruned"))
    )
    expected, found = _outputs(dense, example, masked), _outputs(pruned, example, plain)
    give_back()
    apart, tolerance = difference(expected, found), TOLERANCE[dtype]
    if not apart <= tolerance:
        raise VerificationError(
            f"Outputs of the pruned folder equal to the masked model's within {tolerance:g}",
            f"the relative difference is {apart:.3g}", ADVICE,
        )  # fmt: skip
    return Verification(apart, tolerance, str(dtype).removeprefix("torch."))


def _outputs(model: nn.Module, example: Batch, change: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
    """Return the outputs of a dispatched model with changed weights; see `changed`."""
    with changed(model, change):
        return outputs(model, example)
