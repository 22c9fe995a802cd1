"""A pruned Hugging Face model becomes a folder that plain transformers loads.

The folder holds safetensors and JSON as transformers writes them, the tokenizer of the dense model, the plan
(`cria.json`), a model card and the certificate of a fresh process that loaded it. It is there whole, with a
certificate that holds, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError
from torch import nn

from cria_prune.artifact.card import Card, render_card
from cria_prune.artifact.certificate import Certificate, certify
from cria_prune.artifact.container import container
from cria_prune.artifact.files import refused
from cria_prune.artifact.folders import CARD, CERTIFICATE, GENERATION, MANIFEST, copy_known, whole_folder
from cria_prune.artifact.sizes import check_sizes
from cria_prune.batches import Batch
from cria_prune.errors import ArtifactError
from cria_prune.modules import named_tensors, shared_copy
from cria_prune.plan.plan import Plan
from cria_prune.structure.capture import first_line
from cria_prune.tasks.examples import example_inputs
from cria_prune.tasks.pretrained import find_library, quiet

FORMAT, VERSION = "cria-pretrained", 1


def save_pretrained(
    path: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    source: str | Path | None = None,
    example: Batch | None = None,
    config: BaseModel | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    card: Card | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Certificate:
    """Write a folder that `transformers` loads without Cria, and certify that it does.

    A fresh process loads the folder with its Auto class and runs the example: outputs, and the tokens that
    a language model generates, have to be those of `model`. It needs the memory of a second copy.

    Args:
        path: the folder; it must not hold files unless `overwrite`.
        model: the smaller model, of a class of transformers; it is left as it was.
        plan: what was removed, relative to the dense model.
        source: folder of the dense model: tokenizer, processor and generation settings are copied from it.
        example: keyword arguments of the forward; made from the configuration if None.
        config, provenance, results: kept in `cria.json`; they must be plain JSON.
        card: what the model card says besides; the command of `provenance` by default.
        max_shard_size: of a file of weights.
        overwrite: replace a folder that Cria wrote, once the new one is certified.

    Returns:
        The certificate, which is also in the folder; it prints as one line.

    Raises:
        CertificateError: the folder does not load with transformers alone or computes something else, or the
            configuration cannot say the model's sizes. Nothing is left behind.
        ArtifactError: the place is taken, something is no JSON, or the system refuses.
        DataError: there is no example for this kind of model.
    """
    asked = f"Saving a {type(model).__name__} for transformers"
    library = find_library(asked)
    _check_model(model, library, asked)
    manifest = _manifest(model, plan, config, provenance, results)
    example = example_inputs(model) if example is None else example
    card = card or Card(command=(provenance or {}).get("command"))
    origin = None if source is None else Path(source)
    stored = container(shared_copy(model))
    check_sizes(stored, plan, asked)
    with quiet(library), whole_folder(path, overwrite) as folder:
        left_out = _write_model(stored, folder, origin, max_shard_size, asked)
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        certificate = certify(folder, model, example, stored=stored, left_out=left_out)
        (folder / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
        page = render_card(Path(path).resolve().name, model, plan, certificate, card, origin)
        (folder / CARD).write_text(page, encoding="utf-8")
    return certificate


def read_plan(path: str | Path) -> Plan:
    """Return the plan in the folder of a saved model: what was removed from the dense one.

    Raises:
        ArtifactError: there is no `cria.json` that this Cria reads.
    """
    asked, todo = f"Reading {Path(path) / MANIFEST}", "Give a folder that save_pretrained wrote"
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(asked, f"it cannot be read, {error}", todo) from error
    said = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if said != (FORMAT, VERSION):
        raise ArtifactError(asked, f"found {said}, this Cria reads {(FORMAT, VERSION)}", todo)
    return Plan.from_dict(manifest.get("plan"))


def _check_model(model: nn.Module, library: Any, asked: str) -> None:
    known = type(model).__module__.startswith("transformers.")
    if not known or not isinstance(model, library.PreTrainedModel):
        raise ArtifactError(asked, "its class is not one of transformers", "Use cria_prune.save for it")
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        raise ArtifactError(asked, "its tensors have no values", "Load its weights before it is pruned")


def _manifest(
    model: nn.Module,
    plan: Plan,
    config: BaseModel | Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
) -> str:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": type(model).__name__,
        "plan": plan.to_dict(),
        "config": config.model_dump(mode="json") if isinstance(config, BaseModel) else config,
        "provenance": provenance,
        "results": results,
    }
    try:
        return json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"Writing {MANIFEST}", f"something in it is no JSON, {error}", "Pass plain finite values"
        ) from error


def _write_model(
    stored: Any, folder: Path, source: Path | None, max_shard_size: str, asked: str
) -> tuple[str, ...]:
    """Write weights, configuration and what is copied; return what was not copied, and why."""
    vars(stored.config).pop("auto_map", None)  # there is no code in the folder
    if source is not None and (source / GENERATION).is_file() and stored.can_generate():
        stored.generation_config = type(stored.generation_config)()  # the source's file takes its place
    try:
        stored.save_pretrained(folder, max_shard_size=max_shard_size)
    except SafetensorError as error:  # the system's refusal, in other words
        raise refused(asked, error) from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            asked, f"transformers stops with {type(error).__name__}: {first_line(error)}",
            "Mend what it names, in the model's configuration or generation settings",
        ) from error  # fmt: skip
    return () if source is None else copy_known(source, folder)
