"""`cria export` and `cria latency`: a network for onnxruntime, and how fast it is beside the dense one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cria_prune.artifact.checkpoint import load
from cria_prune.artifact.facts import DENSE, EXPORT, LATENCY, PRUNED, file_size, keep_facts
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, ConfigError
from cria_prune.base.files import MANIFEST as PRETRAINED
from cria_prune.base.files import write_json
from cria_prune.cli import target
from cria_prune.cli.folder import check_file, claimed
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Export, Latency
from cria_prune.cli.target import Source, load_source, parse_shape
from cria_prune.deploy.folder import check_export, export_onnx
from cria_prune.deploy.speeds import check_same_inputs, compare_latency
from cria_prune.tasks.loading import (
    CONFIG,
    HUB_NAME,
    example_inputs,
    find_folder,
    has_tokenizer,
    read_by,
)

EXAMPLES = 64
"""Of the user's data, on which an int8 file is compared."""
SEGMENTS = "token_type_ids"


def export(request: Export, out: Output) -> None:
    """Write the folder for onnxruntime and say how far its files are from torch."""
    if request.onnx is None:
        raise ConfigError(f"Exporting {request.target}", "no format was asked for", "Give --onnx FOLDER")
    if request.onnx.suffix == ".onnx":
        raise ConfigError(
            f"Exporting to {request.onnx}", "it is the name of a file",
            "Name a folder: model.onnx is written into it, with configuration and tokenizer",
        )  # fmt: skip
    if request.texts and not request.int8:
        raise ConfigError(
            f"Texts for exporting {request.target}", "only an int8 file is compared on them",
            "Ask for int8 too, or leave them out",
        )  # fmt: skip
    with claimed(request.onnx, "", request.overwrite) as folder:
        check_export(folder, request.overwrite)
        found = network(request.target, request.factory, request.example, out)
        source = Path(found.name)
        pretrained = source.is_dir() and (source / CONFIG).is_file()
        given = with_segments(found) if pretrained else found.example
        done = export_onnx(
            folder, found.model, given, int8=request.int8, batches=_batches(request, found),
            source=source if pretrained else None, provenance=provenance(None, device="cpu"),
            overwrite=request.overwrite,
        )  # fmt: skip
    values = done.to_dict()
    out.say(f"{folder}: {done.onnx}")
    if done.int8 is not None:
        out.say(f"{folder}, int8: {done.int8}")
    for note in (*done.onnx.notes, *(f"not copied: {name}" for name in done.left_out)):
        out.say(note)
    models = {PRUNED: {"parameters": done.parameters, "bytes": file_size(source)}}
    kept(out, source, EXPORT, {**values, "models": models})
    out.answer({"target": request.target, **values, "output": str(folder)})


def latency(request: Latency, out: Output) -> None:
    """Measure both networks in turns, and print a row for each runtime and batch size."""
    device = request.torch_device
    if request.against is None:
        raise ConfigError(
            f"The latency of {request.target}", "there is nothing to compare it with",
            "Name the dense model with --against MODEL",
        )  # fmt: skip
    check_file(request.output, request.overwrite)
    sizes, runtimes = _numbers(request.batch), [word.strip() for word in request.runtime.split(",")]
    pruned = network(request.target, request.factory, request.example, out)
    dense = network(request.against, None, request.example, out)
    check_same_inputs(dense.model, pruned.model, pruned.example, dense.example)
    found = compare_latency(
        dense.model, pruned.model, pruned.example, batches=sizes, runtimes=runtimes, threads=request.threads,
        device=device, seconds=request.seconds, progress=out.progress,
    )  # fmt: skip
    threads = torch.get_num_threads() if request.threads is None else request.threads
    models = {
        name: {
            "parameters": sum(item.numel() for item in source.model.parameters()),
            "bytes": file_size(Path(source.name)),
        }
        for name, source in ((DENSE, dense), (PRUNED, pruned))
    }
    rows = [
        [
            item.runtime, str(item.batch), f"{1e3 * item.speed.dense:.3g}", f"{1e3 * item.speed.pruned:.3g}",
            f"{item.speed.speedup:.2f} ± {item.speed.error / item.speed.ratio**2:.2f}",
            f"{item.batch / item.speed.pruned:,.0f}" if item.speed.pruned else "-", str(item.speed.turns),
        ]
        for item in found
    ]  # fmt: skip
    columns = ["runtime", "batch", "dense ms", "pruned ms", "times as fast", "examples/s, pruned", "turns"]
    out.table(columns, rows)
    out.say(f"medians of neighbouring runs, in turns, on {device} with {threads} threads; ± standard error")
    values = {
        "rows": [item.to_dict() for item in found], "threads": threads, "device": str(device),
        "models": models, "provenance": provenance(None, device=device),
    }  # fmt: skip
    if request.output is not None:
        out.say(f"result {write_json(request.output, values, allow_nan=False)}")
    kept(out, Path(pruned.name), LATENCY, values)
    out.answer({"target": request.target, "against": request.against, **values})


