"""What a run leaves in a network: weights that it writes into, its state, and what its hooks fill."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune import CriaError, PruneConfig, apply, discover, prune, record
from cria_prune.surgery.verify import Reference

SEEN: list[Any] = []


class Rescaling(nn.Module):
    """Halves a weight in its first evaluation, as RWKV does, and notes its calls."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.halved, self.fails, self.calls = False, fails, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.halved == self.training:
                self.down.weight.mul_(2.0 if self.training else 0.5)
                self.halved = not self.training
            if self.fails:
                self.head.weight.data = self.head.weight.data.clamp(-0.2, 0.2)
        self.calls.append(len(x))
        if self.fails and len(x) > 2:
            raise ValueError("a batch too many")
        x = self.down(torch.relu(self.up(x)))
        return self.head(torch.relu(x * 2.0 if self.halved else x))


def batches() -> list[Tensor]:
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def hooked(net: Rescaling) -> dict[str, list[Any]]:
    kept: dict[str, list[Any]] = {"up": []}
    net.up.register_forward_hook(lambda module, args, out: kept["up"].append(out))
    net.down.register_forward_hook(lambda module, args, out: SEEN.append(out))
    return kept


def check_as_it_was(net: Rescaling, before: dict[str, Tensor], places: dict[str, int]) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.data_ptr() == places[name], name
    assert not net.halved and not net.calls and net.training


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_network_that_writes_into_its_weights_is_as_it_was(fails: bool) -> None:
    torch.manual_seed(0)
    net = Rescaling(fails)
    kept = hooked(net)
    before = copy.deepcopy(net.state_dict())
    places = {name: item.data_ptr() for name, item in net.state_dict().items()}
    groups = discover(net, batches()[0])
    check_as_it_was(net, before, places)
    if fails:
        with pytest.raises(CriaError, match="a batch too many"):
            record(net, groups, batches())
    else:
        result = prune(net, batches(), PruneConfig(plan={"reduction": 0.4}))
        assert result.rounds[0].verification.training == "equal"
        smaller = apply(net, result.plan)
        assert Reference(net, batches()[1]).compare(result.plan, smaller).difference < 1e-10
    check_as_it_was(net, before, places)
    assert not SEEN and kept == {"up": []}
