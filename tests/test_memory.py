"""The prediction of memory: closed forms against the tensors that are really there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from cria_prune import (
    PruneConfig,
    RecordConfig,
    ScoreConfig,
    discover,
    predict_memory,
    prune,
    record,
)
from cria_prune.base.errors import CriterionError
from cria_prune.base.modules import meta_copy
from cria_prune.cli import plans
from cria_prune.criteria.evidence import Sizes
from cria_prune.criteria.score import score
from cria_prune.criteria.table import CRITERIA
from cria_prune.graph.moments import MomentAccumulator
from cria_prune.memory import LiveBytes, amount, carried_on, largest_batch, observe, storages
from cria_prune.recording.sampling import BUFFERED, Buffer, Sampler
from cria_prune.recording.signals import Collector
from cria_prune.recording.states import GroupStates, reads_of
from cria_prune.structure.groups import UnitGroups, without_residual
from cria_prune.tasks.models import build
from networks import Plain, randomize

PARTS = ("mean", "variance", "covariance", "sketch", "positive")
HELD = ("_mean", "_square", "_shift", "_gram", "_positive", "_buckets", "_signs")


class Attention(nn.Module):
    """Heads of several features, and neurons that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(24, 4, batch_first=True)
        self.up, self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x, x, x, need_weights=False)[0]
        y = torch.relu(self.up(x))
        return x + self.first(y) + self.second(y)


def made(kind: str) -> tuple[nn.Module, UnitGroups, Tensor]:
    torch.manual_seed(0)
    model, batch = (
        (Attention(), torch.randn(6, 10, 24)) if kind == "tokens" else (Plain(), torch.randn(6, 3, 9, 9))
    )
    model = randomize(model)
    return model, without_residual(discover(model, batch)), batch


def slow(tensors: Iterable[Tensor | None]) -> int:
    """The bytes of the storages behind tensors, one by one."""
    return storages(item for item in tensors if item is not None)


def of_states(item: GroupStates) -> list[Tensor | None]:
    inputs = [] if item.inputs is None or item.input is None else [*item.inputs, item.input]
    moments = [*inputs, *item.outputs, item.output, *item.consumed.values()]
    features = [part for each in (item.features, *item.features_by_half) for part in each.values()]
    return [
        *(
            getattr(m, name)
            for m in moments
            for name in ("mean", "variance", "covariance", "sketch", "positive")
        ),
        *(tensor for part in features for tensor in (part.mean, part.variance)),
    ]


@pytest.mark.parametrize("kind", ["tokens", "images"])
@pytest.mark.parametrize("exact", [2048, 30, 5])
@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("reads", ["input output positive", "output", "positive", ""])
def test_what_every_group_keeps_is_exact(
    kind: str, exact: int, consumed: bool, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, groups, batch = made(kind)
    kept = reads_of(frozenset(reads.split()))
    config = RecordConfig(exact_units=exact, sketch_columns=16)
    found: list[tuple[int, int]] = []

    class Watched(Collector):
        def states(self, *arguments: dict) -> dict[str, GroupStates]:  # type: ignore[override]
            for name, sides in self._sides.items():
                totals = [half.flush() for side in sides for half in side or ()]
                read = [buffer.flush() for buffer in self._consumed[name].values()]
                features = [
                    tensor
                    for sums in self._sums[name].values()
                    for part in sums._halves.values()
                    for tensor in (part.mean, part.variance)
                ]
                found.append(
                    (
                        slow([*(getattr(item, key) for item in totals for key in HELD), *features]),
                        slow(getattr(item, key) for item in read for key in HELD),
                    )
                )
            return super().states(*arguments)

    monkeypatch.setattr(import_module("cria_prune.recording.collect"), "Collector", Watched)
    states = record(model, groups, [batch, batch], config, consumed=consumed, reads=kept)
    assert len(found) == len(groups.prunable) >= 2
    together = Collector(groups.prunable, config, consumed, kept).memory()
    for group, held, said in zip(groups.prunable, found, together, strict=True):
        assert Collector([group], config, consumed, kept).memory() == [said] and said.name == group.name
        assert (said.collected, said.collected_consumed) == held, group.name
        assert said.afterwards == slow(of_states(states[group.name])), group.name
        assert said.sketched == (bool(kept & {"input", "output"}) and group.size > exact)


def test_live_bytes_count_what_operations_make_and_forget_what_is_freed() -> None:
    known = torch.zeros(10, 10)
    with LiveBytes([known]) as live:
        view = known.T.reshape(100)  # a copy: 400 bytes
        known[:5] + 1  # 200 bytes, gone at once
        again = view.view(10, 10)
    assert (live.now, live.peak) == (400, 600)
    del view
    assert live.now == 400  # the second view holds on to it
    del again
    assert live.now == 0


@pytest.mark.parametrize("kind", ["tokens", "images"])
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"gradients"})])
def test_two_examples_foretell_a_batch(kind: str, needs: frozenset[str]) -> None:
    model, groups, batch = made(kind)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    twice = batch.repeat(2, *[1] * (batch.ndim - 1))
    (one, two), (several, whole) = (
        [observe(model, groups.prunable, given, needs, loss, examples=count) for count in (1, 2)]
        for given in (batch, twice)
    )
    assert (several, whole) == (one, two)
    real = observe(model, groups.prunable, batch, needs, loss, examples=len(batch))
    assert carried_on(one, two, len(batch)) == real
    assert carried_on(one, two, 1) == one and carried_on(one, two, 2) == two


