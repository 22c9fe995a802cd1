"""A walk that was stopped goes on after the layers that it has refitted, with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from watching import counted, interrupted_at

from cria_prune import PruneConfig, PruneResult, prune
from cria_prune.base.errors import ArtifactError

LAYERS = 4  # that are refitted in each of the two rounds


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3)
        head = nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3)
        return nn.Sequential(*body, nn.ReLU(), *head).eval()


def pruned(state: Path | None, **changes: Any) -> PruneResult:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 2, 4, 4, generator=generator) for _ in range(3)]
    values = {"plan": {"reduction": 0.4, "rounds": 2}, "score": {"criterion": "l2"}, **changes}
    return prune(network(), batches, PruneConfig.model_validate(values), state=state)


@pytest.fixture(scope="module")
def whole() -> PruneResult:
    return pruned(None)


@pytest.mark.parametrize("stopped", [1, LAYERS + 2])
def test_a_walk_goes_on_after_its_last_layer_with_the_same_bits(
    whole: PruneResult, tmp_path: Path, stopped: int
) -> None:
    with interrupted_at("refitted", stopped), pytest.raises(KeyboardInterrupt):
        pruned(tmp_path)
    assert len([*tmp_path.glob("walk-*/layer-*")]) == (stopped - 1) % LAYERS + 1
    with counted("refitted") as left:
        found = pruned(tmp_path)
    assert len(left) == 2 * LAYERS - stopped and left[0].facts["number"] == stopped % LAYERS + 1
    after = found.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in whole.model.state_dict().items())
    for one, other in zip(found.rounds, whole.rounds, strict=True):
        assert other.repairs and replace(one, seconds={}) == replace(other, seconds={})
    assert not [*tmp_path.glob("walk-*")], "what a finished round kept of its layers is there"


def test_layers_of_another_pruning_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    with interrupted_at("refitted", 2), pytest.raises(KeyboardInterrupt):
        pruned(tmp_path)
    with pytest.raises(ArtifactError, match="config, record, seed: there 0, here 1"):
        pruned(tmp_path, record={"seed": 1})
    path = next(tmp_path.glob("walk-*/layer-1.safetensors"))
    first = path.with_name("layer-0.safetensors").read_bytes()
    for content, text in ((path.read_bytes()[:-8] + b"\0" * 8, "have the hash"), (first, "is of '0.weight'")):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=text):
            pruned(tmp_path)
