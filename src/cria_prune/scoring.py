"""The stages up to the score, for everything that ranks units without a round of pruning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from cria_prune import pipeline
from cria_prune.batches import Batch
from cria_prune.config import PruneConfig
from cria_prune.loss import Loss
from cria_prune.modules import device_of
from cria_prune.scope import scope
from cria_prune.spectrum import Importance
from cria_prune.structure import UnitGroups


def score_units(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig | None = None,
    *,
    example: Batch | None = None,
    loss: Loss | None = None,
    seconds: dict[str, float] | None = None,
) -> tuple[UnitGroups, dict[str, Importance]]:
    """Discover a model's unit groups, record its signals and score the units; nothing is cut.

    Args:
        model: the trained model; it is left as it was.
        batches: calibration batches: tensors, (inputs, target) pairs or mappings.
        config: `record` and `score`, and of `plan` what may be cut: `residual`, `units` and `vanilla`.
        example: one batch to capture the model with; the first of `batches` by default.
        loss: (model, batch) to a scalar, for `taylor`; cross-entropy by default.
        seconds: where wall times are added: `structure`, `record`, `score`.

    Returns:
        The groups, frozen where the plan leaves them alone; and group name -> importance, scores (units,)
        float64, of every prunable group.

    Raises:
        CaptureError, DataError: the model cannot be captured, or does not accept the batches.
        CriterionError: no such criterion, or it needs targets that the batches lack.
        SignalError: a weight or a signal holds NaN or infinity.
    """
    config, spent = config or PruneConfig(), {} if seconds is None else seconds
    needs, states = pipeline.find_criterion(config.score.criterion).needs, None
    batches, device = pipeline.again(batches), device_of(model)
    with pipeline.clock(spent, "structure"):
        example = pipeline.first_examples(batches, device) if example is None else example
        groups = scope(model, pipeline.discover(model, example), config.plan).groups
    if needs:
        with pipeline.clock(spent, "record"):
            states = pipeline.record_for(needs, model, groups, batches, config, loss=loss)
    with pipeline.clock(spent, "score"):
        return groups, pipeline.score(model, groups, states, config.score)
