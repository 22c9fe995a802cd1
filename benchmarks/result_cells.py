"""The cells of benches: read, picked, and put in words for the tables of benchmarks/tables.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coverage_table import table
from cria_prune.bench.suite import dense_seed
from cria_prune.config import repair_of_before
from cria_prune.report.curves import mean_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SST2 = ("sst2-minilm", "sst2-minilm-again")
LLAMA = ("llama-shakespeare", "llama-shakespeare-again")
"""Folders of the same network; what came again is from other dense models."""
NETWORKS = ("digits", "cifar10-resnet20", "cifar10-resnet56", *SST2, *LLAMA)
SHARE_OF = {
    **dict.fromkeys(SST2, "encoder parameters"),
    **dict.fromkeys(LLAMA, "parameters without embeddings"),
}
ORDER = (
    *("random", "l1", "l2", "group-l2", "activation-norm", "wanda-sp", "fluctuation"),
    *("bn-scale", "fpgm", "lamp", "apoz", "chip", "taylor", "fisher"),
    *("tp-magnitude", "tp-bn-scale", "tp-fpgm", "tp-lamp", "tp-taylor", "tp-hessian"),
    *("distortion", "distortion-weighted", "consumed-distortion", "grounded-distortion", "innovation"),
    "innovation-magnitude",
)
Cells = list[dict[str, Any]]


def every(network: str) -> Cells:
    """All cells."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / network).glob("*-epochs*.json"))]


def read(network: str) -> Cells:
    """All cells but those on a share of something else than the recipe's own."""
    return [item for item in every(network) if "of" not in item["cell"]]


def pick(cells: Cells, **wanted: Any) -> Cells:
    return [item for item in cells if all(item["cell"][key] == value for key, value in wanted.items())]


def way(item: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell does beside scoring and cutting: repair, batch norms again, another ranking."""
    cell = repair_of_before(item["cell"])
    return cell.get("repair", "none"), bool(cell.get("batch_norm")), cell.get("ranking", "uniform")


WAYS = {
    ("none", False, "uniform"): "right after pruning, no training",
    ("none", True, "uniform"): "with batch norms measured again, no training",
    ("once", False, "uniform"): "with all consumers repaired at once, no training",
    (
        "once",
        True,
        "uniform",
    ): "with all consumers repaired at once and batch norms measured again, no training",
    ("walk", False, "uniform"): "with the repair walk, no training",
    ("walk", True, "uniform"): "with the repair walk and batch norms measured again, no training",
}
STARTS = {
    ("none", False): "as cut",
    ("none", True): "norms",
    ("once", False): "once",
    ("once", True): "once, norms",
    ("walk", False): "walk",
    ("walk", True): "walk, norms",
}
"""What a cell does after the cut, in a word or two: its repair, and batch norms; the keys are of a way."""
PLAIN, ALL = ("none", False, "uniform"), ("once", True, "uniform")


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
    if not values:
        return ""
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


def tuned(item: dict[str, Any]) -> tuple[bool, str]:
    """Whether a recovery saw a part of the training data, and its settings that are not the recipe's."""
    tune = item["cell"].get("tune", {})
    return item["cell"].get("quick", False), ", ".join(f"{key} {tune[key]}" for key in sorted(tune))


def settings_text(item: dict[str, Any]) -> str:
    """The rounds of a cell and its recovery, in words."""
    (quick, tune), cell = tuned(item), item["cell"]
    epochs = plural(cell["epochs"], "epoch") + (" of 8,000 sentences" if quick else "")
    dense = f", dense model {cell['dense_seed']}" if "dense_seed" in cell else ""
    return f"{plural(cell['rounds'], 'round')}, {epochs}" + (f" tuned by {tune}" if tune else "") + dense
