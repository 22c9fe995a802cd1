"""What a plan may cut: residual widths, kinds of units, what a vanilla configuration holds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from cria_prune import PlanConfig, PruneConfig, discover, prune
from cria_prune.base.errors import ConfigError, TargetError
from cria_prune.planning.selection import check_reach, scope
from cria_prune.structure.groups import UnitGroups
from cria_prune.tasks.loading import example_inputs

transformers = pytest.importorskip("transformers")


@cache
def bert() -> tuple[nn.Module, UnitGroups]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config).eval()
    return model, discover(model, example_inputs(model))


def kinds(groups: UnitGroups) -> set[str]:
    return {group.kind for group in groups.prunable}


def test_kinds_of_units_are_frozen_by_request() -> None:
    model, groups = bert()
    assert kinds(scope(model, groups, PlanConfig()).groups) == {"neuron", "head"}
    assert kinds(scope(model, groups, PlanConfig(units="neurons")).groups) == {"neuron"}
    assert kinds(scope(model, groups, PlanConfig(units="heads")).groups) == {"head"}
    assert "residual" in kinds(scope(model, groups, PlanConfig(units="heads", residual=True)).groups)


def test_vanilla_leaves_what_the_configuration_cannot_hold() -> None:
    model, groups = bert()
    found = scope(model, groups, PlanConfig(vanilla=True)).groups
    assert kinds(found) == {"neuron"}
    assert all("dense" not in group.name or "pooler" not in group.name for group in found.prunable)
    assert any("cannot hold fewer heads" in (group.frozen or "") for group in found)


def test_vanilla_comes_with_uniform() -> None:
    assert PlanConfig(vanilla=True).uniform and not PlanConfig().uniform
    with pytest.raises(ConfigError, match="vanilla needs uniform"):
        PlanConfig(vanilla=True, uniform=False)


def test_a_target_beyond_reach_says_the_maximum_and_what_lifts_it() -> None:
    model, groups = bert()
    config = PlanConfig(reduction=0.9, of="non-embedding", vanilla=True)
    with pytest.raises(TargetError) as caught:
        check_reach(model, groups, config)
    text = str(caught.value)
    assert "at most" in text and "per-layer" in text and "heads too" not in text
    with pytest.raises(TargetError, match=r"cut heads too .*residual"):
        check_reach(model, groups, PlanConfig(reduction=0.9, of="non-embedding", units="neurons"))


@pytest.mark.parametrize("reduction", [0.2, 0.4])
def test_prune_keeps_what_a_vanilla_configuration_holds(reduction: float) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(64, (4, 16))} for _ in range(3)]
    asked = PruneConfig(
        plan={"reduction": reduction, "of": "non-embedding", "vanilla": True, "multiple": 8, "rounds": 2}
    )
    result = prune(model, batches, asked)
    sizes = {(group.kind, group.size) for group in result.groups if group.frozen is None}
    assert len({size for kind, size in sizes if kind == "gated"}) == 1
    heads = {size for kind, size in sizes if kind in ("kv group", "head")}
    assert len(heads) == 1 and result.report["reached"] >= reduction
    small = transformers.LlamaConfig.from_dict(result.model.config.to_dict())
    with torch.device("meta"):
        again = transformers.LlamaForCausalLM(small)
    assert {n: v.shape for n, v in again.state_dict().items()} == {
        n: v.shape for n, v in result.model.state_dict().items()
    }
