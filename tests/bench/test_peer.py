"""Torch-Pruning in a bench: its pruner, our layers, about our share."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from cria_prune.base.errors import ConfigError, PackageError
from cria_prune.bench import peer as module
from cria_prune.bench.peer import IMPORTANCES, PeerResult, prune_by_peer
from cria_prune.bench.suite import Grid, cells, config_of
from cria_prune.config import PruneConfig
from cria_prune.recipes.registry import task
from cria_prune.stages import prepare
from cria_prune.tasks.models import build

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (make test installs it)")
GRID = Grid(
    network="cifar10-resnet20",
    criteria=["l2", "tp-lamp"],
    reductions=[0.5],
    rounds=[2],
    repair=["none", "once"],
)


@pytest.fixture(autouse=True)
def fewer_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio to 1/128 is near enough for what is tested here."""
    monkeypatch.setattr(module, "HALVINGS", 7)


def batches(examples: int) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(examples, 3, 32, 32, generator=generator)
    return [(images, torch.randint(0, 10, (examples,), generator=generator))]


def pruned(name: str, dense: torch.nn.Module, given: list[Any], config: PruneConfig) -> PeerResult:
    return prune_by_peer(name, prepare(dense, given, config), config)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("cifar10-resnet20").eval()


def widths(model: torch.nn.Module, end: str) -> list[int]:
    return [layer.out_channels for name, layer in model.named_modules() if name.endswith(end)]


@pytest.mark.parametrize("name", sorted(IMPORTANCES))
def test_inner_channels_leave_and_the_network_stays_as_it_was(name: str) -> None:
    dense = network()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    config = config_of(task("cifar10-resnet20"), cells(GRID)[0], GRID)
    state = torch.get_rng_state()
    found = pruned(name, dense, batches(6), config)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(found.report["reached"] - 0.5) < 0.02
    assert found.report["parameters"] == sum(item.numel() for item in found.model.parameters())
    assert list(found.kept.values()) == [8, 8, 8, 16, 16, 16, 32, 32, 32]
    assert set(found.seconds) == {"search", "prune"}
    assert widths(found.model, "conv1")[1:] == [8, 8, 8, 16, 16, 16, 32, 32, 32]  # the first is the stem
    assert widths(found.model, "conv2") == widths(dense, "conv2")
    assert found.model(torch.randn(2, 3, 32, 32)).shape == (2, 10) and not found.model.training
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert all(item.grad is None for item in dense.parameters())
    assert all(item.grad is None for item in found.model.parameters())


def test_magnitude_takes_the_weakest_and_taylor_needs_the_gradients() -> None:
    dense = network()
    layer = dense.get_submodule("layer1.0.conv1")
    with torch.no_grad():
        for part in ("layer1.0.conv1.weight", "layer1.0.bn1.weight"):
            dense.get_parameter(part)[:8] *= 1e-3
        dense.get_parameter("layer1.0.conv2.weight")[:, :8] *= 1e-3
    config = config_of(task("cifar10-resnet20"), cells(GRID)[0], GRID)
    found = pruned("tp-magnitude", dense, batches(6), config)
    assert torch.equal(found.model.get_submodule("layer1.0.conv1").weight, layer.weight[8:])
    one, other = (
        pruned("tp-taylor", dense, given, config).model.get_submodule("layer3.0.conv1").weight
        for given in (batches(6), batches(9))
    )
    assert not torch.equal(one, other)


def test_under_one_threshold_for_all_layers_the_share_is_met_and_the_layers_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, tries, real = network(), [], module._Peer.pruned
    monkeypatch.setattr(module._Peer, "pruned", lambda *given: tries.append(real(*given)) or tries[-1])
    with torch.no_grad():
        for name, scale in dense.named_parameters():
            if name.endswith("bn1.weight"):  # as if the first stage were needed most
                scale.uniform_(10, 11) if name.startswith("layer1") else scale.uniform_(0, 1)
    config, found = freely("tp-bn-scale", dense, reduction=0.3)
    assert abs(found.report["reached"] - 0.3) < 0.02 and found.report["of"] == "macs"
    kept = widths(found.model, "conv1")[1:]
    assert kept[:3] == [16, 16, 16] and max(kept[3:6]) < 32 and max(kept[6:]) < 64
    assert len(tries) == module.HALVINGS  # the network is one of those that were tried
    assert found.model is min(tries, key=lambda item: abs(item.freed - 0.3)).model
    _, other = freely("tp-taylor", dense, reduction=0.3)  # its gradients are asked for at every try
    assert abs(other.report["reached"] - 0.3) < 0.02 and other.kept != found.kept
    by_loss = config.plan.model_copy(update={"ranking": "loss"})
    with pytest.raises(ConfigError, match="its pruner has uniform and global"):
        pruned("tp-bn-scale", dense, batches(6), config.model_copy(update={"plan": by_loss}))


def test_the_nearest_of_all_tries_is_taken_where_what_a_ratio_frees_jumps_and_falls() -> None:
    shares = {0.5: 0.58, 0.75: 0.9}
    tries = []

    def attempt(ratio: float) -> module._Try:
        tries.append(module._Try(ratio, shares.get(ratio, 0.3)))
        return tries[-1]

    assert module._nearest(attempt, 0.6) is tries[0]
    assert [item.ratio for item in tries[:3]] == [0.5, 0.75, 0.625] and len(tries) == module.HALVINGS


def freely(name: str, dense: torch.nn.Module, reduction: float) -> tuple[Any, PeerResult]:
    """Prune under one threshold for all layers."""
    config = config_of(task("cifar10-resnet20"), cells(GRID)[0], GRID)
    plan = config.plan.model_copy(update={"ranking": "global", "of": "macs", "reduction": reduction})
    return config, pruned(name, dense, batches(6), config.model_copy(update={"plan": plan}))


def test_cells_that_the_peer_cannot_do_are_left_out() -> None:
    assert [(cell["criterion"], cell.get("repair", "none")) for cell in cells(GRID)] == [
        ("l2", "none"), ("tp-lamp", "none"), ("l2", "once"),
    ]  # fmt: skip
    both = Grid(**{**GRID.model_dump(), "ranking": ["global", "loss"], "repair": ["none"]})
    assert [(cell["criterion"], cell["ranking"]) for cell in cells(both)] == [
        ("l2", "global"), ("tp-lamp", "global"), ("l2", "loss"),
    ]  # fmt: skip


def test_what_cannot_be_compared_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(task("cifar10-resnet20"), cells(GRID)[0], GRID)
    prunable = config.model_copy(update={"plan": config.plan.model_copy(update={"of": "prunable"})})
    with pytest.raises(ConfigError, match="we count parameters or MACs"):
        pruned("tp-lamp", network(), batches(4), prunable)

    hardly = config.model_copy(update={"plan": config.plan.model_copy(update={"reduction": 0.001})})
    with pytest.raises(ConfigError, match=r"the nearest that Torch-Pruning frees is 0\.0%"):  # nothing at all
        pruned("tp-lamp", network(), batches(4), hardly)

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(PackageError, match="torch-pruning is not installed"):
        pruned("tp-lamp", network(), batches(4), config)
