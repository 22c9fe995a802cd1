"""The networks of the recipes, in a registry, so that a checkpoint can name its architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune.base.errors import ConfigError
from cria_prune.tasks.loading import find_library

VOCABULARY = 1024
"""Tokens of the small Llama's byte-level BPE."""

LONGEST = 256
"""Tokens that the small Llama reads at most."""


def minilm_classifier() -> nn.Module:
    """Return a MiniLM-L6-H384 (Wang et al. 2020, arXiv 2002.10957) with a head for two classes.

    6 layers, width 384, 12 heads, 1,536 feed-forward neurons; 22,713,986 parameters, of which 11,917,440
    are embeddings. Forward: input_ids, attention_mask (batch, tokens) -> logits (batch, 2).
    """
    library = find_library("Building sst2-minilm")
    config = library.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=2,
    )
    return library.BertForSequenceClassification(config)


def small_llama() -> nn.Module:
    """Return a Llama (Touvron et al. 2023, arXiv 2302.13971) of 1,820,352 parameters, embeddings tied.

    4 layers, width 192, 8 query heads on 4 key-value heads, 512 gated neurons (SwiGLU), RMS norms.
    Forward: input_ids (batch, tokens) -> logits (batch, tokens, 1024).
    """
    library = find_library("Building llama-shakespeare")
    config = library.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return library.LlamaForCausalLM(config)


class DigitsNet(nn.Module):
    """A small convolutional network for 8x8 grey images, with one residual block.

    Forward: images (batch, 1, 8, 8) -> logits (batch, 10). 127,082 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64 * 2 * 2, 128)
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 10) of images (batch, 1, 8, 8)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2)
        y = functional.relu(self.bn3(self.conv3(x)))
        x = functional.max_pool2d(functional.relu(x + self.bn4(self.conv4(y))), 2)
        return self.linear(functional.relu(self.hidden(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the parameter-free shortcut (option A of He et al. 2015).

    Args:
        inputs: input channels.
        planes: output channels; where they differ, the block halves the image and the
            shortcut subsamples it and pads the channels with zeros on both sides.
    """

    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == planes else 2
        self.padding = (planes - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, planes, height / stride, width / stride) of (batch, inputs, height, width)."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """The residual network for CIFAR of He et al. 2015, section 4.2.

    Forward: images (batch, 3, 32, 32) -> logits (batch, 10).

    Args:
        depth: weighted layers, 6 n + 2: 20 (269,722 parameters), 56 (853,018).

    Raises:
        ConfigError: the depth is not of the form 6 n + 2.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(
                "A CIFAR ResNet", f"found depth {depth}", "Choose 6 n + 2: 8, 14, 20, 32, 44, 56"
            )
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(BasicBlock(32 if i else 16, 32) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(BasicBlock(64 if i else 32, 64) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 10) of images (batch, 3, 32, 32)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "digits": DigitsNet,
    "cifar10-resnet20": lambda: CifarResNet(20),
    "cifar10-resnet56": lambda: CifarResNet(56),
    "sst2-minilm": minilm_classifier,
    "llama-shakespeare": small_llama,
}


def build(architecture: str, seed: int | None = None) -> nn.Module:
    """Return a network with fresh weights from its name in `ARCHITECTURES`; with a seed, always the same.

    Raises:
        ConfigError: no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError("An architecture", f"found {architecture!r}", f"Known: {', '.join(ARCHITECTURES)}")
    if seed is None:
        return ARCHITECTURES[architecture]()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ARCHITECTURES[architecture]()
