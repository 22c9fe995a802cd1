"""A smaller model, layer by layer: repaired, written shard by shard, tried against its masked twin."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cria_prune.artifact.earlier import write_for_earlier
from cria_prune.artifact.layers import check_sizes
from cria_prune.artifact.pretrained import container
from cria_prune.base.batches import Batch, outputs
from cria_prune.base.dispatched import changed, first_names
from cria_prune.base.errors import ArtifactError, StructureError, VerificationError, needed
from cria_prune.base.events import passed
from cria_prune.base.files import GENERATION, copy_known, refused
from cria_prune.base.modules import give_back, named_tensors
from cria_prune.planning.plan import Plan
from cria_prune.repair.consumers import Repair, compensate
from cria_prune.repair.fidelity import Fidelity, comparable
from cria_prune.resume.turns import Spilled
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.removal import apply, check, ranks, slice_tensor
from cria_prune.surgery.verify import ADVICE, TOLERANCE, Verification, difference, zero_consumers
from cria_prune.tasks.loading import INDEX, load_pretrained


class Repaired(Mapping[str, Tensor]):
    """The weights of a model by name, some of them repaired; those are read from disk.

    Args:
        weights: as they were.
        folder: for the repaired ones.
    """

    def __init__(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        self._weights, self._folder = weights, folder
        self.paths: dict[str, Path] = {}
        self._files = 0

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self.paths[name])["value"] if name in self.paths else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def put(self, name: str, value: Tensor) -> None:
        """Keep a repaired weight, under a new file: the one before may still be read."""
        self._files += 1
        path = self._folder / f"repaired-{self._files}.safetensors"
        save_file({"value": value.detach().cpu().contiguous()}, path)
        self.paths[name] = path


def repair(
    structure: nn.Module,
    groups: UnitGroups,
    kept: Mapping[str, Sequence[int]],
    spilled: Spilled,
    weights: Mapping[str, Tensor],
    folder: Path,
) -> tuple[Repaired, tuple[Repair, ...]]:
    """Repair every consumer of units that leave, in the order and by the arithmetic of `compensate`.

    Args:
        structure: the model on the meta device; groups: its unit groups.
        kept: group name -> units that stay.
        spilled: moments of what the consumers read.
        weights: of the dense model, by name.
        folder: for the repaired weights.

    Returns:
        The weights, in dense shapes (the removed units are still there), and what became of each consumer.
    """
    found, repairs = Repaired(weights, folder), list[Repair]()
    for group in groups.prunable:
        if len(kept.get(group.name, range(group.size))) == group.size:
            continue
        for item in group.consumers:
            moments = spilled.get(group.name, item.tensor)
            if moments is None:
                continue
            # One consumer has values at a time, all other layers are shapes. So `compensate` runs
            # as it does in memory, by the same arithmetic, on a model that does not fit there.
            with _filled(structure, item.tensor, found) as names:
                alone, one = replace(groups, groups=(group,)), {group.name: {item.tensor: moments}}
                after, done = compensate(structure, alone, kept, one)
            tensors = named_tensors(after)
            for name in names if done else ():
                found.put(name, tensors[name])
            repairs += done
            del moments, one, after, tensors  # not two consumers at a time
            give_back()
    return found, tuple(repairs)


@contextmanager
def _filled(structure: nn.Module, weight: str, values: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Inside, the layer of a weight has its values, all else is on the meta device; gives their names."""
    path, _, _ = weight.rpartition(".")
    layer = structure.get_submodule(path)
    before = dict(layer._parameters)
    names = [name for name in (weight, f"{path}.bias".strip(".")) if name.rpartition(".")[2] in before]
    names = [name for name in names if before[name.rpartition(".")[2]] is not None]
    try:
        for name in names:
            layer._parameters[name.rpartition(".")[2]] = nn.Parameter(values[name], requires_grad=False)
        yield names
    finally:
        layer._parameters.update(before)


PATTERN = "model{suffix}.safetensors"


