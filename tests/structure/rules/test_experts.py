"""Mixtures of experts: neurons of all experts of a layer leave together, and masked equals pruned."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cria_prune.artifact.pretrained import save_pretrained
from cria_prune.base.errors import ConfigError, StructureError
from cria_prune.base.experts import grouped_experts, plain_experts, routed_mm
from cria_prune.config import PlanConfig, PruneConfig, ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.pipeline import prune
from cria_prune.planning.budget import count_macs, count_parameters
from cria_prune.planning.plan import make_plan
from cria_prune.planning.selection import scope
from cria_prune.planning.stairs import stairs
from cria_prune.recording.collect import record
from cria_prune.structure.discovery import discover
from cria_prune.structure.groups import UnitGroup, UnitGroups, shrink, without_residual
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


def qwen() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SIZES, intermediate_size=24, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2,
        head_dim=8, decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip
    return filled(Qwen3MoeForCausalLM(config))


def olmoe() -> nn.Module:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return filled(
        OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=24, num_experts=6, num_experts_per_tok=2))
    )


def jamba() -> nn.Module:
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        **(SIZES | {"num_hidden_layers": 2}), intermediate_size=24, num_experts=6, num_experts_per_tok=2,
        use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4,
    )  # fmt: skip
    return filled(JambaForCausalLM(config))


def deepseek_of(experts: int, groups: int) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, intermediate_size=32, moe_intermediate_size=24, n_routed_experts=experts,
        num_experts_per_tok=2, n_shared_experts=1, n_group=groups,
        topk_group=max(1, groups - 1), first_k_dense_replace=0,
        q_lora_rank=10, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    )  # fmt: skip
    return filled(DeepseekV3ForCausalLM(config))


class NeverChosen(TorchFunctionMode):
    """The dense model by hand: the logits of some experts, and biases on top of them, are minus infinity."""

    def __init__(self, weight: Tensor, gone: Tensor) -> None:
        super().__init__()
        self.weight, self.gone = weight, gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self.weight:
            return result.index_fill(-1, self.gone, float("-inf"))
        return result


def most_chosen(model: nn.Module, weight: str) -> int:
    """Return the expert whose logit is the largest for most tokens."""
    seen: list[Tensor] = []
    router = model.get_submodule(weight.rpartition(".")[0])
    handle = router.register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    logits(model, TOKENS)
    handle.remove()
    return int(seen[0].argmax(dim=-1).bincount().argmax())


def whole(groups: UnitGroups) -> list[UnitGroup]:
    return [group for group in groups if group.kind == "experts"]


EXPERTS_MODELS = {
    "mixtral": (mixtral, 1),
    "qwen": (qwen, 1),
    "olmoe": (olmoe, 1),
    "gpt_oss": (gpt_oss, 1),
    "jamba": (jamba, 1),
    "one group": (lambda: deepseek_of(6, 1), 1),
    "deepseek": (lambda: deepseek_of(12, 3), 3),
}


@pytest.mark.parametrize("name", EXPERTS_MODELS)
def test_whole_experts_leave_with_their_router_rows(name):
    make, width = EXPERTS_MODELS[name]
    model, batch = make(), {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    reference = Reference(model, batch)
    groups = settle(model, discover(model, batch), batch, reference)
    (group,) = whole(groups)
    router = group.producers[0]
    count = group.size * width
    assert router.positions.shape[1] == width and group.frozen is None
    unit = int(np.flatnonzero((router.positions == most_chosen(model, router.tensor)).any(axis=1))[0])
    plan = make_plan(groups, {group.name: np.delete(np.arange(group.size), unit)})
    smaller = apply(model, plan)
    assert reference.compare(plan, smaller).twin == "operations"
    left = dict(smaller.named_modules())
    for item in group.slices:  # every slice and every number that counts experts
        tensor = {**dict(smaller.named_parameters()), **dict(smaller.named_buffers())}[item.tensor]
        assert tensor.shape[item.dim] == count - width
    assert {left[edit.module] is not None and edit.after for edit in plan.attributes} == {count - width}
    # By hand, in the model's own way of running its experts: another batch, and training.
    dense, cut_model = copy.deepcopy(model).double(), copy.deepcopy(smaller).double()
    gone = torch.from_numpy(router.positions[unit])
    with torch.no_grad():
        for path, item in dense.named_buffers():
            if path.endswith("e_score_correction_bias"):
                item[gone] = float("-inf")
    for training in (False, True):
        for item in (dense, cut_model):
            item.train(training)
            item.config._experts_implementation = "eager"
        with NeverChosen(dense.get_parameter(router.tensor), gone):
            expected = logits(dense, TOKENS)
        found = logits(cut_model, TOKENS)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        whole_model = copy.deepcopy(model).double().train(training)
        assert not torch.allclose(found, logits(whole_model, TOKENS), rtol=1e-4, atol=1e-4)


TOKENS = torch.tensor([[3, 9, 27, 4, 12, 8, 21], [5, 17, 11, 6, 28, 14, 2], [29, 1, 7, 13, 22, 10, 19]])


def test_whole_experts_stay_unless_they_are_asked_for_and_as_many_as_are_picked_always_stay():
    model, batch = gpt_oss(), {"input_ids": TOKENS[:2]}
    groups = discover(model, batch)
    (group,) = whole(groups)
    assert (group.size, group.least) == (4, 2)
    for config, reason in (
        (PlanConfig(), "only when asked for"),
        (PlanConfig(experts=True), None),
        (PlanConfig(units="neurons", experts=True), "neurons alone"),
        (PlanConfig(units="experts"), None),
    ):
        found = scope(model, groups, config).groups
        assert (reason is None) == (found[group.name].frozen is None)
        assert reason is None or reason in found[group.name].frozen
    alone = scope(model, groups, PlanConfig(units="experts")).groups
    assert [item.name for item in alone.prunable] == [group.name]
    assert stairs(alone, PlanConfig(floor=0.0))[0].counts.tolist() == [4, 3, 2]
    assert "--experts" in str(scope(model, groups, PlanConfig()).groups.account())
    with pytest.raises(ConfigError, match="units are whole experts alone"):
        PlanConfig(units="experts", experts=False)
    with pytest.raises(StructureError, match="2 always stay"):
        make_plan(groups, {group.name: [1]})
    # Tokens go to as many experts as before, so that all but the router's row is still multiplied.
    left = {group.name: 3}
    assert count_macs(groups) - count_macs(groups, left) == TOKENS.shape[1] * 16
    smaller = shrink(groups, {group.name: [0, 1, 3]})
    assert count_macs(smaller) == count_macs(groups, left)
    assert count_parameters(groups) - count_parameters(groups, left) == 16 + 1 + 24 * 16 * 3 + 24 * 2 + 16
    all_needed = shrink(groups, {group.name: [0, 3]})
    assert group.name not in {item.name for item in all_needed.prunable}
    assert all_needed[group.name].whole == "has 2 units, and 2 always stay"


def test_experts_are_scored_by_what_they_give_their_tokens():
    model = qwen()
    block = model.model.layers[0].mlp
    mask = torch.zeros_like(TOKENS)  # so few tokens that some experts get none
    mask[:, 0] = mask[0, 1] = 1
    groups = scope(model, discover(model, {"input_ids": TOKENS[:2]}), PlanConfig(units="experts")).groups
    (group,) = groups.prunable
    batches = [{"input_ids": TOKENS[at:end], "attention_mask": mask[at:end]} for at, end in ((0, 2), (2, 3))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = record(model, groups, batches)
    # By hand: what the block's own modules give, a token and an expert at a time.
    given, count = torch.zeros(6).double(), torch.zeros(6)
    seen = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    hidden = torch.cat([item.reshape(-1, 16) for item in seen])[mask.reshape(-1).bool()]
    with torch.no_grad():
        _, weights, index = block.gate(hidden)
        for row, mine, places in zip(hidden, weights, index, strict=True):
            for weight, number in zip(mine, places.tolist(), strict=True):
                gate, up = (block.experts.gate_up_proj[number] @ row).chunk(2)
                out = block.experts.down_proj[number] @ (F.silu(gate) * up)
                given[number] += (weight * out.norm()).double()
                count[number] += 1
    assert states.routed[group.name].tokens.sum(dim=0).tolist() == count.tolist()
    reached = count > 0
    assert not reached.all() and states.unreached["model.layers.0.mlp.experts"]
    found = score(model, groups, states)[group.name]
    torch.testing.assert_close(found.scores[reached], given[reached] / count[reached], rtol=1e-5, atol=0)
    # What no token reached counts as a usual one, unless it is to leave first.
    assert (found.scores[~reached] == found.scores[reached].median()).all() and found.diagnosis.dead == ()
    dropped = score(model, groups, states, ScoreConfig(drop_unreached=True))[group.name]
    assert (dropped.scores[~reached] == 0).all()
    assert list(dropped.diagnosis.dead) == torch.nonzero(~reached).ravel().tolist()


class Routed(nn.Module):
    """A router that picks two of four experts, whose numbers are used once more where `extra` says so."""

    def __init__(self, extra: str = "") -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 10)), nn.Parameter(torch.randn(4, 10, 8))
        self.scale, self.extra = nn.Parameter(torch.rand(4) + 0.5), extra

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scores = self.router(x).softmax(-1)
        weights, index = (scores + self.scale - 2).topk(2, -1)  # below the zero of what left
        if self.extra == "gather":  # the weights are those of the scores, without what they were ranked by
            weights = scores.gather(-1, index)
        rows = x[:, None].expand(-1, 2, -1)
        inner = routed_mm(F.gelu(routed_mm(rows, self.up, index)), self.down, index)
        if self.extra == "compare":
            weights = weights * (index > 1)
        if self.extra == "table":
            inner = inner * self.scale[index][..., None]
        return self.head((inner * weights[..., None]).sum(1))


@pytest.mark.parametrize("extra", ["", "gather", "compare", "table"])
def test_numbers_of_experts_are_followed_or_keep_them(extra):
    torch.manual_seed(0)
    model, x = Routed(extra).eval(), torch.randn(9, 6)
    reference = Reference(model, x)
    groups = settle(model, discover(model, x), x, reference)
    group = groups["router"]
    assert {item.tensor for item in group.slices} >= {"router.weight", "router.bias", "scale", "up", "down"}
    if extra in ("compare", "table"):
        assert "is numbered in" in group.frozen or "is picked from" in group.frozen
        return
    plan = make_plan(groups, {"router": [0, 2, 3]})
    smaller = apply(model, plan)
    assert reference.compare(plan, smaller).difference < 1e-12
    dense = copy.deepcopy(model)
    with torch.no_grad():  # by hand: a bias of minus infinity
        dense.router.bias[1] = float("-inf")
        dense.scale[1] = float("-inf")
        torch.testing.assert_close(smaller(x), dense(x))
        assert not torch.allclose(model(x), dense(x))


def test_a_model_with_fewer_experts_is_saved_and_pruned_again(tmp_path):
    model = qwen()
    batches = [{"input_ids": torch.arange(24 * at, 24 * at + 24).reshape(2, 12) % 29} for at in range(1, 5)]
    config = PruneConfig(plan={"reduction": 0.2, "units": "experts", "vanilla": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = prune(model, batches, config)
        certificate = save_pretrained(tmp_path / "qwen", result.model, result.plan)
        again = prune(result.model, batches, PruneConfig(plan={"reduction": 0.2, "experts": True}))
    assert result.model.config.num_local_experts == 4 and "bit for bit" in str(certificate)
    assert again.plan.report["reached"] >= 0.2
