"""Predicted against measured memory of recording and scoring, each in a process of its own.

    python benchmarks/memory.py
    python benchmarks/memory.py --only gated-4096-2 --repetitions 1

`predict_memory` is asked before; then the peak of the resident memory above the level before is measured
(Linux: VmHWM, set back by /proc/self/clear_refs), of recording, and of scoring with what was recorded still
there. Twice: with blocks given back to the system as soon as they are freed (MALLOC_MMAP_THRESHOLD_), which
measures what is in use, and as the C library comes, which keeps freed blocks of up to 32 MB for itself.
Networks have random weights. Writes benchmarks/results/memory/predicted.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import PruneConfig, discover, predict_memory
from cria_prune.artifact.provenance import provenance
from cria_prune.batches import Batch
from cria_prune.criteria import score
from cria_prune.criteria.score import find_criterion
from cria_prune.memory import largest_batch
from cria_prune.pipeline import record_for
from cria_prune.scope import scope
from cria_prune.tasks import task
from result_files import RESULTS, write

MB = 2**20
SMALL = 200 * MB
"""Below this the allocator, and what libraries load at first use, are as large as what is predicted."""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}

# name -> (criterion, other values of the configuration)
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10-resnet20": {},
    "cifar10-resnet56": {},
    "cifar10-resnet56/taylor": {"score": {"criterion": "taylor"}},
    "llama-shakespeare": {},
    "llama-shakespeare/distortion": {"score": {"criterion": "distortion"}},
}
# units, layers, examples of 128 tokens in a batch, criterion
GATED = (
    (1024, 4, 8, "innovation"), (1024, 4, 8, "distortion"), (2048, 2, 8, "innovation"),
    (2048, 2, 8, "distortion"), (4096, 1, 8, "innovation"), (4096, 2, 8, "distortion"),
    (4096, 4, 8, "activation-norm"), (11008, 1, 4, "activation-norm"), (11008, 2, 16, "distortion"),
)  # fmt: skip


class Gated(nn.Module):
    """Gated feed-forward layers of a decoder, without attention."""

    def __init__(self, width: int, units: int, layers: int) -> None:
        super().__init__()
        parts = [(width, units), (width, units), (units, width)]
        self.up, self.gate, self.down = (
            nn.ModuleList(nn.Linear(*part, bias=False) for _ in range(layers)) for part in parts
        )

    def forward(self, x: Tensor) -> Tensor:
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            x = x + down(F.silu(gate(x)) * up(x))
        return x


def cases() -> list[str]:
    return [*RECIPES, *(f"gated-{units}-{layers}/{name}" for units, layers, _, name in GATED)]


def build(case: str) -> tuple[nn.Module, list[Batch], PruneConfig]:
    name, _, criterion = case.partition("/")
    torch.manual_seed(0)
    if case in RECIPES:
        chosen = task(name)
        values = {**{key: dict(part) for key, part in chosen.prune_defaults.items()}, **RECIPES[case]}
        config = PruneConfig(**values)
        return chosen.untrained(), chosen.calibration(config.record.examples), config
    units, layers = map(int, name.removeprefix("gated-").split("-"))
    size = next(item[2] for item in GATED if (*item[:2], item[3]) == (units, layers, criterion))
    batches: list[Batch] = [torch.randn(size, 128, 256) for _ in range(4)]
    return Gated(256, units, layers).eval(), batches, PruneConfig(score={"criterion": criterion})


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def begin() -> int:
    """Set the peak back and return the level."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(case: str) -> dict[str, Any]:
    """Predict, record and score in this process; everything in bytes above the level before."""
    model, batches, config = build(case)
    batch = largest_batch(batches)
    groups = scope(model, discover(model, batch), config.plan).groups
    predicted = predict_memory(model, groups, batch, config)
    needs = find_criterion(config.score.criterion).needs
    level = begin()
    states = record_for(needs, model, groups, batches, config, consumed=config.compensate)
    recorded = resident("VmHWM") - level
    begin()
    score(model, groups, states, config.score)
    scored = resident("VmHWM") - level
    stages = {stage.name: stage for stage in predicted.stages}
    return {
        "predicted": {name: stage.peak for name, stage in stages.items()},
        "parts": {name: dict(stage.parts) for name, stage in stages.items()},
        "model": predicted.model,
        "measured": {"record": recorded, "score": scored},
    }


def child(case: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", case]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(case: str, repetitions: int) -> dict[str, Any]:
    """Measure one case: once with blocks given back, `repetitions` times as the allocator comes."""
    first = child(case, GIVEN_BACK)
    others = [child(case, {}) for _ in range(repetitions)]
    usual = {name: [item["measured"][name] for item in others] for name in first["measured"]}
    ratios = {name: first["predicted"][name] / first["measured"][name] for name in first["predicted"]}
    peaks = {key: max(first[key].values()) for key in ("predicted", "measured")}
    return {
        "case": case,
        **first,
        "ratio": ratios,
        "peak_ratio": peaks["predicted"] / peaks["measured"],
        "small": peaks["measured"] < SMALL,
        "usual_allocator": usual,
        "usual_peak_ratios": [
            peaks["predicted"] / max(item["measured"].values()) for item in others
        ],
    }  # fmt: skip


def show(item: dict[str, Any]) -> None:
    parts = [
        f"{name} {item['predicted'][name] / MB:7.0f} / {item['measured'][name] / MB:7.0f} = {ratio:.2f}"
        for name, ratio in item["ratio"].items()
    ]
    usual = ", ".join(f"{ratio:.2f}" for ratio in item["usual_peak_ratios"])
    print(
        f"{item['case']:30} {'; '.join(parts)}; peak {item['peak_ratio']:.2f}"
        f" (usual allocator {usual}){' small' if item['small'] else ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="cases that begin with one of these; nothing is written")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--child", choices=cases(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.child)))
        return
    chosen = [case for case in cases() if not options.only or case.startswith(tuple(options.only))]
    print("megabytes above the level before, predicted / measured")
    rows = []
    for case in chosen:
        rows.append(row(case, options.repetitions))
        show(rows[-1])
    large = [item["peak_ratio"] for item in rows if not item["small"]]
    if options.only:
        return
    result = {
        "rows": rows,
        "least": min(large),
        "most": max(large),
        "median": statistics.median(large),
        "threads": 1,
        "provenance": provenance(seed=0, command=sys.argv),
    }
    write(RESULTS / "memory" / "predicted.json", result)
    print(f"of peaks above {SMALL // MB} MB: predicted / measured {min(large):.2f} to {max(large):.2f}")


if __name__ == "__main__":
    main()
