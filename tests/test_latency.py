"""Measuring seconds, with a clock that counts elements: the table, the comparison, the correction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cria_prune import PruneConfig, discover, latency, prune
from cria_prune.base.errors import ArtifactError, DataError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.latency import compare_speed, known_latency, measure_latency, timed_here, timing_batch
from cria_prune.planning.budget import count_parameters
from cria_prune.planning.latency import LatencyTable


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) for _ in range(8)]
CPU = torch.device("cpu")


def elements(model: nn.Module, batch: object) -> float:
    """A clock: a second for every parameter."""
    assert not model.training and not torch.is_grad_enabled()
    return float(sum(value.numel() for value in model.parameters()))


def test_the_table_is_what_each_group_frees_alone():
    model = network()
    groups = discover(model, BATCHES[0])
    found = measure_latency(model, groups, PlanConfig(), BATCHES[0], timer=elements)
    whole = count_parameters(groups)
    assert found.dense == whole and model.training
    assert found.sizes == {group.name: group.size for group in groups.prunable}
    for name, saved in found.saved.items():
        assert len(saved) in (7, 8)
        for count, seconds in saved.items():
            assert seconds == pytest.approx(whole - count_parameters(groups, {name: count}))
    alike = measure_latency(model, groups, PlanConfig(uniform=True), BATCHES[0], timer=elements)
    assert set(alike.saved) == set(found.saved)


def test_what_groups_save_together_is_measured_too():
    model = network()
    groups = discover(model, BATCHES[0])
    found = measure_latency(model, groups, PlanConfig(), BATCHES[0], timer=elements)
    # The weight between two groups is counted by both alone, and is there once.
    half = {group.name: group.size // 2 for group in groups.prunable}
    alone = LatencyTable(**{**found.model_dump(), "together": 1.0})
    counted = count_parameters(groups, half)
    apart = [abs(table.ledger(groups).count(half) - counted) for table in (found, alone)]
    assert 0.5 < found.together < 1 and apart[0] < apart[1] / 3


def test_a_sum_of_noise_does_not_make_a_network_fast(monkeypatch):
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), *layers, nn.Linear(16, 3))
    groups = discover(model, BATCHES[0])
    generator = torch.Generator().manual_seed(0)

    def clock(model, batch):  # as if a fifth of the time went with the parameters, and the rest were noisy
        share = elements(model, batch) / count_parameters(groups)
        return 0.8 + 0.2 * share + 0.1 * float(torch.randn((), generator=generator))

    def most():  # that one layer alone is said to save: a choice takes the best of many numbers
        found = measure_latency(model, groups, PlanConfig(), BATCHES[0], timer=clock, seconds=0.0)
        return max(max(each.values()) for each in found.saved.values()) / found.dense

    true = max(
        0.2 * (1 - count_parameters(groups, {group.name: 1}) / count_parameters(groups))
        for group in groups.prunable
    )
    assert most() == pytest.approx(true, rel=0.5)
    monkeypatch.setattr(latency, "drawn", lambda measured, expected, errors: np.asarray(measured))
    assert most() > 3 * true


def test_networks_take_turns_and_the_median_of_their_quotients_counts():
    times = {
        1: iter([9.0, 9.0, 1.0, 10.0, 1.0, 1.0, 2.0]),
        2: iter([9.0, 9.0, 0.5, 5.0, 0.5, 0.6, 1.0]),
    }
    order = []

    def clock(model, batch):
        order.append(model.out_features)
        return next(times[model.out_features])

    found = compare_speed(nn.Linear(1, 1), nn.Linear(1, 2), BATCHES[0], seconds=0.0, timer=clock)
    assert (found.dense, found.pruned, found.ratio, found.turns) == (1.0, 0.6, 0.5, 5)
    # Quotients 0.5, 0.5, 1, 0.6, 0.5: the median deviation is 0.
    assert found.error == 0.0
    assert order == [1, 2, 1, 2, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2]
    assert str(found) == "1e+03 -> 600 ms a batch, 2.00 times as fast"


def test_the_real_clock_runs():
    found = compare_speed(network(), network(), BATCHES[0], seconds=0.0)
    assert found.turns == 5 and found.dense > 0 and 0 < found.ratio < float("inf")


def test_the_batch_has_the_size_that_is_asked_for():
    assert timing_batch(BATCHES, CPU).shape == (8, 4)
    assert torch.equal(timing_batch(BATCHES, CPU, 10), torch.cat([BATCHES[0], BATCHES[0][:2]]))
    assert timing_batch([{"x": BATCHES[0], "scale": 2}], CPU, 3)["x"].shape == (3, 4)
    with pytest.raises(DataError, match="found no calibration batch"):
        timing_batch([], CPU)


def test_a_table_is_kept_and_one_of_something_else_is_refused(tmp_path, monkeypatch):
    model, path = network(), tmp_path / "table.json"
    groups = discover(model, BATCHES[0])
    measured = []

    def measure(*args, **kwargs):
        measured.append(1)
        return measure_latency(*args, timer=elements, **kwargs)

    monkeypatch.setattr(latency, "measure_latency", measure)
    config = PlanConfig(latency_table=str(path))
    first = known_latency(model, groups, config, BATCHES)
    assert known_latency(model, groups, config, BATCHES) == first == LatencyTable.read(path)
    assert len(measured) == 1
    other = config.model_copy(update={"latency_batch": 2})
    with pytest.raises(ArtifactError, match=r"Using a table of latencies: it is of batch 8 and not 2"):
        known_latency(model, groups, other, BATCHES)
    wide = nn.Sequential(nn.Linear(4, 17), nn.ReLU(), nn.Linear(17, 3))
    with pytest.raises(ArtifactError, match="it is of structure"):
        known_latency(wide, discover(wide, BATCHES[0]), config, BATCHES)


def kept_table(model: nn.Module, path) -> str:
    """Write a table by the clock of elements, as if it were of this machine."""
    groups = discover(model, BATCHES[0])
    table = measure_latency(model, groups, PlanConfig(), BATCHES[0], timer=elements)
    assert table.of == timed_here(groups, BATCHES[0], CPU)
    table.write(path)
    return str(path)


def test_pruning_for_a_speedup(tmp_path, monkeypatch):
    model, speeds = network(), []

    def compare(dense, pruned, batch, **more):
        def slower(model, batch):  # than the table says: a part that no cut makes faster
            return elements(model, batch) + 200

        speeds.append(compare_speed(dense, pruned, batch, seconds=0.0, timer=slower))
        return speeds[-1]

    monkeypatch.setattr("cria_prune.pipeline.compare_speed", compare)
    plan = {"speedup": 1.5, "rounds": 2, "latency_table": kept_table(model, tmp_path / "t.json")}
    result = prune(model, BATCHES, PruneConfig(plan=plan), state=tmp_path / "state")
    report = result.report
    assert report["asked"] == pytest.approx(1 / 3) and report["speedup_asked"] == pytest.approx(1.5)
    assert report["reached"] >= 1 / 3 and report["ranking"] == "measured"
    # As the table says, then by the factor that this was off by, and once more what comes out.
    assert len(speeds) == 3 and report["aimed"] > 1 / 3
    assert speeds[0].speedup < 1.45 < report["speedup"] == speeds[2].speedup
    assert report["speedup"] == pytest.approx(1.5, rel=0.03)
    assert f"asked 1.50, predicted {report['speedup_predicted']:.2f}, reached {report['speedup']:.2f}" in str(
        result
    )
    again = prune(model, BATCHES, PruneConfig(plan=plan), state=tmp_path / "state")
    assert again.plan == result.plan and len(speeds) == 3
    assert again.rounds[0].losses == result.rounds[0].losses != {} and not result.rounds[1].losses


def test_a_speedup_out_of_reach_is_refused_before_anything_is_recorded(tmp_path):
    model = network()
    plan = {"speedup": 90, "rounds": 1, "floor": 0.5, "latency_table": kept_table(model, tmp_path / "t.json")}
    with pytest.raises(TargetError, match=r"\(90 times as fast\): at most .* times as fast\) with a floor"):
        prune(model, BATCHES, PruneConfig(plan=plan))


def test_the_networks_and_the_batches_are_left_as_they_were():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x.mul_(0.5)

    net, batch = Writes().train(), BATCHES[0].clone()
    compare_speed(net, network(), timing_batch([batch], CPU), seconds=0.0)
    assert net.training and not net.count and torch.equal(batch, BATCHES[0])
