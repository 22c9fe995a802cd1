"""Predicted against measured memory of recording and scoring, each in a process of its own.

    python benchmarks/memory.py
    python benchmarks/memory.py --only gated-4096-2 --repetitions 1

`predict_memory` is asked before; then the peak of the resident memory above the level before is measured
(Linux: VmHWM, set back by /proc/self/clear_refs), of recording, and of scoring with what was recorded still
there. Twice: with blocks given back to the system as soon as they are freed (mallopt, M_MMAP_THRESHOLD),
which measures what is in use, and as the C library comes, which keeps freed blocks of up to 32 MB for itself.
On a GPU (`--device cuda`) it is torch that says what is allocated there, the first time and again.
Networks have random weights. Writes benchmarks/results/memory/predicted.json, of a GPU predicted-cuda.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import PruneConfig, UnitGroups, discover, predict_memory
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.batches import Batch, move
from cria_prune.base.modules import give_back
from cria_prune.criteria.score import find_criterion, score
from cria_prune.memory import largest_batch
from cria_prune.planning.selection import scope
from cria_prune.recipes.registry import task
from cria_prune.stages import record_for
from resident import resident
from result_files import RESULTS, on, write

MB = 2**20
SMALL = 200 * MB
"""Below this the allocator, and what libraries load at first use, are as large as what is predicted."""
M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h

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
    (1024, 4, 8, "innovation"), (1024, 2, 32, "distortion"), (2048, 2, 8, "innovation"),
    (2048, 1, 8, "distortion"), (4096, 1, 8, "innovation"), (4096, 4, 4, "activation-norm"),
    (11008, 1, 4, "innovation"), (11008, 2, 8, "distortion"),
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


def begin() -> int:
    """Set the peak back and return the level."""
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def warm_up(device: str = "cpu") -> None:
    """Touch the code and the tables that recording and scoring use: a fork has yet to map them."""
    model, batch = Gated(8, 96, 1).eval().to(device), torch.randn(8, 4, 8, device=device)
    groups = discover(model, batch)
    for criterion in ("innovation", "distortion"):
        config = PruneConfig(score={"criterion": criterion})
        needs = find_criterion(criterion).needs
        score(model, groups, record_for(needs, model, groups, [batch], config), config.score)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fork of this process; what it returns comes as JSON."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)

    def run() -> None:
        here.send_bytes(json.dumps(function(*arguments)).encode())

    process = context.Process(target=run)
    process.start()
    here.close()
    try:
        return json.loads(there.recv_bytes())
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments[-1:]} ended without an answer") from None
    finally:
        process.join()


def measure(
    model: nn.Module, groups: UnitGroups, batches: list[Batch], config: PruneConfig, at_once: bool
) -> dict[str, int]:
    """Record and score; return both peaks in bytes above the level before."""
    if at_once:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    needs = find_criterion(config.score).needs
    warm_up()
    level = begin()
    states = record_for(needs, model, groups, batches, config, consumed=config.repair == "once")
    recorded = resident("VmHWM") - level
    begin()
    score(model, groups, states, config.score)
    return {"record": recorded, "score": resident("VmHWM") - level}


def there(
    model: nn.Module, groups: UnitGroups, batches: list[Batch], config: PruneConfig, device: str
) -> dict[str, int]:
    """Record and score on a GPU; return both peaks of its memory in bytes above the level before."""
    needs = find_criterion(config.score).needs
    warm_up(device)
    level = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    states = record_for(needs, model, groups, batches, config, consumed=config.repair == "once")
    recorded = torch.cuda.max_memory_allocated(device) - level
    torch.cuda.reset_peak_memory_stats(device)
    score(model, groups, states, config.score)
    return {"record": recorded, "score": torch.cuda.max_memory_allocated(device) - level}


def row(case: str, repetitions: int, device: str) -> dict[str, Any]:
    """Predict, then measure: once with blocks given back, `repetitions` times as the allocator comes."""
    model, batches, config = build(case)
    model.to(device)
    batch = move(largest_batch(batches), device)
    groups = scope(model, discover(model, batch), config.plan).groups
    predicted = predict_memory(model, groups, batch, config)
    measured, *usual = [
        apart(measure, model, groups, batches, config, number == 0)
        if device == "cpu"
        else there(model, groups, batches, config, device)
        for number in range(1 + repetitions)
    ]
    said = {stage.name: stage.peak for stage in predicted.stages}
    peak = max(said.values())
    return {
        "case": case,
        "predicted": said,
        "parts": {stage.name: dict(stage.parts) for stage in predicted.stages},
        "model": predicted.model,
        "measured": measured,
        "ratio": {name: size / measured[name] for name, size in said.items()},
        "peak_ratio": peak / max(measured.values()),
        "small": max(measured.values()) < SMALL,
        "usual_allocator": usual,
        "usual_peak_ratios": [peak / max(item.values()) for item in usual],
    }


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
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in cases() if not options.only or case.startswith(tuple(options.only))]
    print("megabytes above the level before, predicted / measured")
    rows = []
    for case in chosen:
        rows.append(apart(row, case, options.repetitions, options.device))
        show(rows[-1])
    large = [item["peak_ratio"] for item in rows if not item["small"]]
    if options.only:
        return
    result = {
        "rows": rows,
        "small": SMALL,
        "least": min(large),
        "most": max(large),
        "median": statistics.median(large),
        "threads": 1,
        "provenance": provenance(seed=0, command=sys.argv, device=options.device),
    }
    write(RESULTS / "memory" / on("predicted.json", options.device), result)
    print(f"of peaks above {SMALL // MB} MB: predicted / measured {min(large):.2f} to {max(large):.2f}")


if __name__ == "__main__":
    main()
