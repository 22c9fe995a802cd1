"""Every kind of forward that a model has: training mode, further examples, copies, one run by dispatch."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from cria_prune import PruneConfig, apply, discover, predict_memory, prune, verify
from cria_prune.base.errors import CriaError, DataError, VerificationError
from cria_prune.planning.plan import make_plan
from cria_prune.repair.program import programs_for
from cria_prune.structure.one_run import OneRun
from cria_prune.structure.rules.core import module_path, operation_name
from cria_prune.structure.trace import capture, trace, wrapped_graph
from networks import randomize

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(1))
LONG = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(2))


class Auxiliary(nn.Module):
    """A head that runs in training only, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.auxiliary = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return [self.head(x), self.auxiliary(x)] if self.training else self.head(x)


class Averaged(nn.Module):
    """A teacher that follows the student by a method; a counter and a mean are put anew by each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.calls = 0

    def update(self) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(0.9).add_(theirs, alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.calls += 1
        random.random(), np.random.rand()
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.student(x)


class Branches(nn.Module):
    """The length, or else a value, decides which of two layers runs."""

    def __init__(self, by_length: bool = True) -> None:
        super().__init__()
        self.by_length, self.first, self.last = by_length, nn.Linear(8, 12), nn.Linear(10, 3)
        self.one, self.other, self.unused = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        other = x.shape[1] > 6 if self.by_length else x[0, 0, 0] > 0
        x = F.relu(self.first(x))
        return self.last(F.relu(self.other(x) if other else self.one(x)))


class Targets(nn.Module):
    """Its training mode needs boxes."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)
        self.boxes = nn.Linear(12, 4) if head else None

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Tensor:
        x = F.relu(self.first(x))
        if not self.training:
            return self.last(x)
        if boxes is None:
            raise ValueError("In training mode boxes are needed")
        return self.last(x).mean() + (self.boxes(x) - boxes).square().mean()


