"""What recording and scoring cost beside a plain forward pass over the same calibration data.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --only llama-shakespeare --device cuda

For each network its recipe (criterion, repair, calibration examples), the same with all tokens of a text, and
`distortion`, which reads both sides. Forward, recording and scoring alternate in one process; of every
repetition the shares are kept: `record` = recording less the forward pass in it, over the forward pass;
`score` = scoring over the forward pass. Weights are random, for none of it depends on them. Writes
benchmarks/results/overhead/<network>.json, of a GPU <network>-cuda.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cria_prune import PruneConfig, UnitGroups, discover
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.batches import Batch, forward, move
from cria_prune.base.modules import device_of
from cria_prune.criteria.score import find_criterion, score
from cria_prune.planning.selection import scope
from cria_prune.recipes.registry import task
from cria_prune.stages import record_for
from result_files import RESULTS, finished, on, write

NETWORKS = ("cifar10-resnet56", "sst2-minilm", "llama-shakespeare")
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "recipe": {},
    "all tokens": {"record": {"tokens": None}},
    "distortion": {"score": {"criterion": "distortion"}},
}


def all_forward(model: nn.Module, batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            forward(model, move(batch, device_of(model)))


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    finished(device)
    start = time.perf_counter()
    value = function()
    finished(device)
    return time.perf_counter() - start, value


def configured(defaults: dict[str, Any], changes: dict[str, dict[str, Any]]) -> PruneConfig:
    values = {name: dict(part) for name, part in defaults.items()}
    for name, part in changes.items():
        values[name] = {**values.get(name, {}), **part}
    return PruneConfig(**values)


def measure(
    model: nn.Module, groups: UnitGroups, batches: list[Batch], config: PruneConfig, repetitions: int
) -> dict[str, Any]:
    needs, device = find_criterion(config.score).needs, str(device_of(model))
    rows = []
    for number in range(repetitions + 1):
        plain, _ = timed(lambda: all_forward(model, batches), device)
        moments = config.repair == "once"
        recorded, states = timed(
            lambda: record_for(needs, model, groups, batches, config, consumed=moments),  # noqa: B023
            device,
        )
        scored, _ = timed(lambda: score(model, groups, states, config.score), device)  # noqa: B023
        if number:  # the first touches code and memory
            rows.append({"forward": plain, "record": recorded, "score": scored})
    shares = [
        {"record": row["record"] / row["forward"] - 1, "score": row["score"] / row["forward"]} for row in rows
    ]
    totals = sorted(sum(share.values()) for share in shares)
    return {
        "criterion": config.score.criterion,
        "repair": config.repair != "none",
        "tokens": config.record.tokens,
        "seconds": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "shares": {name: statistics.median(share[name] for share in shares) for name in shares[0]},
        "total": statistics.median(totals),
        "least": totals[0],
        "most": totals[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for network in options.only:
        chosen = task(network)
        recipe = configured(chosen.prune_defaults, {})
        batches = list(chosen.calibration(recipe.record.examples))
        model, rows = chosen.untrained().eval().to(options.device), {}
        groups = scope(model, discover(model, move(batches[0], options.device)), recipe.plan).groups
        for name, changes in VARIANTS.items():
            if name == "all tokens" and not isinstance(batches[0], dict):
                continue
            config = configured(chosen.prune_defaults, changes)
            rows[name] = found = measure(model, groups, batches, config, options.repetitions)
            parts = ", ".join(f"{part} {share:.2f}" for part, share in found["shares"].items())
            print(f"{network:20} {name:12} {parts}, total {found['total']:.2f}"
                  f" ({found['least']:.2f} to {found['most']:.2f})", flush=True)  # fmt: skip
        result = {
            "network": network,
            "examples": recipe.record.examples,
            "groups": len(groups.prunable),
            "widest": max(group.size for group in groups.prunable),
            "threads": options.threads,
            "rows": rows,
            "provenance": provenance(seed=0, command=sys.argv, device=options.device),
        }
        write(RESULTS / "overhead" / on(f"{network}.json", options.device), result)


if __name__ == "__main__":
    main()