def test_shapes_alone_foretell_the_same_as_weights() -> None:
    model, groups, batch = made("images")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    real = predict_memory(model.train(), groups, batch)
    empty = predict_memory(meta_copy(model), groups, batch.to("meta"))
    assert real == replace(empty, device="cpu")
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(CriterionError, match=r"gradients.*meta device.*without gradients"):
        predict_memory(meta_copy(model), groups, batch.to("meta"), PruneConfig(score={"criterion": "taylor"}))


def test_a_prediction_says_where_the_bytes_go_and_what_saves_some() -> None:
    net = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 3))
    batch = torch.randn(64, 8)
    groups = discover(net, batch)
    found = predict_memory(net, groups, batch)
    record_stage, score_stage, repair_stage = found.stages
    square = 512**2  # three of the system that is solved, and its sums, in double precision
    assert repair_stage.parts["solving"] == 24 * square
    assert repair_stage.parts["sums"] == 8 * (square + 2 * 512 * 3)
    side = 8 * 512**2
    # Two halves of the output side while batches come, with buffers of half the size; at the end three of it,
    # and for a moment one more and its signs.
    assert record_stage.peak == pytest.approx((2 + 2 * 0.5 + 3 + 1.25) * side, rel=0.01)
    assert score_stage.peak == pytest.approx((3 + 4) * side, rel=0.01)
    both = predict_memory(net, groups, batch, PruneConfig(score={"criterion": "distortion"}))
    assert both.stages[0].peak == pytest.approx((4 + 4 * 0.5 + 6 + 1.25) * side, rel=0.01)
    assert found.model == 4 * (8 * 512 + 512 + 512 * 3 + 3)
    assert found.peak == found.model + max(stage.peak for stage in found.stages)
    assert found.largest_group is not None and found.largest_group.name == "0"
    assert "moments" in str(found) and f"peak {amount(found.peak)}" in str(found)
    assert not any("exact_units" in text for text, _ in found.savings)  # 2,048 columns are more than 512
    narrow = predict_memory(net, groups, batch, PruneConfig(record={"sketch_columns": 64}))
    assert narrow.savings[0][0].startswith("record.exact_units: 256")
    assert all(size < max(stage.peak for stage in narrow.stages) for _, size in narrow.savings)
    again = predict_memory(
        net, groups, batch, PruneConfig(record={"examples": 10**6})
    )  # the buffers are full
    assert again.stages[:2] == found.stages[:2]
    weights = predict_memory(net, groups, batch, PruneConfig(score={"criterion": "l1"}, repair="none"))
    assert [stage.name for stage in weights.stages] == ["score"] and weights.passes == 0
    assert weights.largest_group is None
    repaired = predict_memory(net, groups, batch, PruneConfig(score={"criterion": "l1"}))
    assert [stage.name for stage in repaired.stages] == ["score", "repair"]
    assert (repaired.passes, repaired.walked) == (1, 1)


def test_a_reading_takes_what_the_sampler_takes() -> None:
    sampler = Sampler(RecordConfig(tokens=5, positions=7))

    def taken(*shape: int, dim: int = -1) -> int:
        said = sampler.taken(shape, dim, 4)
        sampler.begin(0, 4, None)
        halves = sampler.halves(torch.zeros(shape), dim, "x", sketched=False)
        assert said == sum(len(samples) for _, samples, _ in halves)
        return said

    assert (taken(4, 3), taken(128, 3), taken(127, 3)) == (4, 128, 127)
    assert (taken(4, 32, 3), taken(8, 32, 3), taken(9, 32, 3)) == (4 * 5, 4 * 8, 9 * 32)
    assert taken(4, 3, 9, 9, dim=1) == 4 * 7


