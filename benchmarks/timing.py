"""Wall time of each stage, and recording plus scoring as a ratio of a plain forward pass.

    python benchmarks/timing.py --network cifar10-resnet56

Forward and record + score alternate over the same calibration batches in one process; the ratio of
every repetition is kept. Writes benchmarks/results/<network>/timing-<criterion>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from cria_prune import apply, discover, plan, record, score, verify
from cria_prune.artifact.provenance import provenance
from cria_prune.batches import model_inputs
from cria_prune.config import PlanConfig, RecordConfig, ScoreConfig
from cria_prune.structure import without_residual
from cria_prune.tasks import TASKS, task
from result_files import RESULTS, write


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def forward(model: torch.nn.Module, batches: list[Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            args, kwargs = model_inputs(batch)
            model(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=sorted(TASKS), default="cifar10-resnet20")
    parser.add_argument("--criterion", default=ScoreConfig().criterion)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1024)
    options = parser.parse_args()
    chosen = task(options.network)
    model, batches = chosen.dense(0), chosen.calibration(options.examples)
    settings, choice = ScoreConfig(criterion=options.criterion), PlanConfig()
    rows = []
    for _ in range(options.repetitions):
        row = {}
        row["forward"], _none = timed(lambda: forward(model, batches))
        row["discover"], groups = timed(lambda: without_residual(discover(model, batches[0])))
        row["record"], states = timed(lambda: record(model, groups, batches, RecordConfig()))  # noqa: B023
        row["score"], found = timed(lambda: score(model, groups, states, settings))  # noqa: B023
        values = {name: item.scores.numpy() for name, item in found.items()}
        row["plan"], step = timed(lambda: plan(groups, values, choice))  # noqa: B023
        row["surgery"], smaller = timed(lambda: apply(model, step))  # noqa: B023
        row["verify"], _none = timed(lambda: verify(model, step, smaller, chosen.example))  # noqa: B023
        rows.append(row)
    ratios = [(row["record"] + row["score"]) / row["forward"] for row in rows]
    result = {
        "network": options.network,
        "criterion": options.criterion,
        "examples": options.examples,
        "threads": torch.get_num_threads(),
        "seconds": {stage: statistics.median(row[stage] for row in rows) for stage in rows[0]},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "provenance": provenance(seed=0, command=sys.argv),
    }
    write(RESULTS / options.network / f"timing-{options.criterion}.json", result)
    print({stage: round(seconds, 3) for stage, seconds in result["seconds"].items()})
    print(f"(record + score) / forward: {[round(item, 2) for item in ratios]}, median {result['ratio']:.2f}")


if __name__ == "__main__":
    main()
