"""Models in every state and kind: types, devices, modes, inputs, outputs, shared and loose parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.structure.rules.test_attention import TOKENS, Expanded, Torch
from torch import Tensor, nn

from cria_prune import PruneConfig, discover, prune
from cria_prune.planning.plan import make_plan
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import verify
from networks import Mixed, Plain, randomize

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))


def cut_exactly(model: nn.Module, example: Any) -> UnitGroups:
    """Discover, cut random units of every prunable group, verify and train a step; return the groups."""
    groups = discover(model, example)
    for seed in range(2):
        generator = np.random.default_rng(seed)
        kept = {
            item.name: np.sort(generator.permutation(item.size)[: generator.integers(1, item.size + 1)])
            for item in groups.prunable
        }
        plan = make_plan(groups, kept)
        assert verify(model, plan, apply(model, plan), example).difference <= 1e-10
    return groups


def names(groups: UnitGroups) -> dict[str, int]:
    return {group.name: group.size for group in groups if group.frozen is None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    model = randomize(Plain()).to(dtype)
    groups = cut_exactly(model, IMAGE.to(dtype))
    assert names(groups) == names(discover(randomize(Plain()), IMAGE))
    assert all(tensor.dtype == dtype for tensor in model.parameters())


@pytest.mark.parametrize("kind", [Plain, Mixed, Expanded, Torch])
def test_a_model_without_values_has_the_same_groups(kind: type[nn.Module]) -> None:
    example = IMAGE if kind in (Plain, Mixed) else TOKENS
    torch.manual_seed(0)
    real = randomize(kind())
    with torch.device("meta"):
        empty = kind()
    found, expected = discover(empty, example.to("meta")), discover(real, example)
    assert names(found) == names(expected) and found.positions == expected.positions
    assert all(tensor.is_meta for tensor in empty.parameters())


def test_a_model_in_training_mode_is_left_in_it() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)))

    model = randomize(Noisy()).train()
    model.norm.eval()
    statistics, state = model.norm.running_mean.clone(), torch.random.get_rng_state()
    assert names(cut_exactly(model, TOKENS)) == {"first": 8}
    assert model.training and model.drop.training and not model.norm.training
    assert torch.equal(model.norm.running_mean, statistics) and torch.equal(
        torch.random.get_rng_state(), state
    )


@dataclasses.dataclass
class Outputs:
    logits: Tensor
    score: Tensor | None = None


torch.utils._pytree.register_dataclass(Outputs)


class Several(nn.Module):
    """Two inputs by keyword, one of them optional; a dataclass of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.image = nn.Embedding(11, 8), nn.Conv2d(3, 8, 3)
        self.mix, self.logits, self.score = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, ids: Tensor, pixels: Tensor | None = None, *, scale: Tensor) -> Outputs:
        x = self.table(ids).mean(1)
        if pixels is not None:
            x = x + self.image(pixels).amax((2, 3))
        x = F.gelu(self.mix(x * scale))
        return Outputs(self.logits(x), self.score(x))


def test_several_inputs_by_keyword_and_several_outputs() -> None:
    batch = {"ids": IDS, "pixels": IMAGE, "scale": torch.ones(2, 1)}
    model = randomize(Several())
    groups = cut_exactly(model, batch)
    assert names(groups) == {"table": 8, "mix": 6}
    assert {item.tensor for item in groups["table"].producers} == {"table.weight", "image.weight"}
    # Without images their part may still read and make as many; beside them it is cut with the rest.
    text = {"ids": IDS, "scale": torch.ones(2, 1)}
    assert names(cut_exactly(model, text)) == {"mix": 6}
    assert discover(model, text, examples=[batch])["table"].frozen is None
    batches = [{key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in batch.items()}]
    result = prune(model, batches, PruneConfig(plan={"reduction": 0.2, "residual": True, "floor": 0.0}))
    assert result.report["reached"] >= 0.2


class Loose(nn.Module):
    """Parameters that belong to no layer: factors, biases, products, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.ParameterList([nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.rand(6))])
        self.second, self.last = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 3)
        self.register_buffer("mean", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu((x @ self.weight) * self.scale + self.shift[0] - self.mean)
        return self.last(torch.relu(x @ self.second.T + self.shift[1]))


def test_parameters_outside_of_layers() -> None:
    groups = cut_exactly(randomize(Loose()), TOKENS)
    assert names(groups) == {"weight": 8, "second": 6}
    assert {item.tensor for item in groups["weight"].slices} == {
        "weight",
        "scale",
        "shift.0",
        "mean",
        "second",
    }


class Tied(nn.Module):
    """An embedding whose weight is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.back = nn.Embedding(11, 8), nn.Linear(8, 5), nn.Linear(5, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.out(x + self.back(F.relu(self.inner(x))))


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    model = randomize(Tied())
    groups = cut_exactly(model, IDS)
    assert names(groups) == {"table": 8, "inner": 5} and groups["table"].kind == "residual"
    roles = {(item.tensor, item.dim, item.role) for item in groups["table"].slices}
    assert {("table.weight", 1, "produces"), ("table.weight", 1, "consumes")} <= roles
    smaller = apply(model, make_plan(groups, {"table": [1, 4]}))
    assert smaller.out.weight is smaller.table.weight
    assert (smaller.table.embedding_dim, smaller.out.in_features, smaller.out.out_features) == (2, 2, 11)
    result = prune(
        model, [IDS.repeat(4, 1)], PruneConfig(plan={"reduction": 0.2, "residual": True, "floor": 0.0})
    )
    assert result.report["reached"] >= 0.2  # the signals of the two uses are told apart


class Cached(nn.Module):
    """Keeps a tensor of its first forward in evaluation mode on itself, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gain = nn.Linear(12, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8) + 1)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "gain" not in self.kept:
            self.kept["gain"] = self.gain.sqrt()
        return self.last(self.first(x) * self.kept["gain"])


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_what_a_forward_keeps_on_its_module_does_not_get_in_the_way() -> None:
    model = randomize(Cached())
    assert names(cut_exactly(model, TOKENS)) == {"first": 8}
    assert model.kept == {}
    with torch.no_grad():
        model(TOKENS)
    assert "meets a tensor of fixed size" in str(discover(model, TOKENS)["first"].frozen)


def test_a_width_of_one_is_told_apart_from_broadcasting() -> None:
    model = nn.Sequential(nn.Linear(12, 1), nn.ReLU(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = cut_exactly(model, TOKENS)
    assert groups["0"].frozen is None and names(groups) == {"0": 1, "2": 4}
    assert [item.tensor for item in groups["0"].consumers] == ["2.weight"]
