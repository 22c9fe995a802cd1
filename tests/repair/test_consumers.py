"""Repairing consumers: exact where others make up for the removed units, least squares elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.criteria.test_baselines_weights import llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from cria_prune import PruneConfig, RecordConfig, discover, preset, prune, record
from cria_prune.base.errors import SignalError
from cria_prune.planning.plan import make_plan
from cria_prune.repair.consumers import Repair, compensate
from cria_prune.surgery.removal import apply
from networks import Mixed, Plain, randomize

TINY = 1e-12


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def repaired(
    model: nn.Module, batch: Any, kept: Mapping[str, Sequence[int]], ridge: float = TINY
) -> tuple[nn.Module, tuple[Repair, ...]]:
    """Discover, record every position and repair."""
    groups = discover(model, batch)
    states = record(model, groups, [batch], RecordConfig(positions=10**6), consumed=True)
    consumed = {name: item.consumed for name, item in states.groups.items()}
    return compensate(model, groups, kept, consumed, ridge=ridge)


def read_by(model: nn.Module, layer: str, batch: Any) -> Tensor:
    """(samples, features) that a layer reads."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    return seen[0]


def perceptron(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double().eval()


@pytest.mark.parametrize("bias", [True, False])
def test_units_that_others_make_up_for_leave_without_a_trace(bias: bool) -> None:
    model, x = perceptron(bias), seeded(64, 4)
    with torch.no_grad():  # neuron 4 is twice neuron 1: a ReLU lets a positive factor through
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[1], 2 * model[0].bias[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fixed, repairs = repaired(model, x, {"0": [0, 1, 2, 3, 5]})
    smaller = apply(fixed, make_plan(discover(model, x), {"0": [0, 1, 2, 3, 5]}))
    other = seeded(32, 4) * 3
    assert torch.allclose(smaller(other), model(other), atol=1e-9)
    assert torch.allclose(smaller[2].weight[:, 1], before["2.weight"][:, 1] + 2 * before["2.weight"][:, 4])
    assert [item.tensor for item in repairs] == ["2.weight"] and repairs[0].bias is bias
    assert repairs[0].recovered == pytest.approx(1)
    assert (smaller[2].bias is None) is not bias
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_constant_unit_goes_into_the_bias() -> None:
    model, x = perceptron(), seeded(64, 4)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 1.5
    fixed, repairs = repaired(model, x, {"0": [0, 1, 3, 4, 5]})
    assert torch.allclose(fixed[2].bias, model[2].bias + 1.5 * model[2].weight[:, 2])
    assert torch.allclose(fixed[2].weight, model[2].weight) and repairs[0].recovered == pytest.approx(1)


def twin(weight: Tensor, y: Tensor, kept: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Least squares of what the layer gave, (samples, n) @ (n, outputs), from the features that stay."""
    columns = y[:, kept]
    if bias is None:
        found = torch.linalg.lstsq(columns, y @ weight, driver="gelsd").solution
        return found, None
    ones = torch.ones(len(y), 1, dtype=y.dtype)
    found = torch.linalg.lstsq(torch.cat([columns, ones], 1), y @ weight + bias, driver="gelsd").solution
    return found[:-1], found[-1]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_consumer_is_the_least_squares_one(bias: bool) -> None:
    model, x, kept = perceptron(bias), seeded(200, 4), torch.tensor([0, 2, 5])
    fixed, repairs = repaired(model, x, {"0": kept.tolist()})
    y = read_by(model, "2", x)
    weight, constant = twin(model[2].weight.T, y, kept, model[2].bias)
    assert torch.allclose(fixed[2].weight[:, kept].T, weight, atol=1e-6)
    lost = y[:, [1, 3, 4]] @ model[2].weight[:, [1, 3, 4]].T
    left = model[2](y) - y[:, kept] @ weight
    if constant is not None:
        assert torch.allclose(fixed[2].bias, constant, atol=1e-6)
        left = left - constant
    assert repairs[0].recovered == pytest.approx(1 - left.square().sum().item() / lost.square().sum().item())


def test_a_convolution_is_repaired_place_by_place_of_its_kernel() -> None:
    model = randomize(Plain()).double()
    batch, kept = seeded(4, 3, 8, 8), torch.tensor([0, 1, 3, 4, 6])
    fixed, _ = repaired(model, batch, {"conv1": kept.tolist()})
    y = read_by(model, "conv2", batch).movedim(1, -1).reshape(-1, 8)
    for row in range(3):
        for column in range(3):
            weight, _ = twin(model.conv2.weight[:, :, row, column].T, y, kept, None)
            assert torch.allclose(fixed.conv2.weight[:, kept, row, column].T, weight, atol=1e-6)


def test_a_biased_convolution_takes_the_means_of_all_its_places() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 2)).double().eval()
    batch, kept = seeded(4, 2, 6, 6), [0, 2, 3]
    fixed, repairs = repaired(model, batch, {"0": kept})
    y = read_by(model, "2", batch).movedim(1, -1).reshape(-1, 5)
    steps = sum(
        twin(model[2].weight[:, :, a, b].T, y, torch.tensor(kept), torch.zeros(3).double())[1]
        for a in (0, 1)
        for b in (0, 1)
    )
    assert repairs[0].bias and torch.allclose(fixed[2].bias, model[2].bias + steps, atol=1e-6)


def test_a_strided_transposed_convolution_keeps_its_bias() -> None:
    """Every output place sees one place of the kernel: their sum is no constant that it loses."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2, stride=2)).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 1.5
    batch, kept = seeded(4, 3, 5, 5), [0, 1, 3, 4, 5]
    groups = discover(model.eval(), batch)
    fixed, repairs = repaired(model, batch, {"0": kept})
    assert torch.equal(fixed[2].bias, model[2].bias) and not repairs[0].bias
    wrong, right = (
        (apply(item, make_plan(groups, {"0": kept}))(batch) - model(batch)).square().mean().item()
        for item in (model, fixed)
    )
    assert right < wrong


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("width", ["neurons", "heads"])
def test_transformers_are_repaired_feature_by_feature(width: str) -> None:
    model = llama()
    group, layer, kept = {
        "neurons": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", list(range(0, 20, 2))),
        "heads": ("model.layers.0.self_attn", "model.layers.0.self_attn.o_proj", [1]),
    }[width]
    groups = discover(model, tokens())
    found = next(item for item in groups.prunable if f"{layer}.weight" in {s.tensor for s in item.consumers})
    fixed, repairs = repaired(model, tokens(), {found.name: kept})
    y = read_by(model, layer, tokens()).flatten(0, 1)
    slices = next(item for item in found.consumers if item.tensor == f"{layer}.weight")
    features = torch.from_numpy(np.sort(slices.positions[kept].ravel()))
    old, new = model.get_submodule(layer).weight, fixed.get_submodule(layer).weight
    weight, _ = twin(old.T, y, features, None)
    assert torch.allclose(y[:, features] @ new[:, features].T, y[:, features] @ weight, atol=1e-6)
    assert [item.tensor for item in repairs] == [f"{layer}.weight"] and group in found.name
    smaller = apply(fixed, make_plan(groups, {found.name: kept}))
    assert not torch.equal(smaller(**tokens()).logits, model(**tokens()).logits)


def test_units_under_a_norm_are_passed_over() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    width = next(group for group in discover(model, tokens()).prunable if group.normed)
    fixed, repairs = repaired(model, tokens(), {width.name: range(8)})
    assert not repairs
    assert all(torch.equal(new, model.get_parameter(name)) for name, new in fixed.named_parameters())


def test_the_other_way_round_of_gpt2_has_its_bias_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model, kept = model.double().eval(), torch.arange(0, 64, 4)
    fixed, repairs = repaired(model, tokens(), {"transformer.h.0.mlp.c_fc": kept.tolist()})
    layer = "transformer.h.0.mlp.c_proj"
    y = read_by(model, layer, tokens()).flatten(0, 1)
    old, new = model.get_submodule(layer), fixed.get_submodule(layer)
    weight, constant = twin(old.weight, y, kept, old.bias)
    found = y[:, kept] @ new.weight[kept] + new.bias
    assert repairs[0].bias and torch.allclose(found, y[:, kept] @ weight + constant, atol=1e-6)


def test_what_cannot_be_repaired_is_left_as_it_was() -> None:
    model = randomize(Mixed()).double()
    groups = discover(model, seeded(2, 3, 8, 8))
    kept = {group.name: range(group.size // 2) for group in groups.prunable}
    fixed, repairs = repaired(model, seeded(2, 3, 8, 8), kept)
    changed = {item.tensor for item in repairs}
    grouped = [name for name, layer in model.named_modules() if getattr(layer, "groups", 1) > 1]
    assert grouped and not {f"{name}.weight" for name in grouped} & changed
    for name, tensor in fixed.named_parameters():
        same = torch.equal(tensor, model.get_parameter(name))
        assert same or name in changed or name.replace("bias", "weight") in changed, name


def test_prune_repairs_every_round_and_verifies_each_cut() -> None:
    model = randomize(Plain())
    batches = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    config = {"plan": {"reduction": 0.5, "rounds": 2}, "score": {"criterion": "l2"}}
    plain, better = (prune(model, batches, PruneConfig(**config, repair=how)) for how in ("none", "once"))
    assert not plain.rounds[0].repairs and all(item.repairs for item in better.rounds)
    for item in better.rounds:
        assert item.verification is not None and item.verification.difference < 1e-10
    dense = torch.cat([model(x) for x in batches])
    wrong, right = (
        (torch.cat([result.model(x) for x in batches]) - dense).square().sum().item()
        for result in (plain, better)
    )
    assert right < 0.5 * wrong
    assert preset("paper").repair == "none" and not preset("paper").batch_norm
    assert PruneConfig().repair == "walk" and PruneConfig().batch_norm


def test_bad_input_is_told() -> None:
    model, x = perceptron(), seeded(64, 4)
    with pytest.raises(SignalError, match="ridge=0"):
        repaired(model, x, {"0": [0]}, ridge=0)
    groups = discover(model, x)
    states = record(model, groups, [x], consumed=True)
    wrong = states["0"].output.select(torch.arange(3))
    with pytest.raises(SignalError, match="moments of 3 features, it reads 6"):
        compensate(model, groups, {"0": [0]}, {"0": {"2.weight": wrong}})
    assert not record(model, groups, [x])["0"].consumed


def test_too_few_samples_and_too_many_features_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    config = {"plan": {"reduction": 0.5, "rounds": 1}, "score": {"criterion": "l2"}}
    few = prune(model, [seeded(31, 4)], PruneConfig(**config, repair="once"))
    enough = prune(model, [seeded(32, 4)], PruneConfig(**config, repair="once"))
    assert not few.rounds[0].repairs and enough.rounds[0].repairs
    assert few.changed == "" and "repaired in closed form" in enough.changed
    monkeypatch.setattr(sys.modules["cria_prune.repair.consumers"], "WIDEST", 2)
    assert not prune(model, [seeded(32, 4)], PruneConfig(**config, repair="once")).rounds[0].repairs
