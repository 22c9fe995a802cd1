"""Made-up texts and tiny models for the other examples, in the place of yours."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "the", "sea", "its", "people", "long", "shadows", "good", "bad", "fine", "dull"]


def rows(count: int) -> list[tuple[str, int]]:
    """Return sentences of random words; the label says whether "good" is among them."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[2:], k=draw.randint(4, 12))) for _ in range(count)]
    return [(text, int("good" in text)) for text in texts]


def classifier_folder(folder: Path) -> Path:
    """Write a tiny BERT with fresh weights and its tokenizer, as `save_pretrained` does."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def llama(length: int, count: int = 400) -> tuple[nn.Module, torch.Tensor]:
    """Return a small Llama and tokens of a language in which most tokens follow from the one before."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(64, generator=generator)
    tokens = torch.randint(64, (count * length,), generator=generator)
    for place in range(1, len(tokens)):
        if place % 5:
            tokens[place] = follows[tokens[place - 1]]
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokens
