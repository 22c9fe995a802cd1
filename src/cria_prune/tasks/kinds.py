"""The kinds of tasks: which models they are of, which columns they read, what a batch is, what is measured.

One row of `KINDS` is one kind. A model is of the first whose Auto class of transformers makes its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ConfigError, DataError
from cria_prune.base.metrics import Loss
from cria_prune.base.progress import Progress
from cria_prune.tasks import columns as names
from cria_prune.tasks import encode, score
from cria_prune.tasks.columns import (
    LABEL_OPTION,
    PAIR_OPTION,
    TEXT_OPTION,
    Classes,
    Reading,
    Rows,
    first_of,
    label_column,
    named,
    number_of,
    strings_of,
    text_columns,
)
from cria_prune.tasks.corpus import KNOWN, Table
from cria_prune.tasks.encode import Encoder

Roles = Mapping[str, Sequence[Any]]
Measure = Callable[[Encoder, nn.Module, Iterable[Batch], Progress | None], dict[str, float]]


NO_METRIC = "fidelity"
"""What stands for a metric where the dense model is all that a model can be measured by."""


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        name: as `pipeline` of transformers and --task call it.
        autos: Auto classes that make its models; the first loads them.
        roles: (encoder, table) -> role -> a value for each row.
        batch: (encoder, features or rows, seed) -> batch.
        features: (encoder, rows) -> what is made of them once; None: batches are made of rows.
        measure: (encoder, model, batches, progress) -> name -> value, first that of `metric`; None: no
            metric is known, the model is compared with the dense one alone.
        metric: encoder -> name of the metric.
        loss: (model, batch) -> scalar; None: the model's own.
        size: examples of a batch; less where something is trained.
    """

    name: str
    autos: tuple[str, ...]
    roles: Callable[[Encoder, Table], Roles]
    batch: encode.Make
    features: Callable[[Encoder, Sequence[Any]], list[dict[str, Any]]] | None = None
    measure: Callable[[Encoder], Measure] | None = None
    metric: Callable[[Encoder], str] = lambda _: NO_METRIC
    loss: Loss | None = None
    size: int = 64
    trained: int = 32

    def rows(self, encoder: Encoder, table: Table) -> Rows:
        """Return the rows of a table that have all that the task reads.

        Raises:
            DataError: a column is missing, or a label is none of the model's.
        """
        found = self.roles(encoder, table)
        needed = [role for role in found if role not in ("row", "pair")]
        there = [
            place
            for place, values in enumerate(zip(*(found[role] for role in needed), strict=True))
            if all(value is not None and (not isinstance(value, str) or value.strip()) for value in values)
        ]
        if not there:
            raise DataError(f"The rows of {table.origin}", "none of them is whole", "Fill the columns")
        return Rows({**found, "row": range(len(table))}, there)


# Columns by their roles.


def _texts(encoder: Encoder, table: Table) -> dict[str, Any]:
    text, pair = text_columns(table, encoder.reading, pairs=True)
    return {"text": table.columns[text], **({} if pair is None else {"pair": table.columns[pair]})}


def _labels(encoder: Encoder, table: Table, usual: Sequence[str] = names.LABELS) -> dict[str, Any]:
    """Return the labels, as the model has them: classes, several of them, or numbers."""
    column = label_column(table, encoder.reading, usual)
    if column is None:
        return {}
    values = table.columns[column]
    way = answers(encoder)
    if way == "number":
        return {"label": [None if value is None else number_of(value, encoder.name) for value in values]}
    classes = Classes(encoder.config, table, column, encoder.name)
    read = classes.several if way == "several" else classes.number
    return {"label": [None if names.is_secret(value) else read(value) for value in values]}


def answers(encoder: Encoder) -> str:
    """Return what a classifier says: one `class`, `several` of them, or a `number`."""
    config = encoder.config
    said = getattr(config, "problem_type", None)
    if said == "multi_label_classification":
        return "several"
    return "number" if said == "regression" or getattr(config, "num_labels", 2) == 1 else "class"


def _classified(encoder: Encoder, table: Table) -> Roles:
    return _texts(encoder, table) | _labels(encoder, table)


def _plain(encoder: Encoder, table: Table) -> Roles:
    text, pair = text_columns(table, encoder.reading, pairs=False)
    return {"text": table.columns[text], **({} if pair is None else {"pair": table.columns[pair]})}


