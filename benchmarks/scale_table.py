"""The result files on scale as docs/scale.md, which benchmarks/tables.py writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coverage_table import table
from cria_prune.config import repair_of_before

FOLDER = Path(__file__).parent / "results"
MB = 1e6

WIDE = """\
A synthetic gated layer of *units* neurons on 8,192 correlated samples, written by `benchmarks/scale.py`:
seconds of wall time, and in brackets of processor time over the threads, which other work on the machine
disturbs less (*dense solve* runs on one). *record / forward* is Cria's recording over a plain forward of that
one layer, in processor time. *both graphs* are the 32 nearest neighbours and weights of both sides; *solve*
the block conjugate gradients over all pairs of `distortion`, *rank correlation* that with the dense one;
`innovation` and the repair work on the sketch above 2,048 units. *left* is the error of the consumer on other
samples after half of the units left with repair, over that without."""

THERE = """\
The same on one {gpu}, seconds of wall time, each measured once. Recording is what first uses the GPU's
libraries: some 0.1 s of it are the same whatever the units. Moments, neighbours, innovation and repair are
computed there, the conjugate gradients on the CPU. *MB* is the most that torch held there for a step."""

PROCESSES = """\
The calibration shared out over processes (gloo, one machine), written by `benchmarks/processes.py`: the
largest relative difference of a unit's score from that of one process, and whether the plan is the same."""

RECOVERY = """\
The most anonymous memory of a process while it recovers a Llama of random weights ({weights:,.0f} MB) by
{steps} steps of {optimizer} on the CPU, over the weights, written by `benchmarks/recovery.py`: on the first
process, which holds the best epoch too, and on the others. With FSDP the whole model waits on the CPU beside
the shares; it is 1 of the multiples, and is not on the device where that is a GPU. *apart* is the largest
difference of a weight from DDP's, over the largest weight."""

LATENCY = """\
Dense and pruned networks in turns, written by `benchmarks/latency.py`; random weights, {threads} thread(s).
*efficiency* is the speed-up over the ratio of the MACs; 1 is what the MACs promise."""

OVERHEAD = """\
Recording and scoring beside a plain forward pass over the same calibration data, each network with the
examples of its recipe, written by `benchmarks/overhead.py`; random weights, {threads} thread(s).
*record* is recording less the forward pass in it, over the forward pass; *score* is scoring over the
forward pass; *total* in brackets from the least to the most of the repetitions. The recipe draws 16
tokens of a text, or one in eight if that is more."""

MEMORY = """\
Predicted by `cria plan --dry-run` before anything is recorded, over what is then measured: the resident
memory above the level before, in MB, written by `benchmarks/memory.py`. Measured with blocks given back
to the system as soon as they are freed; *as it comes* is the ratio under the C library's allocator,
from the least to the most of the repetitions. Below {small:.0f} MB (in italics) what libraries load
counts as much as what is predicted."""

OFFLOAD = """\
A model of TinyLlama's shape, {parameters:,} parameters with random bfloat16 weights of {weights:,.0f}
MB (a block {block:,.0f}, the largest matrix {largest:,.0f}), pruned to 30 % fewer in one round by
{criterion}, written by `benchmarks/offload.py`. The peak is the largest resident set of the process,
with what is mapped from files, which the system can drop at any time; *anonymous* is the peak of the
rest. The libraries alone take {libraries:,.0f} MB, {anonymous:,.0f} of them anonymous."""


def read(path: str) -> list[dict[str, Any]]:
    """Return the results of a file or of all files of a folder, in order of their names, GPUs last."""
    found = sorted(FOLDER.glob(path), key=lambda item: ("-cuda" in item.name, item.name))
    return [json.loads(item.read_text()) for item in found]


def place(result: dict[str, Any]) -> str:
    """Return the name of the GPU that a result is of, or `CPU`."""
    device = result["provenance"].get("device") or "cpu"
    return device.partition("(")[2].rstrip(")") or "CPU"


