"""Files that an earlier Cria wrote are read as they were.

Those in `tests/data/files-of-before` are by commit 2590fd4, before a round was read and written in one place:
two rounds of `network()` on `data()`, and the first of two rounds of a small Llama layer by layer. A state
is refused by every other version of the code, so what is read there is what lies below that check.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune import PruneConfig, RecoverConfig, load, load_scores, prune, recover
from cria_prune.base.errors import ArtifactError
from cria_prune.graph.graph import NeuronGraphs
from cria_prune.report.folder import folder_page, read_run, write_run
from cria_prune.result import PruneResult, Round
from cria_prune.resume import rounds, turns
from cria_prune.resume.store import Store

BEFORE = Path(__file__).parents[1] / "data" / "files-of-before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
CONFIG = PruneConfig(plan={"reduction": 0.5, "rounds": 2, "ranking": "uniform"}, repair="once")
ONE_ROUND = PruneConfig(plan={"reduction": 0.5, "rounds": 1}, repair="once")


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8),
            nn.GELU(), nn.Linear(8, 3),
        ).eval()  # fmt: skip


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 1, 3, 3, generator=generator) for _ in range(3)]


def gone_on(folder: Path) -> PruneResult:
    """The pruning whose first round is kept."""
    return prune(network(), data(), CONFIG, graphs=True, state=folder, data="d" * 8, evaluate=lambda _: 0.25)


def plain(item: Round) -> Any:
    """A round as JSON, without the wall times."""
    return {key: value for key, value in json.loads(json.dumps(asdict(item))).items() if key != "seconds"}


def lists(kept: Any) -> dict[str, list[int]]:
    return {name: list(units) for name, units in kept.items()}


def same_graphs(found: Any, exact: bool) -> None:
    assert found.keys() == EXPECTED["graphs"].keys()
    for name, both in found.items():
        assert isinstance(both, NeuronGraphs)
        expected = EXPECTED["graphs"][name]
        assert both.units.tolist() == expected["units"]
        for graph, said in ((both.input, expected["input"]), (both.output, expected["output"])):
            assert (graph.rows.tolist(), graph.cols.tolist()) == (said["rows"], said["cols"])
            assert graph.ridge == said["ridge"]
            weights = torch.tensor(said["weights"], dtype=torch.float64)
            assert torch.equal(graph.weights, weights if exact else weights.float().double())


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a state of another version of the code for one of this."""
    monkeypatch.setattr(Store, "check", lambda *_: None)


def test_a_pruning_goes_on_after_the_round_that_was_kept(unchecked: None, tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "prune", tmp_path / "state")
    store = Store(tmp_path / "state", rounds.NAME, rounds.FORMAT, "pruning")
    kept: Any = store.read()
    result = gone_on(tmp_path / "state")
    assert result.rounds[0].seconds == kept[0]["rounds"][0]["seconds"]  # it was not run again
    expected = EXPECTED["prune"]
    assert lists(result.plan.kept) == expected["kept"]
    first, second = (plain(item) for item in result.rounds)
    known = {key: value for key, value in expected["rounds"][0].items() if key != "seconds"}
    said, proof = known.pop("repairs"), known.pop("verification")  # of which more is known by now
    assert [{key: item[key] for key in said[0]} for item in first["repairs"]] == said
    assert {key: first["verification"][key] for key in proof} == proof
    assert {key: first[key] for key in known} == known
    assert second["kept"] == expected["rounds"][1]["kept"] and second["number"] == 2
    same_graphs(result.graphs, exact=True)
    # The norms are measured otherwise by now: the second round is as after a first one of today.
    whole = prune(network(), data(), CONFIG)
    with torch.no_grad():
        assert torch.allclose(result.model(data()[0][:4]), whole.model(data()[0][:4]), atol=1e-5)


def test_a_state_of_before_is_refused_for_its_code_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "prune", tmp_path / "state")
    with pytest.raises(ArtifactError, match="its state is of another one"):
        gone_on(tmp_path / "state")
    kept: Any = Store(tmp_path / "state", rounds.NAME, rounds.FORMAT, "pruning").read()
    found = kept[0]["identity"]
    said = {"data": "d" * 8, "device": "cpu", "graphs": True, "scores": None, "metric of every round": True}
    asked = rounds.RoundStore(tmp_path, network(), CONFIG, data()[0][:2], **said).store.identity
    for part in ("record", "plan"):  # of `score` it depends on the criterion what is said
        assert found["config"][part].items() <= asked["config"][part].items()
    differing = {key for key in {*found, *asked} if found.get(key) != asked.get(key)}
    assert "code" in differing <= {"code", "torch", "config"}


