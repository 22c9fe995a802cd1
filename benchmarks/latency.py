"""Latency of pruned networks against the dense one, as a share of what their MACs promise.

    python benchmarks/latency.py --network cifar10-resnet56

For 30 and 50 % fewer MACs, batches of 1 and 64, eager and compiled (torch.compile needs a C++ compiler), with
widths as they fall and in multiples of 8 and 16. Weights are random: latency depends on the widths, which a
uniform ranking gives all criteria alike. Dense and pruned networks take short turns in one process; a time is
that of the best turn, the one that other work on the machine disturbed least, and the spread to the median is
kept. `efficiency` = (dense / pruned time) / (dense / pruned MACs): 1 is what the MACs promise. Writes
benchmarks/results/latency/<network>.json, of a GPU (compiled with graphs of its kernels) <network>-cuda.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cria_prune import apply, discover, plan, score
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.batches import Batch, batch_size, map_tensors, model_inputs, move
from cria_prune.base.errors import CriaError
from cria_prune.config import PlanConfig, ScoreConfig
from cria_prune.recipes.registry import TASKS, task
from cria_prune.structure.groups import without_residual
from cria_prune.tasks.models import build
from result_files import RESULTS, finished, on, write

SHARES, BATCHES, MULTIPLES = (0.3, 0.5), (1, 64), (1, 8, 16)
SLICE = 0.05  # seconds of calls that are timed together


def resized(batch: Batch, size: int) -> Batch:
    """Return a batch of `size` examples, the given ones again and again."""
    there = batch_size(batch)
    index = torch.arange(size) % there
    return map_tensors(batch, lambda item: item[index] if item.ndim and len(item) == there else item)


def once(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    args, kwargs = model_inputs(batch)
    return lambda: model(*args, **kwargs)


def timed(calls: dict[str, Callable[[], Any]], turns: int, device: str) -> dict[str, list[float]]:
    """Return the seconds per call of each, ascending, one value per turn."""
    counts, times = {}, {name: list[float]() for name in calls}
    for name, call in calls.items():
        for _ in range(3):
            call()  # compiles, allocates
        finished(device)
        start = time.perf_counter()
        call()
        finished(device)
        counts[name] = max(1, round(SLICE / (time.perf_counter() - start)))
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            finished(device)
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: sorted(found) for name, found in times.items()}


def sizes(model: nn.Module, example: Batch, network: str) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Return the dense and the pruned networks, and their MACs per example."""
    groups = without_residual(discover(model, example))
    values = {
        name: item.scores.numpy()
        for name, item in score(model, groups, None, ScoreConfig(criterion="random")).items()
    }
    models, macs = {"dense": model}, dict[str, float]()
    for share in SHARES:
        for multiple in MULTIPLES:
            name = f"{share:g}, multiples of {multiple}"
            try:
                step = plan(groups, values, PlanConfig(reduction=share, of="macs", multiple=multiple))
            except CriaError as error:
                print(f"{network}, {name}: {error}", file=sys.stderr)
                continue
            models[name] = apply(model, step).eval()
            macs["dense"], macs[name] = float(step.report["macs_dense"]), float(step.report["macs"])
    return models, macs


def compared(dense: list[float], pruned: list[float], promised: float) -> dict[str, float]:
    """Return what a result file keeps of two networks' turns and the ratio of their MACs."""
    speed = dense[0] / pruned[0]
    return {
        "milliseconds_dense": 1e3 * dense[0],
        "milliseconds": 1e3 * pruned[0],
        "median_over_best": statistics.median(pruned) / pruned[0],
        "speedup": speed,
        "macs_ratio": promised,
        "efficiency": speed / promised,
    }


def measure(network: str, turns: int, modes: list[str], device: str) -> list[dict[str, Any]]:
    chosen = task(network)
    model, example = build(chosen.architecture).eval().to(device), move(chosen.example, device)
    models, macs = sizes(model, example, network)
    graphs = {} if device == "cpu" else {"mode": "reduce-overhead"}
    rows = []
    for mode in modes:
        for size in BATCHES:
            batch = resized(example, size)
            torch.compiler.reset()
            ready = {
                name: torch.compile(item, dynamic=False, **graphs) if mode == "compiled" else item
                for name, item in models.items()
            }
            with torch.no_grad():
                seconds = timed({name: once(item, batch) for name, item in ready.items()}, turns, device)
            for name in list(models)[1:]:
                row = compared(seconds["dense"], seconds[name], macs["dense"] / macs[name])
                rows.append({"pruned": name, "mode": mode, "batch": size, **row})
                print(
                    f"{network:<18} {mode:<9} batch {size:<3} {name:<22} MACs / {row['macs_ratio']:.2f}, "
                    f"time / {row['speedup']:.2f}, efficiency {row['efficiency']:.2f}, "
                    f"median / best {row['median_over_best']:.2f}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=sorted(TASKS), nargs="+", default=["cifar10-resnet56"])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for network in options.network:
        load = os.getloadavg()[0]
        rows = measure(network, options.turns, options.modes, options.device)
        result = {
            "network": network,
            "threads": torch.get_num_threads(),
            "load_before": load,
            "turns": options.turns,
            "rows": rows,
            "provenance": provenance(seed=0, command=sys.argv, device=options.device),
        }
        write(RESULTS / "latency" / on(f"{network}.json", options.device), result)


if __name__ == "__main__":
    main()