class Read(nn.Module):
    """Numbers of a constant, a shape cache, an autocast block, attention: torch.export stops at float()."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.shape, self.grid = torch.tensor([2.0, 4.0]), None, torch.empty(0)
        self.qkv, self.norm, self.out = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        if self.shape != x.shape:
            self.grid = torch.cat([torch.full((x.shape[1], 1), float(item)) for item in self.stride], 1)
            self.shape = x.shape
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False), torch.no_grad():
            x = self.down(F.gelu(self.up(x)))
        return {"y": x * self.grid.to(x).sum(1)[:, None], "x": [x.mean(1)]}


def cut_half(model: nn.Module, example: Any, **more: Any) -> nn.Module:
    """Prune by the walk as users do, and bare by hand with every prunable group at half, verified."""
    groups = discover(model, example, **more)
    plan = make_plan(groups, {group.name: range(0, group.size, 2) for group in groups.prunable})
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, example, **more).difference < 1e-10
    return smaller


def test_a_head_that_runs_in_training_only_is_cut_with_the_rest() -> None:
    model = randomize(Auxiliary()).train()
    groups = discover(model, IMAGES)
    reasons = {group.name: group.frozen for group in groups}
    assert reasons["conv"] is None and "runs only in training" in str(reasons["auxiliary.0"])
    assert not groups.notes
    smaller = prune(model, [IMAGES, IMAGES], PruneConfig(plan={"reduction": 0.3})).model
    assert smaller.auxiliary[0].in_features == smaller.head.in_features < 8
    assert [item.shape for item in smaller.train()(IMAGES)] == [(8, 4), (8, 4)]
    # Against the network with zeros by hand, without dropout: what is left computes the same in training.
    plan = make_plan(groups, {"conv": [0, 2, 5]})
    masked, bare = copy.deepcopy(model).double(), apply(model, plan).double()
    for layer in (masked.head, masked.auxiliary[0]):
        layer.weight.data[:, [1, 3, 4, 6, 7]] = 0
    masked.auxiliary[2].p = bare.auxiliary[2].p = 0.0
    for one, other in zip(masked.train()(IMAGES.double()), bare.train()(IMAGES.double()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert verify(model, plan, apply(model, plan), IMAGES).training == "equal"  # a seed makes chance equal


def test_a_wrong_cut_of_what_only_training_runs_fails() -> None:
    model = randomize(Auxiliary())
    model.auxiliary[2].p = 0.0
    plan = make_plan(discover(model, IMAGES), {"conv": [0, 2, 5]})
    smaller = apply(model, plan)
    assert verify(model, plan, smaller, IMAGES).training == "equal"
    with torch.no_grad():
        smaller.auxiliary[0].weight.copy_(smaller.auxiliary[0].weight.flip(1))
    with pytest.raises(VerificationError, match=r"in training mode .* the relative difference is"):
        verify(model, plan, smaller, IMAGES)
    smaller.auxiliary[0] = nn.Linear(8, 6)
    with pytest.raises(VerificationError, match="training-mode forward of the pruned model: RuntimeError"):
        verify(model, plan, smaller, IMAGES)


def test_a_teacher_is_cut_with_its_student_and_the_model_is_as_before() -> None:
    model, rows = randomize(Averaged()), TOKENS[:, 0]
    before, calls = copy.deepcopy(model.state_dict()), model.calls
    random.seed(3), np.random.seed(3)
    drawn = random.random(), np.random.rand()
    random.seed(3), np.random.seed(3)
    result = prune(model, [rows, rows], PruneConfig(plan={"reduction": 0.4}))
    predict_memory(model, result.dense, rows, PruneConfig())

    def failing(net: nn.Module, batch: Any) -> Tensor:
        net(batch[0] if isinstance(batch, tuple) else batch)
        raise ZeroDivisionError

    for asked in (
        {"score": {"criterion": "taylor"}},
        {"plan": {"reduction": 0.99}},
        {"plan": {"of": "latency", "reduction": 0.9}},
    ):
        with pytest.raises((CriaError, ZeroDivisionError)):
            prune(model, [(rows, rows), (rows, rows)], PruneConfig(**asked), loss=failing)  # type: ignore[arg-type]
    assert (random.random(), np.random.rand()) == drawn
    assert model.calls == calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    small = result.model
    assert small.teacher[0].out_features == small.student[0].out_features < 12
    small.update()
    assert small.teacher.eval()(rows).shape == (8, 3)
    # The same positions of both: what was equal before the cut is equal after it.
    model.teacher.load_state_dict(model.student.state_dict())
    plan = make_plan(discover(model, rows), {"student.0": [1, 4, 7]})
    cut = apply(model, plan)
    torch.testing.assert_close(cut.teacher.eval()(rows), cut.student.eval()(rows))


def test_two_trained_heads_of_one_shape_are_no_copies() -> None:
    class Heads(Auxiliary):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.Linear(8, 4)

    model = randomize(Heads())
    assert discover(model, IMAGES)["conv"].frozen is None
    assert not trace(model, IMAGES[:2]).copies


@pytest.mark.parametrize("by_length", [True, False], ids=["length", "value"])
def test_the_other_branch_follows_an_example_and_stays_whole_without(by_length: bool) -> None:
    model = randomize(Branches(by_length))
    short = TOKENS[:2].clone()
    short[:, 0, 0] = -1
    other = LONG if by_length else -short
    groups = discover(model, short)
    assert "'other.weight', which may count on these units: give an example" in str(groups["first"].frozen)
    assert "no forward that was tried reads other.weight, other.bias" in groups.notes[-1]
    assert ("reads values at module 'Branches', forward() line" in groups.notes[0]) == (not by_length)
    smaller = cut_half(model, short, examples=[other])
    assert (smaller.one.out_features, smaller.other.in_features) == (5, 6)
    assert smaller(other).shape == model(other).shape
    # `unused` is left over: no code names it, so that it holds nothing back.
    assert discover(model, short, examples=[other])["first"].frozen is None


def test_of_values_that_are_read_the_next_examples_take_part() -> None:
    model, batch = randomize(Branches(False)), TOKENS.clone()
    batch[:, 0, 0] = torch.tensor([-1.0, -1, 1, 1, -1, -1, 1, 1])
    batches = [batch, batch.flip(0).contiguous()]
    one, other = programs_for(model, batches)
    assert one is not other  # what one batch's values chose is not run for another
    result = prune(model, batches, PruneConfig(plan={"reduction": 0.4}))
    assert result.report["reached"] >= 0.35 and "the operations are those of one run" in str(result)
    assert all(result.model(item * sign).shape == (8, 5, 3) for item in batches for sign in (1, -1))


def test_a_training_mode_that_needs_targets() -> None:
    model, rows = randomize(Targets()), TOKENS[:2, 0]
    groups = discover(model, rows)
    assert "training mode failed: ValueError: In training mode boxes are needed" in str(
        groups["first"].frozen
    )
    boxes = {"x": rows, "boxes": torch.ones(2, 4)}
    smaller = cut_half(model, rows, examples=[boxes])
    assert smaller.boxes.in_features == 6
    smaller.train()(**boxes).backward()
    groups = discover(randomize(Targets(head=False)), rows)
    assert groups["first"].frozen is None
    assert (
        "training mode is not tried, for its forward fails (ValueError: In training mode" in groups.notes[0]
    )


def test_examples_that_are_none() -> None:
    model = randomize(Branches())
    with pytest.raises(DataError, match=r"Further examples \(examples=\): found Tensor .* Pass a list"):
        discover(model, TOKENS, examples=LONG)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="further example 2 of 2: RuntimeError: mat1 and mat2"):
        discover(model, TOKENS, examples=[LONG, LONG[:, :, :5]])


LAYERS = {"linear", "layer_norm", "scaled_dot_product_attention", "gelu"}


def test_one_run_gives_the_operations_that_export_gives() -> None:
    model = randomize(Read())
    run = capture(model, TOKENS[:2])
    assert isinstance(run, OneRun) and not run.reads
    model.stride = (2.0, 4.0)  # type: ignore[assignment]
    exported = capture(model, TOKENS[:2])
    assert not isinstance(exported, OneRun)

    def layers(graph: Graph) -> list[tuple[str, str]]:
        found = []
        for node in graph.nodes:
            inside = wrapped_graph(node) if node.op == "call_function" else None
            found += [] if inside is None else layers(inside[0])
            if operation_name(node) in LAYERS:
                found.append((operation_name(node), module_path(node)))
        return found

    assert layers(run.graph) == layers(exported.graph) and len(layers(run.graph)) == 7
    model.stride = torch.tensor([2.0, 4.0])
    smaller = cut_half(model, TOKENS)
    assert (smaller.up.out_features, smaller.qkv.out_features) == (8, 12)
    wider, more = torch.randn(3, 7, 8), cut_half(smaller, TOKENS)
    assert more.up.out_features == 4 and smaller(wider)["y"].shape == (3, 7, 3)
    assert model.shape is None
