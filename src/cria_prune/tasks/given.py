"""Batches for Python programs: of a data set, a list of texts or files, by a tokenizer or processor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ConfigError
from cria_prune.tasks.columns import Reading, joined_rows
from cria_prune.tasks.corpus import tables
from cria_prune.tasks.encode import Encoder
from cria_prune.tasks.folder import Batches, Examples, enough, places_of
from cria_prune.tasks.kinds import NAMES, kind_of
from cria_prune.tasks.loading import example_inputs
from cria_prune.tasks.processors import Processors
from cria_prune.tasks.text import by_length


def make_batches(
    model: nn.Module,
    data: Any,
    processor: Any = None,
    *,
    task: str | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    split: str = "train",
    **reading: Any,
) -> Iterable[Batch]:
    """Return batches of data for a model of transformers: to calibrate, to train or to measure on.

    Args:
        model: of transformers; its class says which columns are read and what a batch is.
        data: a path or hub name as of `cria prune --calibration`, a `datasets.Dataset`, a list of texts,
            images or dictionaries, a table of columns; a DataLoader is given back as it is.
        processor: a tokenizer, image processor, feature extractor, or a processor that holds them.
        task: name of the task, where the model could be of several.
        examples: so many, at random; None: as many as the fit of the widest layer needs, or all there are.
        batch_size: examples of a batch; what suits the task if None.
        seed: of the draw and the order.
        split: of the data.
        reading: `text_column`, `label_column`, `pair_column`, `chat`, `max_length`.

    Raises:
        ConfigError: the model is of no known task, or a processor is missing.
        DataError: a column is missing, a label is none of the model's, or a file cannot be read.

    Example:
        batches = make_batches(model, ["a text", "another one"], tokenizer)
        result = prune(model, batches)
    """
    if isinstance(data, DataLoader):
        return data
    kind = kind_of(model, task)
    if kind is None:
        raise ConfigError(
            f"Batches for a {type(model).__name__}", "its task is not known",
            f"Known tasks: {', '.join(NAMES)}; make the batches yourself",
        )  # fmt: skip
    encoder = Encoder(model, Processors(given=processor), Reading(**reading), type(model).__name__)
    found = tables(data)
    rows = joined_rows([kind.rows(encoder, found[split] if split in found else next(iter(found.values())))])
    most = enough(model, places_of(example_inputs(model)))["examples"] if examples is None else examples
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
    chosen = Examples(encoder, kind, rows.rows(order.tolist()))
    return Batches(chosen, by_length(chosen.lengths(), batch_size or kind.size, seed), seed)
