"""The pruned model as a folder of transformers, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cria_prune.artifact.container import container
from cria_prune.artifact.files import refused
from cria_prune.artifact.folders import GENERATION, copy_known
from cria_prune.artifact.sizes import check_sizes
from cria_prune.base.events import passed
from cria_prune.dispatched import bytes_of, first_names
from cria_prune.errors import StructureError
from cria_prune.modules import give_back, named_tensors
from cria_prune.plan import Plan
from cria_prune.surgery import apply, slice_tensor
from cria_prune.surgery.apply import check
from cria_prune.tasks.pretrained import INDEX

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
    cuts = check(tensors, plan)
    names = stored_names(stored)
    split = split_state_dict_into_shards_factory(
        {name: stored.state_dict()[name] for name in names},
        get_storage_size=bytes_of,
        filename_pattern=PATTERN,
        max_shard_size=max_shard_size,
    )
    shapes = {name: tuple(value.shape) for name, value in stored.state_dict().items()}
    for file, held in split.filename_to_tensors.items():
        shard = {}
        give_back()  # the shard before
        for name in held:
            value = slice_tensor(weights[first[name]], cuts.get(first[name], ()))
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
