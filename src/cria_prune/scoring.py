"""The stages up to the score, for everything that ranks units without a round of pruning."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from cria_prune import one_round, pipeline
from cria_prune.batches import Batch
from cria_prune.config import PruneConfig
from cria_prune.criteria import score
from cria_prune.loss import Loss
from cria_prune.modules import device_of
from cria_prune.progress import clock
from cria_prune.record import States
from cria_prune.scope import scope
from cria_prune.scored import Scored, hash_of
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
    groups, scores, _ = _scored(model, batches, config or PruneConfig(), example, loss, seconds, False)
    return groups, scores


def score_once(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig | None = None,
    *,
    example: Batch | None = None,
    loss: Loss | None = None,
    seconds: dict[str, float] | None = None,
) -> Scored:
    """Score a model's units once, so that `prune(..., scores=...)` cuts it to any size without recording.

    Arguments and errors as in `score_units`. With `config.compensate` the second moments of what each
    consumer reads are recorded in the same pass, for the repair.

    Examples:
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
    _, scores, states = _scored(model, batches, config, example, loss, seconds, config.compensate)
    consumed = None
    if states is not None and config.compensate:
        consumed = {name: item.consumed for name, item in states.groups.items()}
    return Scored(scores, consumed, config, hash_of(model))


def _scored(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig,
    example: Batch | None,
    loss: Loss | None,
    seconds: dict[str, float] | None,
    consumed: bool,
) -> tuple[UnitGroups, dict[str, Importance], States | None]:
    spent = {} if seconds is None else seconds
    needs, states = pipeline.find_criterion(config.score).needs, None
    batches, device = pipeline.again(batches), device_of(model)
    with clock(spent, "structure"):
        example = pipeline.first_examples(batches, device) if example is None else example
        groups = scope(model, pipeline.discover(model, example), config.plan).groups
    if needs or consumed:
        with clock(spent, "record"):
            states = one_round.record_for(needs, model, groups, batches, config, loss=loss, consumed=consumed)
    with clock(spent, "score"):
        return groups, score(model, groups, states, config.score), states
