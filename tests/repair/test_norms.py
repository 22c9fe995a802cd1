"""Batch-norm statistics measured again: against closed forms, and nothing else changes."""

from __future__ import annotations

import random
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cria_prune import PruneConfig, fidelity, prune
from cria_prune.base.batches import batch_size, joined
from cria_prune.base.errors import DataError
from cria_prune.repair.norms import remeasure as remeasured


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    with torch.no_grad():
        net[1].running_mean += 5
        net[1].weight.uniform_(0.5, 2)
    return net.double().eval()


def remeasure(model: nn.Module, batches: Any) -> tuple[Any, int]:
    """The model and how many norms were measured."""
    found = remeasured(model, batches)
    return found.model, found.norms


class Named(nn.Module):
    """A network that takes its input by name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(input)
        return out


def test_statistics_are_the_means_over_the_batches_as_the_layers_before_now_give_them() -> None:
    net, batches = network(), [torch.randn(40, 3, 6, 6).double() + shift for shift in range(3)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found, count = remeasure(net, batches)
    assert count == 2
    means: list[list[torch.Tensor]] = [[], []]
    for x in batches:
        for place, (norm, layer) in enumerate(((net[1], net[0]), (net[5], net[4]))):
            x = layer(x)
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            means[place].append(torch.stack([mean, x.var((0, 2, 3))]))
            x = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
            x = torch.relu(x * norm.weight[:, None, None] + norm.bias[:, None, None])
    for place, norm in enumerate((found[1], found[5])):
        mean, var = torch.stack(means[place]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)
    changed = {name for name, value in found.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{place}.running_{kind}" for place in (1, 5) for kind in ("mean", "var")}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found[5].momentum == 0.3 and not found.training and not found[5].training


def test_modes_come_along_and_the_random_state_is_left() -> None:
    net = network().train()
    net[5].eval()
    batches: DataLoader[torch.Tensor] = DataLoader(
        torch.ones(40, 3, 6, 6).double(),  # type: ignore[arg-type]
        batch_size=40,
        shuffle=True,
    )
    state = torch.get_rng_state()
    remeasure(net, batches)
    assert torch.equal(state, torch.get_rng_state())
    found, _ = remeasure(net, [torch.ones(40, 3, 6, 6).double() * torch.arange(40.0)[:, None, None, None]])
    assert [m.training for m in found.modules()] == [m.training for m in net.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_norms_without_statistics_and_models_without_norms_need_no_batch() -> None:
    def never() -> object:
        raise AssertionError("the batches are not read")
        yield

    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    found, count = remeasure(net.train(), never())
    assert found is not net and count == 0 and found.training


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    net = Forked()
    with torch.no_grad():
        net.spare.running_mean += 3
    found, count = remeasure(net, [torch.randn(32, 4)])
    assert count == 1
    assert torch.equal(found.spare.running_mean, net.spare.running_mean)
    assert not torch.equal(found.used.running_mean, net.used.running_mean)


def test_small_batches_are_joined_and_too_few_examples_change_nothing() -> None:
    net, images = network(), torch.randn(70, 3, 6, 6).double()
    whole, _ = remeasure(net, [images[:32], images[32:64]])
    parts, count = remeasure(net, [(item, None) for item in images.split(1)])
    assert count == 2
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    kinds = [UserDict({"input": item}) for item in images.split(8)]
    named, count = remeasure(Named(net), kinds)  # type: ignore[arg-type]
    assert count == 2
    for one, other in zip(whole.state_dict().values(), named.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for few in ([], [images[:31]], [torch.randn(20, 3, size, size).double() for size in (6, 6, 7)][1:]):
        found, count = remeasure(net, few)
        assert count == 0
        pairs = zip(found.state_dict().values(), net.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    wrong = remeasured(net, [torch.randn(40, 5, 6, 6).double()])
    assert wrong.norms == 0 and "RuntimeError" in wrong.reason
    assert "no 32 examples" in remeasured(net, [images[:31]]).reason


class Rough(nn.Module):
    """Draws from every generator, writes into its input, counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        torch.rand(1), np.random.rand(), random.random()
        out: torch.Tensor = self.norm(x.mul_(2.0))
        return out


def test_inputs_generators_and_other_buffers_are_left() -> None:
    x = torch.randn(40, 4)
    before, net = x.clone(), Rough()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
    found, count = remeasure(net, [x])
    assert count == 1 and torch.equal(x, before) and found.calls == 0 == net.calls
    torch.testing.assert_close(found.norm.running_mean, 2 * x.mean(0))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]


