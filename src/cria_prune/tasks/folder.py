"""A Hugging Face folder and the user's texts as a task: perplexity on a text, accuracy on labelled rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, ConfigError, DataError
from cria_prune.base.modules import device_of
from cria_prune.base.progress import Progress
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import SPLITS, Task
from cria_prune.tasks.corpus import Corpus, read_dataset, read_text
from cria_prune.tasks.loading import example_inputs, has_tokenizer, load_pretrained, read_by
from cria_prune.tasks.text import (
    LONGEST,
    PRUNE_TEXT,
    SHORT,
    LanguageTask,
    Sentences,
    SentenceTask,
    conventions,
    encode,
    perplexities,
    places,
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
        calibration: file of plain text.
        dataset: parquet file, folder of them, or hub name.
        text: file of plain text that is measured on alone.
    """

    calibration: Path | None = None
    dataset: str | None = None
    text: Path | None = None

    def __bool__(self) -> bool:
        return any((self.calibration, self.dataset, self.text))


def with_weights(folder: Path) -> nn.Module:
    """Return the model of a folder with its weights; see `load_pretrained`.

    Raises:
        ArtifactError: there are none, or they cannot be read.
    """
    model = load_pretrained(folder)
    if device_of(model).type == "meta":
        raise ArtifactError(
            f"Reading the Hugging Face model in {folder}",
            "there are no weights beside config.json (model.safetensors, or an index of shards)",
            "Copy them into the folder, or give the folder that holds them",
        )
    return model


