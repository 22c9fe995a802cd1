"""Scores that are kept: one recording, from which a network is pruned to any size in one round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cria_prune.base.screen import screenful
from cria_prune.config import PruneConfig
from cria_prune.errors import ConfigError, StructureError
from cria_prune.graph import Moments
from cria_prune.resume.store import weights_of
from cria_prune.spectrum import Importance
from cria_prune.structure import UnitGroups

Consumed = Mapping[str, Mapping[str, Moments]]


@dataclass(frozen=True, eq=False, repr=False)
class Scored:
    """The scores of a network's units, and what the repair of their consumers needs; prints as a table.

    Attributes:
        importances: group name -> importance of its units.
        consumed: group name -> weight of a consumer -> second moments of the features that it reads; None
            where they were not recorded.
        config: how it was recorded and scored; the plan in it says which kinds of units have scores.
        weights: hash of the network's weights.
    """

    importances: Mapping[str, Importance]
    consumed: Consumed | None
    config: PruneConfig
    weights: str

    def __repr__(self) -> str:
        return f"Scored({self.config.score.criterion}, {len(self.importances)} groups)"

    def __str__(self) -> str:
        width = max(map(len, self.importances), default=0)
        rows = [f"{name:{width}}  {found!r}" for name, found in self.importances.items()]
        return "\n".join([f"scored by {self.config.score.criterion}", *screenful(rows)])

    def applied(self, config: PruneConfig) -> PruneConfig:
        """Return a configuration with these scores' own recording and criterion.

        Raises:
            ConfigError: it asks for several rounds, or for a repair without the moments for it.
        """
        if config.plan.rounds != 1:
            raise ConfigError(
                f"Pruning in {config.plan.rounds} rounds from scores",
                "they are those of the dense network, and each further round would need its own",
                "Ask for one round, or leave out the scores",
            )
        if config.compensate and self.consumed is None:
            raise ConfigError(
                "Repairing the consumers from scores",
                "the moments for it were not kept with them",
                "Score again with compensate, or prune without it",
            )
        return config.model_copy(update={"record": self.config.record, "score": self.config.score})

    def check(self, model: nn.Module, groups: UnitGroups) -> None:
        """Check that the scores are those of a network and cover what may be cut of it.

        Raises:
            StructureError: another network, other weights, or a group without scores.
        """
        asked, again = "Pruning from scores", "Score this model again"
        if hash_of(model) != self.weights:
            raise StructureError(asked, "they are of a model with other weights", again)
        missing = [group.name for group in groups.prunable if group.name not in self.importances]
        if missing:
            raise StructureError(
                asked,
                f"{len(missing)} of {len(groups.prunable)} groups have none, the first is {missing[0]!r}",
                "Score again with the options that let these be cut (such as residual), or leave them out",
            )
        for group in groups.prunable:
            units = len(self.importances[group.name].scores)
            if units != group.size:
                raise StructureError(
                    asked, f"group {group.name!r} has {group.size} units, the scores {units}", again
                )


def hash_of(model: nn.Module) -> str:
    """Return the hash of a network's weights, by which its scores are known."""
    return str(weights_of({"model": model}, "scoring")["weights at the start"]["model"])
