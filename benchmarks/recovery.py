"""What a process of a recovery holds: one process, DDP and FSDP on two and four.

    python benchmarks/recovery.py

A Llama-shaped model of random weights takes a few steps of AdamW on random tokens, on the CPU (gloo, one
thread each). Of every process the most anonymous memory during the recovery is taken, less what it held just
before the model was made, and shown as a multiple of the weights. With FSDP a process holds the whole model,
which waits, beside its share; on a GPU there is the share alone. The C library is told to give memory back
at once (MALLOC_MMAP_THRESHOLD_), for what it keeps for later is not the recovery's. The weights that come out
are compared with those of DDP. Writes benchmarks/results/recovery/llama.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from cria_prune import recover
from cria_prune.artifact.rebuild import provenance
from cria_prune.config import RecoverConfig
from resident import resident
from result_files import RESULTS, write

KINDS = {
    "one process": (1, False),
    "ddp 2": (2, False),
    "fsdp 2": (2, True),
    "ddp 4": (4, False),
    "fsdp 4": (4, True),
}
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 8000,
}  # fmt: skip
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STEPS, BATCH, TOKENS = 4, 4, 64


def work(kind: str, rank: int, folder: Path) -> None:
    """Recover as one of the processes; every one writes the most memory, the first one the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size, fsdp = KINDS[kind]
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/store-{kind}", rank=rank, world_size=size)
    before, most, done = resident("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], resident("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    tokens = torch.randint(SHAPE["vocab_size"], (STEPS, BATCH, TOKENS))
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens]
    start = time.perf_counter()
    recover(model, batches, RecoverConfig(epochs=1, lr=1e-3, optimizer="adamw", fsdp=fsdp))
    done.set()
    weights = sum(item.numel() * item.element_size() for item in model.parameters())
    found = {"memory": most[0] - before, "weights": weights, "seconds": time.perf_counter() - start}
    (folder / f"{kind}-{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        held = {name: item.detach().clone() for name, item in model.named_parameters()}
        save_file(held, folder / f"{kind}.safetensors")
    if size > 1:
        dist.destroy_process_group()


def run(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return what every process of one kind found."""
    size, environment = KINDS[kind][0], {**os.environ, "OMP_NUM_THREADS": "1", **ALLOCATOR}
    command = [sys.executable, __file__, "--worker", kind]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(size)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{kind}: a process did not end well")
    return [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(size)]


def apart(one: Path, other: Path) -> float:
    """Return the largest difference of two sets of weights, over the largest weight."""
    a, b = load_file(one), load_file(other)
    largest = max(float(value.abs().max()) for value in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, rank, folder = options.worker
        work(kind, int(rank), Path(folder))
        return
    rows: dict[str, Any] = {}
    print(f"{'':12} {'weights':>9} {'most on the first':>18} {'on another':>11} {'apart from ddp':>15}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, (size, fsdp) in KINDS.items():
            found = run(kind, folder)
            row = {
                "processes": size,
                "fsdp": fsdp,
                "weights": found[0]["weights"],
                "memory": [item["memory"] for item in found],
                "seconds": found[0]["seconds"],
                "apart": apart(folder / f"{kind}.safetensors", folder / f"ddp {size}.safetensors")
                if fsdp
                else None,
            }
            rows[kind] = row
            times = [memory / row["weights"] for memory in row["memory"]]
            other = f"{max(times[1:]):11.2f}" if size > 1 else " " * 11
            difference = f"{row['apart']:15.1e}" if fsdp else ""
            print(f"{kind:12} {row['weights'] / 2**20:5.0f} MiB {times[0]:18.2f} {other} {difference}")
    settings = {
        "shape": SHAPE,
        "steps": STEPS,
        "batch": BATCH,
        "tokens": TOKENS,
        "optimizer": "adamw",
        **ALLOCATOR,
    }
    path = RESULTS / "recovery" / "llama.json"
    write(
        path,
        {"settings": settings, "rows": rows, "provenance": provenance(0, ["python", *sys.argv], "", "cpu")},
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
