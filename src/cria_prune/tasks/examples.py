"""Example inputs for a Hugging Face model, from its configuration alone: enough to capture its operations.

The inputs say nothing; they only fit: tokens inside the vocabulary, images and spectrograms of the size
that the model was made for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.errors import DataError

EXAMPLES, LENGTH, WAVE = 2, 16, 8000
"""Examples in a batch, tokens in a text, samples in a wave (half a second at 16 kHz)."""

IMAGE_TOKENS = ("image_token_id", "image_token_index")
STRIDE = 2
"""Frames of a spectrogram per position of Whisper's encoder."""


def example_inputs(model: nn.Module, shape: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Return one batch of keyword arguments for the forward of a transformers model.

    A model of two towers (CLIP) gets text and image, an encoder-decoder also `decoder_input_ids`. A
    language model that reads images between its tokens gets text alone.

    Args:
        model: a `PreTrainedModel`; its configuration and the signature of its forward are read.
        shape: of the main input: (batch, tokens), (batch, channels, height, width),
            (batch, mel bins, frames) or (batch, samples); from the configuration if None.

    Returns:
        Tensors on the CPU by name: `input_ids` int64 with `attention_mask`, `pixel_values`,
        `input_features` or `input_values` float32, the same on every call.

    Raises:
        DataError: the main input is of an unknown kind, or `shape` has the wrong number of dimensions.
    """
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main not in MAKERS:
        raise DataError(
            f"An example for {type(model).__name__}",
            f"its main input is {main!r}",
            "Write a function that returns (model, example) and name it as package.module:function",
        )
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    inputs = MAKERS[main](config, shape, generator)
    batch = len(inputs[main])
    if main == "input_ids":
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "pixel_values" in accepted and _two_towers(config):
            inputs |= _image(config, None, generator, batch)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        text = _text(getattr(config, "decoder", config), None, generator, batch)
        inputs["decoder_input_ids"] = text["input_ids"]
    return inputs


def _text(
    config: Any, shape: Sequence[int] | None, generator: torch.Generator, batch: int = EXAMPLES
) -> dict[str, Tensor]:
    """Tokens without the padding token; the last one ends the text, as some classifiers ask for."""
    text = getattr(config, "text_config", config)
    vocabulary = int(text.vocab_size)
    longest = int(getattr(text, "max_position_embeddings", None) or 2 * LENGTH)
    batch, length = _checked(shape, (batch, min(LENGTH, max(1, longest // 2))))
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    padding, end = getattr(text, "pad_token_id", None), getattr(text, "eos_token_id", None)
    if padding is not None:
        tokens[tokens == padding] = (padding + 1) % vocabulary
    if isinstance(end, int) and 0 <= end < vocabulary:
        tokens[tokens == end] = (end + (2 if padding == (end + 1) % vocabulary else 1)) % vocabulary
        tokens[:, -1] = end
    return {"input_ids": tokens}


def _image(
    config: Any, shape: Sequence[int] | None, generator: torch.Generator, batch: int = EXAMPLES
) -> dict[str, Tensor]:
    vision = next(
        (getattr(config, name) for name in ("vision_config", "encoder") if hasattr(config, name)), config
    )
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
    channels = int(getattr(vision, "num_channels", 3))
    return {
        "pixel_values": torch.randn(_checked(shape, (batch, channels, height, width)), generator=generator)
    }


def _spectrogram(config: Any, shape: Sequence[int] | None, generator: torch.Generator) -> dict[str, Tensor]:
    bins = int(getattr(config, "num_mel_bins", 80))
    frames = STRIDE * int(getattr(config, "max_source_positions", 50))
    return {"input_features": torch.randn(_checked(shape, (EXAMPLES, bins, frames)), generator=generator)}


def _wave(config: Any, shape: Sequence[int] | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A wave, or for an audio spectrogram transformer, which calls it the same, a spectrogram."""
    usual = (EXAMPLES, WAVE)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        usual = (EXAMPLES, int(config.max_length), int(config.num_mel_bins))  # type: ignore[assignment]
    return {"input_values": torch.randn(_checked(shape, usual), generator=generator)}


def _two_towers(config: Any) -> bool:
    """True where text and image have an encoder each; a token that stands for an image says otherwise."""
    parts = all(hasattr(config, name) for name in ("text_config", "vision_config"))
    return parts and not any(getattr(config, name, None) is not None for name in IMAGE_TOKENS)


def _checked(shape: Sequence[int] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    if shape is None:
        return usual
    if len(shape) != len(usual):
        raise DataError(
            f"An example of shape {tuple(shape)}",
            f"this model takes {len(usual)} dimensions",
            f"Give a shape like {','.join(map(str, usual))}",
        )
    return tuple(shape)


MAKERS: dict[str, Callable[[Any, Sequence[int] | None, torch.Generator], dict[str, Tensor]]] = {
    "input_ids": _text,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _wave,
}
