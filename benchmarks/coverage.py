"""Which networks Cria can prune, and Torch-Pruning beside it: one result file per network, resumable.

    python benchmarks/coverage.py
    python benchmarks/coverage.py torchvision timm/vit_tiny_patch16_224 --no-peer

Without names all networks of the zoo. Every network is measured in a process of its own with a time
limit, one after the other, and so is the peer. Files are in benchmarks/results/coverage; a network that
has one is not run again. `python benchmarks/tables.py` turns the files into docs/coverage.md.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import zoo
from coverage_table import PEER_LIMIT, result_path
from cria_prune.artifact.rebuild import provenance
from result_files import RESULTS, write
from staged import collect

BEFORE = [
    *["transformers/mixtral", "transformers/qwen3-moe", "transformers/deepseek-v3", "transformers/mamba"],
    *["transformers/rwkv", "own/nanogpt", "timm/beit_base_patch16_224", "timm/swinv2_tiny_window8_256"],
    *["timm/volo_d1_224", "transformers/segformer", "own/lstm-tagger", "own/crnn", "transformers/hubert"],
    *["own/wavenet-weight-norm", "transformers/llava", "own/repvgg-train", "own/mlp-kan"],
]
"""What an older version is asked about: kinds that it mostly refused."""
LIMIT = 900.0
"""Seconds that one network may take, the cuts with and without residual width included."""


def chosen(patterns: list[str]) -> list[str]:
    """Return the networks of these names or libraries; all without any.

    Raises:
        SystemExit: a pattern names nothing.
    """
    unknown = [item for item in patterns if item not in zoo.names() and not zoo.names(item)]
    if unknown:
        raise SystemExit(
            f"No network or library is named {', '.join(unknown)}. Known: {', '.join(zoo.names())}"
        )
    return [
        name for name in zoo.names() if not patterns or name in patterns or name.split("/")[0] in patterns
    ]


def measure(network: str, script: str, limit: float, folder: Path, again: bool) -> None:
    """Write the result file of one network, unless there is one."""
    path = result_path(folder, script, network)
    if path.exists() and not again:
        return
    arguments = [network, "--residual"] if script == "coverage_cell" else [network]
    stages = collect(f"{script}.py", arguments, limit)
    if "start" in stages:  # a fault of the measurement, not of the network
        print(f"{script} {network}: {stages['start']['error']} before it began; not written", file=sys.stderr)
        return
    library = network.split("/")[0]
    zoo.find_vision()
    values = {
        "network": network,
        "versions": {} if library == "own" else {library: version(library)},
        "stages": stages,
        "provenance": provenance(seed=zoo.SEED, command=["benchmarks/coverage.py", *sys.argv[1:]]),
    }
    write(path, values)
    errors = [f"{stage}: {item['error']}" for stage, item in stages.items() if "error" in item]
    print(f"{script} {network}: {'; '.join(errors) or 'done'}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks or libraries; all by default")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="Torch-Pruning too"
    )
    parser.add_argument("--again", action="store_true", help="measure Cria again where there is a result")
    parser.add_argument("--peer-again", action="store_true", help="the same for Torch-Pruning")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds per network for Cria")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "coverage", help="folder of the result files"
    )
    parser.add_argument(
        "--before",
        action="store_true",
        help="only what can go, by the version on PYTHONPATH; files under before",
    )
    options = parser.parse_args()
    for network in BEFORE if options.before and not options.names else chosen(options.names):
        if options.before:
            measure(network, "removable_cell", options.limit, options.results, options.again)
            continue
        measure(network, "coverage_cell", options.limit, options.results, options.again)
        if options.peer:
            measure(network, "peer", PEER_LIMIT, options.results, options.peer_again)


if __name__ == "__main__":
    main()
