"""A round comes back from each kind of file as it went there, also with a field that comes later."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cria_prune import PruneConfig, prune
from cria_prune.bench import run as bench
from cria_prune.graph.graph import Graph, NeuronGraphs
from cria_prune.graph.moments import Moments
from cria_prune.planning.plan import identity_plan
from cria_prune.repair.consumers import Repair
from cria_prune.repair.fidelity import Distance, Fidelity
from cria_prune.report import folder as history
from cria_prune.result import OffloadedRound, PruneResult, Round
from cria_prune.resume import rounds, turns
from cria_prune.resume.rounds import (
    graph_tensors,
    graphs_of,
    moment_tensors,
    moments_of,
    ridges_of,
    round_of,
)
from cria_prune.surgery.verify import Verification

CONFIG = PruneConfig(plan={"reduction": 0.5, "rounds": 1}, score={"criterion": "l2"}, repair="none")
BATCHES = [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
FULL: dict[str, Any] = {
    "report": {"asked": 0.5, "of": "parameters", "parameters": 177.0, "reached": 1 / 3, "reachable": 1.0},
    "seconds": {"record": 0.25, "plan": 1e-9},
    "diagnosis": {"0": {"pieces_in": 1, "dead": [2], "gap": None, "values": [0.1], "split_half": 0.5}},
    "verification": Verification(2e-16, 1e-10, "float64", "operations"),
    "metric": 0.1 + 0.2,
    "repairs": (Repair("2.weight", 0.75, True), Repair("4.weight", 1.0, False)),
    "unrepaired": {"3.weight": "is read more than once"},
    "batch_norms": 3,
    "batch_norms_kept": "they have no statistics",
    "turns": 2,
    "losses": {"0": {3: 0.1, 1: 1 / 3}},
    "fidelity": {
        "as cut": Fidelity(
            102, (Distance("logits", 102, 0.1, 0.9, 1 / 3, 0.75), Distance("z", 7, 0.2, -0.5))
        ),
        "norms": Fidelity(102, (Distance("logits", 102, math.inf, 0.0, math.inf, 0.0),)),
    },
}
"""A value for each field that is not what the plan says."""


@dataclass(frozen=True)
class Drift:
    share: float
    stages: tuple[str, ...]


@dataclass(frozen=True)
class LaterRound(Round):
    drift: Mapping[str, Drift] = field(default_factory=dict)


@dataclass(frozen=True)
class LaterOffloadedRound(OffloadedRound):
    drift: Mapping[str, Drift] = field(default_factory=dict)


LATER = {"drift": {"cut": Drift(0.125, ("cut", "repair")), "batch norms": Drift(1 / 3, ())}}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.fixture(scope="module")
def pruned() -> PruneResult:
    return prune(network(), BATCHES, CONFIG)


def filled(result: PruneResult, kind: type[Round], later: Mapping[str, Any]) -> Round:
    """The round of a result, every field set to something else than its default."""
    own = {item.name: getattr(result.rounds[0], item.name) for item in fields(Round)}
    given = {**own, **FULL, **later}
    done = kind(**{item.name: given[item.name] for item in fields(kind)})
    for item in fields(kind):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        assert getattr(done, item.name) not in ({}, (), None, default), f"FULL has no {item.name}"
    return done


def in_the_state(result: PruneResult, folder: Path) -> Round:
    """Write the rounds of a result as `prune(state=...)` does, and read them."""
    store = rounds.RoundStore(folder, network(), CONFIG, BATCHES[0])
    store.write(result)

    def planner(before: PruneResult, item: Round) -> Any:
        assert item.number == 1 and item.scores == result.rounds[0].scores
        return result.plan

    start = replace(result, model=network(), rounds=(), groups=result.dense, plan=identity_plan(result.dense))
    (found,) = store.resume(start, planner).rounds
    return found


def in_the_offloaded_state(result: PruneResult, folder: Path) -> Round:
    turns.FinishedRounds(folder, {}).write(result.rounds)  # type: ignore[arg-type]
    (found,) = turns.FinishedRounds(folder, {}).read()
    return found


def in_the_history(result: PruneResult, folder: Path) -> Round:
    history.write_run(folder, {}, result.rounds, {})
    kept = history.read_run(folder)
    assert kept is not None
    (found,) = kept.rounds
    return found


def in_the_cell(result: PruneResult, folder: Path) -> Round:
    """Read what a bench's cell says of a round; what it leaves out is taken from the round itself."""
    (said,) = json.loads(json.dumps(bench._found(result)))["rounds"]
    (item,) = result.rounds
    assert not {*bench.LEFT_OUT, "scores", "kept"} & said.keys()
    left = {key: getattr(item, key) for key in bench.LEFT_OUT}
    return replace(round_of({**said, "seconds": {}, "diagnosis": {}}, {}, {}, type(item)), **left,
                   scores=item.scores, kept=item.kept)  # fmt: skip