def _targets(encoder: Encoder, table: Table) -> Roles:
    """A text and the text that is to be made of it, where there is one."""
    reading = encoder.reading
    asked = named(table, reading.label_column, LABEL_OPTION)
    asked = asked or named(table, reading.pair_column, PAIR_OPTION)
    strings = strings_of(table)
    target = asked or next((name for name in names.TARGETS if name in strings), None)
    rest = Table({k: v for k, v in table.columns.items() if k != target}, table.origin, plain=table.plain)
    text, _ = text_columns(rest, Reading(reading.text_column, chat=reading.chat), pairs=False)
    return {"text": table.columns[text], **({} if target is None else {"label": table.columns[target]})}


def _words(encoder: Encoder, table: Table) -> Roles:
    """Words and a tag for each; or texts."""
    asked = named(table, encoder.reading.text_column, TEXT_OPTION)
    words = asked or first_of(table, names.WORDS)
    if words is None or any(isinstance(value, str) for value in list(table.columns[words])[:1]):
        return _plain(encoder, table)
    column = label_column(table, encoder.reading, names.TAGS)
    if column is None:
        return {"words": table.columns[words]}
    classes = Classes(encoder.config, table, column, encoder.name)
    tags = []
    for row, (value, there) in enumerate(zip(table.columns[column], table.columns[words], strict=True)):
        if value is not None and len(value) != len(there):
            raise DataError(
                f"The tags of {table.origin}", f"row {row} has {len(there)} words and {len(value)} tags",
                "Give a tag for every word",
            )  # fmt: skip
        tags.append(None if value is None else [classes.number(tag) for tag in value])
    return {"words": table.columns[words], "label": tags}


def _questions(encoder: Encoder, table: Table) -> Roles:
    reading = encoder.reading
    text = named(table, reading.text_column, TEXT_OPTION) or first_of(table, ("question", "query"))
    pair = named(table, reading.pair_column, PAIR_OPTION) or first_of(
        table, ("context", "passage", "document", "text")
    )
    if text is None or pair is None:
        raise DataError(
            f"Questions and contexts of {table.origin}", f"its columns are {', '.join(table.columns)}",
            f"Call them question and context, or name them with --{TEXT_OPTION} and --{PAIR_OPTION}",
        )  # fmt: skip
    column = label_column(table, reading, ("answers", "answer", "label"))
    found = {"text": table.columns[text], "pair": table.columns[pair]}
    return found if column is None else {**found, "label": table.columns[column]}


def _media(table: Table, usual: Sequence[str], kind: str) -> Sequence[Any]:
    known = first_of(table, usual)
    known = known or next((name for name, values in table.columns.items() if _is_file(values)), None)
    if known is None:
        raise DataError(
            f"The {kind} of {table.origin}", f"its columns are {', '.join(table.columns)}",
            f"Give a folder of files, or a column {usual[0]!r} of files, bytes or arrays. {KNOWN}",
        )  # fmt: skip
    values = table.columns[known]
    if len(values) and isinstance(values[0], str):  # paths, beside the file that names them
        return [None if value is None else Path(value) for value in values]
    return values


def _is_file(values: Sequence[Any]) -> bool:
    first = values[0] if len(values) else None
    return isinstance(first, (Path, bytes)) or (isinstance(first, Mapping) and "bytes" in first)


def _images(encoder: Encoder, table: Table) -> dict[str, Any]:
    return {"image": _media(table, names.IMAGES, "images")}


def _seen(encoder: Encoder, table: Table) -> Roles:
    return _images(encoder, table) | _labels(encoder, table)


def _maps(encoder: Encoder, table: Table) -> Roles:
    column = label_column(table, encoder.reading, names.MAPS)
    found = _images(encoder, table)
    values = () if column is None or table.folders else table.columns[column]
    return {**found, "label": values} if len(values) and not isinstance(values[0], (int, str)) else found


def _sounds(encoder: Encoder, table: Table) -> dict[str, Any]:
    return {"audio": _media(table, names.AUDIO, "recordings")}


def _heard(encoder: Encoder, table: Table) -> Roles:
    return _sounds(encoder, table) | _labels(encoder, table)


