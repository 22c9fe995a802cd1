"""Digits, ResNet-20 and the small Llama are cut to the same bits as before the house was rebuilt.

`tests/data/same_bits.json` was written by this file (`python tests/end_to_end/test_same_bits.py`) at commit
2590fd4; once more when batch norms were first measured again on the examples alone that are not held out,
which moved the weights of digits and ResNet-20 and no plan. The case of the walk came with the walk, and the
plans of `global` changed when it no longer emptied narrow layers. The canary is a hash of products, a
factorisation and eigenvalues without Cria: a processor or a torch that rounds these otherwise rounds the
weights otherwise too, and hashes say nothing there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune import PruneConfig, prune
from cria_prune.recipes.registry import task
from cria_prune.tasks.base import Task
from cria_prune.tasks.models import build

BEFORE = Path(__file__).parents[1] / "data" / "same_bits.json"
LLAMA = {"reduction": 0.3, "rounds": 1, "of": "non-embedding"}
CASES: dict[str, dict[str, Any]] = {
    "digits innovation": {"plan": {"reduction": 0.5, "rounds": 2}},
    "digits paper": {"criterion": "distortion", "plan": {"reduction": 0.4, "rounds": 2}, "repair": "none"},
    "digits walk": {"plan": {"reduction": 0.5, "rounds": 1, "of": "macs"}, "repair": "walk"},
    "digits random global": {
        "criterion": "random", "plan": {"reduction": 0.4, "rounds": 1, "ranking": "global"},
    },
    "digits grounded macs": {
        "criterion": "grounded-distortion", "examples": 128,
        "plan": {"reduction": 0.3, "rounds": 1, "of": "macs", "ranking": "uniform"},
    },
    "resnet20 innovation": {"plan": {"reduction": 0.5, "rounds": 2}, "examples": 128},
    "resnet20 magnitude global": {
        "criterion": "innovation-magnitude", "examples": 128,
        "plan": {"reduction": 0.5, "rounds": 1, "ranking": "global", "of": "macs"},
    },
    "llama innovation": {
        "plan": {**LLAMA, "vanilla": True, "uniform": True, "multiple": 8}, "examples": 24,
    },
    "llama distortion sketch": {
        "criterion": "distortion-weighted", "plan": {**LLAMA, "residual": True}, "examples": 24,
    },
}  # fmt: skip
RECIPES = {"digits": "digits", "resnet20": "cifar10-resnet20", "llama": "llama-shakespeare"}


def digest(items: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in items:
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def canary() -> str:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 17, 17, generator=generator)
    weight = torch.randn(24, 3, 3, 3, generator=generator)
    maps = nn.functional.conv2d(images, weight).relu().flatten(2)
    square = torch.randn(300, 300, generator=generator, dtype=torch.float64)
    square = square @ square.T + torch.eye(300, dtype=torch.float64)
    found = {
        "conv": maps,
        "matmul": maps[0] @ maps[0].T,
        "cholesky": torch.linalg.cholesky(square),
        "eigh": torch.linalg.eigvalsh(square),
        "softmax": torch.softmax(maps[0], -1),
    }
    return digest(found.items())


def network(recipe: str) -> tuple[Task, nn.Module]:
    made = task(recipe)
    if recipe.startswith("cifar10"):
        return made, made.dense()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return made, build(made.architecture).eval()


def hashes(name: str) -> dict[str, Any]:
    case, (made, model) = CASES[name], network(RECIPES[name.split()[0]])
    examples, repair = case.get("examples", 256), case.get("repair", "once")
    score = {"criterion": case["criterion"]} if "criterion" in case else {}
    config = PruneConfig(
        record={"examples": examples}, score=score, plan=case["plan"], repair=repair,
        batch_norm=repair != "none",
    )  # fmt: skip
    result = prune(model, made.calibration(examples, 0), config)
    kept = json.dumps({group: list(units) for group, units in sorted(result.plan.kept.items())})
    return {
        "kept": hashlib.sha256(kept.encode()).hexdigest(),
        "weights": digest(sorted(result.model.state_dict().items())),
        "parameters": int(result.report["parameters"]),
    }


@pytest.mark.parametrize("name", CASES)
def test_plan_and_weights_are_those_of_before_bit_for_bit(name: str) -> None:
    before = json.loads(BEFORE.read_text())
    data = Path(os.environ.get("CRIA_DATA") or "../shared")
    if not name.startswith("digits") and not data.is_dir():
        pytest.skip("needs CIFAR-10 and tiny Shakespeare under CRIA_DATA, see docs/contributing.md")
    found = hashes(name)
    assert found["parameters"] == before[name]["parameters"]
    if canary() != before["canary"]:
        pytest.skip("this processor or torch rounds otherwise than the one that wrote the hashes")
    assert found == before[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({"canary": canary(), **{name: hashes(name) for name in CASES}}, sys.stdout, indent=1)
