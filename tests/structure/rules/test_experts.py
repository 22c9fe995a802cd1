"""Mixtures of experts: neurons of all experts of a layer leave together, and masked equals pruned."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cria_prune.base.experts import grouped_experts, plain_experts, routed_mm
from cria_prune.config import PlanConfig, PruneConfig
from cria_prune.pipeline import prune
from cria_prune.planning.plan import make_plan
from cria_prune.planning.stairs import stairs
from cria_prune.recording.collect import record
from cria_prune.structure.discovery import discover
from cria_prune.structure.groups import UnitGroups, without_residual
from cria_prune.surgery.removal import apply
from cria_prune.surgery.trial import settle
from cria_prune.surgery.verify import Reference

SIZES = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def mixtral(experts: int = 4) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=experts, num_experts_per_tok=1)
    return filled(MixtralForCausalLM(config))


def deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, intermediate_size=32, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=0, q_lora_rank=10, kv_lora_rank=12,
        qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    )  # fmt: skip
    return filled(DeepseekV3ForCausalLM(config))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return filled(GptOssForCausalLM(config))


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **SIZES, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1,
        head_dim=8, interleave_moe_layer_step=1, attention_chunk_size=32,
    )  # fmt: skip
    return filled(Llama4ForCausalLM(config))


def filled(model: nn.Module) -> nn.Module:
    """Distinct values everywhere, so that what was kept can be told by its value alone."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for item in model.parameters():
            values = (torch.randperm(item.numel(), generator=generator) + 0.5) / item.numel()
            item.copy_((values * 2 - 1 if item.ndim > 1 else values + 0.5).view(item.shape) * 0.5)
    return model.eval()


