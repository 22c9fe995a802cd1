"""The model card: what was removed, what was measured, how it was made, in README.md of a saved model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cria_prune.artifact.certificate import Certificate, loader_of
from cria_prune.base.files import is_plain_file, without_places
from cria_prune.base.modules import named_tensors
from cria_prune.planning.plan import Plan
from cria_prune.structure.table import ranges
from cria_prune.tasks.loading import CONFIG, HUB_NAME

TAGS = ("cria", "pruned")
LARGEST = 1 << 20
WORD = re.compile(r"[\w.+-][\w.+: /-]{0,95}")
TAKEN = ("license", "language", "tags", "pipeline_tag", "base_model")
TASKS = {
    "ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation", "ForInstanceSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation", "ForImageSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection", "ForZeroShotObjectDetection": "zero-shot-object-detection",
    "ForDepthEstimation": "depth-estimation", "ForImageTextToText": "image-text-to-text",
    "ForZeroShotImageClassification": "zero-shot-image-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition", "ForCTC": "automatic-speech-recognition",
    "ForAudioClassification": "audio-classification", "ForVideoClassification": "video-classification",
    "ForVisualQuestionAnswering": "visual-question-answering",
    "ForTableQuestionAnswering": "table-question-answering",
    "ForDocumentQuestionAnswering": "document-question-answering", "ForTextToWaveform": "text-to-audio",
}  # fmt: skip
"""End of an Auto class -> the hub's name of the task. One that is of several tasks (Seq2SeqLM) has none."""
SENTENCES = "sentence-transformers"


@dataclass(frozen=True)
class Card:
    """What only the caller knows about a saved model.

    Attributes:
        base: name of the dense model, such as `organisation/model`.
        command: the command or call that made the model.
        measured: rows of a table, all with the same keys: `{"model": "pruned", "perplexity": 7.1}`.
        changed: what was done, without training, to the parts that stayed; empty for nothing.
        data: what it was calibrated on; empty where that is not known.
        fidelity: rows of a table, all with the same keys: how far the model was from the dense one after each
            stage, before any training.
        repaired: sentences on how much the layers that lost inputs got back, and what to know of it.
    """

    base: str | None = None
    command: str | Sequence[str] | None = None
    measured: Sequence[Mapping[str, Any]] = ()
    changed: str = ""
    data: str = ""
    fidelity: Sequence[Mapping[str, Any]] = ()
    repaired: Sequence[str] = ()


def render_card(
    name: str, model: nn.Module, plan: Plan, certificate: Certificate, card: Card, source: Path | None = None
) -> str:
    """Return the card as Markdown with its YAML head.

    Args:
        name: of the saved model; model: the smaller model; plan: what was removed from the dense one.
        source: folder of the dense model; of its card only `TAKEN` is.
    """
    taken = source_metadata(source) if source else {}
    base = without_places(card.base) or (source.resolve().name if source else type(model).__name__)
    before, after = parameter_counts(model, plan)
    removed = 1 - after / before if before else 0.0
    parts = [
        _head(
            taken,
            _base_model(card.base, source, taken),
            _library(certificate),
            _tag(model, taken, certificate),
        ),
        f"# {_text(name)}",
        f"{_text(base)}, made smaller by Cria: structured pruning, plain tensors, no code of its own.",
        f"{before:,} parameters before, {after:,} after: {removed:.2%} removed.",
        *_use(certificate),
        "## What was removed",
        _removed(plan),
        *([f"Without training, in what stays: {_text(card.changed)}."] if card.changed else []),
        *([" ".join(f"{_text(_begun(line))}." for line in card.repaired)] if card.repaired else []),
        *([f"Calibrated on {_text(card.data)}."] if card.data else []),
    ]
    if card.measured:
        parts += ["## Measured", _named_rows(card.measured)]
    if card.fidelity:
        parts += [
            "## Distance from the dense model",
            "On held-out calibration examples, without labels, before any training; the worst output.",
            _named_rows(card.fidelity),
        ]
    if card.command:
        command = without_places(card.command)
        command = command if isinstance(command, str) else shlex.join(command)
        parts += ["## How it was made", f"    {' '.join(command.split())}"]
    parts += ["## Reload certificate", f"{_text(str(certificate))}."]
    parts += [f"{_text(_begun(note))}." for note in certificate.notes]
    parts.append(_tried(certificate))
    if certificate.container:
        parts.append(
            f"The tensors are those of a {_text(type(model).__name__)}. Its configuration cannot say the new "
            f"sizes, so they are stored as `{certificate.container}`, which computes the same."
        )
    if "license" in taken:
        said = taken["license"] if isinstance(taken["license"], str) else ", ".join(taken["license"])
        parts += ["## License", f"{_text(said)}, as the card of the dense model says."]
    return str(without_places("\n\n".join(parts) + "\n"))


def source_metadata(source: Path) -> dict[str, Any]:
    """Return what the card in a folder says of `TAKEN`: short words and lists of them only."""
    import yaml  # comes with transformers, whose models alone have a card

    path = source / "README.md"
    try:
        if not is_plain_file(path) or path.stat().st_size > LARGEST:
            return {}
        found = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8"), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    taken: dict[str, Any] = {}
    for key in TAKEN:
        value = values.get(key)
        if isinstance(value, list):
            value = [item for item in value[:64] if _is_word(item)]
        if value and (isinstance(value, list) or _is_word(value)):
            taken[key] = value
    return taken


