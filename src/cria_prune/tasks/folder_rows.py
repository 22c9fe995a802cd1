"""The accuracy of a sequence classifier in a folder, on the user's labelled rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cria_prune.batches import Batch
from cria_prune.config import RecoverConfig
from cria_prune.errors import ConfigError, DataError
from cria_prune.tasks.corpus import Corpus
from cria_prune.tasks.folder import HELD, TUNING, FolderTask
from cria_prune.tasks.language import places
from cria_prune.tasks.sentence_task import LONGEST, SentenceTask
from cria_prune.tasks.text import Sentences

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

    @cached_property
    def _splits(self) -> dict[str, Sentences]:
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
        return self._splits["test"].labels is not None

    @property
    def tested_on(self) -> str:
        """What the test split is, in words."""
        return f"{len(self.split('test')):,} sentences that were kept apart"

    def split(self, name: str) -> Sentences:
        """Return the sentences of a split; see the class for where they come from."""
        if name not in self._splits:
            raise DataError(f"A split of {self.name}", f"found {name!r}", f"Known: {', '.join(self._splits)}")
        return self._splits[name]

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return `examples` random sentences, or all where there are fewer."""
        return super().calibration(min(examples, len(self.split("train"))), seed)