def test_layers_whose_graphs_are_kept_count_with_both_sides() -> None:
    net = nn.Sequential(nn.Linear(8, 3000), nn.ReLU(), nn.Linear(3000, 512), nn.ReLU(), nn.Linear(512, 3))
    batch = torch.randn(64, 8)
    groups = discover(net, batch)
    config = PruneConfig(score={"criterion": "activation-norm"}, repair="none")
    plain, drawn = (predict_memory(net, groups, batch, config, graphs=graphs) for graphs in (False, True))
    # The wider layer is never drawn. Of the other three moments of both sides are kept instead of variances.
    assert drawn.stages[1].parts["states"] - plain.stages[1].parts["states"] == pytest.approx(
        6 * 8 * 512**2, rel=0.01
    )
    wide = {item.name: item.afterwards for item in drawn.groups}
    assert wide["0"] == {item.name: item.afterwards for item in plain.groups}["0"]
    result = prune(net, [batch] * 4, config, graphs=True)
    assert set(result.graphs or {}) == {"2"}


@pytest.mark.parametrize(
    "criterion", ["distortion", "innovation", "chip", "consumed-distortion", "fpgm", "lamp"]
)
def test_every_step_of_scoring_is_counted(criterion: str) -> None:
    """The tensors that torch makes while scoring, which a mode sees, are not more than what is said."""
    model = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 3))
    batch = torch.randn(64, 8)
    groups = discover(model, batch)
    config = PruneConfig(score={"criterion": criterion, "split_half": False})
    states = record(model, groups, [batch] * 8)
    stage = next(item for item in predict_memory(model, groups, batch, config).stages if item.name == "score")
    said = sum(size for name, size in stage.parts.items() if name not in ("states", "for the repair"))
    with LiveBytes([]) as live:
        score(model, groups, states, config.score)
    vectors = 20 * 8 * 300  # means, norms, indices: as good as nothing where it matters
    assert live.peak <= 1.02 * said + vectors
    assert criterion in ("distortion", "consumed-distortion", "chip", "lamp") or said <= 2.5 * live.peak


def test_the_largest_batch_is_that_of_the_most_bytes() -> None:
    small, large = {"x": torch.zeros(9, 2)}, {"x": torch.zeros(3, 8), "labels": torch.zeros(3)}
    assert largest_batch([small, large]) is large


def test_the_machine_and_its_container_say_what_there_is(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(plans, "CGROUP", limit)
    whole = plans.available_memory(torch.device("cpu"))
    assert whole is not None and whole > 2**20
    limit.write_text("max\n")
    assert plans.available_memory(torch.device("cpu")) == whole
    limit.write_text("1000\n")
    assert plans.available_memory(torch.device("cpu")) == 1000


def test_a_family_network_is_foretold() -> None:
    model = build("digits").eval()
    batch = torch.randn(4, 1, 8, 8)
    groups = discover(model, batch)
    found = predict_memory(model, groups, batch, PruneConfig(score={"criterion": "activation-norm"}))
    assert (found.passes, found.recorded, found.walked) == (3, 1, 1)  # it has batch norms


def test_weights_are_read_in_double_precision_and_those_of_a_convolution_are_turned_first() -> None:
    _, groups, _ = made("images")
    for criterion, most in (("l2", 8 * 8 * 3 * 9), ("fluctuation", 12 * 6 * 8 * 9), ("chip", 0)):
        sizes = Sizes(groups["conv1"], groups.shapes)
        found = CRITERIA[criterion].memory(sizes, ScoreConfig(criterion=criterion))
        assert found.get("weights", 0) == most


def test_small_batches_are_held_back_up_to_a_bound() -> None:
    total = MomentAccumulator(16)
    buffer = Buffer(total)
    for batches in range(1, 5):
        buffer.add(torch.randn(16, 100))
        assert buffer.holds(100, batches) == 16 * buffer._used
    assert buffer.holds(100, 10**6) == BUFFERED and buffer.holds(BUFFERED // 16, 3) == 0
    small = predict_memory(*made("images"), PruneConfig(record={"examples": 12}))
    large = predict_memory(*made("images"), PruneConfig(record={"examples": 24}))
    buffers = [item.stages[0].parts["buffers"] for item in (small, large)]
    assert buffers[1] == 2 * buffers[0] > 0
