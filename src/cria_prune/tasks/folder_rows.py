"""The accuracy of a sequence classifier in a folder, on the user's labelled rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cria_prune.batches import Batch
from cria_prune.config import RecoverConfig
from cria_prune.errors import DataError
from cria_prune.tasks.corpus import Corpus
from cria_prune.tasks.folder import HELD, TUNING, FolderTask
from cria_prune.tasks.sentence_task import SentenceTask
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
        self.recover_defaults = RecoverConfig(epochs=1, lr=5e-5, **TUNING)

    @cached_property
    def _splits(self) -> dict[str, Sentences]:
        parts = self.corpora()
        rows = self._sentences(parts.get("train", next(iter(parts.values()))))
        names = [name for name in ("validation", "test") if name in parts and parts[name].labels is not None]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held = max(1, min(HELD_ROWS, round(HELD * len(rows))))
        if len(rows) < 4 * held:
            raise DataError(
                f"Sentences for {self.name}", f"found {len(rows)}", "Give four at least, better hundreds"
            )
        test = self._sentences(parts[names[0]]) if names and len(parts) > 1 else None
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
        return self.tokenised(texts, labels)

    def _label(self, label: int | str | None) -> int:
        """Return a label's number by the model's configuration."""
        config: Any = self.model.config
        number = config.label2id.get(label, -1) if isinstance(label, str) else label
        if number is None or not 0 <= int(number) < config.num_labels:
            raise DataError(
                f"The labels for {self.name}",
                f"found {label!r}, and the model knows {', '.join(map(repr, config.label2id))}",
                f"Give numbers from 0 to {config.num_labels - 1}, or these names",
            )
        return int(number)

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
