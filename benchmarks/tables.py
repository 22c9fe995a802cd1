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
import scale_table
from coverage_table import table
from cria_prune.artifact.intervals import mean_interval
from cria_prune.bench.cell import dense_seed
from cria_prune.metrics import metric

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = ("<!-- {}: written by benchmarks/tables.py -->", "<!-- end of {} -->")
DEMO = RESULTS / "digits" / "demo.txt"
NETWORKS = ("digits", "cifar10-resnet20", "cifar10-resnet56", "sst2-minilm", "llama-shakespeare")
SHARE_OF = {"sst2-minilm": "encoder parameters", "llama-shakespeare": "parameters without embeddings"}
ORDER = (
    *("random", "l1", "l2", "group-l2", "activation-norm", "wanda-sp", "fluctuation"),
    *("bn-scale", "fpgm", "lamp", "apoz", "chip", "taylor", "fisher"),
    *("tp-magnitude", "tp-bn-scale", "tp-fpgm", "tp-lamp", "tp-taylor", "tp-hessian"),
    *("distortion", "distortion-weighted", "consumed-distortion", "grounded-distortion", "innovation"),
    "innovation-magnitude",
)
Cells = list[dict[str, Any]]


def read(network: str) -> Cells:
    """All cells but those on a share of something else than the recipe's own."""
    files = sorted((RESULTS / network).glob("*-epochs*.json"))
    return [item for item in (json.loads(path.read_text()) for path in files) if "of" not in item["cell"]]


def pick(cells: Cells, **wanted: Any) -> Cells:
    return [item for item in cells if all(item["cell"][key] == value for key, value in wanted.items())]


