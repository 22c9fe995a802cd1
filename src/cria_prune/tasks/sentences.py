"""Sentence encoders: their embeddings beside those of the dense one, and a fine-tune towards these.

Legend: N = texts, T = tokens, D = width of the encoder, E = width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune.base.batches import Batch, batch_target, model_inputs, move
from cria_prune.base.errors import ArtifactError, ConfigError, DataError, said
from cria_prune.base.events import passed
from cria_prune.base.modules import device_of, modes_kept
from cria_prune.base.progress import Progress, track
from cria_prune.base.sentences import MODULES, check_modules, encoder_folder, settings_of
from cria_prune.tasks import encode
from cria_prune.tasks.columns import LABELS, label_column, number_of, text_columns
from cria_prune.tasks.corpus import Table
from cria_prune.tasks.encode import Encoder
from cria_prune.tasks.kinds import FEATURES, SIMILARITY, Kind
from cria_prune.tasks.pooling import Behind

TOKENS = 128
"""Tokens of a text, where the folder does not say how many are read."""
PIECE = 1024
"""Rows of a matrix of similarities that are held at a time."""


class Sentences:
    """What a folder's encoder is measured by and learns from.

    Args:
        folder: of the model; with a modules.json or without, then the mean over the tokens is taken.
        model: the encoder.

    Attributes:
        dense: the network that embeddings are compared with and learned from; None until it is given.

    Raises:
        ArtifactError: what stands behind the encoder is not known, or does not fit it.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        check_modules(folder)
        config: Any = model.config
        try:
            self.behind = Behind(folder, int(config.hidden_size))
        except (ValueError, KeyError) as error:
            raise ArtifactError(
                f"The sentence encoder in {folder}", said(error), "Copy the folder again"
            ) from error
        self.settings = settings_of(encoder_folder(folder)) or settings_of(folder)
        self.dense: nn.Module | None = None
        self.named = SIMILARITY if (folder / MODULES).is_file() else FEATURES["input_ids"].name

    def kind(self) -> Kind:
        """Return the kind of task; see `kinds.Kind`."""
        return replace(
            FEATURES["input_ids"], name=self.named, roles=self._roles, features=self._features,
            batch=batch_of, measure=lambda _: self._measure, metric=lambda _: "cosine", loss=self.loss,
        )  # fmt: skip

    def _roles(self, encoder: Encoder, table: Table) -> Mapping[str, Sequence[Any]]:
        """Texts; or pairs of them and how alike they are."""
        text, pair = text_columns(table, encoder.reading, pairs=True)
        found: dict[str, Any] = {"text": table.columns[text]}
        column = None if pair is None else label_column(table, encoder.reading, LABELS)
        if pair is not None:
            found["pair"] = table.columns[pair]
        if column is not None:
            values = table.columns[column]
            found["label"] = [None if value is None else number_of(value, encoder.name) for value in values]
        return found

    def _features(self, encoder: Encoder, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the tokens of every text, and of the second one of a pair."""
        lower, usual = bool(self.settings.get("do_lower_case")), self.settings.get("max_seq_length") or TOKENS
        found = [
            {name: encoder.text({**row, "text": row[name]}) for name in ("text", "pair") if name in row}
            for row in rows
        ]
        tokens: dict[str, Any] = {}
        for name in found[0] if found else ():
            texts = [item[name].lower() if lower else item[name] for item in found]
            tokens[name] = encoder.tokens(texts, usual=usual)["input_ids"]
        return [
            {"input_ids": list(tokens["text"][place])}
            | ({"second_ids": list(tokens["pair"][place])} if "pair" in tokens else {})
            | ({"labels": row["label"]} if "label" in row else {})
            for place, row in enumerate(rows)
        ]

    def embeddings(
        self, model: nn.Module, batches: Iterable[Batch], progress: Progress | None = None
    ) -> Tensor:
        """Return (N, E) float32 on the CPU, the embeddings by an encoder; it is left as it was."""
        place, found = device_of(model), list[Tensor]()
        with modes_kept(model), torch.no_grad():
            model.eval()
            for batch in track(batches, label="embed", progress=progress):
                _, inputs = model_inputs(move(batch, place))
                found.append(self.behind.of(model, inputs).float().cpu())
        if not found:
            raise DataError("Embeddings", "found no texts", "Give one at least; an iterator runs out")
        return torch.cat(found)

    def _measure(
        self, _: Encoder, model: nn.Module, batches: Iterable[Batch], progress: Progress | None
    ) -> dict[str, float]:
        """Return mean cosine and neighbours kept beside the dense one, and Spearman on scored pairs."""
        passed("evaluate", model=model)
        batches = list(batches)
        found, figures = self.embeddings(model, batches, progress), dict[str, float]()
        if self.dense is not None:
            whole = found if self.dense is model else self.embeddings(self.dense, batches, progress)
            if whole.shape != found.shape:
                raise _apart(whole.shape[1], found.shape[1])
            figures["cosine"] = float(functional.cosine_similarity(found, whole).mean())
            if len(found) > 2:
                figures["neighbours"] = float((nearest(found) == nearest(whole)).float().mean())
        scores = [batch_target(batch) for batch in batches]
        if all(item is not None for item in scores):
            from scipy.stats import spearmanr

            alike = functional.cosine_similarity(found[::2], found[1::2]).double().numpy()
            known = torch.cat([item for item in scores if item is not None])[::2].double().numpy()
            figures["spearman"] = float(spearmanr(alike, known).statistic)
        return figures

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return how far an encoder is from the dense one on a batch: no labels are needed.

        The mean of 1 − cosine of the embeddings, and the relative error ‖h − ĥ‖² / ‖h‖² of the states after
        each layer, over the tokens; the mean over the layers. Both are 0 where nothing differs.

        Raises:
            ConfigError: no dense network was given.
            DataError: the embeddings are of other widths.
        """
        if self.dense is None:
            raise ConfigError(
                "A fine-tune of a sentence encoder", "there is no dense one to learn from",
                "Name it as the teacher, and give a weight to distill",
            )  # fmt: skip
        _, inputs = model_inputs(batch)
        inputs = {**inputs, "output_hidden_states": True}
        # Without dropout on both sides: noise would hide how little differs.
        with modes_kept(self.dense), modes_kept(model):
            with torch.no_grad():
                goal = self.dense.eval()(**inputs)
            found = model.eval()(**inputs)
        mask = inputs["attention_mask"]
        said, wanted = (self.behind(item.last_hidden_state, mask) for item in (found, goal))
        if said.shape != wanted.shape:
            raise _apart(wanted.shape[1], said.shape[1])
        far = (1 - functional.cosine_similarity(said, wanted)).mean()
        inside = mask.bool()
        pairs = list(zip(found.hidden_states[1:], goal.hidden_states[1:], strict=True))
        errors = [
            (mine[inside] - theirs[inside]).square().sum() / theirs[inside].square().sum().clamp(min=1e-12)
            for mine, theirs in pairs
        ]
        return far + torch.stack(errors).mean()


def batch_of(encoder: Encoder, items: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return a padded batch; of pairs the two texts follow one another, each with the score of the pair."""
    rows = list[dict[str, Any]]()
    for item in items:
        score = {key: item[key] for key in item if key == "labels"}
        rows += [{"input_ids": item[key], **score} for key in ("input_ids", "second_ids") if key in item]
    return encode.pad(encoder, rows)


def nearest(E: Tensor) -> Tensor:
    """Return (N,) int64, for every text the other one whose embedding is nearest by the cosine.

    >>> nearest(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 1.0]]))
    tensor([2, 3, 0, 1])
    """
    E, found = functional.normalize(E.float(), dim=1), list[Tensor]()
    for start in range(0, len(E), PIECE):
        alike = E[start : start + PIECE] @ E.T
        rows = torch.arange(len(alike))
        alike[rows, rows + start] = -2.0  # a text is not its own neighbour
        found.append(alike.argmax(1))
    return torch.cat(found)


def _apart(dense: int, found: int) -> DataError:
    return DataError(
        "The embeddings of two encoders", f"they have {found} and {dense} features",
        "Give the dense folder that the smaller one was made of",
    )  # fmt: skip
