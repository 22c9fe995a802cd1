"""The transformers of the text recipes, with fresh weights; transformers is imported inside."""

from __future__ import annotations

from torch import nn

from cria_prune.tasks.pretrained import find_library

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
