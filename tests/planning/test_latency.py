"""Seconds as a cost: the additive model, the table as JSON, and what it is refused for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.planning.test_selection import two_layers

from cria_prune.base.errors import ArtifactError, ConfigError, StructureError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import Budget
from cria_prune.planning.latency import LatencyTable, Timed, structure_digest
from cria_prune.planning.plan import plan
from cria_prune.structure.groups import freeze, shrink

OF = Timed(device="cpu x", threads=1, batch=4, inputs=("float32 (4, 3)",), structure="s", torch="2")


def table(saved=None) -> LatencyTable:
    saved = saved or {"a": {8: 0.1, 4: 0.4, 1: 0.5}, "b": {5: 0.2, 1: 0.3}}
    return LatencyTable(of=OF, dense=1.0, sizes={"a": 10, "b": 10}, saved=saved)


def test_seconds_are_those_of_the_dense_network_without_what_each_group_saves():
    groups = two_layers()
    budget = Budget(groups, "latency", table())
    assert budget.total == 1.0
    assert budget.amount(groups, {"a": 8}) == pytest.approx(0.9)
    assert budget.amount(groups, {"a": 6, "b": 5}) == pytest.approx(1 - 0.25 - 0.2)
    assert budget.amount(groups, {"a": 9}) == pytest.approx(0.95)
    smaller = shrink(groups, {"a": np.arange(4)})
    assert budget.amount(smaller) == pytest.approx(0.6)
    assert budget.reduction(smaller, {"b": 1}) == pytest.approx(0.7)
    ledger = budget.ledger(groups)
    assert np.diff(ledger.along(["a"], np.array([10, 8, 4]), {})) == pytest.approx([-0.1, -0.3])


def test_noise_does_not_make_a_smaller_layer_slower_and_never_all_seconds_go():
    noisy = table({"a": {8: -0.2, 4: 0.3, 2: 0.2}, "b": {1: 5.0}}).ledger(two_layers())
    assert [noisy.count({"a": count}) for count in (9, 8)] == [1.0, 1.0]
    assert noisy.count({"a": 4}) == noisy.count({"a": 2}) == pytest.approx(0.75)
    assert noisy.count({"a": 2, "b": 1}) == pytest.approx(1e-3)


def test_shares_by_losses_reach_the_seconds():
    groups, scores = two_layers(), {name: np.arange(10.0) for name in "ab"}
    losses = {"a": {5: 1.0, 1: 9.0}, "b": {5: 0.5, 1: 1.0}}
    config = PlanConfig(of="latency", reduction=0.4, floor=0.1)
    made = plan(groups, scores, config, losses=losses, latency=table())
    assert made.report["reached"] >= 0.4 and made.report["ranking"] == "measured"
    assert made.report["seconds_dense"] == 1.0 and made.report["seconds"] <= 0.6
    assert made.kept["a"][-1] == 9  # the lowest-scored leave
    alike = plan(groups, scores, config.model_copy(update={"ranking": "uniform"}), latency=table())
    assert alike.report["ranking"] == "uniform" and len(alike.kept["a"]) == len(alike.kept["b"])
    with pytest.raises(TargetError, match=r"\(10 times as fast\): at most 80\.00%.*\(5 times as fast\)"):
        plan(groups, scores, config, target=0.9, losses=losses, latency=table())


def test_a_table_goes_to_json_and_back(tmp_path):
    table().write(tmp_path / "t.json")
    assert LatencyTable.read(tmp_path / "t.json") == table()
    table().check(OF)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"dense": 0.0}, "dense"),
        ({"dense": None}, "dense"),
        ({"saved": {"a": {"0": 1.0}}}, "saved.a.0"),
        ({"saved": {"a": {"12": 1.0}}}, r"saved\.a has no units, or more"),
        ({"saved": {"c": {"2": 1.0}}}, r"saved\.c"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_table_is_refused(change, found):
    text = json.dumps(json.loads(table().to_json()) | change)
    with pytest.raises(ArtifactError, match=rf"Reading a table of latencies: .*{found}"):
        LatencyTable.from_json(text)
    with pytest.raises(ArtifactError, match=r"Reading a table.*Invalid JSON"):
        LatencyTable.from_json("no")


def test_a_table_of_something_else_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"device 'cpu x' and not 'gpu y', batch 4 and not 8"):
        table().check(OF.model_copy(update={"device": "gpu y", "batch": 8}))
    with pytest.raises(StructureError, match="nothing was measured for group 'b'"):
        table({"a": {5: 0.1}}).ledger(two_layers())
    with pytest.raises(ArtifactError, match=r"nowhere\.json"):
        LatencyTable.read(tmp_path / "nowhere.json")


def test_the_digest_is_of_the_structure_and_not_of_what_is_frozen():
    groups = two_layers()
    frozen = freeze(groups, lambda group: "so" if group.name == "a" else None)
    assert structure_digest(groups) == structure_digest(frozen) != structure_digest(two_layers(10, 11))


def test_a_speedup_is_a_share_of_the_latency():
    config = PlanConfig(speedup=1.25)
    assert (config.of, config.reduction, config.speedup) == ("latency", pytest.approx(0.2), None)
    assert PlanConfig.from_text(config.to_json()) == config
    for wrong in (1.0, 0.5, -1, "fast"):
        with pytest.raises(ConfigError, match="speedup"):
            PlanConfig(speedup=wrong)
    for name, value in (("of", "macs"), ("reduction", 0.3)):
        with pytest.raises(
            ConfigError, match=f"(?s)speed-up of 1.25 sets {name} to .* {value} was given: leave"
        ):
            PlanConfig(speedup=1.25, **{name: value})
    assert PlanConfig(speedup=1.25, of="latency") == PlanConfig(speedup=1.25)


def test_the_ranking_is_decided_where_it_is_auto():
    for of in ("macs", "latency"):
        assert PlanConfig(of=of).shared_by == "measured"
        assert PlanConfig(of=of, uniform=True).shared_by == PlanConfig(of=of, vanilla=True).shared_by
        assert PlanConfig(of=of, vanilla=True).shared_by == "uniform"
        assert PlanConfig(of=of, ranking="uniform").shared_by == "uniform"
    assert PlanConfig().shared_by == PlanConfig(of="prunable").shared_by == "uniform"
    assert PlanConfig(of="macs", ranking="global").shared_by == "global"
    for ranking in ("global", "loss"):
        with pytest.raises(ConfigError, match=f"ranking of latency is measured or uniform and not {ranking}"):
            PlanConfig(of="latency", ranking=ranking)


def test_scores_alone_have_no_losses():
    groups, scores = two_layers(), {name: np.arange(10.0) for name in "ab"}
    assert plan(groups, scores, PlanConfig(of="macs")).report["ranking"] == "uniform"
    with pytest.raises(StructureError, match="The ranking measured: found no measured losses"):
        plan(groups, scores, PlanConfig(ranking="measured"))
