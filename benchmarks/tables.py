"""Turn the result files into docs/results.md, coverage.md, transformers.md and the blocks of the README.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coverage_table
import roundtrip_table
from coverage_table import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = ("<!-- {}: written by benchmarks/tables.py -->", "<!-- end of {} -->")
DEMO = RESULTS / "digits" / "demo.txt"
NETWORKS = ("digits", "cifar10-resnet20", "cifar10-resnet56")
ORDER = (
    *("random", "l1", "l2", "activation-norm", "wanda-sp", "fluctuation", "taylor"),
    *("distortion", "distortion-weighted", "grounded-distortion", "innovation"),
)
Cells = list[dict[str, Any]]


def read(network: str) -> Cells:
    files = sorted((RESULTS / network).glob("*-epochs*.json"))
    return [json.loads(path.read_text()) for path in files]


def pick(cells: Cells, **wanted: Any) -> Cells:
    return [item for item in cells if all(item["cell"][key] == value for key, value in wanted.items())]


def percent(values: Sequence[float]) -> str:
    """Mean in percent, with the spread (smallest to largest) where there are several seeds."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def dense_line(network: str) -> str:
    files = sorted((RESULTS / network).glob("dense-seed*.json"))
    values = sorted({round(json.loads(path.read_text())["dense"], 6) for path in files})
    return f"Dense: {percent(values)} %."


def seeds_line(cells: Cells) -> str:
    seeds = sorted({item["cell"]["seed"] for item in cells})
    commits = sorted({str(item["provenance"].get("commit"))[:9] for item in cells})
    count = plural(len(cells), "cell")
    return f"Seeds {', '.join(map(str, seeds))}; {count}; code of commit {', '.join(commits)}."


def pruned_table(network: str, scope: str) -> list[str]:
    cells = pick(read(network), scope=scope, epochs=0)
    if not cells:
        return []
    columns = sorted({(item["cell"]["reduction"], item["cell"]["rounds"]) for item in cells})
    names = [name for name in ORDER if pick(cells, criterion=name)]
    rows = [
        [name]
        + [
            percent([item["pruned"] for item in pick(cells, criterion=name, reduction=share, rounds=rounds)])
            for share, rounds in columns
        ]
        for name in names
    ]
    head = ["criterion", *(f"{share:.0%}, {plural(rounds, 'round')}" for share, rounds in columns)]
    width = "inner channels" if scope == "inner" else "inner channels and residual width"
    title = f"### {network}, {width}: accuracy in % right after pruning, no training"
    return [title, "", dense_line(network) + " " + seeds_line(cells), "", *table(head, rows), ""]


def recovered_table(network: str) -> list[str]:
    cells = [item for item in read(network) if item["cell"]["epochs"]]
    lines: list[str] = []
    settings = sorted({(item["cell"]["epochs"], item["cell"]["rounds"]) for item in cells})
    for epochs, rounds in settings:
        chosen = pick(cells, epochs=epochs, rounds=rounds)
        how = f"{plural(rounds, 'round')}, {plural(epochs, 'epoch')}"
        title = f"### {network}: recovered, {how}, accuracy of the last epoch in %"
        rows = [
            [name, f"{share:.0%}", percent([item["pruned"] for item in found]),
             percent([item["recovered"] for item in found]), f"{found[0]['report']['parameters']:,}"]
            for share in sorted({item["cell"]["reduction"] for item in chosen})
            for name in ORDER
            if (found := pick(chosen, criterion=name, reduction=share))
        ]  # fmt: skip
        head = ["criterion", "fewer parameters", "pruned", "recovered", "parameters left"]
        lines += [title, "", dense_line(network) + " " + seeds_line(chosen), "", *table(head, rows), ""]
    return lines


def timing_table() -> list[str]:
    rows = []
    for network in NETWORKS:
        for path in sorted((RESULTS / network).glob("timing-*.json")):
            item = json.loads(path.read_text())
            seconds = item["seconds"]
            ratios = f"{item['ratio']:.2f} ({min(item['ratios']):.2f} to {max(item['ratios']):.2f})"
            stages = [f"{seconds[stage]:.2f}" for stage in STAGES]
            rows.append([network, item["criterion"], f"{item['threads']}", *stages, ratios])
    if not rows:
        return []
    head = ["network", "criterion", "threads", *STAGES, "(record + score) / forward"]
    title = "### Median seconds per stage over the same 1,024 calibration images (2 shared CPU cores)"
    return [title, "", *table(head, rows), ""]


STAGES = ("forward", "discover", "record", "score", "plan", "surgery", "verify")


def render() -> str:
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/tables.py` from the files in benchmarks/results.",
        "",
    ]
    for network in NETWORKS:
        lines += [*pruned_table(network, "inner"), *pruned_table(network, "all"), *recovered_table(network)]
    lines += timing_table()
    return "\n".join(lines).rstrip() + "\n"


def demo() -> list[str]:
    """What `cria run digits` printed, without its last line (the JSON object)."""
    return ["```", *DEMO.read_text().strip().splitlines()[:-1], "```"]


def readme(text: str) -> str:
    """Return the README with its blocks written again from the result files."""
    results = [*recovered_table("cifar10-resnet20"), *recovered_table("digits")]
    for name, lines in (("demo", demo()), ("results", results)):
        start, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(start)
        text = "\n".join([before + start, "", *lines, "", end + rest.split(end)[1]])
    return text


def main() -> None:
    (ROOT / "docs" / "results.md").write_text(render())
    (ROOT / "docs" / "coverage.md").write_text(coverage_table.render())
    (ROOT / "docs" / "transformers.md").write_text(roundtrip_table.render())
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text()))


if __name__ == "__main__":
    main()
