"""The reload certificate: a fresh process loads the folder, without Cria if it can, and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cria_prune.artifact import reload
from cria_prune.artifact.rebuild import Policy
from cria_prune.base.batches import Batch, model_inputs
from cria_prune.base.errors import ArtifactError, CertificateError, DataError, said
from cria_prune.base.events import passed
from cria_prune.base.files import hashes
from cria_prune.base.modules import device_of, devices_in_use, shared_copy
from cria_prune.base.sentences import MODULES, encoder_folder, settings_of
from cria_prune.base.written import weights_kept
from cria_prune.tasks import pooling
from cria_prune.tasks.loading import read_by


def distance(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest relative to the maximum of its output.

    Args:
        expected, found: outputs by name; the names and shapes in `expected` have to be in `found`.
    """
    difference = relative = 0.0
    for name, one in expected.items():
        if one.numel():
            one, other = one.double(), found[name].double()
            apart = (one - other).abs().masked_fill(one == other, 0.0)  # equal infinities are equal
            finite = one[one.isfinite()].abs()
            largest = float(finite.max()) if finite.numel() else 0.0
            worst = float(apart.nan_to_num(float("inf")).max())
            difference, relative = max(difference, worst), max(relative, worst / (largest or 1.0))
    return difference, relative


def same_tokens(one: Tensor | None, other: Tensor | None, tokens: int) -> int:
    """Return for how many of the last steps all examples go on with the same tokens."""
    if one is None or other is None or one.shape != other.shape:
        return 0
    agree = (one == other).all(0)[one.shape[1] - tokens :]
    return int(agree.int().cumprod(0).sum())


