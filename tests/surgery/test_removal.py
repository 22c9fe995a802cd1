"""What a model says of itself after surgery is true: modules, and configurations of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.errors import StructureError
from cria_prune.planning.plan import Plan, compose, make_plan
from cria_prune.structure.groups import UnitGroups, shrink
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import verify

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))}
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 8, "head_dim": 10, "pad_token_id": 0,
}  # fmt: skip


def built(family: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes)
    ).eval()


def mistral(**sizes: Any) -> nn.Module:
    return built("Mistral", **{**SIZES, "num_key_value_heads": 4, **sizes})


def kept_shares(groups: UnitGroups, share: float = 0.5) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        group.name: np.sort(generator.permutation(group.size)[: round(group.size * share)])
        for group in groups.prunable
        if group.kind != "residual"
    }


def test_a_uniform_cut_is_what_the_configuration_says_and_plain_transformers_loads_it(tmp_path: Path) -> None:
    model = mistral()
    groups = discover(model, IDS)
    assert [group.kind for group in groups if group.frozen is None] == [
        "residual",
        *["kv group", "gated"] * 2,
    ]
    smaller = apply(model, make_plan(groups, kept_shares(groups)))
    config = smaller.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 20)
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (8, 40)
    assert all(layer.self_attn.config is config for layer in smaller.model.layers)
    smaller.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**IDS).logits, smaller(**IDS).logits)
    assert again.generate(IDS["input_ids"], max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_residual_width_is_restated_and_loads_too(tmp_path: Path) -> None:
    model = mistral()
    groups = discover(model, IDS)
    plan = make_plan(groups, {"model.embed_tokens": range(0, 48, 2)})
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, IDS).twin == "operations"
    assert smaller.config.hidden_size == smaller.model.embed_tokens.embedding_dim == 24
    smaller.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**IDS).logits, smaller(**IDS).logits)


def test_layers_that_differ_leave_the_shared_configuration_and_still_run() -> None:
    model = built(
        "Phi3", **{key: value for key, value in SIZES.items() if key != "head_dim"}, num_key_value_heads=4
    )
    groups = discover(model, IDS)
    names = [group.name for group in groups if group.kind == "kv group"]
    plan = make_plan(groups, {names[0]: [0], names[1]: [1, 2, 3]})
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, IDS).difference <= 1e-10
    first, second = (layer.self_attn for layer in smaller.model.layers)
    assert (first.config.num_attention_heads, second.config.num_attention_heads) == (2, 6)
    assert (first.num_key_value_heads, second.num_key_value_heads) == (1, 3)
    assert smaller.config.num_attention_heads == 8  # no one number is true


def test_rounds_that_disagree_in_between_compose() -> None:
    model = mistral()
    groups = discover(model, IDS)
    first = {"model.layers.0.mlp.gate_proj": range(30)}
    second = {"model.layers.1.mlp.gate_proj": range(10, 40)}
    one, step = make_plan(groups, first), make_plan(shrink(groups, first), second)
    half = apply(model, one)
    assert (half.config.intermediate_size, half.model.layers[0].mlp.config.intermediate_size) == (40, 30)
    total = Plan.from_json(compose(one, step).to_json())
    smaller = apply(half, step)
    assert smaller.config.intermediate_size == apply(model, total).config.intermediate_size == 30
    assert verify(model, total, smaller, IDS).difference <= 1e-10


def test_encoders_say_their_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    groups = discover(model, IDS)
    smaller = apply(model, make_plan(groups, kept_shares(groups, 0.25)))
    attention = smaller.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (
        2,
        6,
        12,
    )
    assert smaller.config.intermediate_size == 10 and smaller.config.hidden_size == 48


def test_a_plan_for_other_attributes_is_refused() -> None:
    model = mistral()
    groups = discover(model, IDS)
    plan = make_plan(groups, {"model.layers.0.self_attn.q_proj": [0], "model.layers.1.self_attn.q_proj": [1]})
    model.config.num_attention_heads = 7
    with pytest.raises(StructureError, match=r"restates 'config.num_attention_heads'.*the model says 7"):
        apply(model, plan)


def test_prune_takes_a_decoder_with_its_cache_on() -> None:
    model = mistral()
    batches = [
        {"input_ids": torch.randint(0, 99, (4, 9)), "labels": torch.zeros(4, 9).long()} for _ in range(2)
    ]
    result = prune(model, batches, PruneConfig(plan={"reduction": 0.2, "rounds": 2}))
    assert result.report["reached"] >= 0.2 and model.config.use_cache and result.model.config.use_cache
    assert result.model(**IDS).past_key_values is not None
