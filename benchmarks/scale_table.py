"""The result files on scale as docs/scale.md, which benchmarks/tables.py writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coverage_table import table

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

PROCESSES = """\
The calibration shared out over processes (gloo, one machine), written by `benchmarks/processes.py`: the
largest relative difference of a unit's score from that of one process, and whether the plan is the same."""

LATENCY = """\
Dense and pruned networks in turns, written by `benchmarks/latency.py`; random weights, {threads} thread(s).
*efficiency* is the speed-up over the ratio of the MACs; 1 is what the MACs promise."""


def read(path: str) -> list[dict[str, Any]]:
    """Return the results of a file or of all files of a folder, in order of their names."""
    return [json.loads(found.read_text()) for found in sorted(FOLDER.glob(path))]


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


def latency() -> list[str]:
    """One row per network, pruned size, mode and batch."""
    rows, threads = [], set()
    for result in read("latency/*.json"):
        threads.add(str(result["threads"]))
        for item in result["rows"]:
            rows.append(
                [
                    result["network"], item["pruned"], item["mode"], str(item["batch"]),
                    f"{item['macs_ratio']:.2f}", f"{item['speedup']:.2f}", f"{item['efficiency']:.2f}",
                ]
            )  # fmt: skip
    head = ["network", "fewer MACs", "mode", "batch", "MACs, dense / pruned", "speed-up", "efficiency"]
    if not rows:
        return []
    return ["## Latency", "", LATENCY.format(threads=", ".join(sorted(threads))), "", *table(head, rows), ""]


SECTIONS: tuple[Callable[[], list[str]], ...] = (wide, processes, latency)


def render() -> str:
    """Return docs/scale.md."""
    said = "Written by `python benchmarks/tables.py` from the files in benchmarks/results."
    lines = ["# Scale", "", said, "", *(line for section in SECTIONS for line in section())]
    return "\n".join(lines).rstrip() + "\n"