def cut(groups: UnitGroups, seed: int = 0) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    sizes = {group.name: group.size for group in groups.prunable}
    return {name: np.sort(dice.permutation(size)[: max(1, size // 2)]) for name, size in sizes.items()}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
        return found


@pytest.mark.parametrize("make", [mixtral, deepseek, gpt_oss, llama4, lambda: mixtral(1)])
def test_neurons_of_experts_and_heads_leave(make):
    model, tokens = make(), torch.arange(2, 26).reshape(2, 12)
    way = model.config._experts_implementation
    reference = Reference(model, {"input_ids": tokens})
    groups = without_residual(discover(model, {"input_ids": tokens}))
    groups = settle(model, groups, {"input_ids": tokens}, reference)
    experts = [group for group in groups.prunable if group.name.endswith("experts")]
    assert [(group.kind, group.size) for group in experts] == [("gated", 24)]
    assert any(group.kind in ("head", "kv group") for group in groups.prunable)
    plan = make_plan(groups, cut(groups))
    smaller = apply(model, plan)
    assert model.config._experts_implementation == smaller.config._experts_implementation == way
    assert reference.compare(plan, smaller).dtype == "float64"
    if plan.normed:  # statistics over the units: zeros by hand are not what is left
        return
    # By hand: every weight whose value is gone is zero in the dense network. Another batch, and training.
    twin, left = copy.deepcopy(model).double(), dict(smaller.named_parameters())
    with torch.no_grad():
        for name, item in twin.named_parameters():
            if item.shape != left[name].shape and item.ndim > 1:
                item.mul_(torch.isin(item, left[name].double()))
    for training in (False, True):
        pair = [item.train(training) for item in (twin, copy.deepcopy(smaller).double())]
        torch.testing.assert_close(*(logits(item, tokens[:1, :7]) for item in pair), rtol=1e-6, atol=1e-6)


class ByHand(nn.Module):
    """Three experts in a loop, of which the router never chooses the last."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3)
        )

    def forward(self, x):
        weights, chosen = (self.gate(x) + torch.tensor([0.0, 0.0, -99.0])).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == number)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


def test_a_width_that_the_grouped_product_takes():
    model = mixtral()
    groups = discover(model, {"input_ids": torch.arange(2, 26).reshape(2, 12)})
    found = {stair.names[0]: stair.counts.tolist() for stair in stairs(groups, PlanConfig(floor=0.0))}
    assert found["model.layers.0.mlp.experts"] == [24, 16, 8]
    assert found["model.embed_tokens"] == [16, 8]


def test_experts_that_no_token_reaches_are_named_and_padding_is_left_out():
    model, tokens = mixtral(), torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1:] = model.model.layers[0].mlp.gate.weight[:1]
        model.model.layers[0].mlp.gate.weight[3] = 0
    groups = without_residual(discover(model, {"input_ids": tokens}))
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    with pytest.warns(UserWarning, match=r"experts of 'model.layers.0.mlp.experts', and not"):
        states = record(model, groups, [batch], gradients=False)
    assert states.unreached["model.layers.0.mlp.experts"]
    assert states["model.layers.0.mlp.experts"].output.samples == int(mask.sum())
    with pytest.warns(UserWarning, match="The calibration reaches"):
        result = prune(model, [batch] * 2, PruneConfig(plan={"reduction": 0.2, "rounds": 1}, repair="none"))
    (said,) = [line for line in result.remarks if line.startswith("the calibration never reaches")]
    missed = result.rounds[0].diagnosis["model.layers.0.mlp.experts"]["unreached"]
    assert missed and f"model.layers.0.mlp.experts ({', '.join(map(str, missed))})" in said
    assert said in str(result) and not result.rounds[0].diagnosis["model.layers.0.mlp.experts"]["dead"]


def test_one_expert_alone_is_pruned():
    groups = discover(mixtral(experts=1), {"input_ids": torch.arange(2, 14).reshape(1, 12)})
    assert [item.size for item in groups.prunable if item.name.endswith("mlp.experts")] == [24]


def test_an_expert_of_a_loop_by_hand_that_no_example_reaches_is_named():
    torch.manual_seed(0)
    net = ByHand().eval()
    groups = discover(net, torch.randn(2, 8))
    assert "experts.2.0" not in {group.name for group in groups.prunable}
    assert any(
        entry.fate == "not followed" and "experts.2.0.weight" in entry.where for entry in groups.account()
    )


def test_the_routed_product_is_that_of_each_row_alone():
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(*size, dtype=torch.float64, generator=generator, requires_grad=True)
        for size in ((5, 2, 3), (4, 3, 6), (4, 6))
    )
    experts = torch.randint(3, (5, 2), generator=generator)  # the last is not reached
    expected = torch.einsum("tki,tkio->tko", rows, weight[experts]) + bias[experts]
    torch.testing.assert_close(routed_mm(rows, weight, experts, bias), expected)
    torch.autograd.gradcheck(
        lambda *items: routed_mm(items[0], items[1], experts, items[2]), (rows, weight, bias)
    )
    with torch.no_grad():
        torch.testing.assert_close(routed_mm(rows, weight, experts), expected - bias[experts])


def test_the_way_of_the_experts_is_put_back():
    model, tokens = mixtral(), torch.arange(2, 14).reshape(1, 12)
    usual = {name: logits(model, tokens) for name in ("eager", "batched_mm") if _takes(model, name)}
    with pytest.raises(RuntimeError, match="stop"), plain_experts(model):
        usual["here"] = logits(model, tokens)
        raise RuntimeError("stop")
    assert model.config._experts_implementation == "batched_mm"
    torch.testing.assert_close(usual["here"], usual["eager"])
    assert len(grouped_experts(model)) == 1 and not grouped_experts(nn.Linear(2, 2))


def _takes(model: nn.Module, way: str) -> bool:
    model.config._experts_implementation = way
    return True


class Weighted(nn.Module):
    """Every expert for every token, in one product of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(4, 8, 10))
        self.down = nn.Parameter(torch.randn(4, 10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = F.gelu(x.expand(4, *x.shape) @ self.up)
        return self.head((inner @ self.down * self.router(x).softmax(-1).T[..., None]).sum(0))


def test_stacked_experts_written_by_hand():
    torch.manual_seed(0)
    model, x = Weighted().eval(), torch.randn(5, 6)
    groups = discover(model, x)
    assert {group.name: group.size for group in groups.prunable}["up"] == 10
    plan = make_plan(groups, cut(groups))
    assert Reference(model, x).compare(plan, apply(model, plan)).difference < 1e-12
