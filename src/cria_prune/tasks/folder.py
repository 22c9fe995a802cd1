"""A Hugging Face folder and the user's texts as a task: what a text and labelled rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from cria_prune.batches import Batch
from cria_prune.errors import ArtifactError, DataError
from cria_prune.modules import device_of
from cria_prune.progress import Progress
from cria_prune.tasks.base import Task
from cria_prune.tasks.corpus import Corpus, read_dataset, read_text
from cria_prune.tasks.examples import example_inputs
from cria_prune.tasks.hub import has_tokenizer
from cria_prune.tasks.pretrained import find_library, load_pretrained, quiet

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
    prune_defaults: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "plan": {"vanilla": True, "uniform": True, "multiple": 8},
            "record": {"examples": 256},
        }
    )

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
        library = find_library(asked)
        todo = "Copy tokenizer.json and tokenizer_config.json of the base model into the folder"
        if not has_tokenizer(self.folder):
            raise ArtifactError(asked, "the folder holds none", todo)
        try:
            with quiet(library):
                return library.AutoTokenizer.from_pretrained(
                    str(self.folder.resolve()), local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # whatever a file can make another library raise
            text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
            raise ArtifactError(asked, f"{type(error).__name__}: {text}", todo) from error

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the folder's model."""
        return self.model

    def untrained(self) -> nn.Module:
        """Return the folder's model."""
        return self.model

    def pretrained_source(self, scratch: Path) -> Path:
        """Return the folder itself."""
        return self.folder

    def corpora(self) -> dict[str, Corpus]:
        """Return what the user gave, by split.

        Raises:
            DataError: nothing was given, or it cannot be read.
        """
        if self.texts.dataset is not None:
            return read_dataset(self.texts.dataset)
        if self.texts.calibration is None:
            raise DataError(
                f"Texts for {self.name}",
                "none were given",
                "Give a text file with --calibration, or a parquet file, folder or hub name with --dataset",
            )
        return {"train": Corpus(read_text(self.texts.calibration).splitlines(keepends=True))}

    def parts(self) -> tuple[Corpus, Corpus | None]:
        """Return the texts to calibrate and train on, and other ones to measure on if there are any.

        The second are the first of `held_splits` that is not the first one itself.
        """
        found = self.corpora()
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
