"""Prune a Llama to a smaller plain folder, and generate with it.

    python examples/small_llama.py
    python examples/small_llama.py path/to/llama --text text.txt --reduction 0.3

Without a folder, a small Llama learns a made-up language for a few seconds. `cria prune FOLDER` does the same
from the command line, with a card and held-out perplexities.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import made_up
import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cria_prune import PruneConfig, RecoverConfig, prune, recover, save_pretrained

LENGTH = 32  # tokens of a sequence
TUNING = RecoverConfig(epochs=4, lr=1e-2, optimizer="adamw")  # a pretrained model wants about 5e-5


def sequences(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Cut (tokens,) into batches of 16 sequences; the labels of a language model are its inputs."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": part, "labels": part} for part in rows.split(16)]


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return exp of the mean loss per batch."""
    model.eval()
    return math.exp(sum(float(model(**batch).loss) for batch in batches) / len(batches))


def main(
    folder: Annotated[str, typer.Argument()] = "",
    text: str = "",
    reduction: float = 0.3,
    output: str = "small-llama",
) -> None:
    """Print the perplexities of the dense, pruned and recovered model, and what it generates."""
    torch.manual_seed(0)
    if folder:
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt")[
            "input_ids"
        ][0]
    else:
        model, tokens = made_up.llama(LENGTH)
    batches = sequences(tokens)
    train, test = batches[: -max(1, len(batches) // 5)], batches[-max(1, len(batches) // 5) :]
    if not folder:
        model = recover(model, train, TUNING).model
    print(f"dense      {perplexity(model, test):.2f}")

    plan = {"reduction": reduction, "of": "non-embedding", "rounds": 1, "vanilla": True, "multiple": 8}
    result = prune(model, train, PruneConfig(plan=plan))
    print(result)
    print(f"pruned     {perplexity(result.model, test):.2f}")
    tuned = recover(result.model, train, TUNING.model_copy(update={"epochs": 1})).model
    print(f"recovered  {perplexity(tuned, test):.2f}")

    print(save_pretrained(output, tuned, result.plan, source=folder or None, overwrite=True))
    again = AutoModelForCausalLM.from_pretrained(output)  # plain transformers
    written = again.generate(
        test[0]["input_ids"][:1, :8], min_new_tokens=8, max_new_tokens=8, do_sample=False
    )
    print(f"reloaded   {perplexity(again, test):.2f}, writes {written[0, 8:].tolist()}")


if __name__ == "__main__":
    typer.run(main)
