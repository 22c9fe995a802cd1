"""A small Llama on the text of tiny Shakespeare: tokenizer and model are trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch
from cria_prune.base.events import passed
from cria_prune.base.progress import Progress
from cria_prune.config import RecoverConfig
from cria_prune.tasks.base import data_file
from cria_prune.tasks.dense import trained
from cria_prune.tasks.models import LONGEST, VOCABULARY, build
from cria_prune.tasks.text import (
    PRUNE_TEXT,
    SHORT,
    LanguageTask,
    encode,
    perplexities,
    sample_text,
    train_tokenizer,
)

TEXT = "data/tinyshakespeare.txt"
LAYOUT = (
    f"Expected: {TEXT}, the 1.1 MB text of Andrej Karpathy's char-rnn "
    "(github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt)"
)
SHARES = {"train": (0.0, 0.85), "validation": (0.85, 0.9), "test": (0.9, 1.0)}
PROMPT = "ROMEO:\n"
PRUNE = {**PRUNE_TEXT, "plan": {**PRUNE_TEXT["plan"], "of": "non-embedding"}}
DENSE = RecoverConfig(
    epochs=4, lr=3e-3, optimizer="adamw", weight_decay=0.1, warmup=0.05, clip=1.0, precision="auto"
)
QUICK_EPOCHS = 1


@dataclass(eq=False)
class ShakespeareTask(LanguageTask):
    """Perplexity of a causal language model on a text: its first 85 % train, the last 10 % test.

    The metric is the perplexity at 128 tokens per sequence, `further` adds the one at the model's maximum
    and a sample of text. The tokenizer is learned from the train split.

    Args:
        quick: train the dense model for one epoch in place of four.
        text: the whole text; the file under `data_root` if None.
    """

    quick: bool = False
    text: str | None = field(default=None, repr=False)
    name: str = "llama-shakespeare"
    architecture: str = "llama-shakespeare"
    metric: str = f"perplexity-{SHORT}"
    longest: int = LONGEST
    reductions: tuple[float, ...] = (0.2, 0.3, 0.5)

    recover_defaults = RecoverConfig(
        epochs=1, lr=1e-3, optimizer="adamw", weight_decay=0.1, warmup=0.05, clip=1.0, precision="auto"
    )
    prune_defaults = PRUNE

    def __post_init__(self) -> None:
        self.options = {"quick": True} if self.quick else {}
        self.example: Batch = {"input_ids": torch.arange(1, 2 * SHORT + 1).view(2, SHORT)}

    @cached_property
    def tokenizer(self) -> Any:
        """The byte-level BPE tokenizer, a `PreTrainedTokenizerFast`."""
        return train_tokenizer(self._part("train"), VOCABULARY)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tokens of a split, (tokens,) int64."""
        return {name: encode(self.tokenizer, self._part(name))}

    @cached_property
    def _text(self) -> str:
        return data_file(TEXT, LAYOUT).read_text(encoding="utf-8") if self.text is None else self.text

    def _part(self, split: str) -> str:
        start, end = (round(share * len(self._text)) for share in SHARES[split])
        return self._text[start:end]

    def dense(self, seed: int = 0, progress: Progress | None = None) -> nn.Module:
        """Return the model trained from the seed, on the CPU; about five minutes on two cores, once."""
        passed("dense", task=self.name, seed=seed)
        config = DENSE.model_copy(update={"seed": seed, **({"epochs": QUICK_EPOCHS} if self.quick else {})})
        return trained(self, build(self.architecture, seed), config, progress)

    def further(self, model: nn.Module, progress: Progress | None = None) -> dict[str, float | str]:
        """Return the test split's perplexity at the model's maximum, and a sample of text."""
        longer = perplexities(model, self.tokens("test"), [LONGEST], progress)
        return {**longer, "sample": sample_text(model, self.tokenizer, PROMPT)}
