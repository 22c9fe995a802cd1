"""A suite: small YAML files, each a grid of cells on one network; and what a cell is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cria_prune.base.errors import ConfigError
from cria_prune.bench.peer import IMPORTANCES, RANKINGS
from cria_prune.config import (
    OF,
    RANKING,
    REPAIR,
    PruneConfig,
    RecoverConfig,
    StageConfig,
    repair_of_before,
)
from cria_prune.criteria.table import CRITERIA
from cria_prune.recipes.registry import TASKS, task
from cria_prune.tasks.base import Task
from cria_prune.tasks.functions import is_function

ENDINGS = (".yaml", ".yml", ".json")
Share = Annotated[float, Field(gt=0, lt=1)]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Grid(StageConfig):
    """All combinations of its lists are measured."""

    network: str = Field(description="a recipe, or package.module:function that makes a network of your own")
    criteria: tuple[str, ...] = Field(
        min_length=1, description="names of criteria, or of Torch-Pruning's importances"
    )
    reductions: tuple[Share, ...] = Field(min_length=1, description="shares to remove")
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field((4,), min_length=1)
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="of the dense model, the draw, the recovery"
    )
    dense_seed: int | None = Field(None, description="one dense model for all seeds; each its own if None")
    quick_dense: bool = Field(False, description="start from the dense model of the recipe's --quick")
    epochs: int = Field(0, ge=0, description="epochs of recovery, 0 for none")
    scope: Literal["inner", "all", "neurons"] = Field(
        "inner",
        description="inner: without residual width; all: with it; neurons: feed-forward neurons alone",
    )
    of: Annotated[tuple[Annotated[str, OF], ...], BeforeValidator(_listed), Field(min_length=1)] | None = (
        Field(None, description="what the reductions are shares of, one or several; the recipe's own if None")
    )
    ranking: tuple[Annotated[str, RANKING], ...] = Field(("uniform",), min_length=1)
    repair: tuple[Annotated[str, REPAIR], ...] = Field(("none",), min_length=1)
    batch_norm: tuple[bool, ...] = Field(
        (False,), min_length=1, description="without and with batch-norm statistics measured again"
    )
    tune: dict[str, Any] = Field(
        default_factory=dict, description="settings of the recovery other than the recipe's"
    )
    quick: bool = Field(False, description="recover on the recipe's --quick training data")
    examples: int | None = Field(None, ge=2, description="for the calibration; the recipe's, else 1,024")
    tokens: int | None = Field(None, ge=1, description="record.tokens: of each text; all if None")

    @model_validator(mode="before")
    @classmethod
    def _as_now(cls, values: Any) -> Any:
        return repair_of_before(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.network not in TASKS and not is_function(self.network):
            raise ValueError(f"no recipe {self.network!r}; known: {', '.join(sorted(TASKS))}")
        try:
            RecoverConfig(**self.tune)
        except ConfigError as error:
            raise ValueError(f"tune, {error.found.partition(' (found')[0]}") from None
        taken = sorted({"epochs", "seed", "fsdp"} & set(self.tune))
        if taken:
            raise ValueError(f"tune has {taken[0]!r}, which is not for it to say")
        known = (*CRITERIA, *IMPORTANCES)
        unknown = [name for name in self.criteria if name not in known]
        if unknown:
            raise ValueError(f"no criterion {unknown[0]!r}; known: {', '.join(known)}")
        return self


def packaged() -> list[str]:
    """Return the names of the suites that come with Cria."""
    return sorted(item.name for item in _home().iterdir() if item.is_dir())


def read_suite(source: str) -> list[Grid]:
    """Return the grids of a suite; all are of one network.

    Args:
        source: the name of a packaged suite, a folder of YAML or JSON files, or one such file.

    Raises:
        ConfigError: there is no such suite, a file is not valid, or the grids are of several networks.
    """
    asked = f"The suite {source!r}"
    folder = _home() / source if source in packaged() else Path(source)
    if not folder.exists():
        raise ConfigError(
            asked, "there is none", f"Give a folder of YAML files, or one of {', '.join(packaged())}"
        )
    files = (
        sorted(item for item in folder.iterdir() if item.suffix in ENDINGS) if folder.is_dir() else [folder]
    )
    if not files:
        raise ConfigError(asked, "the folder holds no YAML or JSON file", "Write one grid per file")
    grids = []
    for path in files:
        try:
            grids.append(Grid.from_text(path.read_text(encoding="utf-8")))
        except (ConfigError, UnicodeDecodeError, OSError) as error:
            found = error.found if isinstance(error, ConfigError) else str(error)
            todo = f"Known keys: {', '.join(Grid.model_fields)}"
            raise ConfigError(f"The grid {path.name} of the suite {source!r}", found, todo) from error
    networks = sorted({grid.network + " --quick" * grid.quick_dense for grid in grids})
    if len(networks) > 1:
        raise ConfigError(asked, f"its grids are of {', '.join(networks)}", "Give one suite per network")
    return grids


CRITERIA_OF_OWN, REDUCTIONS_OF_OWN = ("innovation", "l2", "random"), (0.3, 0.5)


def grid_of(
    network: str,
    criteria: Sequence[str],
    reductions: Sequence[float],
    seeds: Sequence[int],
    repair: Sequence[str],
) -> Grid:
    """Return the grid of a network of the user's own: these lists, or the usual ones where one is empty."""
    return Grid(
        network=network, criteria=tuple(criteria) or CRITERIA_OF_OWN,
        reductions=tuple(reductions) or REDUCTIONS_OF_OWN, seeds=tuple(seeds) or (0,), rounds=(1,),
        repair=tuple(repair) or ("none", "walk"),
    )  # fmt: skip


