"""Thousands of random networks: is a cut ever wrong, and how much can be cut?

    python benchmarks/fuzz.py --networks 3000 --seed 0
    python benchmarks/fuzz.py --networks 3000 --seed 1000000 --results benchmarks/results/fuzz/after

Networks from seed 1000000 on have the further blocks (experts, recurrence, computed weights, widths from the
input, branches without a skip) too. With `--results` every fifty networks are a file there, and a stopped run
goes on; without it, it prints networks, groups, the prunable ones per kind of network and of block, why the
others are frozen, the largest difference between masked and pruned, and every failing network as a small
program.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from generator import network, shrunk
from generator_check import Outcome, check, check_seed, coverage, plain_reason, same_failure

from cria_prune.artifact.rebuild import provenance
from result_files import write


def report(outcomes: list[Outcome], seconds: float) -> None:
    groups = [group for outcome in outcomes for group in outcome.groups]
    prunable = sum(frozen is None and size > 1 for _, _, size, frozen in groups)
    failed = [outcome for outcome in outcomes if outcome.failure]
    print(
        f"{len(outcomes)} networks, {len(groups)} groups, "
        f"{prunable} prunable ({prunable / max(len(groups), 1):.0%})"
    )
    print(f"largest difference {max(outcome.difference for outcome in outcomes):.1e}, "
          f"{sum(outcome.moved > 0 for outcome in outcomes)} outputs moved by pruning, "
          f"{len(failed)} networks failed, {seconds:.0f} s "
          f"({sum(outcome.seconds for outcome in outcomes) / len(outcomes):.3f} s each)")  # fmt: skip
    everything, offered = coverage(outcomes)
    print(f"\n{'producer':24} {'groups':>7} {'prunable':>9}")
    for name, count in sorted(everything.items(), key=lambda item: (" " not in item[0], item[0])):
        print(f"{name:24} {count:7} {offered[name] / count:9.0%}")
    reasons = Counter(plain_reason(frozen) for _, _, _, frozen in groups if frozen)
    print(f"\n{'frozen':>7} because it")
    for reason, count in reasons.most_common(30):
        print(f"{count:7} {reason}")


def by_chunks(seeds: range, folder: Path, processes: int) -> None:
    """Write one file for every fifty seeds that has none yet; a failure is in it with its seed."""
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for first in range(seeds.start, seeds.stop, CHUNK):
            path = folder / f"{first}.json"
            if path.exists():
                continue
            outcomes = pool.map(check_seed, range(first, min(first + CHUNK, seeds.stop)))
            write(path, summed(outcomes) | {"provenance": provenance(seed=first, command=COMMAND)})
            failures = [f"seed {item.seed}: {item.failure}" for item in outcomes if item.failure]
            print(f"{first}: {len(outcomes)} networks", *failures, sep="\n  ", file=sys.stderr, flush=True)


def summed(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the counts of some networks, ready for JSON."""
    everything, offered = coverage(outcomes)
    groups = [group for outcome in outcomes for group in outcome.groups]
    return {
        "networks": len(outcomes),
        "groups": len(groups),
        "prunable": sum(frozen is None and size > 1 for _, _, size, frozen in groups),
        "moved": sum(outcome.moved > 0 for outcome in outcomes),
        "difference": max(outcome.difference for outcome in outcomes),
        "cpu": sum(outcome.seconds for outcome in outcomes),
        "blocks": {name: [offered[name], count] for name, count in sorted(everything.items())},
        "frozen": dict(Counter(plain_reason(frozen) for *_, frozen in groups if frozen).most_common(12)),
        "failures": {str(outcome.seed): outcome.failure for outcome in outcomes if outcome.failure},
    }


CHUNK = 50
COMMAND = ["benchmarks/fuzz.py", *sys.argv[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--show", type=int, default=5, help="failing networks to shrink and print, one per kind"
    )
    parser.add_argument(
        "--results", type=Path, help="folder of result files; a network in one is not run again"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.results:
        by_chunks(range(options.seed, options.seed + options.networks), options.results, options.processes)
        return
    start = time.perf_counter()
    seeds = range(options.seed, options.seed + options.networks)
    with multiprocessing.get_context("spawn").Pool(options.processes, torch.set_num_threads, (1,)) as pool:
        outcomes = list(pool.imap_unordered(check_seed, seeds, chunksize=10))
    outcomes.sort(key=lambda outcome: outcome.seed)
    report(outcomes, time.perf_counter() - start)
    kinds: list[Outcome] = []
    for outcome in outcomes:
        if outcome.failure and not any(same_failure(outcome.failure, item.failure) for item in kinds):
            kinds.append(outcome)
    for outcome in kinds[: options.show]:
        small = shrunk(network(outcome.seed), lambda item: same_failure(check(item).failure, outcome.failure))  # noqa: B023
        alike = [item.seed for item in outcomes if same_failure(item.failure, outcome.failure)]
        print(
            f"\n{'=' * 100}\n{outcome.failure}\n"
            f"{len(alike)} networks, seeds {alike[:8]}; the first one, shrunk:\n"
        )
        print(small)
    for outcome in kinds[options.show :]:
        print(f"\nseed {outcome.seed}: {outcome.failure}")
    sys.exit(bool(kinds))


if __name__ == "__main__":
    main()