def write_model(
    folder: Path,
    structure: nn.Module,
    plan: Plan,
    weights: Mapping[str, Tensor],
    source: Path,
    max_shard_size: int | str,
    asked: str,
) -> nn.Module:
    """Write weights, configuration and what is copied; return the pruned model on the meta device.

    Args:
        folder: where to.
        structure: the dense model on the meta device.
        plan: what stays of it.
        weights: name -> tensor of the dense model (repaired, where that was asked for), loaded one by one.
        source: folder of the dense model, for its tokenizer and generation settings.
        max_shard_size: bytes, or a text such as `1GB`; so much is in memory.
        asked: for error texts.

    Raises:
        CertificateError: no vanilla configuration says the sizes.
        StructureError: the plan is of another model.
        ArtifactError: the system refuses.
    """
    passed("write", folder=folder)
    smaller = apply(structure, plan)
    stored: Any = container(smaller)
    check_sizes(stored, plan, asked)
    _write_weights(folder, structure, stored, plan, weights, max_shard_size, asked)
    config = stored.config
    vars(config).pop("auto_map", None)  # there is no code in the folder
    config.architectures = [type(stored).__name__]
    config.dtype = str(stored.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if stored.can_generate() and not (source / GENERATION).is_file():
        stored.generation_config.save_pretrained(folder)
    copy_known(source, folder)
    write_for_earlier(folder)
    passed("written", folder=folder)
    return smaller


def _write_weights(
    folder: Path,
    structure: nn.Module,
    stored: nn.Module,
    plan: Plan,
    weights: Mapping[str, Tensor],
    max_shard_size: int | str,
    asked: str,
) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors, first = named_tensors(structure), first_names(structure)
    cuts, orders = check(tensors, plan), {cut.tensor for cut in plan.cuts if cut.role == "picks"}
    names = stored_names(stored)
    split = split_state_dict_into_shards_factory(
        {name: stored.state_dict()[name] for name in names},
        get_storage_size=lambda value: value.nbytes,
        filename_pattern=PATTERN,
        max_shard_size=max_shard_size,
    )
    shapes = {name: tuple(value.shape) for name, value in stored.state_dict().items()}
    for file, held in split.filename_to_tensors.items():
        shard = {}
        give_back()  # the shard before
        for name in held:
            value = slice_tensor(weights[first[name]], cuts.get(first[name], ()))
            value = ranks(value) if first[name] in orders else value
            # The files have to hold what the configuration builds, or nothing could load them.
            if tuple(value.shape) != shapes[name]:
                raise StructureError(
                    asked, f"{name!r} would be {tuple(value.shape)}, its configuration says {shapes[name]}",
                    "Please report this network with its config.json",
                )  # fmt: skip
            shard[name] = value.detach()
        try:
            passed("shard", path=folder / file)
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # the system's refusal, in other words
            raise refused(asked, error) from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stored_names(model: nn.Module) -> list[str]:
    """Return the names that are written: of tied tensors, the one that gives the others."""
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name in model.state_dict() if name not in tied]


def floats(model: nn.Module) -> torch.dtype:
    """Return the type of a model's first floating-point parameter."""
    return next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)


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
    gone = {cut.tensor for cut in plan.cuts if cut.role == "consumes" and len(cut.kept) < cut.size}

    def masked(name: str, value: Tensor) -> Tensor:
        give_back()
        if name in gone or name in repaired.paths:
            # A copy: what accelerate holds is not ours to write into.
            value = (repaired[name] if name in repaired.paths else value).to(value, copy=True)
            zero_consumers({name: value}, plan)
        return value

    # Both are read layer by layer. The dense one is masked as
    # its weights are loaded: nothing of it is written anew.
    dense, pruned = (
        in_type(load_dispatched(path, scratch / name, device), dtype)
        for path, name in ((source, "dense"), (folder, "pruned"))
    )
    expected, found = _outputs(dense, example, masked), _outputs(pruned, example, _lightly)
    give_back()
    apart, tolerance = difference(expected, found), TOLERANCE[dtype]
    if not apart <= tolerance:
        raise VerificationError(
            f"Outputs of the pruned folder equal to the masked model's within {tolerance:g}",
            f"the relative difference is {apart:.3g}", ADVICE,
        )  # fmt: skip
    return Verification(apart, tolerance, str(dtype).removeprefix("torch."))


def folder_fidelity(
    source: Path, folder: Path, batches: Iterable[Batch], scratch: Path, device: torch.device
) -> Fidelity | None:
    """Return how far a folder's outputs are from another's, both loaded layer by layer; see `comparable`.

    Args:
        source: folder of the dense model.
        folder: of the pruned one.
        batches: examples that nothing was fitted on.
        scratch: see `load_dispatched`.
        device: where the layers run.
    """
    dense, pruned = (
        load_dispatched(path, scratch / name, device) for path, name in ((source, "first"), (folder, "last"))
    )
    with changed(dense, _lightly), changed(pruned, _lightly):
        found = comparable(dense, pruned, batches)
    give_back()
    return found


def _lightly(name: str, value: Tensor) -> Tensor:
    """Return a weight as it is, and hand back what the one before took.

    That can be hundreds of megabytes after a few layers.
    """
    give_back()
    return value


def _outputs(model: nn.Module, example: Batch, change: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
    """Return the outputs of a dispatched model with changed weights; see `changed`."""
    with changed(model, change):
        return outputs(model, example)
