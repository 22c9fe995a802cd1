"""The six rows of results of the README, each from the result files that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coverage_table import table
from cria_prune.bench.suite import dense_seed
from cria_prune.report.curves import mean_interval
from result_cells import ALL, LLAMA, PLAIN, Cells, dense_of, figures, metric_of, percent, pick, read, way

REPAIR = ("once", False, "uniform")
"""What was the default beside cutting, before the walk was it, where a network has no batch norms."""
AT_ONCE = "`innovation`, repaired at once"


@dataclass(frozen=True)
class Side:
    """One side of a row.

    Attributes:
        label: what it is called there.
        criterion: of the cells.
        way: what they do beside scoring and cutting, as `result_cells.way` says it.
        cell: what else their cells must say.
    """

    label: str
    criterion: str
    way: tuple[Any, ...]
    cell: tuple[tuple[str, Any], ...] = (("reduction", 0.5),)

    def cells(self, network: str, epochs: int) -> Cells:
        """Its cells: inner units, four rounds, a recovery at the recipe's settings."""
        wanted = {"scope": "inner", "rounds": 4, "epochs": epochs, **dict(self.cell)}
        found = pick(read(network), criterion=self.criterion, **wanted)
        return [item for item in found if way(item) == self.way and not item["cell"].get("tune")]


@dataclass(frozen=True)
class Row:
    """One row: what was cut, how it was trained after, and two sides.

    Attributes:
        gone: what was removed.
        training: in words.
        networks: folders of result files; several are of the same network, trained from other seeds.
        epochs: of the recovery.
        ours: Cria.
        beside: what stands beside it.
    """

    gone: str
    training: str
    networks: tuple[str, ...]
    epochs: int
    ours: Side
    beside: Side


ONCE = Side(AT_ONCE, "innovation", ALL)
PEER = Side("Torch-Pruning, magnitude", "tp-magnitude", PLAIN)
ROWS = (
    Row("half of ResNet-20", "none", ("cifar10-resnet20",), 0, ONCE, PEER),
    Row("half of ResNet-56", "none", ("cifar10-resnet56",), 0, ONCE, PEER),
    Row("half of ResNet-20", "3 epochs", ("cifar10-resnet20",), 3, ONCE, PEER),
    Row(
        *("half of ResNet-56", "3 epochs", ("cifar10-resnet56",), 3),
        Side(
            "`innovation-magnitude`, repaired at once", "innovation-magnitude", ALL, (("reduction", 0.4975),)
        ),
        PEER,
    ),
    Row(
        *("half of MiniLM's encoder (SST-2)", "1 epoch of 8,000 sentences", ("sst2-minilm",), 1),
        Side(AT_ONCE, "innovation", REPAIR, (("reduction", 0.5), ("dense_seed", 1))),
        Side("weights' group norm", "group-l2", PLAIN, (("reduction", 0.5), ("dense_seed", 1))),
    ),
    Row(
        *("half of small Llamas, embeddings apart", "none", LLAMA, 0),
        Side(AT_ONCE, "innovation", REPAIR),
        Side("Wanda-sp", "wanda-sp", PLAIN),
    ),
)


def summary() -> list[str]:
    """The table."""
    head = ["what is gone", "training", "draws", "dense", "Cria", "beside it", "`cria bench`"]
    return table(head, map(cells_of, ROWS))


def cells_of(row: Row) -> list[str]:
    ours, beside = ({n: side.cells(n, row.epochs) for n in row.networks} for side in (row.ours, row.beside))
    counts = [sum(map(len, found.values())) for found in (ours, beside)]
    draws = str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} / {counts[1]}"
    sources = (f"[`{n.removeprefix('cifar10-')}`](benchmarks/results/{n})" for n in row.networks)
    return [
        *(row.gone, row.training, draws, dense_text(ours)),
        *(f"{side.label}: {value(found)}" for side, found in ((row.ours, ours), (row.beside, beside))),
        ", ".join(sources),
    ]


def dense_text(found: dict[str, Cells]) -> str:
    """The accuracy of the dense models that the cells start from, or the range of their perplexities."""
    values = sorted(
        {dense_of(name)[dense_seed(item["cell"])]["dense"] for name, cells in found.items() for item in cells}
    )
    if metric_of(next(iter(found))) == "accuracy":
        return percent(values) + " %"
    return f"perplexity {values[0]:.1f} to {values[-1]:.1f}"


def value(found: dict[str, Cells]) -> str:
    """An accuracy, or by how much the perplexity of each dense model is multiplied; with its interval."""
    network, cells = next(iter(found.items()))
    key = "recovered" if cells[0]["cell"]["epochs"] else "pruned"
    if metric_of(network) == "accuracy":
        return f"{figures(network, cells, key)} %"
    ratios = [
        item[key] / dense_of(name)[dense_seed(item["cell"])]["dense"]
        for name, several in found.items()
        for item in several
    ]
    mean, half = mean_interval(ratios)
    return f"{mean:.2f}" + ("" if half is None else f" ± {half:.2f}") + " ×"