def network(name: str, factory: str | None, shape: str | None, out: Output) -> Source:
    """Return a trained model and an example of its inputs; see `target.load_source`.

    Args:
        name: a recipe, a folder, a model of the hub or `package.module:function`.
        factory: for a checkpoint of the user's own network: the function that makes the dense one.
        shape: of the main input, as it is typed.
        out: where a training shows how far it is.

    Raises:
        ConfigError, ArtifactError, DataError: see there.
    """
    sizes = parse_shape(shape)
    if factory is not None:
        made = load_source(factory, sizes)
        return replace(made, model=load(name, made.model).model, name=name, kind="checkpoint")
    if HUB_NAME.fullmatch(name) and not Path(name).is_dir():
        name = str(find_folder(name))
    if (Path(name) / PRETRAINED).is_file():  # layer by layer too, which transformers alone does not build
        model = load(name).model
        return Source(model, example_inputs(model, sizes), name, "hugging-face")
    found = load_source(name, sizes)
    if found.kind == "recipe" and found.target is not None:
        return replace(found, model=found.target.model(torch.device("cpu"), 0, out.progress).eval())
    return found


def with_segments(found: Source) -> Batch:
    """Return an example with what the tokenizer gives besides: which of two sentences a token is of."""
    folder, example = Path(found.name), found.example
    accepted = inspect.signature(found.model.forward).parameters
    if SEGMENTS not in accepted or not isinstance(example, Mapping) or not has_tokenizer(folder):
        return example
    tokenizer = read_by("AutoTokenizer", folder, f"The tokenizer in {folder}", "Copy its files again")
    if SEGMENTS not in tokenizer.model_input_names:
        return example
    config: Any = found.model.config
    second = torch.zeros_like(example["input_ids"])
    second[:, second.shape[1] // 2 :] = int(config.type_vocab_size > 1)
    return {**example, SEGMENTS: second}


def kept(out: Output, folder: Path, section: str, values: Mapping[str, Any]) -> None:
    """Keep what was measured in the folder of a pruned model; say so where the system refuses."""
    try:
        if keep_facts(folder, section, values):
            out.say(f"kept in {folder}, and in its card and report")
    except ArtifactError as error:
        out.note(f"not kept in {folder}: {error}")


def _batches(request: Export, found: Source) -> Iterable[Batch] | None:
    """Return what an int8 file is compared on: the texts that were given, or the data of a recipe."""
    if not request.int8:
        return None
    if request.texts:
        return list(target.find(request.target, request.texts).task.calibration(EXAMPLES, 0))
    return None if found.target is None else list(found.target.task.calibration(EXAMPLES, 0))


def _numbers(text: str) -> list[int]:
    """Return the whole numbers of `1,8,64`; a ConfigError says what is none."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError("Batch sizes", f"found {text!r}", "Give numbers from 1 on, such as 1,8,64")
    return [int(word) for word in words]
