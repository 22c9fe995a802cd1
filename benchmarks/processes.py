"""One, two and four processes at one calibration: how far their scores differ, and whether the plans do.

    python benchmarks/processes.py --network cifar10-resnet20

Each number of processes is run by itself (gloo, CPU, one thread each) with every criterion, then both with
exact Gram matrices and with sketches. The scores of the first process are compared with those of one process
alone; a difference is |a - b| / max(|a|, |b|) of one unit's score, and the largest is shown. Writes
benchmarks/results/processes/<network>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from cria_prune import discover, plan, record, score
from cria_prune.artifact.rebuild import provenance
from cria_prune.config import PlanConfig, RecordConfig, ScoreConfig
from cria_prune.recipes.registry import TASKS, task
from cria_prune.structure.groups import without_residual
from result_files import RESULTS, write

SIZES = (1, 2, 4)
CRITERIA = ("innovation", "distortion", "grounded-distortion", "taylor", "fisher")
KINDS = {"exact": {}, "sketched": {"exact_units": 8, "sketch_columns": 64}}


def work(network: str, examples: int, rank: int, size: int, folder: Path) -> None:
    """Score and plan as one of `size` processes; the first writes what came out."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/store-{size}", rank=rank, world_size=size)
    chosen = task(network)
    model, batches = chosen.dense(0), chosen.calibration(examples)
    groups, found = without_residual(discover(model, batches[0])), dict[str, Any]()
    for kind, settings in KINDS.items():
        start = time.perf_counter()
        states = record(model, groups, batches, RecordConfig(**settings), per_example=True)
        seconds = time.perf_counter() - start
        rows: dict[str, Any] = {}
        for criterion in CRITERIA:
            scores = score(model, groups, states, ScoreConfig(criterion=criterion))
            values = {name: item.scores.numpy() for name, item in scores.items()}
            kept = plan(groups, values, PlanConfig()).kept
            rows[criterion] = {
                "scores": {name: item.tolist() for name, item in values.items()},
                "kept": {name: list(item) for name, item in kept.items()},
            }
        found[kind] = {"criteria": rows, "batches": states.batches, "record_seconds": seconds}
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def run(network: str, examples: int, size: int, folder: Path) -> Any:
    """Return what `size` processes find."""
    command = [sys.executable, __file__, "--network", network, "--examples", str(examples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, "--worker", str(rank), str(size), str(folder)], env=environment)
        for rank in range(size)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{size} processes did not end well")
    return json.loads((folder / f"{size}.json").read_text())


def largest(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Return the largest relative difference of a unit's score."""
    pairs = [pair for name in one for pair in zip(one[name], other[name], strict=True)]
    return max(abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=sorted(TASKS), default="cifar10-resnet20")
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, size, folder = options.worker
        work(options.network, options.examples, int(rank), int(size), Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {size: run(options.network, options.examples, size, Path(folder)) for size in SIZES}
    rows = []
    print(f"{'':9} {'criterion':20} {'processes':>9} {'largest difference':>19} {'plan':>9}")
    for kind in KINDS:
        for criterion in CRITERIA:
            one = found[1][kind]["criteria"][criterion]
            for size in SIZES[1:]:
                other = found[size][kind]["criteria"][criterion]
                row = {
                    "moments": kind,
                    "criterion": criterion,
                    "processes": size,
                    "largest_difference": largest(one["scores"], other["scores"]),
                    "same_plan": one["kept"] == other["kept"],
                }
                rows.append(row)
                said = "the same" if row["same_plan"] else "another"
                print(f"{kind:9} {criterion:20} {size:9} {row['largest_difference']:19.1e} {said:>9}")
    seconds = {
        kind: {str(size): round(found[size][kind]["record_seconds"], 3) for size in SIZES} for kind in KINDS
    }
    print(f"seconds of recording: {seconds} on {os.cpu_count()} cores")
    origin = provenance(0, ["python", *sys.argv], task(options.network).fingerprint("train"), "cpu")
    values = {
        "network": options.network,
        "examples": options.examples,
        "batches": found[1]["exact"]["batches"],
        "settings": KINDS,
        "rows": rows,
        "record_seconds": seconds,
        "provenance": origin,
    }
    path = RESULTS / "processes" / f"{options.network}.json"
    write(path, values)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
