"""A pruned Hugging Face model becomes a folder that transformers loads, or else `cria_prune.load`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import nn

from cria_prune.artifact.card import Card, render_card
from cria_prune.artifact.certificate import Certificate, certify
from cria_prune.artifact.earlier import write_for_earlier
from cria_prune.artifact.facts import renew_card
from cria_prune.artifact.layers import check_sizes, dense_twin, layered
from cria_prune.artifact.padded import padded
from cria_prune.artifact.rebuild import Policy, check_policy, render_manifest
from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, said
from cria_prune.base.files import (
    CARD,
    CERTIFICATE,
    GENERATION,
    MANIFEST,
    copy_known,
    hashes,
    refused,
    whole_folder,
)
from cria_prune.base.kinds import is_sentence_encoder, plain
from cria_prune.base.modules import named_tensors, shared_copy
from cria_prune.base.progress import quiet
from cria_prune.base.sentences import MODULES, check_modules
from cria_prune.planning.plan import Plan
from cria_prune.tasks.loading import example_inputs, find_library
from cria_prune.tasks.pooling import Behind

CLASSES = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
DROPPED = {"model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "sliding_window"}


def container(model: nn.Module) -> nn.Module:
    """Return a model that transformers can save and load, with the very tensors of `model`.

    Returns:
        `model` itself, or for a Llama without biases whose hidden size its heads do not divide the same
        network as a Mistral. Their outputs are equal bit for bit.
    """
    config: Any = model.config
    kind = type(model).__name__.removeprefix("Llama")
    needed = config.model_type == "llama" and config.hidden_size % config.num_attention_heads
    if not needed or kind not in CLASSES or config.attention_bias or config.mlp_bias:
        return model
    import transformers

    said = {key: value for key, value in config.to_dict().items() if key not in DROPPED}
    held = transformers.MistralConfig(**said, sliding_window=None)
    held._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        mistral: Any = getattr(transformers, f"Mistral{kind}")(held)
    mistral.load_state_dict(model.state_dict(), strict=True, assign=True)
    mistral.tie_weights()
    for name, buffer in model.named_buffers():  # the frequencies of the positions are in no state
        owner, _, local = name.rpartition(".")
        mistral.get_submodule(owner)._buffers[local] = buffer
    if model.can_generate():  # type: ignore[operator]
        mistral.generation_config = copy.deepcopy(model.generation_config)
    return mistral.train(model.training)


def save_pretrained(
    path: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    policy: Literal["vanilla", "per-layer"] = "vanilla",
    dense_config: Any = None,
    source: str | Path | None = None,
    example: Batch | None = None,
    config: BaseModel | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    card: Card | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Certificate:
    """Write a folder of a pruned Hugging Face model, and certify that it loads.

    A fresh process loads the folder and runs the example: outputs, and the tokens that a language model
    generates, have to be those of `model`. It needs the memory of a second copy.

    Args:
        path: the folder; it must not hold files unless `overwrite`.
        model: the smaller model, of a class of transformers, or a SentenceTransformer with such an encoder;
            it is left as it was.
        plan: what was removed, relative to the dense model.
        policy: `vanilla` writes what the model's Auto class loads without Cria, so that one configuration
            has to say the sizes of all layers. `per-layer` writes any plan, for `cria_prune.load`.
        dense_config: for `per-layer`, the configuration of the dense model; None undoes the plan's edits in
            the model's own.
        source: folder of the dense model: tokenizer, processor and generation settings are copied from it,
            and all that makes the embeddings of a sentence encoder. None takes these of a SentenceTransformer
            from the object.
        example: keyword arguments of the forward; made from the configuration if None.
        config, provenance, results: kept in `cria.json`, without the folders of absolute paths; they must be
            plain JSON.
        card: what the model card says besides; the command of `provenance` by default.
        max_shard_size: of a file of weights.
        overwrite: replace a folder that Cria wrote, once the new one is certified.

    Returns:
        The certificate, which is also in the folder; it prints as one line.

    Raises:
        CertificateError: the folder does not load or computes something else, or, for `vanilla`, the
            configuration cannot say the model's sizes. Nothing is left behind.
        ArtifactError: the place is taken, something is no JSON, the plan does not fit, or the system refuses.
        DataError: there is no example for this kind of model.
    """
    check_policy(policy)
    return _saved(
        f"Saving a {type(plain(model)).__name__} for transformers", path, model, plan, policy, dense_config,
        source, example, config, provenance, results, card, max_shard_size, overwrite,
    )  # fmt: skip


def save_padded(
    path: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    dense_config: Any = None,
    source: str | Path | None = None,
    example: Batch | None = None,
    config: BaseModel | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    card: Card | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Certificate:
    """Write a pruned Hugging Face model, padded with zeros so that plain transformers loads it.

    Layers that a configuration counts together are as wide as the widest of them, or as the next number
    that it can hold; what it cannot count (the heads of a BERT) is as wide as in the dense model.

    Args:
        path, model, plan, source, example, config, provenance, results, card, max_shard_size, overwrite: as
            in `save_pretrained`; any plan will do whose units are under no norm.
        dense_config: configuration of the dense model; None undoes the plan's edits in the model's own.

    Returns:
        The certificate: plain transformers, in a fresh process, computes with the padded model what `model`
        computes here. It says how many parameters are stored and how many of them are zeros.

    Raises:
        CertificateError: it does not load or computes something else. Nothing is left behind.
        ArtifactError: the plan cuts under a norm, or does not fit; the place is taken, or the system refuses.
        CaptureError, DataError: the dense model cannot be followed, or there is no example for it.
    """
    asked = f"Padding a {type(plain(model)).__name__}"
    if plan.normed:
        raise ArtifactError(
            asked,
            "the plan removes units over which a normalisation takes its statistics: zeros would change them",
            "Use save_pretrained, with policy='per-layer' where layers differ, or keep the width",
        )
    return _saved(
        asked, path, model, plan, "padded", dense_config, source, example, config, provenance, results, card,
        max_shard_size, overwrite,
    )  # fmt: skip


def _saved(
    asked: str, path: str | Path, model: nn.Module, plan: Plan, policy: Policy, dense_config: Any,
    source: str | Path | None, example: Batch | None, config: BaseModel | Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None, results: Mapping[str, Any] | None, card: Card | None,
    max_shard_size: str, overwrite: bool,
) -> Certificate:  # fmt: skip
    """Check what is to be saved, write and certify it, whole or not at all; `asked` is for error texts."""
    with _source_of(model, source) as found:
        source, model = found, plain(model)
        _check_model(model, find_library(asked), asked)
        _check_encoder(model, source, asked)
        manifest = render_manifest(model, plan, policy, config, provenance, results)
        example = example_inputs(model) if example is None else example
        card = card or Card(command=(provenance or {}).get("command"))
        with quiet(), whole_folder(path, overwrite) as folder:
            stored, notes = _stored(model, plan, policy, dense_config, example, asked)
            left_out, earlier = _write_model(stored, folder, policy, source, max_shard_size, asked)
            (folder / MANIFEST).write_text(manifest, encoding="utf-8")
            if policy == "per-layer":  # Cria loads it, and asks for the hashes
                (folder / CERTIFICATE).write_text(json.dumps({"sha256": hashes(folder)}), encoding="utf-8")
            certificate = certify(
                folder, model, example, stored=stored, policy=policy, left_out=left_out, notes=notes,
                source=source, earlier=earlier,
            )  # fmt: skip
            (folder / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
            page = render_card(Path(path).resolve().name, model, plan, certificate, card, source)
            (folder / CARD).write_text(page, encoding="utf-8")
            if results:
                renew_card(folder)
    return certificate


@contextmanager
def _source_of(model: nn.Module, source: str | Path | None) -> Iterator[Path | None]:
    """Give the folder of the dense model; of a SentenceTransformer without one, what it writes itself."""
    if source is not None or not is_sentence_encoder(model):
        yield None if source is None else Path(source)
        return
    with TemporaryDirectory(prefix="cria-") as scratch:
        pipeline: Any = model
        with quiet():
            pipeline.save(scratch, create_model_card=False)
        yield Path(scratch)


def _check_encoder(model: nn.Module, source: Path | None, asked: str) -> None:
    """Check that what stands behind a sentence encoder can be kept and fits it; nothing for other folders.

    Raises:
        ArtifactError: it cannot, or it does not.
    """
    if source is None or not (source / MODULES).is_file():
        return
    check_modules(source)
    try:
        Behind(source, int(cast(Any, model.config).hidden_size))
    except (ValueError, KeyError) as error:
        raise ArtifactError(
            asked, f"what stands behind the encoder does not fit it: {said(error)}",
            "Give as source the folder that this encoder was loaded from",
        ) from error  # fmt: skip


def _stored(
    model: nn.Module, plan: Plan, policy: Policy, dense_config: Any, example: Batch, asked: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model whose weights and configuration are written, and what its reader has to know."""
    if policy == "vanilla":
        stored = container(shared_copy(model))
        check_sizes(stored, plan, asked)
        return stored, ()
    dense = dense_twin(model, plan, dense_config, asked)
    if policy == "padded":
        return padded(model, plan, dense, example, asked), ()
    stored = shared_copy(model)
    stored.config, notes = layered(dense, plan, example)
    return stored, notes


