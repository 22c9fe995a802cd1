"""Tiny configurations of transformers families, in sizes of which no two are equal by accident.

Width 48 is 6 heads of 8; where a family states its own head size it is 10, so that heads and width
differ; 2 key-value heads where the family groups its queries. Texts are 13 tokens of 99, the second
one with padding; images are 32 pixels wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, LENGTH, PADDED, LABELS, PIXELS = 99, 13, 3, 5, 32
SPREAD = 0.2
"""Standard deviation of the random weights: at the usual 0.02 attention and branches say next to nothing."""

BASE = {"vocab_size": TOKENS, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 84}
LAYERS = {"num_hidden_layers": 2}
ENCODER = {**BASE, **LAYERS, "max_position_embeddings": 40, "num_labels": LABELS, "pad_token_id": 0}
DECODER = {**BASE, **LAYERS, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1}
DECODER |= {"eos_token_id": 2}
GROUPED = {**DECODER, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 10}
VISION = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 84, **LAYERS}
VISION |= {"image_size": PIXELS, "patch_size": 8, "num_labels": LABELS}
SEQUENCE = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6}
SEQUENCE |= {"decoder_attention_heads": 6, "encoder_ffn_dim": 84, "decoder_ffn_dim": 84}


@dataclass(frozen=True)
class Family:
    """A model class, its configuration class, the options of the latter, and the inputs of the former.

    `inputs` names what the example holds: text, targets (a second text), image, audio.
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: tuple[str, ...] = ("text",)


def text_encoder(name: str, options: dict[str, Any]) -> Family:
    """A model that classifies texts."""
    return Family(f"{name}ForSequenceClassification", f"{name}Config", options)


def decoder(name: str, options: dict[str, Any]) -> Family:
    """A model that goes on with texts."""
    return Family(f"{name}ForCausalLM", f"{name}Config", options)


def vision(name: str, options: dict[str, Any]) -> Family:
    """A model that classifies images."""
    return Family(f"{name}ForImageClassification", f"{name}Config", options, ("image",))


DISTILBERT = {"vocab_size": TOKENS, "dim": 48, "n_heads": 6, "hidden_dim": 84, "n_layers": 2}
DISTILBERT |= {"max_position_embeddings": 40, "num_labels": LABELS, "pad_token_id": 0}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
DEBERTA |= {"type_vocab_size": 0, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
MODERNBERT = {**ENCODER, "global_attn_every_n_layers": 2, "local_attention": 8}
MODERNBERT |= {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": TOKENS, "n_embd": 48, "n_head": 6, "n_inner": 84, "n_layer": 2, "n_positions": 40}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OPT = {**DECODER, "ffn_dim": 84, "word_embed_proj_dim": 48, "eos_token_id": 2}
OPT.pop("intermediate_size")
T5 = {"vocab_size": TOKENS, "d_model": 48, "d_kv": 10, "d_ff": 84, "num_layers": 2, "num_heads": 6}
BART = {**SEQUENCE, "vocab_size": TOKENS, "max_position_embeddings": 40, "pad_token_id": 0}
BART |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
WHISPER = {**SEQUENCE, "vocab_size": TOKENS, "num_mel_bins": 20, "max_source_positions": 25}
WHISPER |= {"num_labels": LABELS, "classifier_proj_size": 30, "pad_token_id": 0, "bos_token_id": 1}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 1}
SWIN = {"image_size": PIXELS, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 4]}
SWIN |= {"window_size": 4, "num_labels": LABELS}
CLIP = {
    "text_config": {**DECODER, "projection_dim": 28},
    "vision_config": {**VISION, "hidden_size": 60, "projection_dim": 28},
    "projection_dim": 28,
}

FAMILIES: dict[str, Family] = {
    "bert": text_encoder("Bert", ENCODER),
    "roberta": text_encoder("Roberta", ENCODER),
    "distilbert": text_encoder("DistilBert", DISTILBERT),
    "albert": text_encoder("Albert", {**ENCODER, "embedding_size": 20}),
    "electra": text_encoder("Electra", {**ENCODER, "embedding_size": 20}),
    "deberta-v2": text_encoder("DebertaV2", DEBERTA),
    "modernbert": text_encoder("ModernBert", MODERNBERT),
    "vit": vision("ViT", VISION),
    "deit": vision("DeiT", VISION),
    "dinov2": vision("Dinov2", {**VISION, "mlp_ratio": 2}),
    "swin": vision("Swin", SWIN),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": decoder("OPT", OPT),
    "gpt-neox": decoder("GPTNeoX", DECODER),
    "llama": decoder("Llama", GROUPED),
    "mistral": decoder("Mistral", {**WIDE, "sliding_window": None}),
    "qwen2": decoder("Qwen2", WIDE),
    "qwen3": decoder("Qwen3", WIDE),
    "gemma": decoder("Gemma", WIDE),
    "phi3": decoder("Phi3", GROUPED),
    "olmo2": decoder("Olmo2", GROUPED),
    "smollm3": decoder("SmolLM3", GROUPED),
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, ("text", "targets")),
    "t5-gated": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ("text", "targets"),
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, ("text", "targets")),
    "whisper": Family("WhisperForAudioClassification", "WhisperConfig", WHISPER, ("audio",)),
    "clip": Family("CLIPModel", "CLIPConfig", CLIP, ("text", "image")),
}


def build(library: ModuleType, family: Family, examples: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model of a family and its inputs by keyword."""
    config = getattr(library, family.config)(**family.options)
    parts = [getattr(config, key) for key in ("text_config", "vision_config") if key in family.options]
    for part in (config, *parts):
        part.initializer_range = SPREAD
    model = getattr(library, family.model)(config)
    example: dict[str, Tensor] = {}
    for kind in family.inputs:
        example |= _inputs(kind, examples)
    return model, example


def _inputs(kind: str, examples: int) -> dict[str, Tensor]:
    if kind == "image":
        return {"pixel_values": torch.randn(examples, 3, PIXELS, PIXELS)}
    if kind == "waveform":
        return {"input_values": torch.randn(examples, 240)}
    if kind.startswith("text with"):
        return _text_with_images(examples, several=kind.endswith("images"))
    if kind == "audio":
        return {"input_features": torch.randn(examples, WHISPER["num_mel_bins"], 50)}
    tokens = torch.randint(3, TOKENS, (examples, LENGTH))
    if kind == "targets":
        return {"decoder_input_ids": tokens[:, : LENGTH - 2]}
    mask = torch.ones_like(tokens)
    mask[1:, -PADDED:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def _text_with_images(examples: int, several: bool) -> dict[str, Tensor]:
    """Four places of the text stand for an image; a model that takes several gets them in a list of one."""
    tokens = torch.randint(3, TOKENS - 1, (examples, LENGTH))
    tokens[:, 2:6] = TOKENS - 1
    sizes = (examples, 1, 3, PIXELS, PIXELS) if several else (examples, 3, PIXELS, PIXELS)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(sizes),
    }
