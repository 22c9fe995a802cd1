"""The losses of groups cut alone: against the stages by hand, over rounds, and going on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from watching import counted, interrupted_at, never

from cria_prune import PruneConfig, prune
from cria_prune.measured import loss_of, measure_losses
from cria_prune.planning.plan import make_plan
from cria_prune.planning.stairs import levels, stairs
from cria_prune.repair.fidelity import fidelity
from cria_prune.repair.levels import RIDGE
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
    found = measure_losses(ready, ranking, every=True)
    assert set(found) == {"0", "2"} and sorted(found["0"]) == [2, 4, 6, 8, 10, 12, 14]
    kept = np.argsort(ranking.scores["2"], kind="stable")[16 - 6 :]
    cut = remove(ready.model, make_plan(ready.groups, {"2": kept}))
    # On examples that are fitted on: those that are held out go on to say what the whole cut did.
    fit = [torch.cat([batch[row : row + 1] for row in range(32) if row % 4 != 3]) for batch in BATCHES]
    assert found["2"][6] == pytest.approx(fidelity(ready.model, cut, fit).loss, rel=1e-9)
    # The slow twin: a cut, and two runs of whole networks.
    for stair in stairs(ready.groups, ready.config.plan):
        for count in levels(stair):
            slow = loss_of(ready, ranking, stair, count)
            assert found[stair.names[0]][count] == pytest.approx(slow, rel=1e-9)
    alike = prepare(network(), BATCHES, config(of="macs", uniform=True))
    both = measure_losses(alike, rank(alike), every=True)
    assert {name: set(item) for name, item in both.items()} == {name: set(found["0"]) for name in found}


def test_a_level_is_measured_with_the_best_weights_and_the_others_follow_from_the_error():
    wanted = PruneConfig(plan={"of": "macs"}, score={"criterion": "l2"})
    ready = prepare(network(), BATCHES, wanted)
    ranking = rank(ready)
    whole, one = (measure_losses(ready, ranking, every=every) for every in (True, False))
    # By hand: least squares of what the layer behind gives, on what is left of what it reads.
    fit = torch.cat([batch[row : row + 1] for batch in BATCHES for row in range(32) if row % 4 != 3])
    hidden, layer = ready.model[:2](fit).detach(), ready.model[2]
    centred, errors = hidden - hidden.mean(0), {}
    for count in (8, 4):
        kept = np.sort(np.argsort(ranking.scores["0"], kind="stable")[16 - count :])
        S = centred.T @ centred / len(centred)
        C = layer.weight.detach() @ S[:, kept]
        size = S[kept][:, kept].diagonal().mean() * RIDGE
        start = layer.weight.detach()[:, kept]
        right = (C + size * start) @ torch.linalg.inv(S[kept][:, kept] + size * torch.eye(count).double())
        cut = network()
        with torch.no_grad():
            cut[2].weight.zero_()
            cut[2].weight[:, kept] = right
            cut[2].bias += (layer.weight @ hidden.mean(0)) - right @ hidden.mean(0)[kept]
        assert whole["0"][count] == pytest.approx(fidelity(ready.model, cut, [fit]).loss, rel=1e-9)
        away = (cut[2](hidden) - layer(hidden)).detach().var(0, correction=0).sum()
        errors[count] = float(away / layer(hidden).detach().var(0, correction=0).sum())
    assert one["0"][8] == whole["0"][8]
    assert one["0"][4] == pytest.approx(whole["0"][8] * errors[4] / errors[8], rel=1e-9)


def test_groups_that_one_pass_cannot_measure_are_cut_one_by_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).double()
    ready = prepare(net, BATCHES, config(of="macs"))
    with counted("cut") as cuts:
        found = measure_losses(ready, rank(ready))
    assert len(cuts) == len(found["0"]) > 0


def test_what_was_measured_is_not_measured_again(tmp_path):
    ready, keep = prepare(network(), BATCHES, config(of="macs")), tmp_path / "losses.json"
    ranking = rank(ready)
    whole = measure_losses(ready, ranking)
    with pytest.raises(KeyboardInterrupt), interrupted_at("level", 9):
        measure_losses(ready, ranking, keep=keep)
    assert list(json.loads(keep.read_text())["losses"]) == ["0"]
    with counted("level") as done:
        assert measure_losses(ready, ranking, keep=keep) == whole
    assert len(done) == 7
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


class Joined(nn.Module):
    """Features that are read again behind layers of their own, a parameter among the outputs, short types."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1)
        self.d, self.scale = nn.Conv2d(16, 4, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.a(x))
        y = torch.relu(self.c(torch.relu(self.b(x))))
        return {"logits": self.d(torch.cat([x, y], 1)).mean((2, 3)), "scale": self.scale}


def test_the_network_and_the_random_state_are_left_as_they_were_in_training_mode():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3)
            )
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return self.layers(x) + 0 * torch.rand(3)

    torch.manual_seed(0)
    net, batches = Noisy().train(), [batch.float() for batch in BATCHES]
    before, random = {name: item.clone() for name, item in net.state_dict().items()}, torch.get_rng_state()
    ready = prepare(net, batches, PruneConfig(plan={"of": "macs"}))
    measure_losses(ready, rank(ready))
    assert net.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(item, before[name]) for name, item in net.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_features_that_are_read_again_later_and_outputs_that_are_weights(kind):
    torch.manual_seed(0)
    net, batches = Joined().eval().to(kind), [torch.randn(32, 3, 6, 6).to(kind) for _ in range(4)]
    ready = prepare(net, batches, PruneConfig(plan={"of": "macs", "residual": True}))
    with counted("cut") as cuts:
        found = measure_losses(ready, rank(ready))
    assert not cuts and set(found) == {"a", "b", "c"}
    assert all(0 <= loss < 10 for item in found.values() for loss in item.values())


def test_units_that_give_constants_cost_nothing():
    net = network()
    with torch.no_grad():
        net[0].weight.zero_()
    ready = prepare(net, BATCHES, PruneConfig(plan={"of": "macs"}, score={"criterion": "l2"}))
    found = measure_losses(ready, rank(ready))
    assert all(0 <= loss < 1e-6 for item in found.values() for loss in item.values()), found
