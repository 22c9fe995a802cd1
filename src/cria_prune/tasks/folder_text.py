"""The perplexity of a causal language model in a folder, on the user's text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from cria_prune.batches import Batch
from cria_prune.config import RecoverConfig
from cria_prune.errors import DataError
from cria_prune.progress import Progress
from cria_prune.tasks.corpus import Corpus, read_text
from cria_prune.tasks.encode import encode
from cria_prune.tasks.folder import HELD, TUNING, FolderTask
from cria_prune.tasks.language import SHORT, conventions, perplexities
from cria_prune.tasks.language_task import SPLITS, LanguageTask

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

    @cached_property
    def _tokens(self) -> dict[str, Tensor]:
        if self.texts.text is not None and self.texts.calibration is None and self.texts.dataset is None:
            return {"test": self._encoded(read_text(self.texts.text), 1)}
        source, held = self.parts()
        train = self._encoded(_joined(source), 4)
        if self.texts.text is not None:
            test = self._encoded(read_text(self.texts.text), 1)
        elif held is not None:
            test = self._encoded(_joined(held), 1)
        else:
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

    def tokens(self, split: str) -> Tensor:
        """Return the tokens of a split, (tokens,) int64; see the class for where they come from."""
        if split not in self._tokens and split in SPLITS:
            raise DataError(
                f"A text to calibrate {self.name} on",
                "only one to measure on was given",
                "Give --calibration",
            )
        if split not in self._tokens:
            raise DataError(
                f"A split of {self.name}", f"found {split!r}", f"Known: {', '.join(self._tokens)}"
            )
        return self._tokens[split]

    def calibration(self, examples: int, seed: int = 0) -> list[Batch]:
        """Return `examples` random blocks of `short` tokens, or all where the text has fewer."""
        return super().calibration(min(examples, len(self.tokens("train")) // self.short), seed)

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
        return super().fingerprint(*(splits or self._tokens))

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
