"""Prune a vision transformer of timm: heads and feed-forward neurons, with random weights or yours.

    python examples/timm_vit.py
    python examples/timm_vit.py --name vit_small_patch16_224 --weights vit.safetensors --reduction 0.4

It needs timm (`pip install timm`). Put a few hundred images of yours in the place of `images`, and fine-tune
what comes out.
"""

from __future__ import annotations

import timm
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

from cria_prune import PruneConfig, discover, load, prune, save

TINY = {"img_size": 64, "depth": 2, "num_classes": 10}  # in seconds on a CPU; without it, timm's own sizes


def images(size: int, count: int = 64) -> list[Tensor]:
    """Return batches of 16 made-up images (16, 3, size, size): yours, normalised as the model wants them."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 3, size, size, generator=generator).split(16))


def main(
    name: str = "vit_tiny_patch16_224", weights: str = "", reduction: float = 0.3, output: str = "small-vit"
) -> None:
    """Print what can be removed, what was, and how far the checkpoint is from the pruned model."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **({} if weights else TINY))
    if weights:
        model.load_state_dict(load_file(weights))
    batches = images(model.patch_embed.img_size[0])

    for group in discover(model, batches[0][:2]).groups:
        print(f"{group.name:<20} {group.kind:<9} {group.size:>5} {group.frozen or ''}")

    result = prune(model, batches, PruneConfig(plan={"reduction": reduction}))
    print(result)
    print("heads of each block:", [block.attn.num_heads for block in result.model.blocks])

    save(output, result.model, result.plan, overwrite=True)
    again = load(output, model=model).model
    print(
        "reloaded: equal" if torch.equal(again(batches[0]), result.model.eval()(batches[0])) else "different"
    )


if __name__ == "__main__":
    typer.run(main)
