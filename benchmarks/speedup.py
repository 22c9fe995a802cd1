"""Speed-ups that are asked for, foretold and reached on this machine, beside the same ones by MACs.

    python benchmarks/speedup.py
    python benchmarks/speedup.py --only cifar10-resnet56 --batches 64

Asked: 1.3 and 1.6 times as fast, of batches of 1 and of 64, in one round with the default repair. `predicted`
is what the table of measured latencies says of the network that was chosen, `reached` what it is beside the
dense one, measured anew after the choice. Beside it MACs are cut, by shares that are measured too, so many
that the network is as fast: the share is searched for as the pruning of latency does. The fidelity is that of
the held-out calibration examples. ResNet-56, the MiniLM (sst2-minilm) and the small Llama are trained; the
MobileNetV2 is torchvision's with random weights, of which speeds say as much, and is left out where there is
no torchvision. Writes benchmarks/results/speedup/<network>.json, row by row: the same command goes on.
Tables of latencies and losses are kept in memory alone: both speed-ups of a batch are made in one go.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import zoo
from cria_prune import PruneConfig, prune
from cria_prune.base.batches import Batch
from cria_prune.base.errors import CriaError
from cria_prune.config import RecordConfig
from cria_prune.latency import TRIES, compare_speed, next_aim, timing_batch
from cria_prune.measured import measure_losses, with_latency
from cria_prune.recipes.registry import task
from cria_prune.stages import Prepared, Ranking, plan_cut, prepare, rank, remove
from result_files import RESULTS, Rows

NETWORKS = ("cifar10-resnet56", "sst2-minilm", "llama-shakespeare", "mobilenet-v2")
SPEEDUPS, BATCHES = (1.3, 1.6), (1, 64)
EXAMPLES, PIXELS, NEAR = 256, 96, 0.1


def build(network: str, untrained: bool, examples: int) -> tuple[nn.Module, list[Batch], dict[str, Any]]:
    """Return a network, calibration batches and what its recipe says of its pruning."""
    if network == "mobilenet-v2":
        model, _ = zoo.build("torchvision/mobilenet_v2")
        generator = torch.Generator().manual_seed(0)
        count = (examples + 31) // 32
        return model, [torch.randn(32, 3, PIXELS, PIXELS, generator=generator) for _ in range(count)], {}
    chosen = task(network)
    values: dict[str, Any] = {name: dict(part) for name, part in chosen.prune_defaults.items()}
    batches = list(chosen.calibration(examples))
    return chosen.untrained() if untrained else chosen.dense(0), batches, values


def configured(values: dict[str, Any], examples: int, **plan: Any) -> PruneConfig:
    record = {**RecordConfig().model_dump(), **values.get("record", {}), "examples": examples}
    return PruneConfig(**{**values, "record": record, "plan": {"rounds": 1, **plan}}, verify=False)


def by_macs(ready: Prepared, ranking: Ranking, speedup: float, size: int) -> float:
    """Return the share of the MACs without which a network is so many times as fast."""
    asked, points, aims = 1 - 1 / speedup, list[tuple[float, float]](), [1 - 1 / speedup]
    batch = timing_batch(ready.batches, torch.device("cpu"), size)
    while True:
        step = plan_cut(ready, ranking.scores, aims[-1])
        found = compare_speed(ready.model, remove(ready.model, step), batch)
        points.append((float(step.report["reached"]), found.reduction))
        further = next_aim(asked, points, float(step.report["reachable"]))
        if further is None or len(points) == TRIES:
            return aims[min(range(len(points)), key=lambda number: abs(points[number][1] - asked))]
        aims.append(further)


def measure(
    model: nn.Module, batches: list[Batch], values: dict[str, Any], examples: int, size: int, kept: Rows
) -> None:
    """Add the rows of a network and a batch that are not there yet."""
    names = {
        (speedup, of): f"{speedup:g}, batch {size}, {of}"
        for speedup in SPEEDUPS
        for of in ("latency", "macs")
    }
    if all(name in kept for name in names.values()):
        return
    timed = {"latency_batch": size}
    start = time.perf_counter()
    # Hardly faster, for a table is measured whatever can be reached: what cannot be is said row by row.
    ready = with_latency(prepare(model, batches, configured(values, examples, speedup=1.01, **timed)))
    seconds = {"latencies": time.perf_counter() - start}
    ranking = rank(ready)
    start = time.perf_counter()
    losses = measure_losses(ready, ranking)
    seconds["losses"] = time.perf_counter() - start
    for (speedup, of), name in names.items():
        if name in kept:
            continue
        try:
            row = pruned(ready, ranking, losses, values, examples, (speedup, of, size))
        except CriaError as error:  # more than this network can become: that is a result
            row = {"asked": speedup, "error": f"{error.asked}: {error.found}"}
        kept.add(name, {**row, "seconds": seconds, "load": os.getloadavg()[0]})
        show(name, kept.rows[name])


def pruned(
    ready: Prepared, ranking: Ranking, losses: Any, values: dict[str, Any], examples: int,
    asked: tuple[float, str, int],
) -> dict[str, Any]:  # fmt: skip
    speedup, of, size = asked
    plan: dict[str, Any] = {"speedup": speedup, "latency_batch": size}
    if of == "macs":
        config = configured(values, examples, of="macs", ranking="measured", reduction=0.5)
        there = replace(ready.with_config(config), losses=losses)
        plan = {"of": "macs", "ranking": "measured", "reduction": by_macs(there, ranking, speedup, size)}
    config = configured(values, examples, **plan)
    there = replace(ready.with_config(config), losses=losses)
    start = time.perf_counter()
    result = prune(ready.model, ready.batches, config, prepared=there)
    spent, report = time.perf_counter() - start, result.report
    batch = timing_batch(ready.batches, torch.device("cpu"), size)
    reached = report.get("speedup") or compare_speed(ready.model, result.model, batch).speedup
    near = result.rounds[-1].nearness
    return {
        "asked": speedup, "predicted": report.get("speedup_predicted"), "reached": reached,
        "macs_left": float(report["macs"]) / float(report["macs_dense"]),
        "parameters_left": float(report["parameters"]) / float(report["parameters_dense"]),
        "fidelity": None if near is None else near.to_dict(), "brief": "" if near is None else near.brief,
        "prune": spent,
    }  # fmt: skip


def show(name: str, row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"  {name:24} {row['error']}", flush=True)
        return
    predicted = "" if row["predicted"] is None else f"predicted {row['predicted']:.2f}"
    missed = "" if abs(row["reached"] / row["asked"] - 1) <= NEAR else " MISSED"
    print(
        f"  {name:24} {predicted:14} reached {row['reached']:.2f}{missed}; MACs left {row['macs_left']:.1%}, "
        f"parameters left {row['parameters_left']:.1%}; {row['brief']}; {row['prune']:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="calibration examples")
    parser.add_argument("--untrained", action="store_true", help="random weights, for a try")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for network in options.only:
        try:
            model, batches, values = build(network, options.untrained, options.examples)
        except ImportError as error:
            print(f"{network}: left out, {error}")
            continue
        facts = {
            "network": network, "examples": options.examples, "threads": options.threads,
            "trained": network != "mobilenet-v2" and not options.untrained,
        }  # fmt: skip
        kept = Rows(RESULTS / "speedup" / f"{network}.json", facts)
        print(f"{network}: asked, predicted and reached on {options.threads} thread(s)")
        for size in options.batches:
            measure(model, batches, values, options.examples, size, kept)


if __name__ == "__main__":
    main()
