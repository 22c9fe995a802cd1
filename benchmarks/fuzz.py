"""Thousands of random networks: is a cut ever wrong, and how much can be cut?

    python benchmarks/fuzz.py --networks 3000 --seed 0

Prints networks, groups, the prunable ones per kind of network and of block, why the others are
frozen, the largest difference between masked and pruned, and every failing network as a small program.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from generator import network, shrunk
from generator_check import Outcome, check, check_seed, coverage, plain_reason, same_failure


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--show", type=int, default=5, help="failing networks to shrink and print, one per kind"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
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