def parameter_counts(model: nn.Module, plan: Plan) -> tuple[int, int]:
    """Return the parameters before and after the plan, tied ones once, from the smaller model."""
    tensors = named_tensors(model)
    factors: dict[tuple[int, int], tuple[int, int]] = {}
    for cut in plan.cuts:
        if cut.tensor in tensors:
            factors[id(tensors[cut.tensor]), cut.dim] = (cut.size, len(cut.kept))
    before = after = 0
    for parameter in model.parameters():
        count = parameter.numel()
        after += count
        for dim in range(parameter.ndim):
            size, kept = factors.get((id(parameter), dim), (1, 1))
            count = count * size // kept
        before += count
    return before, after


def _head(taken: Mapping[str, Any], base: str | None, library: str, tag: str | None) -> str:
    import yaml

    tags = taken.get("tags", [])
    tags = tags if isinstance(tags, list) else [tags]
    values: dict[str, Any] = {"library_name": library}
    values |= {} if tag is None else {"pipeline_tag": tag}
    values.update({key: taken[key] for key in ("license", "language") if key in taken})
    if base:
        values["base_model"] = base
    values["tags"] = list(dict.fromkeys([*tags, *TAGS]))
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _library(certificate: Certificate) -> str:
    if not certificate.alone:
        return "cria-prune"
    return SENTENCES if certificate.embedded else "transformers"


def _tag(model: nn.Module, taken: Mapping[str, Any], certificate: Certificate) -> str | None:
    """Return the task: as the dense model's card says, or as the class of the model has it."""
    said = taken.get("pipeline_tag")
    if isinstance(said, str):
        return said
    if certificate.embedded:
        return "sentence-similarity"
    loader = loader_of(model)
    if loader == "AutoModel":
        images = str(getattr(model, "main_input_name", "")) == "pixel_values"
        return "image-feature-extraction" if images else "feature-extraction"
    return next((tag for end, tag in TASKS.items() if loader.endswith(end)), None)


def _base_model(given: str | None, source: Path | None, taken: Mapping[str, Any]) -> str | None:
    """Return the name on the hub of the dense model, or of what that was made of; None where nothing says it.

    As it was given; of a snapshot in the cache of the hub; else as the dense folder's card or configuration
    name what it was made of.
    """
    if given and HUB_NAME.fullmatch(given):
        return given
    if source is None:
        return None
    cached = [part for part in source.resolve().parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/")
    said: Any = taken.get("base_model")
    if said is None:
        with suppress(OSError, ValueError, AttributeError):
            said = json.loads((source / CONFIG).read_text(encoding="utf-8")).get("_name_or_path")
    said = said[0] if isinstance(said, list) and said else said
    return said if isinstance(said, str) and HUB_NAME.fullmatch(said) else None


def _tried(certificate: Certificate) -> str:
    """With which versions the folder was tried, and what others find in it."""
    versions = ", ".join(f"{name} {number}" for name, number in certificate.versions.items())
    said = f"Tried with {versions}"
    if certificate.embedded and certificate.embedded.startswith(SENTENCES):
        said += f", {certificate.embedded}"
    said += "; with no other versions."
    if certificate.earlier:
        names = ", ".join(f"`{name}`" for name in certificate.earlier)
        said += f" Settings that transformers 4 reads under other names are written for it too: {names}."
    return said


def _use(certificate: Certificate) -> list[str]:
    """How the folder is loaded, and what its reader has to know that is not a smaller model of its class."""
    said, load = "", f'model = {certificate.loader}.from_pretrained("path/to/this/folder")'
    imported = f"from transformers import {certificate.loader}"
    if certificate.embedded:
        load = 'model = SentenceTransformer("path/to/this/folder")'
        imported = "from sentence_transformers import SentenceTransformer"
    if not certificate.alone:
        said = (
            "Its layers differ in size, or hold what its configuration cannot say, so plain "
            "`from_pretrained` of transformers does not build it yet: `config.json` is that of the dense "
            "model, and Cria replays `cria.json` on it."
        )
        imported = "from cria_prune import load  # pip install 'cria-prune[hf]'"
        load = 'model = load("path/to/this/folder").model'
    elif certificate.zeros:
        said = (
            f"This folder {certificate.zeros}: layers are padded to sizes that one configuration can say. "
            "The outputs are those of the smaller model; memory and time are those of the stored one."
        )
    return [*([said] if said else []), f"```python\n{imported}\n\n{load}\n```"]


def _removed(plan: Plan) -> str:
    """The groups that lost units; equal rows of numbered layers are one."""
    rows: dict[tuple[str, int, int], list[int]] = {}
    for name, size in plan.sizes.items():
        kept = len(plan.kept[name])
        if kept < size:
            number = re.search(r"(?<=\.)\d+(?=\.)", name)
            key = name if number is None else f"{name[: number.start()]}\0{name[number.end() :]}"
            rows.setdefault((key, size, kept), []).append(int(number[0]) if number else 0)
    lines = [
        [f"`{key.replace(chr(0), ranges(numbers))}`", f"{size:,}", f"{kept:,}", f"{1 - kept / size:.1%}"]
        for (key, size, kept), numbers in rows.items()
    ]
    if not lines:
        return "Nothing."
    return _table(["layers", "units before", "units after", "removed"], lines, "right")


def _named_rows(found: Sequence[Mapping[str, Any]]) -> str:
    columns = list(found[0])
    return _table(columns, [[_value(row.get(column, "")) for column in columns] for row in found])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    rule = ["---", *(("---:" if align else "---") for _ in columns[1:])]
    lines = [[_text(item) for item in columns], rule, *([_text(item) for item in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _text(value: Any) -> str:
    """One line that opens no table cell, link or tag."""
    line = " ".join(str(value).split())
    return re.sub(r"([|<\[\]])", r"\\\1", line)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(WORD.fullmatch(value))
