"""What a walk will hold is foretold: the tensors that are there while it runs are not more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.repair.test_spill import Block, batches, halved, network
from torch import nn

from cria_prune import PruneConfig, apply, discover, predict_memory
from cria_prune.base.modules import named_tensors
from cria_prune.memory import LiveBytes, Stage
from cria_prune.repair import spill
from cria_prune.repair.levels import losses_of
from cria_prune.repair.walk import walk


class Real(LiveBytes):
    """Counts no tensors without values, of which captured operations hold some."""

    def _meet(self, tensor: torch.Tensor, counted: bool) -> None:
        if not tensor.is_meta:
            super()._meet(tensor, counted)


def said(net: nn.Module, batch: torch.Tensor, **record: int) -> Stage:
    config = PruneConfig.model_validate({"score": {"criterion": "l2"}, "record": record})
    return predict_memory(net, discover(net, batch), batch, config).stages[-1]


def test_a_walk_takes_no_more_than_is_foretold_and_not_much_less() -> None:
    net, step = network(), halved()
    smaller, data = apply(net, step), batches()
    stage = said(net, data[0], examples=64)
    assert stage.name == "repair" and stage.group in named_tensors(net)
    with Real([*named_tensors(net).values(), *named_tensors(smaller).values(), *data]) as live:
        walk(net, smaller, step, data, examples=64, memory=2**40)
    # The dense network is counted twice in place of it and the smaller one, at a cut of two fifths.
    assert live.peak <= stage.peak <= 1.5 * live.peak


def test_streams_grow_with_the_examples_up_to_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = nn.Sequential(Block(), Block()).eval(), batches()
    few, many = (said(net, data[0], examples=count).parts["streams"] for count in (512, 1024))
    assert many == 2 * few
    # In a block of 6 channels on 4 by 4 the streams are its input, and what its layers read and give.
    assert few % (2 * 512 * 4 * 16) == 0
    monkeypatch.setattr(spill, "free_memory", lambda _: 2**20)
    bound = said(net, data[0], examples=1024).parts["streams"]
    assert bound == 2**19 + few * 16 // 512


def test_measuring_losses_takes_no_more_than_is_foretold_and_not_much_less() -> None:
    net, data = network(), batches()
    groups = discover(net, data[0])
    config = PruneConfig.model_validate({"score": {"criterion": "l2"}, "plan": {"of": "macs"}})
    config = config.model_copy(update={"record": config.record.model_copy(update={"examples": 64})})
    found = predict_memory(net, groups, data[0], config)
    assert [item.name for item in found.stages] == ["score", "losses", "repair"]
    assert (found.passes, found.measured, found.walked) == (3, 1, 1)
    counts = {item.name: [item.size // 2] for item in groups.prunable}
    held = [batch[:12] for batch in data]
    with Real([*named_tensors(net).values(), *data, *held]) as live:
        for _ in losses_of(net, groups.prunable, counts, lambda _, count: np.arange(count), data, held, 0):
            pass
    stage = found.stages[1]
    assert live.peak <= stage.peak <= 1.5 * live.peak
