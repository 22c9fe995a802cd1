"""Batches that wait in files come back as they were: the walk gives the same bits in any memory."""

from __future__ import annotations

import errno
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cria_prune import Plan, PruneConfig, apply, discover, plan
from cria_prune.base.errors import ArtifactError
from cria_prune.repair import spill
from cria_prune.repair.levels import Level, losses_of
from cria_prune.repair.program import Program, Run
from cria_prune.repair.spill import Storages, Waiting
from cria_prune.repair.walk import Walked, walk


class Block(nn.Module):
    """A residual block whose shortcut is written into, and a table that several batches share a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 10, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.last = nn.Conv2d(10, 6, 3, padding=1)
        self.register_buffer("table", torch.linspace(0, 1, 6)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table[: x.shape[1]]
        y: Tensor = self.last(nn.functional.relu_(self.norm(self.first(x))))
        x += y
        return x.relu_()


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            Block(), Block(), nn.Flatten(), nn.Linear(6 * 16, 12), nn.GELU(), nn.Linear(12, 3)
        )
    return net.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, 4, 4, generator=generator) for _ in range(4)]


@cache
def halved() -> Plan:
    net = network()
    groups = discover(net, batches()[0])
    generator = torch.Generator().manual_seed(2)
    scores = {item.name: torch.rand(item.size, generator=generator).numpy() for item in groups.prunable}
    return plan(groups, scores, PruneConfig(plan={"reduction": 0.4}).plan)


def walked(net: nn.Module, **more: Any) -> Walked:
    step = halved()
    return walk(net, apply(net, step), step, batches(), examples=64, **more)


def test_the_walk_gives_the_same_bits_in_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    whole, files = walked(net, memory=2**40), list[int]()
    written = Waiting._write

    def counted(self: Waiting, batch: int, own: Any) -> None:
        written(self, batch, own)
        files.append(batch)

    monkeypatch.setattr(Waiting, "_write", counted)
    for memory, out in ((0, {0, 1, 2, 3}), (60_000, {2, 3})):
        files.clear()
        found = walked(net, memory=memory)
        assert set(files) >= out, memory
        assert found.repairs == whole.repairs and any(item.ridge for item in found.repairs)
        after = found.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in whole.model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_views_of_one_storage_stay_views_of_it_and_weights_are_never_emptied(tmp_path: Path) -> None:
    net = network()
    program, fixed = Program(net, batches()[0]), Storages()
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    runs = [Run(program, batch, torch.device("cpu")) for batch in batches()[:2]]
    waiting = Waiting([runs], fixed, 0, tmp_path)
    look = spill.noting(tensors.__getitem__, fixed)
    base = torch.arange(6.0)
    for number, run in enumerate(runs):
        with waiting.turn(number):
            run.advance(3, look)
            run.values |= {-1: base.clone(), -2: look("0.table"), -3: look("0.table")[1:]}
            run.values[-4] = [run.values[-1][2:], 7]
    assert all(run.values[-1].untyped_storage().nbytes() == 0 for run in runs)
    assert net.get_buffer("0.table").sum() == pytest.approx(3)
    with waiting.turn(0):
        runs[0].values[-4][0].add_(1)
        assert runs[0].values[-1].tolist() == [0, 1, 3, 4, 5, 6] and runs[0].values[-3].shape == (5, 1, 1)
    waiting.close()
    assert not list(tmp_path.iterdir())


def test_a_system_that_refuses_is_said_and_no_weight_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def full(storage: torch.UntypedStorage) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spill, "_bytes", full)
        with pytest.raises(ArtifactError, match=r"(?s)No space left on device.*TMPDIR"):
            walked(net, memory=0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="No such file"):
        walked(net, memory=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_losses_are_the_same_bits_in_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = network(), [batches()[0], *batches()[2:]]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    groups = discover(net, data[0]).prunable
    counts = {group.name: [group.size // 2] for group in groups}
    written, files = Waiting._write, list[int]()

    def counted(self: Waiting, batch: int, own: Any) -> None:
        written(self, batch, own)
        files.append(batch)

    def found(memory: int) -> list[Level]:
        chosen = lambda group, count: np.arange(count)  # noqa: E731
        return list(losses_of(net, groups, counts, chosen, data, batches()[1:2] * 2, 0, memory=memory))

    monkeypatch.setattr(Waiting, "_write", counted)
    whole = found(2**40)
    assert not files and len(whole) == len(groups) > 2 and all(item.loss for item in whole)
    assert found(0) == whole
    assert set(files) == {0, 1, 2, 3, 4}
    # The examples of the losses are written when they have come further, and not for every level.
    assert 0 < files.count(4) <= len(groups)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
