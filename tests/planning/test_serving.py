"""Plans for a server: what it does not load stays, and the rest leaves in numbers that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cria_prune import PlanConfig, PruneConfig, UnitGroups, discover
from cria_prune.base.errors import ConfigError, StructureError
from cria_prune.planning.savable import savable
from cria_prune.planning.selection import Scope, scope
from cria_prune.planning.serving import checked_for
from cria_prune.tasks.loading import example_inputs

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
FOUND: dict[str, tuple[Any, UnitGroups]] = {}


def structure(name: str) -> tuple[Any, UnitGroups]:
    if name not in FOUND:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        FOUND[name] = model, discover(model, example_inputs(model))
    return FOUND[name]


def held(name: str, **plan: Any) -> tuple[Scope, dict[str, tuple[int, ...]]]:
    """The scope, and by kind of unit the numbers that may stay, of those that may lose some."""
    model, groups = structure(name)
    found = scope(model, groups, PlanConfig(**plan))
    return found, {group.kind: found.allowed.get(group.name, ()) for group in found.groups.prunable}


def test_vllm_divides_by_the_devices() -> None:
    assert held("Mistral", vanilla=True)[1] == {"kv group": (1, 2, 3, 4), "gated": ()}
    assert held("Mistral", serve="vllm")[1] == {"kv group": (1, 2, 3, 4), "gated": ()}
    _, two = held("Mistral", serve="vllm", tensor_parallel=2)
    assert two == {"kv group": (2, 4), "gated": tuple(range(2, 97, 2))}
    with pytest.raises(StructureError, match=r"on 3 devices: .*has 4 units. Name a tensor-parallel size"):
        held("Mistral", serve="vllm", tensor_parallel=3)


def test_a_head_size_that_is_not_read_keeps_the_heads() -> None:
    found, qwen = held("Qwen2", serve="vllm")
    assert qwen == {"gated": ()}
    reasons = {group.frozen for group in found.groups if group.kind == "kv group"}
    assert reasons == {"vllm does not read the head size of a qwen2"}
    assert set(held("Qwen2", serve="transformers4")[1]) == {"kv group", "gated"}


def test_llama_cpp_takes_whole_blocks() -> None:
    assert held("Mistral", serve="llama.cpp")[1] == {"kv group": (1, 2, 3, 4), "gated": (32, 64, 96)}
    assert held("Qwen2", serve="llama.cpp")[1] == {"gated": (32, 64, 96)}


def test_the_card_says_what_was_checked() -> None:
    model = structure("Qwen2")[0]
    assert checked_for(PlanConfig(), model) == ""
    said = checked_for(PlanConfig(serve="vllm", tensor_parallel=2), model)
    assert said.startswith("cut for vllm: neurons alone, in multiples of the tensor-parallel size 2, by what")
    assert "multiples of 32" in checked_for(PlanConfig(serve="llama.cpp"), model)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"serve": "vllm", "vanilla": False}, "vllm loads layers that are alike, so it needs vanilla"),
        ({"serve": "vllm", "uniform": False}, "so it needs uniform"),
        ({"serve": "vllm", "residual": True}, "leave out residual"),
        ({"serve": "llama.cpp", "tensor_parallel": 2}, "a tensor-parallel size is of vllm alone"),
        ({"tensor_parallel": 2}, "name vllm with serve"),
        ({"serve": "triton"}, "serve: Input should be"),
    ],
)
def test_what_no_server_loads_is_refused(plan: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PlanConfig(**plan)


def test_a_plan_for_no_server_is_kept_as_before() -> None:
    assert not {"serve", "tensor_parallel"} & set(PlanConfig().model_dump())
    served = PruneConfig(plan={"serve": "vllm", "tensor_parallel": 2})
    assert PruneConfig.from_text(served.to_json()) == served and served.plan.vanilla and served.plan.uniform


def test_what_a_target_means_is_known_before_the_work() -> None:
    """For a Qwen2 whose width its heads do not say: head by head per layer, and in a plain folder."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BertForSequenceClassification(config).eval()
    groups = discover(model, example_inputs(model))
    plan = PlanConfig(vanilla=True, of="prunable", reduction=0.25)
    found = savable(model, groups, plan, scope(model, groups, plan))
    assert found.plain.units == {"neurons": 2} and set(found.layers.units) == {"neurons", "heads"}
    assert "cannot hold fewer heads" in found.alone["heads"]
    neurons = 2 * (48 * 32 + 48 + 48 * 32)
    assert found.plain.asked in (neurons / 4, (neurons + 2 * 32) / 4)
    assert found.layers.asked > found.plain.asked and 0.8 < found.plain.most < 0.91
    text = str(found)
    assert "a plain folder can hold fewer neurons of 2 groups" in text and "per-layer alone: heads (" in text
    assert "25.0% of the prunable parameters are" in text and "in a plain folder; " in text
    again = savable(model, groups, plan.model_copy(update={"vanilla": False, "uniform": False}))
    assert again.plain == found.plain and again.layers == found.layers