class Frozen(nn.BatchNorm1d):
    """Always normalises by the statistics that it has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


def test_what_follows_a_frozen_norm_sees_its_own_statistics() -> None:
    net = nn.Sequential(Frozen(4), nn.BatchNorm1d(4)).double()
    with torch.no_grad():
        net[0].running_mean += 3  # type: ignore[operator]
        net[0].running_var *= 9  # type: ignore[operator]
    x = torch.randn(64, 4).double()
    found, count = remeasure(net, [x])
    assert count == 1 and torch.equal(found[0].running_mean, net[0].running_mean)
    torch.testing.assert_close(found[1].running_var, x.var(0) / (9 + 1e-5))


def test_a_norm_with_one_value_per_channel_keeps_its_statistics_and_says_so() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
            self.last = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.norm(torch.relu(self.first(x)).mean(0, keepdim=True)))
            return out

    found = remeasured(Pooled().eval(), [torch.randn(40, 4)])
    assert found.norms == 0 and "more than 1 value per channel" in found.reason


def test_only_what_plainly_belongs_together_is_joined() -> None:
    def sizes(*batches: Any) -> list[int]:
        return [batch_size(item) for item in joined(batches, 32)]

    x = torch.randn(8, 4)
    table = torch.randn(8, 4)
    assert sizes((x, torch.zeros(8, 3)), (x + 1, torch.zeros(8, 5)), (x, None), (x, torch.tensor(0))) == [32]
    assert sizes(x, x.double()) == [8, 8] and sizes(x, torch.randn(8, 5)) == [8, 8] and sizes(x, x) == [16]
    assert sizes({"x": x, "e": torch.zeros(2, 5)}, {"x": x + 1, "e": torch.ones(2, 5)}) == [8, 8]
    assert sizes({"x": x, "table": table}, {"x": x + 1, "table": table}) == [8, 8]
    assert sizes({"x": x, "size": 3}, {"x": x, "size": 4}) == [8, 8]
    assert sizes({"x": x, "size": 3, "labels": None}, {"x": x, "size": 3, "labels": x}) == [16]


def test_pruning_measures_after_the_last_cut_on_what_is_not_held_out_where_that_is_nearer() -> None:
    # The dense network has the statistics of these examples, and units that mostly add a constant: with them
    # gone the mean is another one, which new statistics take out again.
    batches, drifted = [torch.randn(32, 3, 6, 6).double() for _ in range(2)], network()
    with torch.no_grad():
        drifted[1].bias.fill_(3)
        drifted[1].weight.fill_(0.5)
    net = remeasured(drifted, batches).model
    config = {"score": {"criterion": "l2"}, "plan": {"reduction": 0.3, "rounds": 2}, "repair": "none"}
    plain = prune(net, batches, PruneConfig(**config, batch_norm=False))
    found = prune(net, batches, PruneConfig(**config, batch_norm=True))
    assert found.plan.kept == plain.plan.kept
    assert all(item.verification.difference < 1e-10 for item in found.rounds)  # type: ignore[union-attr]
    again, _ = remeasure(plain.model, [torch.cat([item[::2] for item in batches])])
    assert [item.batch_norms for item in found.rounds] == [0, 2] and plain.changed == ""
    assert "2 batch norms measured again" in str(found)
    for one, other in zip(found.model.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    held = [torch.cat([item[1::2] for item in batches])]
    assert [list(item.fidelity) for item in found.rounds] == [["as cut"], ["as cut", "norms"]]
    before, after = found.rounds[-1].fidelity.values()
    assert before == plain.rounds[-1].fidelity["as cut"] == fidelity(net, plain.model, held)
    assert after == fidelity(net, found.model, held) and after.loss < before.loss


def test_batch_norms_measured_again_stay_as_they_were_where_the_held_out_examples_say_so() -> None:
    # The statistics of this network are not those of these examples, as on other pictures than the trained.
    net, batches = network(), [torch.randn(32, 3, 6, 6).double() for _ in range(2)]
    config = {"score": {"criterion": "l2"}, "plan": {"reduction": 0.1, "rounds": 1}, "compensate": False}
    plain = prune(net, batches, PruneConfig(**config, batch_norm=False))
    found = prune(net, batches, PruneConfig(**config, batch_norm=True))
    (item,) = found.rounds
    assert item.batch_norms == 0 and list(item.fidelity) == ["as cut"]
    worse = remeasured(plain.model, [torch.cat([part[::2] for part in batches])]).model
    loss = fidelity(net, worse, [torch.cat([part[1::2] for part in batches])]).loss
    before = item.fidelity["as cut"].loss
    assert loss > before
    assert item.batch_norms_kept == f"measured again KL {loss:.3g}, as they were {before:.3g}"
    assert "batch norms left as they were: measured again KL" in str(found)
    for one, other in zip(found.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_too_few_examples_for_a_fit_and_for_what_is_held_out_are_told_before_the_work() -> None:
    net = network()
    with pytest.raises(DataError, match="one calibration example"):
        prune(net, [torch.randn(1, 3, 6, 6).double()], PruneConfig(plan={"rounds": 1}, batch_norm=True))