def task_of(grid: Grid) -> Task:
    """Return the task of a grid's network.

    Raises:
        ConfigError: its recipe has no --quick, and the grid asks for that.
    """
    return task(grid.network, **({"quick": True} if grid.quick_dense else {}))


def _home() -> Path:
    return Path(str(resources.files("cria_prune") / "bench" / "suites"))


Cell = dict[str, Any]


def cells(grid: Grid) -> list[Cell]:
    """Return the cells of a grid, seed by seed: a bench that is stopped has whole tables of the first seeds.

    What is usual (a dense model of the cell's own seed, the recipe's kind of share, ranking uniform, no
    repair, batch norms as they are, all training data) is not in a cell. Importances of Torch-Pruning have no
    cells under rankings that its pruner lacks, with repair, or with batch norms measured again.
    """
    lists = ("seeds", "of", "reductions", "rounds", "ranking", "repair", "batch_norm", "criteria")
    product = itertools.product(*(getattr(grid, name) or (None,) for name in lists))
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
            **({"repair": repair} if repair != "none" else {}),
            **({"batch_norm": True} if batch_norm else {}),
            **({} if of is None else {"of": of}),
            **({} if grid.dense_seed is None else {"dense_seed": grid.dense_seed}),
            **({"quick_dense": True} if grid.quick_dense else {}),
        }
        for seed, of, reduction, rounds, ranking, repair, batch_norm, criterion in product
        if criterion not in IMPORTANCES or (ranking in RANKINGS and repair == "none" and not batch_norm)
    ]


def dense_seed(cell: Cell) -> int:
    """Return the seed of the dense model that a cell starts from."""
    return int(cell["dense_seed" if "dense_seed" in cell else "seed"])


AFTER = {"none": [], "once": ["repair"], "walk": ["walk"]}
"""Repair -> what the name of a result file says of it; `repair` was once the only one."""


def file_name(cell: Cell) -> str:
    """Return the name of a cell's result file.

    >>> cell = {"scope": "inner", "criterion": "l2", "reduction": 0.5, "rounds": 4, "seed": 0, "epochs": 0}
    >>> file_name(cell)
    'inner-l2-0.5-rounds4-seed0-epochs0.json'
    >>> file_name({**cell, "repair": "once", "ranking": "global"})
    'inner-l2-0.5-rounds4-seed0-epochs0-global-repair.json'
    >>> file_name({**cell, "epochs": 60, "tune": {"compile": True}})
    'inner-l2-0.5-rounds4-seed0-epochs60-compile_true.json'
    """
    name = "{scope}-{criterion}-{reduction:g}-rounds{rounds}-seed{seed}-epochs{epochs}".format(**cell)
    words = [
        *(["quick"] if cell.get("quick") else []),
        *(f"{key}_{value}".lower() for key, value in sorted(cell.get("tune", {}).items())),
        *([cell["ranking"]] if cell.get("ranking") else []),
        *AFTER[cell.get("repair", "none")],
        *(["norms"] if cell.get("batch_norm") else []),
        *([cell["of"]] if cell.get("of") else []),
        *([f"dense{cell['dense_seed']}"] if "dense_seed" in cell else []),
        *(["quick_dense"] if cell.get("quick_dense") else []),
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
        repair=cell.get("repair", "none"),
        batch_norm=cell.get("batch_norm", False),
    )
