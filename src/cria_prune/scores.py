"""Scores that are kept: one recording, from which a network is pruned to any size in one round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import ConfigError, StructureError
from cria_prune.base.inputs import Inputs
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.metrics import Loss
from cria_prune.base.progress import screenful
from cria_prune.config import PruneConfig
from cria_prune.resume.store import weights_of
from cria_prune.spectrum.importance import Importance
from cria_prune.stages import Consumed, Prepared, Ranking, prepare, rank
from cria_prune.structure.groups import UnitGroups


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
        if config.repair == "once" and self.consumed is None:
            raise ConfigError(
                "Repairing the consumers from scores",
                "the moments for it were not kept with them",
                "Score again with the repair once, or prune without it (repair none)",
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

    def ranking(self, groups: UnitGroups) -> Ranking:
        """Return the scores of these groups as `rank` returns them."""
        found = {group.name: self.importances[group.name] for group in groups.prunable}
        return Ranking(found, self.consumed, seconds={"record": 0.0, "score": 0.0})


@of_plain_models
def score_once(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig | None = None,
    *,
    example: Batch | None = None,
    loss: Loss | None = None,
    seconds: dict[str, float] | None = None,
    inputs: Inputs | None = None,
) -> Scored:
    """Score a model's units once, so that `prune(..., scores=...)` cuts it to any size without recording.

    With the repair `once` the second moments of what each consumer reads are recorded in the same pass, for
    the repair.

    Args:
        model: the trained model; it is left as it was.
        batches: calibration batches: tensors, (inputs, target) pairs or mappings.
        config: `record` and `score`, and of `plan` what may be cut: `residual`, `units` and `vanilla`.
        example: one batch to capture the model with; the first of `batches` by default.
        loss: (model, batch) to a scalar, for `taylor`; cross-entropy by default.
        seconds: where wall times are added: `structure`, `record`, `score`.
        inputs: as in `prune`.

    Raises:
        CaptureError, DataError: the model cannot be captured, or does not accept the batches.
        CriterionError: no such criterion, or it needs targets that the batches lack.
        SignalError: a weight or a signal holds NaN or infinity.

    Example:
        >>> import torch
        >>> from cria_prune import PruneConfig, prune
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> batches = [torch.randn(32, 4) for _ in range(4)]
        >>> scored = score_once(net, batches)
        >>> sizes = [prune(net, batches, PruneConfig(plan={"reduction": share, "rounds": 1}), scores=scored)
        ...          for share in (0.2, 0.6)]
        >>> sizes[0].model[0].out_features > sizes[1].model[0].out_features
        True
    """
    config = config or PruneConfig()
    prepared = prepare(model, batches, config, example=example, inputs=inputs).without_reference()
    return scored_of(prepared, loss=loss, seconds=seconds)


def scored_of(
    prepared: Prepared, *, loss: Loss | None = None, seconds: dict[str, float] | None = None
) -> Scored:
    """Score the units of a model that is prepared; see `score_once`."""
    ranking = rank(prepared, loss=loss)
    spent = {} if seconds is None else seconds
    for stage, wall in {"structure": prepared.seconds, **ranking.seconds}.items():
        spent[stage] = spent.get(stage, 0.0) + wall
    return Scored(ranking.importances, ranking.consumed, prepared.config, hash_of(prepared.model))


def hash_of(model: nn.Module) -> str:
    """Return the hash of a network's weights, by which its scores are known."""
    return str(weights_of({"model": model}, "scoring")["weights at the start"]["model"])
