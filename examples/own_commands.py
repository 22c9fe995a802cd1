"""Prune a network of your own by commands: the functions that they name.

    python examples/own_commands.py
    python examples/own_commands.py weights.safetensors 5
    cd examples
    cria inspect own_commands:make --loader own_commands:loader
    cria prune own_commands:make --weights model.safetensors --loader own_commands:loader \
        --evaluate own_commands:accuracy --reduction 0.5 --output small
    cria recover small --factory own_commands:make --loader own_commands:loader \
        --evaluate own_commands:accuracy --loss own_commands:loss --epochs 2 --output tuned
    cria eval tuned --factory own_commands:make --loader own_commands:loader \
        --evaluate own_commands:accuracy --against own_commands:make --weights model.safetensors

The first line trains a small network to say which quarter of a noisy square is bright, and keeps its weights.
"""

from __future__ import annotations

import torch
import typer
from own_network import Batches, Net, make_batches
from safetensors.torch import save_file
from torch import Tensor, nn

from cria_prune import RecoverConfig, recover


def make() -> nn.Module:
    """Return the network, untrained: `--weights` has what was learned."""
    return Net()


def loader() -> Batches:
    """Return the training batches of (images, target); a DataLoader does as well."""
    return make_batches(24, 1)


def accuracy(model: nn.Module) -> float:
    """Return the share of other images that a model gets right."""
    with torch.no_grad():
        right = [model(images).argmax(1) == target for images, target in make_batches(8, 3)]
    return float(torch.cat(right).float().mean())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return what training makes small."""
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


def main(output: str = "model.safetensors", epochs: int = 4) -> None:
    """Train the network and keep its weights."""
    torch.manual_seed(0)
    model = recover(make(), loader(), RecoverConfig(epochs=epochs, lr=0.05)).model
    save_file(model.state_dict(), output)
    print(f"accuracy {accuracy(model):.1%}, weights {output}")


if __name__ == "__main__":
    typer.run(main)
