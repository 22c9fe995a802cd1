"""A suite: small YAML files, each a grid of cells on one network."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cria_prune.bench.peer import IMPORTANCES
from cria_prune.config import OF, RANKING, RecoverConfig, StageConfig
from cria_prune.criteria import CRITERIA
from cria_prune.errors import ConfigError
from cria_prune.tasks import TASKS

ENDINGS = (".yaml", ".yml", ".json")
Share = Annotated[float, Field(gt=0, lt=1)]


class Grid(StageConfig):
    """All combinations of its lists are measured."""

    network: str = Field(description="a recipe")
    criteria: tuple[str, ...] = Field(
        min_length=1, description="names of criteria, or of Torch-Pruning's importances"
    )
    reductions: tuple[Share, ...] = Field(min_length=1, description="shares to remove")
    rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field((4,), min_length=1)
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="of the dense model, the draw, the recovery"
    )
    dense_seed: int | None = Field(None, description="one dense model for all seeds; each its own if None")
    epochs: int = Field(0, ge=0, description="epochs of recovery, 0 for none")
    scope: Literal["inner", "all", "neurons"] = Field(
        "inner",
        description="inner: without residual width; all: with it; neurons: feed-forward neurons alone",
    )
    of: Annotated[str, OF] | None = Field(
        None, description="what the reductions are shares of; the recipe's own if None"
    )
    ranking: tuple[Annotated[str, RANKING], ...] = Field(("uniform",), min_length=1)
    compensate: tuple[bool, ...] = Field((False,), min_length=1, description="without and with repair")
    batch_norm: tuple[bool, ...] = Field(
        (False,), min_length=1, description="without and with batch-norm statistics measured again"
    )
    tune: dict[str, Any] = Field(
        default_factory=dict, description="settings of the recovery other than the recipe's"
    )
    quick: bool = Field(False, description="recover on the recipe's --quick training data")
    examples: int | None = Field(None, ge=2, description="for the calibration; the recipe's, else 1,024")
    tokens: int | None = Field(None, ge=1, description="record.tokens: of each text; all if None")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.network not in TASKS:
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
    networks = sorted({grid.network for grid in grids})
    if len(networks) > 1:
        raise ConfigError(asked, f"its grids are of {', '.join(networks)}", "Give one suite per network")
    return grids


def _home() -> Path:
    return Path(str(resources.files("cria_prune") / "bench" / "suites"))