@dataclass(frozen=True)
class Certificate:
    """What a fresh process found that loaded the folder, with transformers alone unless Cria is the loader.

    Attributes:
        loader: the class that loaded it, `AutoModelForCausalLM`, or `cria_prune.load`; architecture: the
            class that came of it.
        container: the `model_type` that holds the weights in place of the model's own, or None.
        outputs: names of the outputs that were compared.
        equal: they are equal bit for bit.
        difference: largest absolute difference; relative: the same over the largest value of its output.
        tolerance: relative difference that was allowed.
        tokens: tokens generated with the cache; None where the model writes no text.
        same_tokens: how many of them, from the first on, are the same on both sides. Less than all is an
            error, unless half types differ in their last bits.
        dtype, device, attention: how both sides computed.
        versions: of `python`, `torch`, `transformers` and `safetensors` in the fresh process.
        sha256: file name -> hash, of the weights and the configuration.
        seconds: loading and running in the fresh process.
        left_out: files of the source folder that were not copied, and why.
        parameters: of the model that was saved; stored: in the folder, with zeros where it is padded.
        notes: what else a reader of the folder has to know.
        embedded: by what the fresh process computed embeddings, `sentence-transformers 6.2.0`; None where the
            folder is no sentence encoder.
        earlier: settings that were written a second time, under the names that transformers 4 reads.
    """

    loader: str
    architecture: str
    container: str | None
    outputs: tuple[str, ...]
    equal: bool
    difference: float
    relative: float
    tolerance: float
    tokens: int | None
    same_tokens: int | None
    dtype: str
    device: str
    attention: str | None
    versions: Mapping[str, str]
    sha256: Mapping[str, str]
    seconds: float
    left_out: tuple[str, ...] = ()
    parameters: int = 0
    stored: int = 0
    notes: tuple[str, ...] = ()
    embedded: str | None = None
    earlier: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether transformers loads the folder without Cria."""
        return self.loader != reload.LOAD

    @property
    def zeros(self) -> str | None:
        """What padding costs, `stores 120 parameters for 90 (25.0% are zeros that pad)`; None without any."""
        if self.stored <= self.parameters:
            return None
        share = 1 - self.parameters / self.stored
        return f"stores {self.stored:,} parameters for {self.parameters:,} ({share:.1%} are zeros that pad)"

    def __str__(self) -> str:
        same = (
            "outputs equal bit for bit"
            if self.equal
            else f"outputs within {self.relative:.1e} (relative; allowed {self.tolerance:g})"
        )
        version = self.versions["transformers"]
        where = f"of transformers {version} alone" if self.alone else f"with transformers {version}"
        parts = [
            f"{self.loader} {where}: {same}",
            f"embeddings by {self.embedded}" if self.embedded else "",
            f"{self.same_tokens} of {self.tokens} generated tokens equal" if self.tokens else "",
            f"stored as {self.container}" if self.container else "",
            self.zeros or "",
            *self.notes,
            f"not copied: {', '.join(self.left_out)}" if self.left_out else "",
            f"{self.seconds:.1f} s",
        ]
        return ", ".join(part for part in parts if part)

    def to_json(self) -> str:
        """Return the certificate as indented JSON."""
        return json.dumps({"format": "cria-certificate", "version": 1, **asdict(self)}, indent=2)


TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
TOKENS, LIMIT = 8, 3600
"""Tokens that are generated; seconds that the other process may take."""
TEXTS = (
    "A small animal lives in the mountains.", "Who wrote the first letter?", "No.",
    "The weather was fine until Friday; then it rained for three days, and the river rose by a metre.",
)  # fmt: skip
"""What a sentence encoder embeds: of several lengths, so that padding and its mask count."""

ADVICE = "Nothing was saved. Check the model, and please report it with its config.json"


def certify(
    folder: Path,
    model: nn.Module,
    example: Batch,
    *,
    stored: nn.Module,
    policy: Policy = "vanilla",
    left_out: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
    source: Path | None = None,
    earlier: tuple[str, ...] = (),
) -> Certificate:
    """Load a folder in a fresh process, and compare its outputs with those of the model here.

    Args:
        folder: what `save_pretrained` of transformers wrote.
        model: the model that it has to equal; it is left as it was.
        example: keyword arguments of its forward.
        stored: the model that was written: `model`, its weights in a container, or padded with zeros.
        policy: how it was written; a `per-layer` folder is loaded with Cria.
        left_out, notes, earlier: kept in the certificate.
        source: folder of the dense model. What it holds behind a sentence encoder says the embeddings that
            the new folder has to give.

    Raises:
        CertificateError: it does not load, keys are missing, unexpected or of other shapes, outputs differ by
            more than the tolerance (relative: 1e-5, in half types 2e-2), or other tokens are generated. Of a
            sentence encoder the embeddings of texts are among the outputs.
        ArtifactError: a module behind a sentence encoder does not fit it.
        DataError: the example is no mapping of tensors.
    """
    passed("certify", folder=folder)
    inputs, dtype = _inputs(model, example), _dtype(model)
    own, held = (str(cast(Any, item.config).model_type) for item in (model, stored))
    job = _job(folder, stored, inputs, policy)
    job["sentences"] = list(TEXTS) if source is not None and (source / MODULES).is_file() else []
    # The model here runs first: if it does not run, or gives NaN, no other process is asked.
    expected, written = _here(model, job, inputs)
    tokens, embedded = _embeddings(model, source) if source and job["sentences"] else ({}, {})
    expected |= embedded
    with TemporaryDirectory(prefix="cria-") as scratch:
        answer, found = _there(Path(scratch), job, inputs, tokens)
    notes = (*notes, *answer["notes"])
    _check(answer["class"] == type(stored).__name__, f"it loads as {answer['class']}")
    written_there = found.pop("generated", None)
    for name, value in expected.items():
        there = name in found and found[name].shape == value.shape
        _check(there, f"its output {name!r} is missing or of another shape")
    difference, relative = distance(expected, found)
    tolerance = TOLERANCE.get(dtype, 1e-5)
    _check(
        relative <= tolerance,
        f"its outputs differ by {relative:.2g} relative to the largest, {tolerance:g} is allowed",
    )
    equal = all(torch.equal(value, found[name]) for name, value in expected.items())
    same = same_tokens(written, written_there, job["tokens"])
    rounded = dtype in TOLERANCE and not equal  # the most likely token may then be another
    _check(rounded or same == job["tokens"], f"of {job['tokens']} generated tokens {same} are the same")
    return Certificate(
        loader=job["loader"],
        architecture=answer["class"],
        container=held if held != own else None,
        outputs=tuple(expected),
        equal=equal,
        difference=difference,
        relative=relative,
        tolerance=tolerance,
        tokens=job["tokens"] or None,
        same_tokens=same if job["tokens"] else None,
        dtype=str(dtype).removeprefix("torch."),
        device=job["device"],
        attention=job["attention"],
        versions=answer["versions"],
        sha256=hashes(folder),
        seconds=answer["seconds"],
        left_out=left_out,
        parameters=sum(item.numel() for item in model.parameters()),
        stored=sum(item.numel() for item in stored.parameters()),
        notes=notes,
        embedded=answer["embedded"],
        earlier=earlier,
    )


def loader_of(model: nn.Module) -> str:
    """Return the name of the Auto class that makes this model of its folder, else of its own class."""
    from transformers.models.auto import modeling_auto

    kind, config = type(model), type(model.config)
    names = sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel"))
    names.sort(key=lambda name: (name not in WRITERS, name == "AutoModelForPreTraining"))
    for name in names:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", {})
        found = mapping.get(config, ())
        if kind in (found if isinstance(found, (tuple, list)) else (found,)):
            return name
    return kind.__name__


def _job(folder: Path, stored: nn.Module, inputs: Mapping[str, Tensor], policy: Policy) -> dict[str, Any]:
    """What the fresh process is to do. Prompt and continuation are together as long as the example."""
    loader = loader_of(stored)
    length = inputs["input_ids"].shape[1] if loader in WRITERS and "input_ids" in inputs else 0
    tokens = min(TOKENS, (length + 1) // 2)
    return {
        "folder": str(folder.resolve()),
        "loader": reload.LOAD if policy == "per-layer" else loader,
        "attention": getattr(stored.config, "_attn_implementation", None),
        "device": str(device_of(stored)),
        # Threads, precision, device and attention are part of
        # the job: with others the same weights give other bits.
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "tokens": tokens,
        "prompt": max(length - tokens, min(length, 1)),
        # Where packages lie, and not the working directory: what lies there is no part of the folder.
        "paths": [path for path in sys.path if path and Path(path).resolve() != Path.cwd()],
    }


def _inputs(model: nn.Module, example: Batch) -> dict[str, Tensor]:
    """The example on the model's device; floating values of the model's type."""
    _, inputs = model_inputs(example)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs.values()):
        raise DataError(
            "An example for the reload certificate",
            f"found {type(example).__name__}",
            "Give the keyword arguments of the forward as a mapping of tensors",
        )
    dtype, device = _dtype(model), device_of(model)
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in inputs.items()
    }


def _dtype(model: nn.Module) -> torch.dtype:
    return next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)


def _here(
    model: nn.Module, job: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Run the model in this process; return outputs and, by the folder's settings, generated tokens."""
    from transformers import GenerationConfig

    copy: Any = shared_copy(model).eval()  # some forwards keep caches on their module
    asked, todo = f"Running the {type(model).__name__} to be saved", "Pass an `example` that it can run on"
    tokens = None
    try:
        with torch.random.fork_rng(devices=devices_in_use()), weights_kept(copy):
            found = reload.outputs(copy, inputs)
            if job["tokens"]:
                copy.generation_config = GenerationConfig.from_pretrained(job["folder"])
                tokens = reload.generated(copy, inputs, job["prompt"], job["tokens"])
    except Exception as error:  # the model's code
        raise CertificateError(asked, said(error), todo) from error
    for name, value in found.items():
        if value.isnan().any():
            raise CertificateError(asked, f"its output {name!r} holds NaN", todo)
    return found, tokens


