"""Prune a network of your own: train, prune, recover, save, reload.

    python examples/own_network.py
    python examples/own_network.py --factory mypackage.nets:mine

`mine()` returns your trained network and three loaders of (inputs, target) pairs: train, validation, test.
Without it, a small CNN is trained to say which quarter of a noisy square is bright.
"""

from __future__ import annotations

from importlib import import_module

import torch
import typer
from torch import Tensor, nn

from cria_prune import PruneConfig, RecoverConfig, load, prune, recover, save
from cria_prune.tasks.base import evaluate

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Three convolutions with a residual sum, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 48, 3, padding=1), nn.Conv2d(48, 16, 3, padding=1)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) -> logits (batch, 4)."""
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def make_batches(count: int, seed: int) -> Batches:
    """Return batches of 64 noisy squares and their bright quarter."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        target = torch.randint(4, (64,), generator=generator)
        images = torch.randn(64, 1, 8, 8, generator=generator)
        for image, quarter in zip(images, target.tolist(), strict=True):
            row, column = 4 * (quarter // 2), 4 * (quarter % 2)
            image[0, row : row + 4, column : column + 4] += 0.5
        batches.append((images, target))
    return batches


def made_up() -> tuple[nn.Module, Batches, Batches, Batches]:
    """Return a trained network and its data."""
    train = make_batches(24, 1)
    return (
        recover(Net(), train, RecoverConfig(epochs=4, lr=0.05)).model,
        train,
        *map(make_batches, (4, 8), (2, 3)),
    )


def main(output: str = "own-network", factory: str = "", reduction: float = 0.5) -> None:
    """Print the accuracies of the dense, pruned and recovered network."""
    torch.manual_seed(0)
    module, _, function = factory.partition(":")
    net, train, held, test = getattr(import_module(module), function)() if factory else made_up()
    print(f"dense      {evaluate(net, test):.1%}")

    result = prune(net, train, PruneConfig(plan={"reduction": reduction}))
    print(result)
    print(f"pruned     {evaluate(result.model, test):.1%}")

    settings = RecoverConfig(epochs=2, lr=0.02)
    tuned = recover(result.model, train, settings, evaluate=lambda model: evaluate(model, held)).model
    print(f"recovered  {evaluate(tuned, test):.1%}")

    save(output, tuned, result.plan, overwrite=True)
    again = load(output, model=net).model  # the dense architecture, with any weights
    images = test[0][0]
    print("reloaded: equal" if torch.equal(again(images), tuned.eval()(images)) else "reloaded: different")


if __name__ == "__main__":
    typer.run(main)