FILES: dict[str, Callable[[PruneResult, Path], Round]] = {
    "state": in_the_state,
    "offloaded": in_the_offloaded_state,
    "history": in_the_history,
    "cell": in_the_cell,
}


@pytest.mark.parametrize("name", FILES)
def test_a_round_comes_back_from_each_kind_of_file(name: str, pruned: PruneResult, tmp_path: Path) -> None:
    kind = OffloadedRound if name == "offloaded" else Round
    done = filled(pruned, kind, {})
    found = FILES[name](replace(pruned, rounds=(done,)), tmp_path)
    assert found == done and type(found) is kind
    assert type(found.verification) is Verification and type(found.repairs[0]) is Repair


@pytest.mark.parametrize("name", FILES)
def test_a_field_that_is_added_to_a_round_is_in_each_kind_of_file(
    name: str, pruned: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rounds, history):
        monkeypatch.setattr(module, "Round", LaterRound)
    monkeypatch.setattr(turns, "OffloadedRound", LaterOffloadedRound)
    kind, before = (LaterOffloadedRound, OffloadedRound) if name == "offloaded" else (LaterRound, Round)
    done = filled(pruned, kind, LATER)
    found = FILES[name](replace(pruned, rounds=(done,)), tmp_path)
    assert found == done and type(found) is kind
    # A file from before there was the field.
    old = filled(pruned, before, {})
    if name != "cell":  # nothing reads the rounds of a cell again
        found = FILES[name](replace(pruned, rounds=(old,)), tmp_path)
        assert found == kind(**{item.name: getattr(old, item.name) for item in fields(before)})


def test_what_a_file_says_beyond_the_fields_is_passed_over_and_what_is_missing_is_told() -> None:
    said = {"number": 1, "report": {}, "seconds": {}, "diagnosis": {}, "verification": None, "metric": None}
    assert round_of({**said, "later": 1}, {}, {}, Round) == Round(1, {}, {}, {}, {}, {}, None, None)
    for name in said:
        with pytest.raises(ValueError, match=name):
            round_of({key: value for key, value in said.items() if key != name}, {}, {}, Round)


@pytest.mark.parametrize("sketched", [False, True])
def test_moments_come_back(sketched: bool) -> None:
    moments = Moments.from_signals(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)))
    if sketched:
        moments = replace(moments, covariance=None, sketch=torch.ones(3, 2), positive=None)
    tensors = moment_tensors(moments, "here/")
    again = moments_of(9, tensors, "here/")
    for item in fields(Moments):
        one, two = getattr(moments, item.name), getattr(again, item.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one is two or one == two
    with pytest.raises(ValueError, match="not whole"):
        moments_of(9, tensors, "there/")


def test_graphs_come_back_in_all_bits_or_in_32() -> None:
    def graph(ridge: float) -> Graph:
        weights = torch.tensor([1 / 3, 1e-60], dtype=torch.float64)
        return Graph(4, torch.tensor([0, 1]), torch.tensor([3, 2]), weights, ridge)

    both = NeuronGraphs(torch.tensor([0, 2, 3, 7]), graph(0.5), graph(0.25))
    for short in (False, True):
        tensors = graph_tensors(both, "here/", short=short)
        again = graphs_of(ridges_of(both), tensors, "here/")
        assert torch.equal(again.units, both.units) and again.output.ridge == 0.25
        for one, two in ((both.input, again.input), (both.output, again.output)):
            assert torch.equal(one.rows, two.rows) and torch.equal(one.cols, two.cols)
            assert one.rows.dtype == two.rows.dtype and two.weights.dtype == torch.float64
            assert torch.equal(one.weights, two.weights) is not short and (two.weights > 0).all()
            assert torch.allclose(one.weights, two.weights, atol=1e-30)
    tensors["here/in/cols"] = tensors["here/in/cols"] + 1
    with pytest.raises(ValueError, match="here/in is no graph of 4 units"):
        graphs_of(ridges_of(both), tensors, "here/")