@torch.no_grad()
def _embeddings(model: nn.Module, source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tokens of some texts, and their embeddings by the model here and the dense folder's modules.

    Raises:
        ArtifactError: a module's numbers do not fit the encoder, or there is no tokenizer.
    """
    asked = f"The embeddings of the {type(model).__name__} to be saved"
    encoder = encoder_folder(source)
    tokenizer = read_by("AutoTokenizer", encoder, asked, "Put the tokenizer's files into the dense folder")
    tokens = pooling.tokens_of(tokenizer, TEXTS, settings_of(encoder) or settings_of(source))
    copy: Any = shared_copy(model).eval()
    placed = {name: value.to(device_of(model)) for name, value in tokens.items()}
    try:
        behind = pooling.Behind(source, int(copy.config.hidden_size))
    except ValueError as error:
        raise ArtifactError(asked, str(error), "Give the folder that the encoder was loaded from") from error
    return tokens, {reload.EMBEDDING: behind.of(copy, placed).cpu().contiguous()}


def _there(
    scratch: Path, job: Mapping[str, Any], inputs: Mapping[str, Tensor], tokens: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run `reload.py` in a fresh process; return its answer and the outputs."""
    save_file({name: value.cpu() for name, value in inputs.items()}, scratch / "inputs.safetensors")
    if job["sentences"]:
        save_file(
            {name: value.contiguous() for name, value in tokens.items()}, scratch / "tokens.safetensors"
        )
        (scratch / "pooling.py").write_text(
            Path(pooling.__file__).read_text(encoding="utf-8"), encoding="utf-8"
        )
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # As a text, in isolated mode and in an empty folder, without the hub: the
    # process sees nothing but the saved folder and installed packages. A fresh
    # process, for what this one has registered or patched would hide a gap.
    program = Path(reload.__file__).read_text(encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, str(scratch)],
            env={**os.environ, **offline},
            cwd=scratch,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(f"it is not loaded after {LIMIT} s") from error
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["nothing said"]
        raise _failed(f"the process ends with {done.returncode}: {said[-1][:300]}")
    answer = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
    wrong = [
        f"{len(names)} {key.replace('_', ' ')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for key, names in answer["wrong"].items()
    ]
    _check(not wrong, "; ".join(wrong))
    return answer, load_file(scratch / "outputs.safetensors")


def _check(good: bool, found: str) -> None:
    if not good:
        raise _failed(found)


def _failed(found: str) -> CertificateError:
    return CertificateError("Loading the saved folder in a fresh process", found, ADVICE)
