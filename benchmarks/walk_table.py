"""What repair, shares of the layers and criterion are worth right after a cut, nothing trained."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from coverage_table import table
from cria_prune.bench.suite import dense_seed
from cria_prune.config import OF
from cria_prune.repair.fidelity import STAGES, Distance, Fidelity
from result_cells import ORDER, STARTS, Cells, dense_of, every, figures, metric_of, pick, section, way

WALKS = {
    "cifar10-resnet20-walk": "ResNet-20",
    "cifar10-resnet56-walk": "ResNet-56",
    "sst2-minilm-walk": "MiniLM on SST-2",
    "llama-shakespeare-walk": "a small Llama",
}
"""Folder of result files -> its network; the suites have the same names, without `cifar10-`."""
SHARED = ("uniform", "measured", "global")
Way = tuple[Any, ...]


def walk_tables() -> list[str]:
    """For every network and size a table: the peer, then every repair, ranking and criterion."""
    return [line for folder in WALKS for size in sizes(every(folder)) for line in walk_table(folder, *size)]


def sizes(cells: Cells) -> list[tuple[str, float]]:
    """What is gone, of what: all sizes that cells were asked for."""
    return sorted(
        {size(item) for item in cells}, key=lambda found: (list(OF.texts).index(found[0]), found[1])
    )


def size(item: dict[str, Any]) -> tuple[str, float]:
    return item["report"]["of"], item["cell"]["reduction"]


def walk_table(folder: str, of: str, reduction: float) -> list[str]:
    cells = [item for item in every(folder) if size(item) == (of, reduction)]
    ways = {(way(item), item["cell"]["criterion"]) for item in cells}
    rows = [["dense", "", "", "", dense_text(folder, cells), "0", "100%", "0%", "0%"]]
    for how, name in sorted(ways, key=_order):
        found = [item for item in pick(cells, criterion=name) if way(item) == how]
        rows.append(
            [STARTS[how[:2]], how[2], name, str(len(found)), figures(folder, found, "pruned"), *far(found)]
            + [f"{statistics.mean(item['gone'][kind] for item in found):.1%}" for kind in KINDS]
        )
    unit = metric_of(folder) + (" in %" if metric_of(folder) == "accuracy" else " (ratio to dense)")
    head = ["repair", "shares", "criterion", "draws", unit, "KL (nats)", "same class", "parameters gone"]
    title = f"### {WALKS[folder]}, {100 * reduction:g}% of the {OF.texts[of]} gone, nothing trained"
    return section(folder, title, cells, [*head, "MACs gone"], rows)


KINDS = ("parameters", "macs")


def _order(row: tuple[Way, str]) -> tuple[Any, ...]:
    (repair, norms, ranking), name = row
    starts = list(STARTS).index((repair, norms))
    return not name.startswith("tp-"), starts, SHARED.index(ranking), ORDER.index(name)


def dense_text(folder: str, cells: Cells) -> str:
    """The figure of the dense models that cells start from; of several the mean."""
    values = {dense_of(folder)[dense_seed(item["cell"])]["dense"] for item in cells}
    value = statistics.mean(values)
    return f"{100 * value:.2f}" if metric_of(folder) == "accuracy" else f"{value:.1f} (1.00 ×)"


def far(cells: Cells) -> list[str]:
    """How far the networks are from the dense one after their last stage: mean KL, mean agreement."""
    known = [item for item in map(distance, cells) if item is not None and item.divergence is not None]
    if not known:
        return ["", ""]
    return [
        f"{statistics.mean(item.divergence or 0.0 for item in known):.3f}",
        f"{statistics.mean(item.agreement or 0.0 for item in known):.1%}",
    ]


def distance(item: dict[str, Any]) -> Distance | None:
    stages = [stage for stage in STAGES if stage in item["fidelity"]]
    return Fidelity.from_dict(item["fidelity"][stages[-1]]).worst if stages else None


@dataclass(frozen=True)
class Column:
    """A column of the table for the README: which cells it takes."""

    title: str
    ways: tuple[Way, ...]
    criterion: str = "innovation"


CUT, ONCE = (("none", False, "uniform"),), (("once", False, "uniform"), ("once", True, "uniform"))
WALK, MEASURED = (
    tuple(("walk", norms, ranking) for norms in (False, True)) for ranking in ("uniform", "measured")
)
COLUMNS = (
    Column("Torch-Pruning, magnitude", CUT, "tp-magnitude"),
    Column("as cut", CUT),
    Column("repaired at once", ONCE),
    Column("the walk", WALK),
    Column("the walk, measured shares", MEASURED),
)


SAID = (
    "Half of a network gone in one round, nothing trained: accuracy in %, or perplexity and how many",
    "times the dense one it is. Cria's units are chosen by `innovation`. `cria bench resnet20-walk` and the",
    "suites like it measure it again; [results](docs/results.md) has other sizes and criteria. Without ± it",
    "is one draw. The dense MiniLM has seen 8,000 sentences (`--quick`).",
)


def without_training() -> list[str]:
    """Half of every network gone, nothing trained: one row per network and what the half is of."""
    rows = []
    for folder, name in WALKS.items():
        for of, reduction in sizes(every(folder)):
            if reduction == 0.5:
                cells = [item for item in every(folder) if size(item) == (of, reduction)]
                rows.append(
                    [f"{name}, {OF.texts[of]}", dense_text(folder, cells)]
                    + [figures(folder, cells_of(cells, column), "pruned") or "" for column in COLUMNS]
                )
    return [*SAID, "", *table(["half of", "dense", *(item.title for item in COLUMNS)], rows)] if rows else []


def cells_of(cells: Cells, column: Column) -> Cells:
    return [item for item in pick(cells, criterion=column.criterion) if way(item) in column.ways]
