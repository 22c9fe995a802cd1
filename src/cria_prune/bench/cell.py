"""A cell of a grid: what is measured, under which name, with which configuration."""

from __future__ import annotations

import itertools
from typing import Any

from cria_prune.bench.peer import IMPORTANCES, RANKINGS
from cria_prune.bench.suite import Grid
from cria_prune.config import PruneConfig
from cria_prune.tasks import Task

Cell = dict[str, Any]


def cells(grid: Grid) -> list[Cell]:
    """Return the cells of a grid, seed by seed: a bench that is stopped has whole tables of the first seeds.

    What is usual (a dense model of the cell's own seed, the recipe's kind of share, ranking uniform, no
    repair, batch norms as they are, all training data) is not in a cell. Importances of Torch-Pruning have no
    cells under the ranking `loss`, with repair, or with batch norms measured again.
    """
    product = itertools.product(
        grid.seeds,
        grid.reductions,
        grid.rounds,
        grid.ranking,
        grid.compensate,
        grid.batch_norm,
        grid.criteria,
    )
    return [
        {
            "network": grid.network,
            "scope": grid.scope,
            "criterion": criterion,
            "reduction": reduction,
            "rounds": rounds,
            "seed": seed,
            "epochs": grid.epochs,
            **({"quick": True} if grid.quick and grid.epochs else {}),
            **({"tune": dict(grid.tune)} if grid.tune and grid.epochs else {}),
            **({"ranking": ranking} if ranking != "uniform" else {}),
            **({"compensate": True} if compensate else {}),
            **({"batch_norm": True} if batch_norm else {}),
            **({} if grid.of is None else {"of": grid.of}),
            **({} if grid.dense_seed is None else {"dense_seed": grid.dense_seed}),
        }
        for seed, reduction, rounds, ranking, compensate, batch_norm, criterion in product
        if criterion not in IMPORTANCES or (ranking in RANKINGS and not (compensate or batch_norm))
    ]


def dense_seed(cell: Cell) -> int:
    """Return the seed of the dense model that a cell starts from."""
    return int(cell["dense_seed" if "dense_seed" in cell else "seed"])


def file_name(cell: Cell) -> str:
    """Return the name of a cell's result file.

    >>> cell = {"scope": "inner", "criterion": "l2", "reduction": 0.5, "rounds": 4, "seed": 0, "epochs": 0}
    >>> file_name(cell)
    'inner-l2-0.5-rounds4-seed0-epochs0.json'
    >>> file_name({**cell, "compensate": True, "ranking": "global"})
    'inner-l2-0.5-rounds4-seed0-epochs0-global-repair.json'
    >>> file_name({**cell, "epochs": 60, "tune": {"compile": True}})
    'inner-l2-0.5-rounds4-seed0-epochs60-compile_true.json'
    """
    name = "{scope}-{criterion}-{reduction:g}-rounds{rounds}-seed{seed}-epochs{epochs}".format(**cell)
    words = [
        *(["quick"] if cell.get("quick") else []),
        *(f"{key}_{value}".lower() for key, value in sorted(cell.get("tune", {}).items())),
        *([cell["ranking"]] if cell.get("ranking") else []),
        *(["repair"] if cell.get("compensate") else []),
        *(["norms"] if cell.get("batch_norm") else []),
        *([cell["of"]] if cell.get("of") else []),
        *([f"dense{cell['dense_seed']}"] if "dense_seed" in cell else []),
    ]
    return "-".join([name, *words]) + ".json"


def config_of(task: Task, cell: Cell, grid: Grid) -> PruneConfig:
    """Return the configuration of a cell: the recipe's own, and what the cell and its grid say."""
    record = {**task.prune_defaults.get("record", {}), "seed": cell["seed"], "tokens": grid.tokens}
    if grid.examples is not None:
        record["examples"] = grid.examples
    plan = {
        **task.prune_defaults.get("plan", {}),
        "reduction": cell["reduction"],
        "rounds": cell["rounds"],
        "residual": cell["scope"] == "all",
        "units": "neurons" if cell["scope"] == "neurons" else "all",
        "ranking": cell.get("ranking", "uniform"),
        **({"of": cell["of"]} if cell.get("of") else {}),
    }
    return PruneConfig(
        record=record,
        score={"criterion": cell["criterion"], "seed": cell["seed"]},
        plan=plan,
        compensate=cell.get("compensate", False),
        batch_norm=cell.get("batch_norm", False),
    )
