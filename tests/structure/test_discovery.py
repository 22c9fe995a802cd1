"""Discovery and surgery: the groups are right, and masked equals pruned."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cria_prune.base.errors import CaptureError, DataError, StructureError, VerificationError
from cria_prune.planning.plan import compose, make_plan
from cria_prune.stages import discover
from cria_prune.structure.axes import reshape_segments
from cria_prune.structure.discovery import discover as follow
from cria_prune.structure.groups import UnitGroups, shrink, without_residual
from cria_prune.surgery.removal import apply, slice_tensor
from cria_prune.surgery.verify import mask, verify
from cria_prune.tasks.models import build
from networks import Adaptive, Literal, Mixed, NoRule, OptionA, Plain, randomize

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NETWORKS = {
    "plain": Plain,
    "option-a": OptionA,
    "mixed": Mixed,
    "adaptive": Adaptive,
    "literal": Literal,
    "no-rule": NoRule,
}


def halves(groups: UnitGroups, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        group.name: np.sort(generator.permutation(group.size)[: max(1, group.size // 2)])
        for group in groups.prunable
    }


def sliced(groups: UnitGroups) -> dict[str, list[tuple[str, int, str]]]:
    return {group.name: [(item.tensor, item.dim, item.role) for item in group.slices] for group in groups}


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_pruned_and_shrink_equals_discovery(name: str) -> None:
    model = randomize(NETWORKS[name]())
    groups = discover(model, IMAGE)
    assert groups.prunable
    kept = halves(groups)
    plan = make_plan(groups, kept)
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, IMAGE).difference <= 1e-10
    smaller(IMAGE).sum().backward()
    again, shrunk = discover(smaller, IMAGE), shrink(groups, kept)
    assert shrunk.shapes == again.shapes and shrunk.positions == again.positions
    for left, right in zip(shrunk, again, strict=True):
        assert (left.name, left.size, left.kind) == (right.name, right.size, right.kind)
        pairs = [*zip(left.slices, right.slices, strict=True), *zip(left.inputs, right.inputs, strict=True)]
        pairs += zip(left.outputs, right.outputs, strict=True)
        for one, other in pairs:
            assert (one.tensor, one.dim) == (other.tensor, other.dim)
            assert np.array_equal(one.positions, other.positions)


def test_groups_of_a_plain_network() -> None:
    groups = discover(Plain(), IMAGE)
    assert [(group.name, group.kind, group.size, group.frozen is None) for group in groups] == [
        ("conv1", "channel", 8, True),
        ("conv2", "channel", 6, True),
        ("fc1", "neuron", 10, True),
        ("fc2", "neuron", 4, False),
    ]
    assert groups["fc2"].frozen == "is part of the model's output"
    assert sliced(groups)["conv1"] == [
        ("conv1.weight", 0, "produces"),
        ("conv1.bias", 0, "follows"),
        ("bn1.weight", 0, "follows"),
        ("bn1.bias", 0, "follows"),
        ("conv2.weight", 1, "consumes"),
        ("bn1.running_mean", 0, "follows"),
        ("bn1.running_var", 0, "follows"),
    ]
    consumer = groups["conv2"].consumers[0]
    assert consumer.tensor == "fc1.weight" and consumer.positions.tolist()[1] == [4, 5, 6, 7]
    assert [(tap.tensor, tap.site, tap.dim) for tap in groups["conv1"].inputs] == [
        ("bn1.weight", "output", 1)
    ]
    assert [(tap.tensor, tap.site) for tap in groups["conv2"].outputs] == [("fc1.weight", "input")]
    # 8x8 outputs of conv1, 6x6 of conv2, one row for each linear
    assert groups.positions == {"conv1.weight": 64, "conv2.weight": 36, "fc1.weight": 1, "fc2.weight": 1}


def test_option_a_shortcut_couples_the_middle_and_freezes_the_padding() -> None:
    groups = discover(OptionA(), IMAGE)
    stream = groups["stem"]
    assert stream.kind == "residual" and stream.size == 8 and stream.frozen is None
    last = next(item for item in stream.slices if (item.tensor, item.dim) == ("b2.weight", 0))
    assert last.positions.ravel().tolist() == list(range(4, 12))
    padded = groups["b2"]
    assert padded.size == 8 and "padded with a fixed number of channels" in (padded.frozen or "")
    assert without_residual(groups)["stem"].frozen
    assert without_residual(groups)["a1"].frozen is None


def test_groups_of_the_mixed_network() -> None:
    groups = discover(Mixed(), IMAGE)
    slices = sliced(groups)
    assert ("depthwise.weight", 0, "follows") in slices["expand"]
    assert groups["expand"].slices[1].tensor == "excite.weight"
    assert groups["expand"].size == 8 and groups["squeeze"].size == 5
    # three groups of four inputs and the two halves of a chunk: i, i+4, i+8 and i, i+6 leave together
    assert groups["project"].size == 2
    assert groups["grouped"].size == 3
    assert groups["up"].size == 6 and ("shared.weight", 0, "produces") in slices["up"]


def test_a_literal_reshape_is_restated_after_a_trial_and_an_adaptive_one_is_not() -> None:
    groups = discover(Literal(), IMAGE)
    assert groups["conv"].frozen is None and groups["conv"].restated == ("",)
    assert groups["free"].frozen is None and groups["free"].restated == ()
    assert discover(Adaptive(), IMAGE)["conv"].restated == ()
    assert follow(Literal(), IMAGE)["conv"].assumes == (
        "reshape in the model takes its sizes from its input",
    )


def test_a_literal_reshape_cut_by_force_fails_verification() -> None:
    model = randomize(Literal())
    groups = follow(model, IMAGE)
    plan = make_plan(groups, {"conv": range(4)})
    with pytest.raises(VerificationError, match="the relative difference is"):
        verify(model, plan, apply(model, plan), IMAGE)


def test_an_operation_without_rule_freezes_with_its_name() -> None:
    groups = discover(NoRule(), IMAGE)
    assert groups["conv"].frozen == "no rule for the operation sort in the model"
    assert groups["mid"].frozen is None


@pytest.mark.parametrize("name", ["digits", "cifar10-resnet20", "cifar10-resnet56"])
def test_own_architectures(name: str) -> None:
    model = randomize(build(name))
    image = torch.randn(2, *((1, 8, 8) if name == "digits" else (3, 32, 32)))
    groups = discover(model, image)
    plan = make_plan(groups, halves(groups))
    assert verify(model, plan, apply(model, plan), image).difference <= 1e-10


def test_reshape_segments() -> None:
    assert reshape_segments([2, 6, 4], [2, 3, 2, 4]) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert reshape_segments([1, 6, 1], [6]) == [([1], [0])]


def test_capture_leaves_mode_and_random_state() -> None:
    model = Plain().train()
    model.bn1.eval()
    before, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    discover(model, IMAGE)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrong_example_and_data_dependent_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"forward pass of Plain on the example inputs of shape \[\(2, 5, 8, 8\)\]"
    ):
        discover(Plain(), torch.randn(2, 5, 8, 8))

    class Branch(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    # The operations are those of one run, and where that cannot be followed either, the error is export's.
    assert "reads values at module 'Branch', forward() line" in discover(Branch(), IMAGE).notes[0]
    monkeypatch.setattr("cria_prune.structure.trace.one_run", None)
    with pytest.raises(CaptureError, match=r"torch.export stops at .*module 'Branch', forward\(\) line \d+"):
        discover(Branch(), IMAGE)


def test_apply_leaves_the_dense_model_and_restates_sizes() -> None:
    model = randomize(Mixed())
    before = copy.deepcopy(model.state_dict())
    groups = discover(model, IMAGE)
    smaller = apply(model, make_plan(groups, halves(groups)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert smaller.expand.out_channels == smaller.depthwise.groups == smaller.depthwise.in_channels == 4
    assert smaller.depthwise.out_channels == smaller.bn.num_features == 8
    assert smaller.squeeze.in_features == 8 and smaller.grouped.groups == 3
    assert smaller.up.out_channels == smaller.slope.num_parameters == 3
    assert (smaller.shared.in_features, smaller.shared.out_features) == (3, 3)
    assert isinstance(smaller.up.weight, nn.Parameter) and smaller.up.weight.requires_grad


def test_apply_in_place_and_shared_parameters_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.first(x)) + self.second(x))

    model, data = Tied(), torch.randn(4, 3)
    groups = discover(model, data)
    plan = make_plan(groups, halves(groups))
    smaller = apply(model, plan)
    assert smaller.first.weight is smaller.second.weight and smaller.first.weight.shape == (3, 3)
    assert verify(model, plan, smaller, data).difference <= 1e-10
    expected = mask(model, plan)(data)
    assert apply(model, plan, inplace=True) is model
    assert torch.allclose(model(data), expected, atol=1e-6) and model.out.in_features == 3


def test_a_plan_for_another_model_is_refused_and_nothing_changes() -> None:
    plain = Plain()
    groups = discover(plain, IMAGE)
    plan = make_plan(groups, halves(groups))
    other = OptionA()
    with pytest.raises(StructureError, match="the model has no such tensor"):
        apply(other, plan, inplace=True)
    smaller = apply(plain, plan)
    with pytest.raises(StructureError, match="the model's tensor has shape"):
        apply(smaller, plan, inplace=True)


def test_verify_sees_a_wrong_cut() -> None:
    torch.manual_seed(0)  # else all the units that read the changed weight may be silent
    model = randomize(Plain())
    groups = discover(model, IMAGE)
    plan = make_plan(groups, halves(groups))
    smaller = apply(model, plan)
    with torch.no_grad():
        smaller.conv2.weight[0, 0] += 1e-6
    with pytest.raises(VerificationError, match="the relative difference is"):
        verify(model, plan, smaller, IMAGE)
    other = make_plan(groups, halves(groups, seed=5))
    with pytest.raises(VerificationError):
        verify(model, plan, apply(model, other), IMAGE)


def test_slice_tensor_keeps_a_parameter() -> None:
    weight = nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)
    smaller = slice_tensor(weight, [(0, [0, 2]), (1, [1, 3])])
    assert isinstance(smaller, nn.Parameter) and not smaller.requires_grad
    assert smaller.tolist() == [[1, 3], [9, 11]]
    assert slice_tensor(weight.to("meta"), [(0, [1])]).shape == (1, 4)


def test_a_grouped_convolution_with_one_input_left_per_group_is_not_depthwise() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1)))
    groups = discover(model, IMAGE)
    first = {"0": [1]}
    step = make_plan(shrink(groups, first), {"1": [0]})
    total = compose(make_plan(groups, first), step)
    smaller = apply(apply(model, make_plan(groups, first)), step)
    assert (smaller[1].groups, smaller[1].in_channels, smaller[1].out_channels) == (4, 4, 4)
    assert verify(model, total, smaller, IMAGE).difference <= 1e-10