def way(item: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell does beside scoring and cutting: repair, batch norms again, another ranking."""
    cell = item["cell"]
    return bool(cell.get("compensate")), bool(cell.get("batch_norm")), cell.get("ranking", "uniform")


WAYS = {
    (False, False, "uniform"): "right after pruning, no training",
    (False, True, "uniform"): "with batch norms measured again, no training",
    (True, False, "uniform"): "with closed-form repair, no training",
    (True, True, "uniform"): "with closed-form repair and batch norms measured again, no training",
}
PLAIN, ALL = (False, False, "uniform"), (True, True, "uniform")


def percent(values: Sequence[float]) -> str:
    """Mean in percent, with the half width of its 95 % t-interval where there are several seeds."""
    if not values:
        return ""
    mean, half = mean_interval([100 * value for value in values])
    return f"{mean:.2f}" + ("" if half is None else f" ± {half:.1f}")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def dense_of(network: str) -> dict[int, dict[str, Any]]:
    """Seed -> the file of the dense model."""
    files = sorted((RESULTS / network).glob("dense-seed*.json"))
    found = [json.loads(path.read_text()) for path in files]
    return {item["provenance"]["seed"]: item for item in found}


def metric_of(network: str) -> str:
    return next((item.get("metric", "accuracy") for item in dense_of(network).values()), "accuracy")


def figures(network: str, cells: Cells, key: str) -> str:
    """An accuracy in percent, or a perplexity with its ratio to that of the dense model of its seed."""
    values = [item[key] for item in cells]
    if metric_of(network) == "accuracy":
        return percent(values)
    dense = dense_of(network)
    ratios = [item[key] / dense[dense_seed(item["cell"])]["dense"] for item in cells]
    mean, half = mean_interval(ratios)
    return f"{statistics.mean(values):.1f} ({mean:.2f}{'' if half is None else f' ± {half:.2f}'} ×)"


def dense_line(network: str, cells: Cells) -> str:
    """The dense models that the cells start from."""
    started = {dense_seed(item["cell"]) for item in cells}
    dense = {seed: item for seed, item in dense_of(network).items() if seed in started}
    values = sorted({round(item["dense"], 6) for item in dense.values()})
    if metric_of(network) == "accuracy":
        return f"Dense: {percent(values)} %."
    return f"Dense: {', '.join(f'{value:.2f}' for value in values)}."


def seeds_line(cells: Cells) -> str:
    seeds = sorted({item["cell"]["seed"] for item in cells})
    commits = sorted({str(item["provenance"].get("commit"))[:9] for item in cells})
    count = plural(len(cells), "cell")
    return f"Seeds {', '.join(map(str, seeds))}; {count}; code of commit {', '.join(commits)}."


def section(
    network: str, title: str, cells: Cells, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
    """A table of cells under its title, with where the cells come from."""
    return [title, "", f"{dense_line(network, cells)} {seeds_line(cells)}", "", *table(head, rows), ""]


def pruned_table(network: str, scope: str, how: tuple[Any, ...] = PLAIN) -> list[str]:
    cells = [item for item in pick(read(network), scope=scope, epochs=0) if way(item) == how]
    if not cells:
        return []
    columns = sorted({(item["cell"]["reduction"], item["cell"]["rounds"]) for item in cells})
    names = [name for name in ORDER if pick(cells, criterion=name)]
    rows = [
        [name]
        + [
            figures(network, found, "pruned")
            if (found := pick(cells, criterion=name, reduction=share, rounds=rounds))
            else ""
            for share, rounds in columns
        ]
        for name in names
    ]
    head = ["criterion", *(f"{100 * share:g}%, {plural(rounds, 'round')}" for share, rounds in columns)]
    inner = "neurons and heads" if network in SHARE_OF else "inner channels"
    width = inner if scope == "inner" else f"{inner} and residual width"
    said = metric_of(network)
    unit = "accuracy in %" if said == "accuracy" else f"{said} (ratio to dense)"
    title = f"### {network}, {width}: {unit} {WAYS[how]}"
    return section(network, title, cells, head, rows)


def compact_table(network: str) -> list[str]:
    """The criteria that the README compares, with and without what the default does beside cutting."""
    cells = pick(read(network), scope="inner", epochs=0, rounds=4)
    repaired = (True, network not in SHARE_OF, "uniform")
    most = len({item["cell"]["seed"] for item in cells})
    named = [(name, PLAIN) for name in ORDER if name.startswith("tp-")]
    named += [(name, how) for how in (PLAIN, repaired) for name in COMPARED]
    shares = sorted({item["cell"]["reduction"] for item in cells} & set(SHARES))
    rows = []
    for name, how in named:
        found = [
            [item for item in pick(cells, criterion=name, reduction=share) if way(item) == how]
            for share in shares
        ]
        if any(found):
            label = name + ("" if how == PLAIN else REPAIRED[how])
            draws = (f", n = {len(group)}" if fixed(name, how) < len(group) < most else "" for group in found)
            figure = [figures(network, group, "pruned") if group else "" for group in found]
            rows.append([label, *(text + draw for text, draw in zip(figure, draws, strict=True))])
    if not rows:
        return []
    fewer = SHARE_OF.get(network, "parameters")
    title = f"### {network}: {metric_of(network)} with fewer {fewer}, no training"
    chosen = [item for item in cells if item["cell"]["reduction"] in shares]
    head = ["criterion", *(f"{100 * share:g}%" for share in shares)]
    return section(network, title, chosen, head, rows)


def fixed(name: str, how: tuple[Any, ...]) -> int:
    """How many draws are all there is: one where only weights are read."""
    weights = name.removeprefix("tp-") in ("l1", "l2", "magnitude", "bn-scale", "fpgm", "lamp")
    return 1 if weights and how == PLAIN else 0


REPAIRED = {(True, False, "uniform"): " + repair", (True, True, "uniform"): " + repair, norms"}
COMPARED = ("random", "l2", "wanda-sp", "taylor", "distortion", "distortion-weighted",
            "consumed-distortion", "innovation")  # fmt: skip
SHARES = (0.2, 0.3, 0.4, 0.5)


def tuned(item: dict[str, Any]) -> tuple[bool, str]:
    """Return how a cell's recovery differs from the recipe's."""
    tune = item["cell"].get("tune", {})
    return item["cell"].get("quick", False), ", ".join(f"{key} {tune[key]}" for key in sorted(tune))


def recovered_table(network: str, how: tuple[Any, ...] = PLAIN) -> list[str]:
    cells = [item for item in read(network) if item["cell"]["epochs"] and way(item) == how]
    lines: list[str] = []
    said = metric_of(network)
    unit = (
        "accuracy of the last epoch in %"
        if said == "accuracy"
        else f"{said} of the last epoch (ratio to dense)"
    )
    settings = sorted({(i["cell"]["epochs"], i["cell"]["rounds"], *tuned(i)) for i in cells})
    for epochs, rounds, quick, tune in settings:
        chosen = [item for item in pick(cells, epochs=epochs, rounds=rounds) if tuned(item) == (quick, tune)]
        length = (
            f"{plural(rounds, 'round')}, {plural(epochs, 'epoch')}"
            + (" of 8,000 sentences" if quick else "")
            + (f" tuned by {tune}" if tune else "")
        )
        start = "" if how == PLAIN else f" {WAYS[how].removesuffix(', no training')}"
        title = f"### {network}: recovered{start}, {length}, {unit}"
        rows = [
            [name + (" (neurons alone)" if scope == "neurons" else ""), f"{100 * share:g}%",
             figures(network, found, "pruned"), figures(network, found, "recovered"),
             f"{found[0]['report']['reached']:.1%}", f"{found[0]['report']['parameters']:,}"]
            for share in sorted({item["cell"]["reduction"] for item in chosen})
            for scope in ("inner", "all", "neurons")
            for name in ORDER
            if (found := pick(chosen, criterion=name, reduction=share, scope=scope))
        ]  # fmt: skip
        fewer = f"fewer {SHARE_OF.get(network, 'parameters')}"
        head = ["criterion", fewer, "pruned", "recovered", "reached", "parameters left"]
        lines += section(network, title, chosen, head, rows)
    return lines


def ablation_tables(network: str) -> list[str]:
    """What is left without the lowest-scored, the highest-scored and random units, per criterion."""
    lines: list[str] = []
    for path in sorted((RESULTS / network).glob("ablation-*.json")):
        item = json.loads(path.read_text())
        known = metric(item["metric"])
        curves = [[values for _, values in item["curves"][order]] for order in ORDERS]
        rows = [
            [f"{100 * share:g}%", f"{reached:.1%}", *map(known.text, (low[0], *spread(random), high[0]))]
            for share, reached, low, random, high in zip(
                item["shares"], item["reached"], *curves, strict=True
            )
        ]
        head = ["units gone", "prunable parameters gone", "lowest first", "random, mean", "random, lowest"]
        head += ["random, highest", "highest first"]
        title = f"### {network}: ablation of `{item['criterion']}`, {item['metric']}"
        dense = f"Dense: {known.text(item['dense'])}, {item['tested_on']}; {item['verdict']}."
        picture = f"pictures/ablation-{network}-{item['criterion']}.png"
        drawn = [f"![the curves]({picture})", ""] if (ROOT / "docs" / picture).exists() else []
        lines += [title, "", dense, "", *table(head, rows), "", *drawn]
    return lines


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest."""
    return statistics.mean(values), min(values), max(values)


ORDERS = ("lowest", "random", "highest")


def render() -> str:
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/tables.py` from the files in benchmarks/results.",
        "",
    ]
    for network in NETWORKS:
        for scope in ("inner", "all"):
            lines += [line for how in WAYS for line in pruned_table(network, scope, how)]
        lines += [line for how in WAYS for line in recovered_table(network, how)]
        lines += ablation_tables(network)
    return "\n".join(lines).rstrip() + "\n"


def demo() -> list[str]:
    """What `cria run digits` printed, without its last line (the JSON object)."""
    return ["```", *DEMO.read_text().strip().splitlines()[:-1], "```"]


def readme(text: str) -> str:
    """Return the README with its blocks written again from the result files."""
    results = [line for network in NETWORKS[1:] for line in compact_table(network)]
    results += recovered_table("digits", ALL)
    results += [line for how in (PLAIN, ALL) for line in recovered_table("cifar10-resnet20", how)]
    results += recovered_table("sst2-minilm")
    for name, lines in (("demo", demo()), ("results", results)):
        start, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(start)
        text = "\n".join([before + start, "", *lines, "", end + rest.split(end)[1]])
    return text


def main() -> None:
    (ROOT / "docs" / "results.md").write_text(render())
    (ROOT / "docs" / "coverage.md").write_text(coverage_table.render())
    (ROOT / "docs" / "transformers.md").write_text(roundtrip_table.render())
    (ROOT / "docs" / "scale.md").write_text(scale_table.render())
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text()))


if __name__ == "__main__":
    main()