def _check_model(model: nn.Module, library: Any, asked: str) -> None:
    known = type(model).__module__.startswith("transformers.")
    if not known or not isinstance(model, library.PreTrainedModel):
        raise ArtifactError(asked, "its class is not one of transformers", "Use cria_prune.save for it")
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        raise ArtifactError(asked, "its tensors have no values", "Load its weights before it is pruned")


def _write_model(
    stored: Any, folder: Path, policy: Policy, source: Path | None, max_shard_size: str, asked: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write weights, configuration and what is copied; return what was not copied, and why.

    And the names of settings that were added for earlier versions of transformers.
    """
    vars(stored.config).pop("auto_map", None)  # there is no code in the folder
    if source is not None and (source / GENERATION).is_file() and stored.can_generate():
        stored.generation_config = type(stored.generation_config)()  # the source's file takes its place
    try:
        stored.save_pretrained(
            folder,
            max_shard_size=max_shard_size,
            save_original_format=policy != "per-layer",  # Cria reads the names that the model has
        )
    except SafetensorError as error:  # the system's refusal, in other words
        raise refused(asked, error) from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            asked, f"transformers stops with {said(error)}",
            "Mend what it names, in the model's configuration or generation settings",
        ) from error  # fmt: skip
    left_out = () if source is None else copy_known(source, folder)
    # The weights of a per-layer folder have the names that Cria reads, in this version alone.
    return left_out, () if policy == "per-layer" else write_for_earlier(folder)
