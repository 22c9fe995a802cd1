"""A Hugging Face folder and the user's data as a task: what it is calibrated, trained and measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, first_examples, model_inputs
from cria_prune.base.errors import ArtifactError, ConfigError, DataError
from cria_prune.base.modules import device_of
from cria_prune.base.progress import Progress
from cria_prune.base.sentences import MODULES, encoder_folder
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import SPLITS, Task
from cria_prune.tasks.columns import Reading, Rows, joined_rows
from cria_prune.tasks.corpus import KNOWN, Table, read_source
from cria_prune.tasks.encode import Encoder, of_type
from cria_prune.tasks.kinds import (
    FEATURES,
    NAMES,
    PYTHON,
    SIMILARITY,
    TEXT_GENERATION,
    Kind,
    auto_of,
    kind_of,
)
from cria_prune.tasks.loading import example_inputs, load_pretrained
from cria_prune.tasks.processors import Processors
from cria_prune.tasks.sentences import Sentences
from cria_prune.tasks.text import (
    AT_ONCE,
    PRUNE_TEXT,
    SHORT,
    BlockBatches,
    LanguageTask,
    blocks,
    by_length,
    conventions,
    encode,
    perplexities,
)

HELD = 0.05
"""Share of the texts that is kept apart to measure on where no other data are given."""

TUNING: dict[str, Any] = {
    "optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.1, "schedule": "linear", "clip": 1.0,
    "precision": "auto",
}  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """What the user gave to calibrate, train and measure on.

    Attributes:
        calibration: a source, or several that are mixed; see `corpus.read_source`.
        dataset: another name for one source.
        text: a source that is measured on alone.
        reading: how rows are read.
        task: which task the model is of; None for what its class says.
    """

    calibration: Path | str | Sequence[Path | str] | None = None
    dataset: str | None = None
    text: Path | str | None = None
    reading: Reading = field(default_factory=Reading)
    task: str | None = None

    def __bool__(self) -> bool:
        return bool(self.sources) or self.text is not None

    @property
    def sources(self) -> tuple[str, ...]:
        """What is calibrated and trained on."""
        if self.dataset is not None:
            return (self.dataset,)
        given = () if self.calibration is None else self.calibration
        return (str(given),) if isinstance(given, (str, Path)) else tuple(map(str, given))


def with_weights(folder: Path, task: str | None = None) -> nn.Module:
    """Return the model of a folder with its weights; see `load_pretrained`.

    Args:
        folder: of the model.
        task: which it is of, where its configuration does not say.

    Raises:
        ArtifactError: there are none, or they cannot be read.
    """
    model = load_pretrained(folder, auto=None if task is None else auto_of(task))
    if device_of(model).type == "meta":
        raise ArtifactError(
            f"Reading the Hugging Face model in {folder}",
            "there are no weights beside config.json (model.safetensors, or an index of shards)",
            "Copy them into the folder, or give the folder that holds them",
        )
    return model


@dataclass(eq=False)
class FolderTask(Task):
    """A model in a folder, and data.

    Args:
        folder: of the model and its tokenizer or processor.
        texts: the data.
        model: the folder's model.
        kind: of its task.
    """

    folder: Path
    texts: Texts
    model: nn.Module = field(repr=False)
    kind: Kind = field(repr=False)
    architecture: str = ""
    held_splits: tuple[str, ...] = ("validation", "test")

    def __post_init__(self) -> None:
        self.name = self.folder.resolve().name or "model"
        self.parts_of = Processors(encoder_folder(self.folder))
        self.encoder = Encoder(self.model, self.parts_of, self.texts.reading, self.name)
        self.example: Batch = example_inputs(self.model)
        self.loss = self.kind.loss
        self.recover_defaults = RecoverConfig(epochs=1, lr=5e-5, **TUNING)

    @property
    def prune_defaults(self) -> dict[str, dict[str, Any]]:  # type: ignore[override]
        """Sections of a PruneConfig: what a plain configuration can hold, and data for the widest layer."""
        return {**PRUNE_TEXT, "record": enough(self.model, self.tokens_each)}

    @property
    def tokens_each(self) -> int:
        """Tokens, or places, of an example, about."""
        return places_of(self.example)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's own tokenizer.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        return self.parts_of.tokenizer

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the folder's model."""
        return self.model

    def untrained(self) -> nn.Module:
        """Return the folder's model."""
        return self.model

    def pretrained_source(self, scratch: Path) -> Path:
        """Return the folder itself."""
        return self.folder

    def real_example(self) -> Batch | None:
        """Return the first two examples of the validation split, without labels."""
        _, inputs = model_inputs(first_examples(self.validation_batches(), torch.device("cpu")))
        return inputs

    def drawn(self, count: int, examples: int, seed: int) -> Tensor:
        """Return `examples` of `count` at random, or all where there are fewer."""
        return super().drawn(count, min(examples, count), seed)

    def parts(self) -> tuple[list[Table], list[Table]]:
        """Return the rows to calibrate and train on, and other ones to measure on, of each source.

        The second are the first of `held_splits` that is not the first one itself, where there is one.

        Raises:
            DataError: nothing was given, or it cannot be read.
        """
        if not self.texts.sources:
            raise DataError(
                f"Data for {self.name}",
                "none were given",
                f"Name them with --calibration. {KNOWN}",
            )
        sources, others = list[Table](), list[Table]()
        for name in self.texts.sources:
            found = read_source(name)
            source = "train" if "train" in found else next(iter(found))
            sources.append(found[source])
            held = next((part for part in self.held_splits if part in found and part != source), None)
            others += [] if held is None else [found[held]]
        return sources, others

    @property
    def _alone(self) -> bool:
        """Whether data to measure on are all that was given."""
        return self.texts.text is not None and not self.texts.sources

    def check_alone(self, split: str) -> None:
        """Raise a DataError where another split is asked for than the one that was given."""
        if self._alone and split != "test":
            raise DataError(
                f"Data to calibrate {self.name} on",
                "only some to measure on were given",
                "Give --calibration",
            )

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the splits (of all that there are if none is named)."""
        return super().fingerprint(*(splits or (("test",) if self._alone else SPLITS)))


SAMPLES, FEWEST, MOST, WORK = 16, 256, 4096, 4e13
"""Samples for a regressor of the widest layer that the default calibrates on; so many examples at least and
at most, in about so many multiplications (minutes on a few cores)."""


def enough(model: nn.Module, tokens: int) -> dict[str, int]:
    """Return how many examples, and tokens of each, the widest layer of a model needs for its fit.

    A layer that reads n features is fitted to samples of them: `SAMPLES` for each feature, as far as `WORK`
    allows, which is counted and not timed, so that the same command gives the same plan.

    Args:
        model: its layers' weights say how much each reads.
        tokens: of an example.

    >>> enough(nn.Linear(3072, 8), 128)["examples"], enough(nn.Linear(64, 8), 128)["examples"]
    (384, 256)
    """
    reads = [item.shape[1:].numel() for item in model.parameters() if item.ndim > 1]
    widest = max((size for size in reads if size < 2**16), default=1)
    size = sum(item.numel() for item in model.parameters())
    wanted = SAMPLES * widest
    able = int(WORK / max(size * tokens, 1))
    examples = max(FEWEST, min(MOST, -(-wanted // tokens), able))
    return {"examples": examples, "tokens": max(16, min(tokens, -(-wanted // examples)))}


def places_of(example: Batch) -> int:
    """Return the places (tokens, patches, frames) of an example that a layer sees, about."""
    if isinstance(example, Mapping):
        for name, value in example.items():
            if name == "input_ids":
                return SHORT // 4
            if name == "pixel_values":
                return max(1, value.shape[-1] * value.shape[-2] // 256)
            return max(1, value.shape[-1] // 320)
    return 1


SPLIT_SEED, HELD_ROWS = 0, 1000
EMBEDDING_RATE = 3e-4
"""Learning rate of a fine-tune towards the dense embeddings."""


class Examples:
    """Rows of a split, and the features that were made of them.

    Args:
        encoder, kind: make batches of them.
        rows: the rows.
        features: of each row; None where batches are made of the rows themselves.
    """

    def __init__(
        self, encoder: Encoder, kind: Kind, rows: Rows, features: Sequence[Any] | None = None
    ) -> None:
        self.encoder, self.kind, self.source = encoder, kind, rows
        if features is None and kind.features is not None:
            features = kind.features(encoder, list(rows))
        self.features = features

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labelled(self) -> bool:
        """Whether there is something to measure on."""
        return self.source.labelled or (len(self.source) > 0 and self.kind.name in SELF_LABELLED)

    def rows(self, index: Tensor) -> Examples:
        """Return some of them."""
        places = index.tolist()
        features = None if self.features is None else [self.features[place] for place in places]
        return Examples(self.encoder, self.kind, self.source.rows(places), features)

    def lengths(self) -> Tensor:
        """Return (examples,) int64, tokens of each; 1 where that is not known."""
        if self.features is None:
            return torch.ones(len(self), dtype=torch.int64)
        return torch.tensor([len(item["input_ids"]) for item in self.features])

    def batch(self, places: Tensor, seed: int) -> Batch:
        """Return the batch of some of them."""
        items = (
            list(self.source.rows(places.tolist()))
            if self.features is None
            else [self.features[place] for place in places.tolist()]
        )
        return of_type(self.kind.batch(self.encoder, items, seed), self.encoder.model)


SELF_LABELLED = ("fill-mask",)
"""Kinds whose batches hold what is to be said without labels of the user."""


class Batches:
    """Batches of examples, made on every pass anew, and the same.

    Args:
        data: the examples; chunks: the places of every batch; seed: of what is drawn in a batch.
    """

    def __init__(self, data: Examples, chunks: Sequence[Tensor], seed: int) -> None:
        self.data, self.chunks, self.seed = data, chunks, seed

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Batch]:
        for chunk in self.chunks:
            yield self.data.batch(chunk, self.seed)


@dataclass(eq=False)
class RowsFolder(FolderTask):
    """A model whose examples are rows: classifiers, taggers, images, recordings, encoders, ...

    Measured are the labelled splits validation or test of the data; else 5 % of the rows, at most 1,000,
    which are then not used for anything else; or the source `texts.text`, all of it. Rows without labels
    serve for the calibration, and to compare with the dense model.
    """

    sentences: Sentences | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.metric = self.kind.metric(self.encoder)
        self.embeds = self.sentences is not None
        if self.embeds:  # a network that is near already, towards states that are known to the last bit
            self.recover_defaults = RecoverConfig(epochs=1, **{**TUNING, "lr": EMBEDDING_RATE})
        self.batch_size = self.kind.trained
        self._last: dict[str, float] = {}

    def load(self, name: str) -> dict[str, Examples]:
        """Return all splits that there are; see the class for where they come from."""
        self.check_alone(name)
        test = (
            None
            if self.texts.text is None
            else self._examples(list(read_source(str(self.texts.text)).values()))
        )
        if self._alone and test is not None:
            return {"test": test}
        sources, others = self.parts()
        rows = self._examples(sources)
        if test is None and others:
            other = self._examples(others)
            test = other if other.labelled or not rows.labelled else None
        return self._split(rows, test)

    def _split(self, rows: Examples, test: Examples | None) -> dict[str, Examples]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held = max(1, min(HELD_ROWS, round(HELD * len(rows))))
        if len(rows) < 4 * held:
            raise DataError(
                f"Rows for {self.name}", f"found {len(rows)}", "Give four at least, better hundreds"
            )
        first = 0 if test is not None else held
        return {
            "train": rows.rows(order[first + held :]),
            "validation": rows.rows(order[first : first + held]),
            "test": rows.rows(order[:held]) if test is None else test,
        }

    def _examples(self, parts: Sequence[Table]) -> Examples:
        rows = joined_rows([self.kind.rows(self.encoder, part) for part in parts])
        return Examples(self.encoder, self.kind, rows)

    def epoch(self, data: Examples, seed: int, batch_size: int, augment: bool) -> Iterable[Batch]:
        """Return shuffled batches, of alike length where that is known; nothing is augmented."""
        return Batches(data, by_length(data.lengths(), batch_size, seed), seed)

    def chosen(self, data: Examples, index: Tensor, seed: int | None = None) -> Iterable[Batch]:
        """Return batches of some examples, shuffled by the seed, or the short ones first."""
        data = data.rows(index)
        return Batches(data, by_length(data.lengths(), self.kind.size, seed), 0)

    def tensors(self, data: Examples) -> Iterable[Tensor]:
        """Return a digest of the rows."""
        return (torch.tensor(list(data.source.digest()), dtype=torch.uint8),)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], progress: Progress | None = None) -> float:
        """Return the metric of the model on the batches; `further` has what else was measured then."""
        if self.kind.measure is None:
            raise ConfigError(
                f"A metric for {self.name}", f"there is none for {self.kind.name}",
                "Compare it with the dense model: --against",
            )  # fmt: skip
        self._last = self.kind.measure(self.encoder)(self.encoder, model, batches, progress)
        if self.metric not in self._last:  # an encoder that there is no dense one for
            self.metric = next(iter(self._last))
        return self._last[self.metric]

    def compare_with(self, dense: nn.Module) -> None:
        """Compare the embeddings of an encoder with those of this network."""
        if self.sentences is not None:
            self.sentences.dense = dense

    def further(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float | str]:
        """Return the other figures of what was measured last."""
        return {name: value for name, value in self._last.items() if name != self.metric}

    @property
    def measured(self) -> bool:
        """Whether there are labels to measure on."""
        known = self.sentences is not None and self.sentences.dense is not None
        return self.kind.measure is not None and (known or self.split("test").labelled)

    @property
    def tested_on(self) -> str:
        """What the test split is, in words."""
        count = f"{len(self.split('test')):,} examples"
        return f"{count} of {self.texts.text}" if self.texts.text else f"{count} that were kept apart"


HELD_BLOCKS, TRAINED = 512, 512
"""Blocks that are held out at most; tokens per block of a fine-tune at most."""


@dataclass(eq=False)
class TextFolder(FolderTask, LanguageTask):
    """Perplexity of a causal language model on a text.

    Measured is the source `texts.text`; else the split test or validation of the data; else the last 5 %
    of each text, at most 512 blocks, which are then not used for anything else. The validation split is the
    last 5 % of what is left.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        most = conventions(self.model)[-1]
        asked = self.texts.reading.max_length
        self.short, self.longest = min(SHORT, most), min(asked or TRAINED, most)
        self.metric = f"perplexity-{self.short}"
        self.looked = min(asked or self.short, most)

    @property
    def tokens_each(self) -> int:
        """Tokens of an example of the calibration."""
        return self.looked

    def load(self, name: str) -> dict[str, Tensor]:
        """Return all splits that there are; see the class for where they come from.

        Raises:
            DataError: there is only a text to measure on, and another split is asked for.
        """
        self.check_alone(name)
        test = None
        if self.texts.text is not None:
            test = torch.cat([self._encoded(part, 1) for part in read_source(str(self.texts.text)).values()])
        if self._alone and test is not None:
            return {"test": test}
        sources, others = self.parts()
        parts = [self._encoded(part, 4) for part in sources]
        if test is None and others:
            test = torch.cat([self._encoded(part, 1) for part in others])
        elif test is None:
            pieces = [self._cut(part) for part in parts]
            parts, test = [piece[0] for piece in pieces], torch.cat([piece[1] for piece in pieces])
        pieces = [self._cut(part) for part in parts]
        train, validation = (torch.cat([piece[side] for piece in pieces]) for side in (0, 1))
        return {"train": train, "validation": validation, "test": test}

    def _cut(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the last blocks of a text apart."""
        count = len(tokens) // self.short
        held = max(1, min(HELD_BLOCKS, round(HELD * count))) * self.short
        return tokens[:-held], tokens[-held:]

    def _encoded(self, table: Table, least: int) -> Tensor:
        rows = self.kind.rows(self.encoder, table)
        if table.plain:
            text = "".join(table.columns["text"])
        else:  # each on lines of its own
            ends = [self.encoder.text(row) if self.texts.reading.chat else str(row["text"]) for row in rows]
            text = "".join(item if item.endswith("\n") else f"{item}\n" for item in ends)
        tokens = encode(self.tokenizer, text)
        if len(tokens) < least * self.short:
            raise DataError(
                f"A text for {self.name}",
                f"it has {len(tokens)} tokens; {least} sequences of {self.short} are needed at least",
                "Give a longer text",
            )
        self.encoder.check_vocabulary(int(tokens.max()))
        return tokens

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return so many blocks of `looked` tokens, at random; as many as there are where there are fewer."""
        data = self.tokens("train")
        index = self.drawn(len(blocks(data, self.looked)), examples, seed)
        return list(BlockBatches(data, self.looked, AT_ONCE, index))

    def further(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float | str]:
        """Return the perplexity in the other convention: 2,048 tokens, or the most that the model reads."""
        most, tokens = conventions(model)[-1], self.tokens("test")
        if most == self.short:
            return {}
        if len(tokens) < most:
            return {"note": f"perplexity-{most} is not measured: the text has {len(tokens)} tokens"}
        return dict(perplexities(model, tokens, [most], progress))

    @property
    def tested_on(self) -> str:
        """What the test split is, in words."""
        if self.texts.text is not None:
            return Path(self.texts.text).name
        return f"{len(self.tokens('test')):,} tokens that were kept apart"


def folder_task(folder: Path, texts: Texts, model: nn.Module | None = None) -> FolderTask:
    """Return the task of a model in a folder.

    Args:
        folder: of the model; its tokenizer or processor is read when the data are.
        texts: the data, and the task where it was named.
        model: the folder's model where it is already there, else it is read.

    Raises:
        ArtifactError: the folder holds no weights, pickles, quantized weights or a damaged file.
        ConfigError: its model is of a kind that is not known, or not of the task that was named.
    """
    model = with_weights(folder) if model is None else model
    encoder = (folder / MODULES).is_file() or texts.task == SIMILARITY
    kind = FEATURES["input_ids"] if encoder else kind_of(model, texts.task)
    if kind is None:
        raise ConfigError(
            f"The task of the model in {folder}", f"it is a {type(model).__name__}",
            f"Known tasks: {', '.join(NAMES)}. {PYTHON}",
        )  # fmt: skip
    if kind is FEATURES["input_ids"] and not getattr(model.config, "is_encoder_decoder", False):
        sentences = Sentences(folder, model)
        return RowsFolder(folder, texts, model, sentences.kind(), sentences=sentences)
    return (TextFolder if kind.name == TEXT_GENERATION else RowsFolder)(folder, texts, model, kind)