def there() -> list[str]:
    """One row per width on a GPU."""
    lines: list[str] = []
    for result in read("scale/wide-cuda.json"):
        rows = []
        for units, size in sorted(result["sizes"].items(), key=lambda item: int(item[0])):
            record, repair = size["record"], size["repair"]
            stages = [
                record["forward"], record["record"], size["graph"]["both"], size["solve"]["solve"],
                size["innovation"]["innovation"], repair["repair"],
            ]  # fmt: skip
            most = max(stage["bytes"] for stage in stages)
            rows.append(
                [f"{int(units):,}", *(f"{stage['wall']:.3f}" for stage in stages), f"{most / MB:,.0f}",
                 f"{repair['relative']:.2f}"]
            )  # fmt: skip
        head = ["units", "forward", "record", "both graphs", "solve", "innovation", "repair", "MB", "left"]
        lines += ["## Wide layers on a GPU", "", THERE.format(gpu=place(result)), "", *table(head, rows), ""]
    return lines


def both(value: dict[str, float], threads: int) -> str:
    return f"{value['wall']:.2f} ({value['processor'] / threads:.2f})"


def wide() -> list[str]:
    """One row per width."""
    lines: list[str] = []
    for result in read("scale/wide.json"):
        threads, rows = result["threads"], []
        for units, size in result["sizes"].items():
            record, repair = size["record"], size["repair"]
            ratio = record["record"]["processor"] / record["forward"]["processor"]
            graph = size["graph"]["both"]
            dense = size.get("dense", {})
            row = [
                f"{int(units):,}", f"{ratio:.1f}", both(graph, threads),
                both(size["solve"]["solve"], threads), both(dense["solve"], 1) if dense else "",
                f"{dense['ranks: solver']:.2f}" if dense else "",
                both(size["innovation"]["innovation"], threads), both(repair["repair"], threads),
                f"{repair['relative']:.2f}", f"{graph['bytes'] / MB:,.0f}", f"{size['load']['average']:.1f}",
            ]  # fmt: skip
            rows.append(row)
        head = ["units", "record / forward", "both graphs", "solve", "dense solve", "rank correlation"]
        head += ["innovation", "repair", "left", "MB of the graphs", "load before"]
        grows = ", ".join(f"{name} {value:.2f}" for name, value in result["exponents"].items())
        lines += ["## Wide layers", "", WIDE, "", *table(head, rows), ""]
        lines += [f"Growth exponents of processor time over the three widest: {grows}.", ""]
    return lines


def processes() -> list[str]:
    """One row per network, kind of moments and criterion."""
    found: dict[tuple[str, str, str], dict[int, tuple[float, bool]]] = {}
    for result in read("processes/*.json"):
        for row in result["rows"]:
            key = (result["network"], row["moments"], row["criterion"])
            found.setdefault(key, {})[row["processes"]] = (row["largest_difference"], row["same_plan"])
    rows = []
    for key, seen in found.items():
        alike = "yes" if all(same for _, same in seen.values()) else "no"
        rows.append([*key, *(f"{seen[count][0]:.0e}" for count in (2, 4)), alike])
    head = ["network", "moments", "criterion", "2 processes", "4 processes", "same plan"]
    return ["## Several processes", "", PROCESSES, "", *table(head, rows), ""] if rows else []


def recovery() -> list[str]:
    """One row per kind of recovery."""
    rows: list[list[str]] = []
    said = ""
    for result in read("recovery/*.json"):
        for kind, row in result["rows"].items():
            times = [f"{memory / row['weights']:.2f}" for memory in row["memory"]]
            said = RECOVERY.format(weights=row["weights"] / MB, **result["settings"])
            apart = "" if row["apart"] is None else f"{row['apart']:.0e}"
            rows.append([kind, times[0], max(times[1:], default=""), apart])
    head = ["processes", "first / weights", "another / weights", "apart from DDP"]
    return ["## Recovery over several processes", "", said, "", *table(head, rows), ""] if rows else []


def latency() -> list[str]:
    """One row per network, pruned size, mode and batch."""
    rows, threads = [], set()
    for result in read("latency/*.json"):
        if place(result) == "CPU":
            threads.add(str(result["threads"]))
        for item in result["rows"]:
            rows.append(
                [
                    result["network"], place(result), item["pruned"], item["mode"], str(item["batch"]),
                    f"{item['macs_ratio']:.2f}", f"{item['speedup']:.2f}", f"{item['efficiency']:.2f}",
                ]
            )  # fmt: skip
    head = [
        "network",
        "device",
        "fewer MACs",
        "mode",
        "batch",
        "MACs, dense / pruned",
        "speed-up",
        "efficiency",
    ]
    if not rows:
        return []
    return ["## Latency", "", LATENCY.format(threads=", ".join(sorted(threads))), "", *table(head, rows), ""]


