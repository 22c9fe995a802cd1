"""What vanilla configurations hold, for tiny models of many families; and that they do: equal outputs."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cria_prune import PlanConfig, UnitGroups, apply, discover, plan
from cria_prune.base.errors import StructureError
from cria_prune.planning.plan import compose, make_plan
from cria_prune.structure.groups import shrink, without_residual
from cria_prune.vanilla import Holdable, holdable

T = pytest.importorskip("transformers")

ENCODER: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64,
}  # fmt: skip
TEXT: dict[str, Any] = {**ENCODER, "vocab_size": 97, "max_position_embeddings": 64}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 3, "pad_token_id": 0}
OPT: dict[str, Any] = {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 48}
DISTIL = {"dim": 48, "hidden_dim": 64, "n_layers": 2, "n_heads": 6, "vocab_size": 97}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 97, "n_positions": 64}
T5 = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6, "vocab_size": 97}
VIT = {**ENCODER, "image_size": 16, "patch_size": 4}
ALL_HEADS, ALL_GROUPS = (1, 2, 3, 4, 5, 6), (1, 2, 3)

# family: class, options, numbers of heads or KV groups that can be held, of the residual width (None: any)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...] | None]] = {
    "Bert": ("ForSequenceClassification", TEXT, (), ()),
    "Roberta": ("ForSequenceClassification", TEXT, (), ()),
    "DistilBert": ("ForSequenceClassification", DISTIL, (), ()),
    "GPT2": ("LMHeadModel", GPT2, (), ()),
    "OPT": ("ForCausalLM", OPT, (), ()),
    "ViT": ("ForImageClassification", VIT, ALL_HEADS, None),
    "Llama": ("ForCausalLM", DECODER, ALL_GROUPS, (12, 24, 36, 48)),
    "Mistral": ("ForCausalLM", DECODER, ALL_GROUPS, None),
    "Qwen2": ("ForCausalLM", DECODER, ALL_GROUPS, None),
    "Qwen3": ("ForCausalLM", {**DECODER, "head_dim": 8}, ALL_GROUPS, None),
    "Gemma": ("ForCausalLM", {**DECODER, "head_dim": 8}, ALL_GROUPS, ()),
    "Phi3": ("ForCausalLM", DECODER, ALL_GROUPS, None),
    "Olmo2": ("ForCausalLM", DECODER, ALL_GROUPS, None),
    "T5": ("ForConditionalGeneration", T5, ALL_HEADS, ()),
}


def example(family: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if family == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(3, 97, (2, 7))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if family == "T5" else {})}


def build(family: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    T.utils.logging.set_verbosity_error()
    model: nn.Module = getattr(T, family + FAMILIES[family][0])(getattr(T, f"{family}Config")(**options))
    return model.double().eval()


@cache
def known(family: str) -> tuple[nn.Module, UnitGroups, Holdable]:
    """A model, its groups, and what can be held with the residual width cut too."""
    model = build(family, FAMILIES[family][1])
    groups = discover(model, example(family))
    return model, groups, holdable(model, groups)


def held(groups: UnitGroups, found: Holdable, kinds: tuple[str, ...]) -> set[tuple[int, ...] | None]:
    """The allowed numbers of the groups of some kinds; () for one that is frozen."""
    return {
        found.allowed.get(group.name) if found.groups[group.name].frozen is None else ()
        for group in groups
        if group.kind in kinds and group.size > 2 and group.size != 97
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_be_held(family: str) -> None:
    _, groups, found = known(family)
    _, _, heads, residual = FAMILIES[family]
    assert held(groups, found, ("head", "kv group")) == {heads}
    assert held(groups, found, ("residual",)) == {residual}
    wide = {group.name for group in groups.prunable if group.size in (64, 192)}
    assert len(wide) == (4 if family == "T5" else 2)
    assert all(found.groups[name].frozen is None and name not in found.allowed for name in wide)
    for group in found.groups:
        if groups[group.name].frozen is None and group.frozen is not None:
            assert f"a vanilla {family}Config cannot hold fewer " in group.frozen
    poolers = {group.name for group in groups if group.kind == "neuron" and group.size == 48}
    assert len(poolers) == (family in ("Bert", "Roberta", "DistilBert"))
    assert all("weight would be 48 × 48, not 47 × 48" in str(found.groups[name].frozen) for name in poolers)


def some_scores(groups: UnitGroups, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in groups.prunable}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_plan_reloads(family: str, residual: bool, tmp_path: Path) -> None:
    """The configuration is written, read by its class, and the built model takes the pruned weights."""
    model, groups, found = known(family)
    if not residual:
        found = holdable(model, without_residual(groups))
    options = PlanConfig(uniform=True, multiple=4, reduction=0.4, of="prunable")
    made = plan(found.groups, some_scores(found.groups), options, allowed=found.allowed)
    smaller = apply(model, made)
    found.config(made.kept).save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    again = type(model)(config).double().eval()
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(outputs(again, example(family)), outputs(smaller, example(family)))
    assert sum(item.numel() for item in again.parameters()) == made.report["parameters"]


def test_a_validator_leaves_the_numbers_that_divide() -> None:
    options = {**DECODER, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = build("Llama", options)
    groups = discover(model, example("Llama"))
    found = holdable(model, groups)
    assert held(groups, found, ("head",)) == {(1, 2, 4, 8)}
    assert held(groups, found, ("residual",)) == {tuple(range(8, 65, 8))}


def test_more_rounds_end_in_one_configuration() -> None:
    model, _, found = known("Qwen3")
    groups, total = found.groups, None
    for number in (1, 2, 3):
        options = PlanConfig(uniform=True, reduction=0.6)
        step = plan(
            groups, some_scores(groups, number), options,
            dense=found.groups, target=0.2 * number, allowed=found.allowed,
        )  # fmt: skip
        total = step if total is None else compose(total, step)
        groups = shrink(groups, step.kept)
    assert total is not None
    config = found.config(total.kept)
    assert config.intermediate_size == groups["model.layers.0.mlp.gate_proj"].size < 64
    # What was pruned uniformly is itself a model with a vanilla configuration.
    again = holdable(apply(model, total), groups)
    assert again.groups["model.layers.1.mlp.gate_proj"].frozen is None


def test_numbers_that_differ_between_layers_are_refused() -> None:
    _, _, found = known("Bert")
    kept = {"bert.encoder.layer.1.intermediate.dense": range(60)}
    with pytest.raises(StructureError, match=r"A vanilla BertConfig .* 64 × 48, not 60 × 48.*uniform"):
        found.config(kept)
    with pytest.raises(StructureError, match="not a multiple"):
        known("Llama")[2].config({"model.embed_tokens": range(47)})


def test_a_model_without_a_configuration() -> None:
    with pytest.raises(StructureError, match=r"its config is NoneType\. Pass a model of transformers"):
        holdable(nn.Linear(3, 3), UnitGroups((), {}, (), {}))


def test_a_model_that_its_configuration_does_not_describe() -> None:
    model, groups, _ = known("Bert")
    uneven = make_plan(groups, {"bert.encoder.layer.1.intermediate.dense": range(60)})
    smaller = apply(model, uneven)
    with pytest.raises(StructureError, match=r"builds another model: .* would be 64 × 48, not 60 × 48"):
        holdable(smaller, shrink(groups, uneven.kept))
    other = copy.deepcopy(model)
    other.config.hidden_size = 47
    with pytest.raises(StructureError, match=r"builds another model: it cannot be built, ValueError"):
        holdable(other, groups)


def test_the_model_the_log_and_the_random_state_are_left_as_they_were() -> None:
    model, groups, _ = known("Llama")
    before, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    logger = logging.getLogger("transformers")
    logger.setLevel(logging.WARNING)
    holdable(model, without_residual(groups))
    assert model.config.to_dict() == before and type(model.config) is T.LlamaConfig
    assert torch.equal(state, torch.get_rng_state())
    assert logger.level == logging.WARNING


def test_frozen_groups_stay_frozen() -> None:
    model, groups, _ = known("Mistral")
    gate = "model.layers.0.mlp.gate_proj"
    frozen = replace(
        groups, groups=tuple(replace(g, frozen="kept" if g.name == gate else g.frozen) for g in groups)
    )
    found = holdable(model, frozen)
    assert found.groups[gate].frozen == "kept"
    # One layer alone cannot be cut: one field says the width of all.
    assert "63 × 48, not 64 × 48" in str(found.groups["model.layers.1.mlp.gate_proj"].frozen)


def test_numbers_that_modules_hold_must_agree_too() -> None:
    """A width that one field can say, and a number of heads that the code takes from another."""

    class Config(T.PretrainedConfig):  # type: ignore[name-defined, misc]
        model_type = "fixed-heads"
        hidden_size: int = 24
        inner: int = 48
        middle: int = 20

    class Model(T.PreTrainedModel):  # type: ignore[name-defined, misc]
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.num_heads = config.hidden_size // 4
            self.drawn = float(torch.rand(1, device="cpu"))  # differs from build to build, which says nothing
            self.into = nn.Linear(config.hidden_size, config.inner)
            self.middle = nn.Linear(config.inner, config.middle)
            self.out = nn.Linear(config.middle, 3)
            self.post_init()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            split = self.into(x).unflatten(-1, (self.num_heads, -1))
            return self.out(self.middle(split.softmax(-1).flatten(-2)).relu())

    model = Model(Config()).eval()
    groups = discover(model, torch.randn(2, 24))
    assert [group.name for group in groups.prunable] == ["into", "middle"]
    state = torch.get_rng_state()
    found = holdable(model, groups)
    assert torch.equal(state, torch.get_rng_state())
    assert found.groups["middle"].frozen is None
    assert found.config({"middle": range(13)}).middle == 13
    reason = str(found.groups["into"].frozen)
    assert reason.endswith("fewer neurons: with 5 of 6, into.weight would be 48 × 24, not 40 × 24")
