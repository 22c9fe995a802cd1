"""Latencies side by side: batch sizes, threads, runtimes; and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, batch_size
from cria_prune.base.errors import ConfigError, DataError
from cria_prune.deploy.session import OnnxModule
from cria_prune.deploy.speeds import check_same_inputs, compare_latency


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def test_each_runtime_runs_both_networks_at_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    seen: list[tuple[str, int, int]] = []
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)

    def timer(model: nn.Module, batch: Batch) -> float:
        model(batch)
        seen.append((type(model).__name__, batch_size(batch), torch.get_num_threads()))
        width = 8 if isinstance(model, OnnxModule) else len(model[0].weight)  # type: ignore[index,arg-type]
        return width * batch_size(batch) * 1e-3

    before = torch.get_num_threads()
    dense, pruned = net(8), net(4)
    found = compare_latency(
        dense, pruned, torch.randn(2, 4), batches=(1, 5), runtimes=("eager", "compiled", "onnxruntime"),
        threads=before + 1, seconds=0, timer=timer,
    )  # fmt: skip
    assert torch.get_num_threads() == before and compiled == [dense, pruned]
    cells = [(item.runtime, item.batch) for item in found]
    assert cells == [(name, size) for name in ("eager", "compiled", "onnxruntime") for size in (1, 5)]
    assert found[1].speed.dense == pytest.approx(0.04) and found[1].speed.speedup == pytest.approx(2)
    assert found[1].to_dict()["error"] == 0.0
    assert {threads for *_, threads in seen} == {before + 1}
    assert {(kind, size) for kind, size, _ in seen} == {
        (kind, size) for kind in ("Sequential", "OnnxModule") for size in (1, 5)
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"threads": 0}, "Threads of a forward: found 0. Give 1 or more"),
    ({"batches": (1, 0)}, "Batch sizes: found [1, 0]. Give numbers from 1 on"),
    ({"runtimes": ("eager", "tpu")}, "A runtime: found tpu. Known runtimes: eager, compiled, onnxruntime"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "text"), BAD)
def test_numbers_and_names_that_are_none(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        compare_latency(net(8), net(4), torch.randn(2, 4), **asked)


class Other(nn.Module):
    """The same width under another name."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.sum(1)


def test_networks_with_other_inputs_are_refused() -> None:
    with pytest.raises(DataError, match=r"differ: 'input' is float32 \(2, 4\) and None, 'pixels' is"):
        check_same_inputs(Other(), net(4), torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(DataError, match="the dense one does not run on the inputs, RuntimeError"):
        compare_latency(nn.Linear(7, 2), net(4), torch.randn(2, 4))
