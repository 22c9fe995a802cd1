"""Tiny models of the families that `python benchmarks/roundtrip.py` sends through a folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SEED, SPREAD = 0, 0.1
"""Seed of the weights; noise on every parameter, for at their usual start norms and biases say nothing."""

Options = dict[str, Any]

# 8 heads of 20 in 4 KV groups; a head size that is stated is 24. 160 is no multiple of 6 or 7.
BASE: Options = {"vocab_size": 99, "hidden_size": 160, "num_attention_heads": 8, "num_hidden_layers": 2}
BASE |= {"intermediate_size": 208}
TEXT: Options = {**BASE, "max_position_embeddings": 64, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
DECODER: Options = {**TEXT, "num_key_value_heads": 4}
WIDE: Options = {**DECODER, "head_dim": 24}
VISION: Options = {**BASE, "image_size": 32, "patch_size": 8, "num_labels": 5}
DISTIL: Options = {"vocab_size": 99, "dim": 160, "n_heads": 8, "n_layers": 2, "hidden_dim": 208}
GPT2: Options = {"vocab_size": 99, "n_embd": 160, "n_head": 8, "n_layer": 2, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OPT: Options = {**TEXT, "ffn_dim": 208, "word_embed_proj_dim": 160}
T5: Options = {"vocab_size": 99, "d_model": 160, "d_kv": 24, "d_ff": 208, "num_layers": 2, "num_heads": 8}
T5 |= {"decoder_start_token_id": 0}

UNEVEN = "llama-as-mistral"
"""A Llama that keeps a number of heads which its own configuration refuses."""

FAMILIES: dict[str, tuple[str, Options]] = {
    "mistral": ("MistralForCausalLM", {**WIDE, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", WIDE),
    "gemma": ("GemmaForCausalLM", WIDE),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "smollm3": ("SmolLM3ForCausalLM", DECODER),
    "olmo2": ("Olmo2ForCausalLM", DECODER),
    "olmo3": ("Olmo3ForCausalLM", DECODER),
    "granite": ("GraniteForCausalLM", DECODER),
    "llama": ("LlamaForCausalLM", DECODER),
    UNEVEN: ("LlamaForCausalLM", DECODER),
    "llama-classifier": ("LlamaForSequenceClassification", {**DECODER, "num_labels": 5}),
    "gemma2": ("Gemma2ForCausalLM", WIDE),
    "gemma3": ("Gemma3ForCausalLM", WIDE),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "opt": ("OPTForCausalLM", OPT),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bert": ("BertForMaskedLM", TEXT),
    "bert-classifier": ("BertForSequenceClassification", {**TEXT, "num_labels": 5}),
    "roberta": ("RobertaForMaskedLM", TEXT),
    "distilbert": ("DistilBertForMaskedLM", {**DISTIL, "max_position_embeddings": 64}),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}),
    "beit": ("BeitForImageClassification", VISION),
}


def build(library: Any, name: str) -> nn.Module:
    """Return the model of a family, no parameter of which is a plain one or zero."""
    kind, options = FAMILIES[name]
    torch.manual_seed(SEED)
    found = getattr(library, kind)
    model: nn.Module = found(found.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    return model
