"""Trial cuts: what a forward reads beside its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cria_prune import apply, discover
from cria_prune.planning.plan import make_plan
from cria_prune.surgery.verify import Reference

pytest.importorskip("transformers")


def test_rotary_positions_of_a_shared_configuration_keep_the_size_of_a_head():
    """Phi-MoE works out the size of a head in each forward, from the numbers that a cut restates."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=30, hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=2, max_position_embeddings=32, pad_token_id=0,
        original_max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = PhimoeForCausalLM(config).eval()
    example = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    groups = discover(model, example)
    heads = [group for group in groups.prunable if group.kind == "kv group"]
    assert len(heads) == 2
    plan = make_plan(groups, {group.name: np.array([0, 2]) for group in heads})
    smaller = apply(model, plan)
    assert smaller.config.num_attention_heads == 4 and smaller.config.head_dim == 8
    assert "head_dim" not in vars(config)
    assert Reference(model, {"input_ids": torch.arange(1, 8)[None]}).compare(plan, smaller).difference < 1e-10
    narrow = make_plan(groups, {"model.embed_tokens": np.arange(40)})
    assert Reference(model, example).compare(narrow, apply(model, narrow)).difference < 1e-10
