"""How time and memory grow with the units of a layer, up to 28,672; one result file, resumable by width.

    python benchmarks/scale.py
    python benchmarks/scale.py 4096 28672 --again
    python benchmarks/scale.py --device cuda

A gated feed-forward layer with weights in families and random correlated inputs stands in for a real one.
Every width is measured in a process of its own: recording against a plain forward over the same tokens,
both neuron graphs, all pairs by block PCG, innovation, and the repair of the consumer on tokens that were
not recorded; up to 4,096 units also from exact moments with the dense eigensolver, with the rank
correlation between the two. Processor time over the threads is given beside wall time: on a machine that
others use it is the one that repeats. Writes benchmarks/results/scale/wide.json, of a GPU wide-cuda.json; a
width that is in it is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

from cria_prune.artifact.rebuild import provenance
from result_files import RESULTS, on, write
from scale_cell import SEED, THREADS
from staged import Values, collect

WIDTHS = (256, 1024, 4096, 11008, 28672)
LIMIT = 1800.0
STAGES = {
    "neighbours": ("graph", "neighbours"),
    "both graphs": ("graph", "both"),
    "solve": ("solve", "solve"),
    "innovation": ("innovation", "innovation"),
    "repair": ("repair", "repair"),
}


def exponents(sizes: dict[str, Values], count: int = 3) -> dict[str, float]:
    """Return the slope of log processor time over log units, of the largest `count` widths, by stage."""
    widths = sorted(map(int, sizes))[-count:]
    if len(widths) < 2:
        return {}
    x = [math.log(width) for width in widths]
    found = {}
    for name, (stage, key) in STAGES.items():
        y = [math.log(max(sizes[str(width)][stage][key]["processor"], 1e-9)) for width in widths]
        centre, level = sum(x) / len(x), sum(y) / len(y)
        found[name] = sum((a - centre) * (b - level) for a, b in zip(x, y, strict=True)) / sum(
            (a - centre) ** 2 for a in x
        )
    return found


def table(result: Values) -> str:
    """Return the figures as text: seconds of wall time, and of processor time over the threads."""
    lines = [f"{'units':>6} {'load':>5} {'rec/fwd':>8}" + "".join(f"{name:>20}" for name in STAGES)]
    for width in sorted(map(int, result["sizes"])):
        item = result["sizes"][str(width)]
        cells = [item[stage][key] for stage, key in STAGES.values()]
        times = "".join(f"{cell['wall']:>11.2f} ({cell['processor'] / THREADS:>6.2f})" for cell in cells)
        load = item.get("load", {}).get("average", math.nan)
        lines.append(f"{width:>6} {load:>5.1f} {item['record']['ratio']:>8.2f}{times}")
        lines.append(
            f"{'':>6} repair: error {item['repair']['none']:.4f} -> {item['repair']['repaired']:.4f}"
        )
        if "dense" in item:
            dense = item["dense"]
            ranks = ", ".join(f"{key[7:]} {value:.3f}" for key, value in dense.items() if key[:5] == "ranks")
            lines[-1] += f" (exact {dense['repaired']:.4f}); ranks: {ranks}; "
            lines[-1] += f"dense solve {dense['solve']['processor'] / THREADS:.2f}"
    slopes = ", ".join(f"{name} {value:.2f}" for name, value in result["exponents"].items())
    return "\n".join([*lines, f"growth exponents of the largest three: {slopes}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("widths", nargs="*", type=int, default=list(WIDTHS), help="units; all by default")
    parser.add_argument("--again", action="store_true", help="measure widths again that are in the file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale", help="folder of the result file")
    options = parser.parse_args()
    path = options.results / on("wide.json", options.device)
    sizes: dict[str, Values] = json.loads(path.read_text())["sizes"] if path.exists() else {}
    # The dense solver runs on one thread: on a shared machine two of OpenBLAS wait for each other, 15 times
    # as long. Processor time over the threads is then what two would take at best.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for width in options.widths:
        if str(width) in sizes and not options.again:
            continue
        found = collect("scale_cell.py", [str(width), options.device], LIMIT)
        wrong = {stage: item["error"] for stage, item in found.items() if "error" in item}
        if wrong:
            raise SystemExit(f"{width} units: {wrong}; nothing of this width is written")
        origin = provenance(seed=SEED, command=["benchmarks/scale.py", *sys.argv[1:]], device=options.device)
        sizes[str(width)] = {**found, "provenance": origin}
        result = {"threads": THREADS, "sizes": sizes, "exponents": exponents(sizes), "provenance": origin}
        write(path, result)
        print(f"{width} units: done", file=sys.stderr, flush=True)
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