@dataclass(eq=False)
class FolderTask(Task):
    """A model in a folder, and texts.

    Args:
        folder: of the model and its tokenizer.
        texts: the data.
        model: the folder's model.
    """

    folder: Path
    texts: Texts
    model: nn.Module = field(repr=False)
    architecture: str = ""
    held_splits: tuple[str, ...] = ("validation", "test")
    prune_defaults = PRUNE_TEXT

    def __post_init__(self) -> None:
        self.name = self.folder.resolve().name or "model"
        self.example: Batch = example_inputs(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's own tokenizer.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        asked = f"The tokenizer in {self.folder}"
        todo = "Copy tokenizer.json and tokenizer_config.json of the base model into the folder"
        if not has_tokenizer(self.folder):
            raise ArtifactError(asked, "the folder holds none", todo)
        return read_by("AutoTokenizer", self.folder, asked, todo)

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the folder's model."""
        return self.model

    def untrained(self) -> nn.Module:
        """Return the folder's model."""
        return self.model

    def pretrained_source(self, scratch: Path) -> Path:
        """Return the folder itself."""
        return self.folder

    def drawn(self, count: int, examples: int, seed: int) -> Tensor:
        """Return `examples` of `count` at random, or all where there are fewer."""
        return super().drawn(count, min(examples, count), seed)

    def parts(self) -> tuple[Corpus, Corpus | None]:
        """Return the texts to calibrate and train on, and other ones to measure on if there are any.

        The second are the first of `held_splits` that is not the first one itself.

        Raises:
            DataError: nothing was given, or it cannot be read.
        """
        if self.texts.dataset is not None:
            found = read_dataset(self.texts.dataset)
        elif self.texts.calibration is not None:
            found = {"train": Corpus(read_text(self.texts.calibration).splitlines(keepends=True))}
        else:
            raise DataError(
                f"Texts for {self.name}",
                "none were given",
                "Give a text file with --calibration, or a parquet file, folder or hub name with --dataset",
            )
        source = "train" if "train" in found else next(iter(found))
        held = next((name for name in self.held_splits if name in found and name != source), None)
        return found[source], None if held is None else found[held]

    def check_vocabulary(self, largest: int) -> None:
        """Raise an ArtifactError if the tokenizer writes tokens that the model does not know."""
        config: Any = self.model.config
        if largest >= int(config.vocab_size):
            raise ArtifactError(
                f"The tokenizer in {self.folder}",
                f"it writes token {largest}, and the model knows {config.vocab_size} tokens",
                "Copy the tokenizer of this very model into the folder",
            )


SPLIT_SEED, HELD_ROWS = 0, 1000


@dataclass(eq=False)
class SentenceFolder(FolderTask, SentenceTask):
    """Accuracy of a sequence classifier on labelled rows.

    Measured are the labelled splits validation or test of the data set; else 5 % of its rows, at most 1,000,
    which are then not used for anything else. A text file is one sentence per line, without labels: it
    serves for the calibration alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts.text is not None:
            raise ConfigError(
                f"A text to measure {self.name} on",
                "it classifies sentences",
                "Give labelled rows with --dataset in place of --text",
            )
        self.recover_defaults = RecoverConfig(epochs=1, lr=5e-5, **TUNING)

    def load(self, name: str) -> dict[str, Sentences]:
        """Return all splits; see the class for where they come from."""
        source, other = self.parts()
        rows = self._sentences(source)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held = max(1, min(HELD_ROWS, round(HELD * len(rows))))
        if len(rows) < 4 * held:
            raise DataError(
                f"Sentences for {self.name}", f"found {len(rows)}", "Give four at least, better hundreds"
            )
        test = None if other is None or other.labels is None else self._sentences(other)
        first = 0 if test is not None else held
        return {
            "train": rows.rows(order[first + held :]),
            "validation": rows.rows(order[first : first + held]),
            "test": rows.rows(order[:held]) if test is None else test,
        }

    def _sentences(self, corpus: Corpus) -> Sentences:
        texts = [text.strip() for text in corpus.texts]
        labels = (
            None if corpus.labels is None else torch.tensor([self._label(item) for item in corpus.labels])
        )
        if labels is None:
            texts = [text for text in texts if text]
        found = self.tokenised(texts, labels)
        self.check_vocabulary(max((max(tokens, default=0) for tokens in found.tokens), default=0))
        return found

    @property
    def padding(self) -> int:
        """The token that fills up a batch: the model's own, for it may look for the last other one.

        Raises:
            ConfigError: neither configuration nor tokenizer says one.
        """
        config: Any = self.model.config
        said = getattr(config, "pad_token_id", None)
        said = self.tokenizer.pad_token_id if said is None else said
        if said is None:
            raise ConfigError(
                f"Batches of sentences for {self.name}",
                "neither its configuration nor its tokenizer has a padding token",
                "Set pad_token_id in config.json, to a token that the model was trained with",
            )
        config.pad_token_id = int(said)
        return int(said)

    @property
    def longest_sentence(self) -> int:
        """Tokens per sentence: 128, or what the model's positions allow."""
        return min(LONGEST, places(self.model) or LONGEST)

    def _label(self, label: int | str | None) -> int:
        """Return a label's number by the model's configuration."""
        config: Any = self.model.config
        number = config.label2id.get(label) if isinstance(label, str) else label
        if not isinstance(number, int) or not 0 <= number < config.num_labels:
            raise DataError(
                f"The labels for {self.name}",
                f"found {label!r}, and the model knows {', '.join(map(repr, config.label2id))}",
                f"Give numbers from 0 to {config.num_labels - 1}, or these names",
            )
        return number

    @property
    def measured(self) -> bool:
        """Whether there are labels to measure on."""
        return self.split("test").labels is not None

    @property
    def tested_on(self) -> str:
        """What the test split is, in words."""
        return f"{len(self.split('test')):,} sentences that were kept apart"


HELD_BLOCKS, TRAINED = 512, 512
"""Blocks that are held out at most; tokens per block of a fine-tune at most."""


@dataclass(eq=False)
class TextFolder(FolderTask, LanguageTask):
    """Perplexity of a causal language model on a text.

    Measured is the file `texts.text`; else the split test or validation of the data set; else the last 5 %
    of the text, at most 512 blocks, which are then not used for anything else. The validation split is the
    last 5 % of what is left.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        most = conventions(self.model)[-1]
        self.short, self.longest = min(SHORT, most), min(TRAINED, most)
        self.metric = f"perplexity-{self.short}"
        self.recover_defaults = RecoverConfig(epochs=1, lr=5e-5, **TUNING)

    @property
    def _alone(self) -> bool:
        """Whether a text to measure on is all that was given."""
        return self.texts == Texts(text=self.texts.text) and self.texts.text is not None

    def load(self, name: str) -> dict[str, Tensor]:
        """Return all splits that there are; see the class for where they come from.

        Raises:
            DataError: there is only a text to measure on, and another split is asked for.
        """
        if self._alone and name != "test":
            raise DataError(
                f"A text to calibrate {self.name} on",
                "only one to measure on was given",
                "Give --calibration",
            )
        test = None if self.texts.text is None else self._encoded(read_text(self.texts.text), 1)
        if self._alone and test is not None:
            return {"test": test}
        source, held = self.parts()
        train = self._encoded(_joined(source), 4)
        if test is None and held is not None:
            test = self._encoded(_joined(held), 1)
        elif test is None:
            train, test = self._cut(train)
        train, validation = self._cut(train)
        return {"train": train, "validation": validation, "test": test}

    def _cut(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the last blocks of a text apart."""
        count = len(tokens) // self.short
        held = max(1, min(HELD_BLOCKS, round(HELD * count))) * self.short
        return tokens[:-held], tokens[-held:]

    def _encoded(self, text: str, least: int) -> Tensor:
        tokens = encode(self.tokenizer, text)
        if len(tokens) < least * self.short:
            raise DataError(
                f"A text for {self.name}",
                f"it has {len(tokens)} tokens; {least} sequences of {self.short} are needed at least",
                "Give a longer text",
            )
        self.check_vocabulary(int(tokens.max()))
        return tokens

    def further(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float | str]:
        """Return the perplexity in the other convention: 2,048 tokens, or the most that the model reads."""
        most, tokens = conventions(model)[-1], self.tokens("test")
        if most == self.short:
            return {}
        if len(tokens) < most:
            return {"note": f"perplexity-{most} is not measured: the text has {len(tokens)} tokens"}
        return dict(perplexities(model, tokens, [most], progress))

    def fingerprint(self, *splits: str) -> str:
        """Return the SHA-256, in hex, of the splits' tokens (of all that there are if none is named)."""
        return super().fingerprint(*(splits or (("test",) if self._alone else SPLITS)))

    @property
    def tested_on(self) -> str:
        """What the test split is, in words."""
        if self.texts.text is not None:
            return self.texts.text.name
        return f"{len(self.tokens('test')):,} tokens that were kept apart"


def _joined(corpus: Corpus) -> str:
    """Return the rows as one text, each on lines of its own."""
    ends = [text if text.endswith("\n") else f"{text}\n" for text in corpus.texts]
    return "".join(ends)
