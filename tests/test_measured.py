"""The losses of groups cut alone: against the stages by hand, over rounds, and going on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from watching import counted, interrupted_at, never

from cria_prune import PruneConfig, prune
from cria_prune.measured import measure_losses
from cria_prune.planning.plan import make_plan
from cria_prune.repair.fidelity import fidelity
from cria_prune.stages import prepare, rank, remove


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()


BATCHES = [torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).double() for _ in range(4)]
PLAIN = {"repair": "none", "score": {"criterion": "l2"}}


def config(**plan) -> PruneConfig:
    return PruneConfig(plan=plan, **PLAIN)


def test_each_loss_is_that_of_the_one_group_cut():
    ready = prepare(network(), BATCHES, config(of="macs"))
    ranking = rank(ready)
    found = measure_losses(ready, ranking)
    assert set(found) == {"0", "2"} and sorted(found["0"]) == [2, 4, 6, 8, 10, 12, 14]
    kept = np.argsort(ranking.scores["2"], kind="stable")[16 - 6 :]
    cut = remove(ready.model, make_plan(ready.groups, {"2": kept}))
    assert found["2"][6] == pytest.approx(fidelity(ready.model, cut, ready.held.batches).loss, rel=1e-12)
    alike = prepare(network(), BATCHES, config(of="macs", uniform=True))
    both = measure_losses(alike, rank(alike))
    assert both["0"] == both["2"] and set(both["0"]) == set(found["0"])


def test_what_was_measured_is_not_measured_again(tmp_path):
    ready, keep = prepare(network(), BATCHES, config(of="macs")), tmp_path / "losses.json"
    ranking = rank(ready)
    whole = measure_losses(ready, ranking)
    with pytest.raises(KeyboardInterrupt), interrupted_at("cut", 5):
        measure_losses(ready, ranking, keep=keep)
    assert 0 < sum(map(len, json.loads(keep.read_text())["losses"].values())) < 14
    with counted("cut") as cuts:
        assert measure_losses(ready, ranking, keep=keep) == whole
    assert len(cuts) == 14 - 4
    # Of other scores nothing holds; a damaged file is measured anew.
    other = prepare(network(), BATCHES, config(of="macs", floor=0.3))
    measure_losses(other, rank(other), keep=keep)
    keep.write_text("[")
    assert measure_losses(ready, ranking, keep=keep) == whole


def test_it_is_the_default_for_macs_and_measured_once_for_all_rounds(tmp_path):
    with counted("losses") as told:
        result = prune(network(), BATCHES, config(of="macs", rounds=2), state=tmp_path)
    assert len(told) == 1
    assert [item.report["ranking"] for item in result.rounds] == ["measured"] * 2
    assert result.rounds[0].losses and not result.rounds[1].losses
    assert 0.5 <= result.report["reached"] < 0.55
    again = prune(network(), BATCHES, config(of="macs", rounds=2), state=tmp_path)
    assert again.plan == result.plan
    for plan in ({"of": "macs", "uniform": True}, {"of": "parameters"}, {"of": "macs", "ranking": "uniform"}):
        with never("losses"):
            assert prune(network(), BATCHES, config(rounds=1, **plan)).report["ranking"] == "uniform"
