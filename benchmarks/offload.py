"""Peak memory of pruning a Llama-shaped model of 1.1 B parameters, in memory and layer by layer.

    python benchmarks/offload.py
    python benchmarks/offload.py --shape 7b --device cuda --memory 4096 --kinds offloaded

Makes the folder of a model of TinyLlama's shape with random bfloat16 weights (22 layers, 2,048 wide, 5,632
gated neurons; `--shape 7b`: of Llama-7B's), shard by shard, in a temporary place, and prunes it to 30 % fewer
parameters in one round with repair, in fresh processes: by `prune_offloaded`, and by `prune` in memory. A
third process prunes a tiny model layer by layer, for what the libraries take. All record the same few
sequences with the same settings:
sketches of `--columns` columns for layers of more than 2,048 units, no split halves. The peak is the largest
resident set of the process (VmHWM); weights that are mapped from a file count as long as they are mapped,
though the system can drop them at any time. `anonymous` is the peak of what it cannot drop (RssAnon, looked
at every 20 ms).
`--limit` bounds the address space, so that a pruning that does not fit does not take the machine down: it
ends with the error that is noted, at the peak that is noted. Writes benchmarks/results/offload/llama-1b.json,
or llama-1b-no-repair.json with `--no-repair`: the moments of a consumer's repair are then in no peak. On a
GPU the file ends in -cuda, and `device` is the most that torch allocated there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from cria_prune import PruneConfig, prune, prune_offloaded
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.errors import CriaError
from cria_prune.tasks.loading import load_pretrained
from resident import resident
from result_files import RESULTS, on, write

SMALL: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LARGE: dict[str, Any] = {
    **SMALL, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SMALL, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "vocab_size": 512,
}  # fmt: skip
SHAPES = {"1b": SMALL, "7b": LARGE}
MIB = 2**20


def make(folder: Path, shape: dict[str, Any], device: str) -> dict[str, int]:
    """Write a model with random weights, drawn on a device, one shard per block; return sizes in bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    parts: dict[str, list[str]] = {}
    for name in tensors:
        words = name.split(".")
        parts.setdefault(words[2] if words[1] == "layers" else words[-2], []).append(name)
    generator = torch.Generator(device).manual_seed(0)
    where = {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        shard = {}
        for name in names:
            value = torch.ones(tensors[name].shape, dtype=torch.bfloat16, device=device)
            if value.ndim > 1:
                value.normal_(generator=generator).mul_(value.shape[1] ** -0.5)
            shard[name], where[name] = value.cpu(), file
        save_file(shard, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return {
        "parameters": sum(item.numel() for item in tensors.values()),
        "weights": total,
        "largest_layer": max(tensor.nbytes for tensor in tensors.values()),
        "block": sum(tensors[name].nbytes for name in parts["0"]),
    }


def job(kind: str, folder: Path, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Do one of the prunings in this process; return seconds by stage, or the error."""
    torch.set_num_threads(options["threads"])
    if options["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (options["limit"], options["limit"]))
    config = PruneConfig(
        record={"examples": options["examples"], "sketch_columns": options["columns"]},
        score={"split_half": False, "criterion": options["criterion"]},
        plan={"reduction": 0.3, "rounds": 1, "vanilla": True, "multiple": 8},
        repair=options["repair"],
    )
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    shape = (options["examples"], options["tokens"])
    tokens = torch.randint(vocabulary, shape, generator=generator)
    batches = [{"input_ids": part} for part in tokens.split(4)]
    start = time.perf_counter()
    try:
        if kind != "in memory":
            done = prune_offloaded(
                folder, output, batches, config, memory=options["memory"], max_shard_size="250MB",
                device=options["device"],
            )  # fmt: skip
            check, report = done.rounds[-1].verification, done.plan.report
            further = {"turns": done.rounds[0].turns, "seconds_by_stage": done.seconds}
        else:
            result = prune(load_pretrained(folder).to(options["device"]), batches, config)
            result.model.save_pretrained(output)
            check, report = result.rounds[-1].verification, result.report
            further = {"seconds_by_stage": dict(result.seconds_by_stage)}
    except (CriaError, MemoryError, RuntimeError) as error:
        return {
            "error": f"{type(error).__name__}: {str(error)[:300]}",
            "seconds": time.perf_counter() - start,
        }
    return {
        "seconds": time.perf_counter() - start,
        "parameters": report["parameters"],
        **({"device": torch.cuda.max_memory_allocated()} if options["device"] != "cpu" else {}),
        "masked_equals_pruned": None if check is None else check.difference,
        **further,
    }


def watched(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns, with the largest resident set so far and the most anonymous memory."""
    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        values = function()
    finally:
        done.set()
        thread.join()
    return {**values, "peak": resident("VmHWM"), "anonymous": most}


def child(kind: str, folder: Path, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run `job` in a fresh process; return what it said."""
    words = [sys.executable, __file__, "--child", json.dumps([kind, str(folder), str(output), options])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no text"])[-1]
        return {"error": f"exit status {done.returncode}: {last[:300]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(sizes: dict[str, int], rows: dict[str, dict[str, Any]]) -> None:
    parts = ", ".join(
        f"{name} {sizes[name] / MIB:,.0f} MiB" for name in ("weights", "block", "largest_layer")
    )
    print(f"{sizes['parameters']:,} parameters, {parts}")
    print(f"{'':<12} {'peak MiB':>9} {'anonymous':>10} {'/ weights':>10} {'device':>8} {'seconds':>8}")
    for name, row in rows.items():
        numbers = (row.get("peak", 0) / MIB, row.get("anonymous", 0) / MIB, row.get("over_weights", 0))
        there, seconds, error = row.get("device", 0) / MIB, row.get("seconds", 0), row.get("error", "")
        print(
            "{:<12} {:9,.0f} {:10,.0f} {:10.2f} {:8,.0f} {:8.0f}  {}".format(
                name, *numbers, there, seconds, error
            ),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--no-repair", action="store_true")
    parser.add_argument("--criterion", default="fluctuation")
    parser.add_argument("--memory", type=int, default=512, help="MiB of moments and weights in a turn")
    parser.add_argument("--limit", type=int, default=0, help="MiB of address space of a process, 0 for none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to try the command")
    parser.add_argument("--kinds", nargs="+", default=["offloaded", "in memory"])
    options = parser.parse_args()
    if options.child:
        kind, folder, output, said = json.loads(options.child)
        print(json.dumps(watched(lambda: job(kind, Path(folder), Path(output), said))))
        return
    settings = {
        "examples": options.examples, "tokens": options.tokens, "columns": options.columns,
        "criterion": options.criterion, "memory": options.memory * MIB, "limit": options.limit * MIB,
        "threads": options.threads, "device": options.device,
        "repair": "none" if options.no_repair else "once",
    }  # fmt: skip
    with TemporaryDirectory(prefix="cria-offload-") as scratch:
        folder, tiny = Path(scratch) / "dense", Path(scratch) / "tiny"
        folder.mkdir()
        tiny.mkdir()
        shape = TINY if options.tiny else SHAPES[options.shape]
        make(tiny, TINY, options.device)
        sizes = make(folder, shape, options.device)
        libraries = child("libraries", tiny, Path(scratch) / "libraries", {**settings, "limit": 0})
        rows: dict[str, dict[str, Any]] = {}
        for kind in options.kinds:
            rows[kind] = row = child(kind, folder, Path(scratch) / kind.replace(" ", "-"), settings)
            if "peak" in row:
                row["libraries"], row["libraries_anonymous"] = libraries["peak"], libraries["anonymous"]
                row["over_weights"] = (row["anonymous"] - libraries["anonymous"]) / sizes["weights"]
            table(sizes, rows)
    origin = provenance(seed=0, command=sys.argv, device=options.device)
    name = f"llama-{options.shape}{'-no-repair' if options.no_repair else ''}.json"
    if not options.tiny:
        write(
            RESULTS / "offload" / on(name, options.device),
            {"model": {**shape, "dtype": "bfloat16"}, "sizes": sizes, "settings": settings, "rows": rows,
             "provenance": origin},
        )  # fmt: skip


if __name__ == "__main__":
    main()
