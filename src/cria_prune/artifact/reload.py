"""A saved folder, loaded by plain transformers and run. This file is also a program of its own.

The certificate hands its text to `python -I -c`: a fresh process that sees the folder, the example inputs
and transformers, and to which `cria_prune` does not exist, unless the folder is one that only Cria loads. So
nothing of Cria is imported above, and torch only once the place where it lies is known. The functions run on
both sides of the comparison.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CACHES = ("past_key_values", "cache_params")
LOAD = "cria_prune.load"
TEXT = ("input_ids", "attention_mask")
EMBEDDING = "sentence_embedding"


def outputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor in the output of a forward on the CPU, by name (`logits`); caches are left out."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return {name: _stored(value) for name, value in _tensors(model(**inputs))}


def generated(model: Any, inputs: Mapping[str, Tensor], prompt: int, tokens: int) -> Tensor:
    """Return the first tokens of the inputs and what follows, chosen greedily with the cache, on the CPU."""
    found = model.generate(
        **{name: inputs[name][:, :prompt] for name in TEXT if name in inputs},
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=False,
    )
    return _stored(found)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if key not in CACHES:
                yield from _tensors(item, f"{name}.{key}".strip("."))


def _stored(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()


def _by_transformers(job: Mapping[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """Return the model and what of its keys is wrong."""
    import transformers

    options = {} if job["attention"] is None else {"attn_implementation": job["attention"]}
    loader = getattr(transformers, job["loader"])
    model, info = loader.from_pretrained(job["folder"], output_loading_info=True, **options)
    return model, {str(key): sorted(map(str, value)) for key, value in info.items() if value}


def _by_cria(job: Mapping[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    from cria_prune.artifact.checkpoint import load

    model = load(job["folder"]).model
    for module in model.modules():  # layers that differ have a configuration of their own
        config: Any = getattr(module, "config", None)
        if job["attention"] is not None and config is not None:
            config._attn_implementation = job["attention"]
    return model, {}


def _embedded(
    job: Mapping[str, Any], scratch: Path, model: Any, tokens: dict[str, Tensor]
) -> tuple[Tensor, str, list[str]]:
    """Return the embeddings of texts, by what they were computed, and what else there is to say.

    By sentence-transformers where it is installed and can load the folder; else by the pooling that came
    along, which is the same code that ran on the other side.
    """
    import importlib.util

    import torch

    notes = list[str]()
    try:
        library = None if job["loader"] == LOAD else __import__("sentence_transformers")
    except ModuleNotFoundError:
        library = None
    if library is None:
        spec = importlib.util.spec_from_file_location("pooling", scratch / "pooling.py")
        pooling: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(pooling)  # type: ignore[union-attr]
        with torch.no_grad():
            behind = pooling.Behind(Path(job["folder"]), int(model.config.hidden_size))
            return _stored(behind.of(model, tokens)), "Cria's own pooling", notes
    options = {} if job["attention"] is None else {"attn_implementation": job["attention"]}
    encoder = library.SentenceTransformer(
        job["folder"], device=job["device"], local_files_only=True, model_kwargs=options
    ).eval()
    with torch.no_grad():
        found = _stored(encoder(dict(tokens))[EMBEDDING])
        asked = {"prompt": "", "convert_to_tensor": True, "show_progress_bar": False}
        texts = _stored(encoder.encode(job["sentences"], **asked))
    if texts.shape != found.shape or not torch.allclose(texts.float(), found.float(), atol=1e-3, rtol=1e-2):
        notes.append("SentenceTransformer reads texts in another way than its tokenizer alone")
    return found, f"sentence-transformers {library.__version__}", notes


def main(scratch: Path) -> None:
    """Read `job.json` and `inputs.safetensors`; load, run, write `answer.json` and `outputs.safetensors`."""
    job = json.loads((scratch / "job.json").read_text(encoding="utf-8"))
    if job["loader"] != LOAD:
        sys.modules["cria_prune"] = None  # type: ignore[assignment]  # the folder must do without it
    sys.path += [path for path in job["paths"] if path not in sys.path]
    import safetensors
    import safetensors.torch
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    torch.set_float32_matmul_precision(job["precision"])
    start = time.perf_counter()
    model, wrong = (_by_cria if job["loader"] == LOAD else _by_transformers)(job)
    embedded, notes = None, list[str]()
    if not wrong:
        model = model.to(job["device"]).eval()
        inputs = safetensors.torch.load_file(scratch / "inputs.safetensors", device=job["device"])
        found = outputs(model, inputs)
        if job["tokens"]:
            found["generated"] = generated(model, inputs, job["prompt"], job["tokens"])
        if job["sentences"]:
            tokens = safetensors.torch.load_file(scratch / "tokens.safetensors", device=job["device"])
            found[EMBEDDING], embedded, notes = _embedded(job, scratch, model, tokens)
        safetensors.torch.save_file(found, scratch / "outputs.safetensors")
    answer = {
        "class": type(model).__name__,
        "wrong": wrong,
        "embedded": embedded,
        "notes": notes,
        "seconds": time.perf_counter() - start,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{item.__name__: str(item.__version__) for item in (torch, transformers, safetensors)},
        },
    }
    (scratch / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
