"""Prune a Hugging Face sequence classifier, recover it, and load it with plain transformers.

    python examples/hugging_face_classifier.py
    python examples/hugging_face_classifier.py path/to/folder --rows rows.tsv

A row is a sentence, a tab and a label from 0. Without a folder a tiny BERT is trained on made-up sentences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import made_up
import torch
import typer
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cria_prune import PruneConfig, RecoverConfig, prune, recover, save_pretrained
from cria_prune.tasks.base import evaluate

TUNING = RecoverConfig(epochs=4, lr=5e-3, optimizer="adamw")  # a pretrained model wants about 2e-5


def batches(folder: Path, rows: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return batches of 32 rows as the model's forward takes them, with labels."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for start in range(0, len(rows), 32):
        texts, labels = zip(*rows[start : start + 32], strict=True)
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
        found.append({**encoded, "labels": torch.tensor(labels)})
    return found


def main(
    folder: Annotated[str, typer.Argument()] = "",
    rows: str = "",
    reduction: float = 0.4,
    output: str = "small-classifier",
) -> None:
    """Print the accuracies of the dense, pruned and recovered classifier."""
    torch.manual_seed(0)
    source = Path(folder) if folder else made_up.classifier_folder(Path(f"{output}-dense"))
    lines = Path(rows).read_text().splitlines() if rows else []
    found = [(text, int(label)) for text, label in (line.split("\t") for line in lines)] or made_up.rows(512)
    train, test = batches(source, found[: len(found) * 3 // 4]), batches(source, found[len(found) * 3 // 4 :])
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(source)
    if not folder:
        model = recover(model, train, TUNING).model
    print(f"dense      {evaluate(model, test):.1%}")

    plan = {"reduction": reduction, "of": "non-embedding", "rounds": 1, "vanilla": True}
    result = prune(model, train, PruneConfig(plan=plan))
    print(result)
    print(f"pruned     {evaluate(result.model, test):.1%}")
    tuned = recover(result.model, train, TUNING.model_copy(update={"epochs": 1})).model
    print(f"recovered  {evaluate(tuned, test):.1%}")

    print(save_pretrained(output, tuned, result.plan, source=source, overwrite=True))
    again = AutoModelForSequenceClassification.from_pretrained(output)  # plain transformers
    print(f"reloaded   {evaluate(again, test):.1%}, {again.config.intermediate_size} feed-forward neurons")


if __name__ == "__main__":
    typer.run(main)
