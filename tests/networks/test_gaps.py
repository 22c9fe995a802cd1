"""Networks of kinds that came up late: adapters, size assertions, training that needs targets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune import PruneConfig, apply, discover, prune
from cria_prune.base.errors import DataError, TargetError


class Adapted(nn.Module):
    """A frozen layer and a trained update of low rank, as peft wraps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, outputs, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_pruned_with_their_layers_and_a_refusal_names_how_to_merge_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(6, 16), nn.ReLU(), Adapted(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    groups = discover(net, torch.randn(2, 6))
    assert {group.name for group in groups.prunable} == {
        "0.base_layer", "0.lora_A.default", "2.base_layer", "2.lora_A.default"
    }  # fmt: skip
    with pytest.raises(TargetError, match=r"merged into the weights first: model = model\.merge_and_unload"):
        prune(net, [torch.randn(8, 6) for _ in range(3)], PruneConfig(plan={"reduction": 0.99}))


class Judged(nn.Module):
    """Gives a loss in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out = self.down(torch.relu(self.up(x)))
        return functional.cross_entropy(out, y) if self.training else out


def test_a_forward_that_needs_targets_says_how_to_give_them_and_bad_examples_are_numbered() -> None:
    torch.manual_seed(0)
    net, x = Judged().eval(), torch.randn(4, 6)
    (note,) = discover(net, x).notes
    assert "training mode is not tried" in note and "examples=[{...}]" in note
    with_targets = {"x": x, "y": torch.tensor([0, 1, 2, 0])}
    assert not discover(net, x, examples=[with_targets]).notes
    bad = {
        "words": "A batch for the model, further example 2 of 2: found str",
        torch.randn(4, 7): r"further example 2 of 2: RuntimeError: mat1 and mat2",
        torch.tensor(1.0): "further example 2 of 2: found Tensor",
    }
    for example, text in bad.items():
        with pytest.raises(DataError, match=text):
            discover(net, x, examples=[with_targets, example])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"example 1 of 1: of its keys \(w\) the forward takes none"):
        discover(net, x, examples=[{"w": torch.zeros(4)}])


class Checking(nn.Module):
    """Compares sizes with what it stores, in the ways that people write."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.width, self.inner, self.shape = width, inner, (inner,)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.width, "another width"
        x = torch.relu(self.up(x))
        if x.size(-1) != self.inner:
            raise ValueError(f"expected {self.inner}")
        torch._check(tuple(x.shape[1:]) == self.shape)
        return torch.relu(self.down(x))


class Checked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 12), nn.ModuleList([Checking(12, 16)])
        self.sizes = [12, 10]
        self.gain, self.gated, self.last = nn.Parameter(torch.randn(10)), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for block in self.blocks:
            x = block(x)
        assert [x.shape[-1], self.gated.out_features] == self.sizes
        return self.last(torch.relu(torch.mul(*torch.broadcast_tensors(self.gated(x), self.gain))))


class Literal(Checked):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        assert x.shape[1] == 12
        return self.last(torch.relu(self.gated(self.blocks[0](x)) * self.gain))


def test_sizes_that_code_checks_are_followed_and_a_literal_one_freezes_with_its_check() -> None:
    torch.manual_seed(0)
    net = Checked().eval()
    result = prune(net, [torch.randn(16, 6) for _ in range(3)], PruneConfig(plan={"reduction": 0.4}))
    small = result.model
    assert len(result.dense.prunable) == 4
    assert small.sizes == [small.blocks[0].down.out_features, small.gated.out_features] != net.sizes
    assert net.sizes == [12, 10]
    # By hand: the weights whose value is gone are zero in the dense network. Another batch, and training.
    cut, x = apply(net, result.plan).double(), torch.randn(5, 6).double()
    left, twin = dict(cut.named_parameters()), copy.deepcopy(net).double()
    with torch.no_grad():
        for name, item in twin.named_parameters():
            item.mul_(torch.isin(item, left[name]))
    for training in (False, True):
        torch.testing.assert_close(twin.train(training)(x), cut.train(training)(x))
    assert len(discover(small, x[:2].float()).prunable) == 4  # cut a second time
    kept = {group.name: group.frozen or "" for group in discover(Literal().eval(), torch.randn(2, 6))}
    assert "AssertionError" in kept["first"] and not kept["blocks.0.up"]
