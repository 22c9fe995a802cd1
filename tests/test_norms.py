"""Batch-norm statistics measured again: against closed forms, and nothing else changes."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cria_prune import PruneConfig, prune
from cria_prune.errors import DataError
from cria_prune.surgery import remeasure


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
    with pytest.raises(DataError, match="Running Sequential"):
        remeasure(net, [torch.randn(40, 5, 6, 6).double()])


def test_pruning_with_it_measures_after_the_last_cut_and_every_cut_is_verified() -> None:
    net, batches = network(), [torch.randn(32, 3, 6, 6).double() for _ in range(2)]
    config = {"score": {"criterion": "l2"}, "plan": {"reduction": 0.3, "rounds": 2}, "compensate": False}
    plain = prune(net, batches, PruneConfig(**config, batch_norm=False))
    found = prune(net, batches, PruneConfig(**config, batch_norm=True))
    assert found.plan.kept == plain.plan.kept
    assert all(item.verification.difference < 1e-10 for item in found.rounds)  # type: ignore[union-attr]
    again, _ = remeasure(plain.model, batches)
    assert [item.batch_norms for item in found.rounds] == [0, 2] and plain.changed == ""
    assert "2 batch norms measured again" in str(found)
    for one, other in zip(found.model.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    fewer = prune(net, batches, PruneConfig(**config, batch_norm=True, record={"examples": 32}))
    assert not torch.equal(fewer.model[1].running_mean, found.model[1].running_mean)  # type: ignore[index]