def overhead() -> list[str]:
    """One row per network and variant."""
    rows, threads = [], set()
    for result in read("overhead/*.json"):
        if place(result) == "CPU":
            threads.add(str(result["threads"]))
        for name, item in result["rows"].items():
            shares = (f"{item['shares'][part]:.2f}" for part in ("record", "score"))
            rows.append(
                [
                    result["network"], place(result), f"{result['examples']:,}",
                    f"{result['widest']:,}", name,
                    item["criterion"] + (" + repair" if item["repair"] else ""), *shares,
                    f"{item['total']:.2f} ({item['least']:.2f} to {item['most']:.2f})",
                ]
            )  # fmt: skip
    head = [
        "network",
        "device",
        "examples",
        "widest group",
        "variant",
        "criterion",
        "record",
        "score",
        "total",
    ]
    if not rows:
        return []
    return [
        "## Overhead",
        "",
        OVERHEAD.format(threads=", ".join(sorted(threads))),
        "",
        *table(head, rows),
        "",
    ]


def memory() -> list[str]:
    """One row per case."""
    lines: list[str] = []
    for result in read("memory/predicted*.json"):
        rows = []
        for item in result["rows"]:
            parts = (
                f"{item['predicted'][stage] / MB:,.0f} / {item['measured'][stage] / MB:,.0f}"
                for stage in ("record", "score")
            )
            usual = item["usual_peak_ratios"]
            cells = [
                item["case"],
                *parts,
                f"{item['peak_ratio']:.2f}",
                f"{min(usual):.2f} to {max(usual):.2f}",
            ]
            rows.append([f"*{cell}*" for cell in cells] if item["small"] else cells)
        head = ["case", "recording, predicted / measured", "scoring", "peak, ratio", "as it comes"]
        lines += [
            "## Predicted memory" + ("" if place(result) == "CPU" else f" ({place(result)})"),
            "",
            MEMORY.format(small=result["small"] / MB),
            "",
            *table(head, rows),
            "",
        ]
        lines += [f"Ratio of the peaks above that: {result['least']:.2f} to {result['most']:.2f}.", ""]
    return lines


def offload() -> list[str]:
    """One section per model and device, one row per way and setting."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in read("offload/*.json"):
        found.setdefault((result["sizes"]["parameters"], place(result)), []).append(result)
    lines: list[str] = []
    for (_, where), results in found.items():
        rows, said = [], ""
        for result in results:
            sizes, settings = result["sizes"], result["settings"]
            rows += [ended(name, row, settings) for name, row in result["rows"].items()]
            first = next((row for row in result["rows"].values() if "peak" in row), {})
            said = OFFLOAD.format(
                parameters=sizes["parameters"], weights=sizes["weights"] / MB, block=sizes["block"] / MB,
                largest=sizes["largest_layer"] / MB, criterion=settings["criterion"],
                libraries=first.get("libraries", 0) / MB, anonymous=first.get("libraries_anonymous", 0) / MB,
            )  # fmt: skip
        head = ["way", "repair", "peak, MB", "anonymous, MB", "(anonymous - libraries) / weights", "ended"]
        title = "## Larger than the memory" + ("" if where == "CPU" else f" ({where})")
        lines += [title, "", said, "", *table(head, rows), ""]
    return lines


def ended(name: str, row: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Return the cells of one way."""
    error = row.get("error", "").partition(":")[0]
    limit = f" at a limit of {settings['limit'] / MB:,.0f} MB" if settings["limit"] else ""
    there = f", {row['device'] / MB:,.0f} MB of the GPU" if "device" in row else ""
    return [
        name,
        "with repair" if repair_of_before(settings)["repair"] != "none" else "without repair",
        f"{row['peak'] / MB:,.0f}" if "peak" in row else "",
        f"{row['anonymous'] / MB:,.0f}" if "anonymous" in row else "",
        f"{row['over_weights']:.2f}" if "over_weights" in row else "",
        f"{error}{limit}" if error else f"after {row['seconds']:.0f} s{there}",
    ]


SECTIONS: tuple[Callable[[], list[str]], ...] = (
    wide,
    there,
    overhead,
    memory,
    offload,
    processes,
    recovery,
    latency,
)


def render() -> str:
    """Return docs/scale.md."""
    said = "Written by `python benchmarks/tables.py` from the files in benchmarks/results."
    lines = ["# Scale", "", said, "", *(line for section in SECTIONS for line in section())]
    return "\n".join(lines).rstrip() + "\n"