def test_scores_and_what_the_repair_needs() -> None:
    scored = load_scores(BEFORE / "scores")
    assert {name: item.scores.tolist() for name, item in scored.importances.items()} == EXPECTED["scores"]
    means = {
        name: {weight: moments.mean.tolist() for weight, moments in by_weight.items()}
        for name, by_weight in (scored.consumed or {}).items()
    }
    assert means == EXPECTED["scored"]
    assert all(item.diagnosis.solver == "cholesky" for item in scored.importances.values())
    result = prune(network(), data(), ONE_ROUND, scores=scored)
    assert lists(result.plan.kept) == EXPECTED["from scores"] and result.rounds[0].repairs
    sketched = load_scores(BEFORE / "scores-sketched")
    assert {name: item.scores.tolist() for name, item in sketched.importances.items()} == EXPECTED["sketched"]
    assert sketched.consumed is not None
    (moments,) = sketched.consumed["0"].values()
    assert moments.covariance is None and moments.sketch is not None and moments.samples == 96


def test_what_a_run_kept_for_its_report(tmp_path: Path) -> None:
    found = read_run(BEFORE / "run")
    assert found is not None and len(found.rounds) == 2
    for item, expected in zip(found.rounds, EXPECTED["prune"]["rounds"], strict=True):
        assert item.number == expected["number"] and item.metric == 0.25
        assert json.loads(json.dumps(item.scores)) == expected["scores"]
        assert lists(item.kept) == {name: expected["kept"][name] for name in expected["scores"]}
        assert item.diagnosis == expected["diagnosis"] and item.seconds["record"] > 0
        assert item.verification is None and item.report == {}  # not known then
    same_graphs(found.graphs, exact=False)
    row = found.page["rounds"][0]
    assert row["parameters"] == 177 and 0 < row["masked_equals_pruned"] < 1e-10
    text = folder_page(BEFORE / "run").html
    assert "tiny: 50.00 % of the parameters removed" in text and "5 of 6 stay" in text
    write_run(tmp_path, found.page, found.rounds, found.graphs)  # as `cria recover` does
    again = read_run(tmp_path)
    assert again is not None and again.rounds == found.rounds
    assert row.items() <= again.page["rounds"][0].items()
    assert folder_page(tmp_path).html == text


def test_a_checkpoint() -> None:
    found = load(BEFORE / "checkpoint", network())
    assert lists(found.plan.kept) == EXPECTED["prune"]["kept"] and found.manifest["results"] == {"seed": 0}
    with torch.no_grad():
        assert torch.allclose(found.model(data()[0][:4]), torch.tensor(EXPECTED["outputs"]), atol=1e-5)


class Given:
    """Stands for the chain of a model's blocks."""

    def __init__(self) -> None:
        self.taken: dict[str, Any] = {}

    def form(self) -> dict[str, Any] | None:
        return self.taken

    def take(self, said: dict[str, Any]) -> None:
        self.taken = said


def test_rounds_and_turns_of_a_pruning_layer_by_layer(unchecked: None, tmp_path: Path) -> None:
    (done,) = turns.FinishedRounds(BEFORE / "offload", {}).read()
    assert (done.number, done.turns, done.kept) == (1, 2, {})  # its plan is made again from its scores
    assert done.verification is not None and done.verification.dtype == "float32"
    assert len(done.scores) == 4 == len(done.diagnosis) and len(done.repairs) == 2
    assert sum(map(len, done.scores.values())) == 28 and done.report["parameters"] == 1272

    shutil.copytree(BEFORE / "offload" / "round-2", tmp_path / "turns")
    spilled, chain = turns.Spilled(tmp_path / "turns", torch.device("cpu")), Given()
    number, found = turns.TurnStore(tmp_path / "turns", {}).read(spilled, chain)
    assert number == 1 and chain.taken["turn"] == 1
    assert found.keys() == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"}
    for item in found.values():
        assert item.diagnosis.solver == "cholesky" and (item.scores > 0).all()
    moments = spilled.get("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj.weight")
    assert moments is not None and moments.samples == 90 and moments.covariance is not None
    turns.TurnStore(tmp_path, {}).write(number, found, spilled, chain)
    again = turns.TurnStore(tmp_path, {}).read(turns.Spilled(tmp_path / "turns", torch.device("cpu")), chain)
    assert again[0] == 1 and repr(again[1]) == repr(found)


def test_a_fine_tune_goes_on(unchecked: None, tmp_path: Path) -> None:
    def small() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()

    def batches() -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [
            (torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator))
            for _ in range(3)
        ]

    config = RecoverConfig(epochs=3, lr=0.1)
    shutil.copytree(BEFORE / "recovery", tmp_path / "state")
    seen: list[int] = []

    def evaluate(_: nn.Module) -> float:
        seen.append(1)
        return 0.5

    found = recover(small(), batches(), config, evaluate=evaluate, state=tmp_path / "state")
    assert len(seen) == 2  # of the four epochs 0 to 3, two were over
    whole = recover(small(), batches(), config, evaluate=lambda _: 0.5)
    assert [row.epoch for row in found.history] == [0, 1, 2, 3] and found.best_epoch == whole.best_epoch == 3
    for one, two in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