def _transcripts(encoder: Encoder, table: Table) -> Roles:
    reading = encoder.reading
    asked = named(table, reading.label_column, LABEL_OPTION)
    text = asked or named(table, reading.text_column, TEXT_OPTION) or first_of(table, names.SPOKEN)
    return _sounds(encoder, table) | ({} if text is None else {"label": table.columns[text]})


PROMPT = "a photo of a {}"


def _captions(encoder: Encoder, table: Table) -> Roles:
    """Images and texts, or the names of their classes as a text."""
    text = named(table, encoder.reading.text_column, TEXT_OPTION) or first_of(table, names.CAPTIONS)
    found = _images(encoder, table)
    if text is not None:
        return {**found, "text": table.columns[text], "label": range(len(table))}
    column = label_column(table, encoder.reading)
    if column is None:
        return {**found, "text": ["a photo"] * len(table)}
    theirs = list(table.names.get(column, ()))
    said = [theirs[value] if isinstance(value, int) and theirs else value for value in table.columns[column]]
    texts = [PROMPT.format(str(value).replace("_", " ")) for value in said]
    return {**found, "text": texts, "label": range(len(table))}


def _asked(encoder: Encoder, table: Table) -> Roles:
    """Images, what is asked of them, and what is to be answered; or texts alone."""
    reading = encoder.reading
    if first_of(table, names.IMAGES) is None and not any(_is_file(v) for v in table.columns.values()):
        return _plain(encoder, table)
    found = _images(encoder, table)
    text = named(table, reading.text_column, TEXT_OPTION) or first_of(table, names.CAPTIONS)
    pair = named(table, reading.pair_column, PAIR_OPTION) or first_of(table, ("answer", "target"))
    if pair is None and text is not None and text in ("caption", "captions", "text"):
        text, pair = None, text
    found |= {} if text is None else {"text": table.columns[text]}
    return found if pair is None else {**found, "pair": table.columns[pair], "label": range(len(table))}


# The table.


def _of_class(encoder: Encoder) -> Measure:
    return {"class": score.classified, "several": score.several, "number": score.correlated}[answers(encoder)]


def _name_of_class(encoder: Encoder) -> str:
    return {"class": "accuracy", "several": "f1", "number": "spearman"}[answers(encoder)]


def _name_of_tags(encoder: Encoder) -> str:
    return "f1" if score.in_spans(map(str, encoder.config.id2label.values())) else "accuracy"


def _always(value: Any) -> Callable[[Encoder], Any]:
    return lambda _: value


TEXT_GENERATION = "text-generation"
_CLASSES: dict[str, Any] = {"measure": _of_class, "metric": _name_of_class}
_PERPLEXITY = _always("perplexity")

KINDS: tuple[Kind, ...] = (
    Kind(
        "image-text-to-text", ("AutoModelForImageTextToText",), _asked, encode.told_batch,
        measure=_always(score.told), metric=_PERPLEXITY, size=4, trained=4,
    ),
    Kind(
        "automatic-speech-recognition", ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"), _transcripts,
        encode.spoken_batch, measure=_always(score.spoken), metric=_always("wer"), size=8, trained=8,
    ),
    Kind(
        TEXT_GENERATION, ("AutoModelForCausalLM",), _plain, encode.text_batch, encode.text_features,
        measure=_always(score.told), metric=_PERPLEXITY,
    ),
    Kind(
        "text2text-generation", ("AutoModelForSeq2SeqLM",), _targets, encode.sequence_batch,
        encode.sequence_features, measure=_always(score.predicted), metric=_PERPLEXITY,
    ),
    Kind(
        "text-classification", ("AutoModelForSequenceClassification",), _classified, encode.text_batch,
        encode.text_features, **_CLASSES,
    ),
    Kind(
        "token-classification", ("AutoModelForTokenClassification",), _words, encode.text_batch,
        encode.tag_features, measure=_always(score.tagged), metric=_name_of_tags,
    ),
    Kind(
        "question-answering", ("AutoModelForQuestionAnswering",), _questions, encode.text_batch,
        encode.question_features, measure=_always(score.answered), metric=_always("f1"),
        loss=score.span_loss, size=16, trained=16,
    ),
    Kind(
        "fill-mask", ("AutoModelForMaskedLM",), _plain, encode.masked_batch, encode.text_features,
        measure=_always(score.predicted), metric=_PERPLEXITY,
    ),
    Kind(
        "image-classification", ("AutoModelForImageClassification",), _seen, encode.image_batch,
        size=32, **_CLASSES,
    ),
    Kind(
        "image-segmentation", ("AutoModelForSemanticSegmentation",), _maps, encode.map_batch,
        measure=_always(score.mapped), metric=_always("mean-iou"), size=8, trained=8,
    ),
    Kind("audio-classification", ("AutoModelForAudioClassification",), _heard, encode.sound_batch,
         size=8, trained=8, **_CLASSES),
    Kind(
        "zero-shot-image-classification", ("AutoModelForZeroShotImageClassification",), _captions,
        encode.pair_batch, measure=_always(score.retrieved), metric=_always("retrieval"),
        loss=score.contrast_loss, size=32,
    ),
    Kind("object-detection", ("AutoModelForObjectDetection", "AutoModelForUniversalSegmentation",
                              "AutoModelForInstanceSegmentation"), _images, encode.image_batch, size=8),
    Kind("depth-estimation", ("AutoModelForDepthEstimation",), _images, encode.image_batch, size=8),
    Kind("image-to-image", ("AutoModelForImageToImage", "AutoModelForMaskedImageModeling"), _images,
         encode.image_batch, size=8),
)  # fmt: skip
"""The kinds with a head, the more particular first: some classes are in several of transformers' tables."""

