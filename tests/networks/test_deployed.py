"""A pruned network compiles, exports and becomes ONNX like any other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.structure.rules.test_attention import TOKENS, Expanded, Fused, Torch
from torch import nn

from cria_prune import discover
from cria_prune.planning.plan import make_plan
from cria_prune.surgery.removal import apply
from networks import Mixed, randomize

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NETWORKS: dict[str, tuple[type[nn.Module], torch.Tensor]] = {
    "convolutions": (Mixed, IMAGE),
    "grouped attention": (Expanded, TOKENS),
    "fused attention": (Fused, TOKENS),
    "encoder layer": (Torch, TOKENS),
}


def pruned(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    kind, example = NETWORKS[name]
    torch.manual_seed(0)
    model = randomize(kind())
    groups = discover(model, example)
    smaller = apply(
        model, make_plan(groups, {item.name: range((item.size + 1) // 2) for item in groups.prunable})
    )
    with torch.no_grad():
        return smaller, example, smaller(example)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_is_compiled_and_exported(name: str) -> None:
    model, example, expected = pruned(name)
    with torch.no_grad():
        # Dynamo traces it whole; the code generator behind it is PyTorch's own matter.
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(example), expected)
        program = torch.export.export(model, (example,))
        torch.testing.assert_close(program.module()(example), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_becomes_onnx(name: str, tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    model, example, expected = pruned(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