FEATURES: dict[str, Kind] = {
    "pixel_values": Kind("image-feature-extraction", ("AutoModel",), _images, encode.image_batch, size=32),
    "input_ids": Kind(
        "feature-extraction", ("AutoModel",), _plain, encode.encoder_batch, encode.text_features
    ),
    "input_values": Kind("audio-feature-extraction", ("AutoModel",), _sounds, encode.sound_batch, size=8),
    "input_features": Kind("audio-feature-extraction", ("AutoModel",), _sounds, encode.sound_batch, size=8),
}
"""The main input of a model without a head -> its kind; it is compared with the dense one alone."""

SIMILARITY = "sentence-similarity"
"""What a model without a head is for where a folder of sentence-transformers holds it."""
NAMES = tuple(dict.fromkeys([*(kind.name for kind in (*KINDS, *FEATURES.values())), SIMILARITY]))

PYTHON = """Or in Python, with batches of your own:
    from cria_prune import PruneConfig, prune, save_pretrained
    batches = [dict(processor(part, return_tensors="pt")) for part in parts]   # what its forward takes
    result = prune(model, batches, PruneConfig(plan={"reduction": 0.3, "vanilla": True}))
    print(result)
    save_pretrained("smaller", result.model, result.plan, source="path/to/dense")"""


def auto_of(task: str) -> str:
    """Return the Auto class that loads the models of a task.

    Raises:
        ConfigError: no such task.
    """
    known = {kind.name: kind.autos[0] for kind in (*FEATURES.values(), *KINDS)} | {SIMILARITY: "AutoModel"}
    if task not in known:
        raise ConfigError("A task", f"found {task!r}", f"Known tasks: {', '.join(NAMES)}")
    return known[task]


def kind_of(model: nn.Module, task: str | None = None) -> Kind | None:
    """Return the kind of a model of transformers; None where none is known.

    Args:
        model: the model; its class is looked for in the tables of transformers' Auto classes.
        task: name of the kind, to choose one that could be several.

    Raises:
        ConfigError: no such task, or the model is not of it.
    """
    from transformers.models.auto import modeling_auto

    def makes(auto: str) -> bool:
        mapping = getattr(getattr(modeling_auto, auto, None), "_model_mapping", {})
        found = mapping.get(type(model.config), ())
        return type(model) in (found if isinstance(found, (tuple, list)) else (found,))

    if task is not None:
        auto_of(task)
    fitting = [kind for kind in KINDS if any(makes(auto) for auto in kind.autos)]
    bare = FEATURES.get(str(getattr(model, "main_input_name", ""))) if makes("AutoModel") else None
    if not fitting and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        fitting = [kind for kind in KINDS if kind.name == TEXT_GENERATION]
    fitting += [bare] if bare is not None else []
    chosen = [kind for kind in fitting if task in (None, kind.name)]
    if task is not None and not chosen:
        known = f"its tasks are {', '.join(kind.name for kind in fitting) or 'none of those known'}"
        raise ConfigError(
            f"The task {task} of a {type(model).__name__}", known, "Leave the task out, or give another model"
        )
    return chosen[0] if chosen else None
