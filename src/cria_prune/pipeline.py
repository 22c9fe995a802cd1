"""prune(): the rounds, one after another; the order of the stages within one is in `one_round`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from cria_prune.base.events import passed
from cria_prune.batches import Batch
from cria_prune.config import PruneConfig
from cria_prune.criteria.score import find_criterion
from cria_prune.dispatched import is_dispatched, structure_of
from cria_prune.errors import CriaError
from cria_prune.given import again, check_finite, first_examples, shortened
from cria_prune.modules import device_of, digest, named_tensors
from cria_prune.one_round import OneRound
from cria_prune.plan import identity_plan
from cria_prune.progress import QUIET, Progress
from cria_prune.ranks import world
from cria_prune.result import PruneResult, Round
from cria_prune.resume.pruning import RoundStore
from cria_prune.scope import check_target
from cria_prune.scored import Scored
from cria_prune.structure import UnitGroups
from cria_prune.structure import discover as follow
from cria_prune.surgery import Reference, settle


def discover(model: nn.Module, example: Batch) -> UnitGroups:
    """Find what can be removed from a model: its unit groups, and why the frozen ones are frozen.

    Args:
        model: any module that torch.export can follow; it is left as it was.
        example: one batch, as its forward takes it; two examples are enough.

    Raises:
        CaptureError: the operations cannot be captured.
        DataError: the forward does not accept the example.
    """
    if is_dispatched(model):  # its shapes decide, for there is no room for a copy with values
        model = structure_of(model)
    batch = shortened(example, device_of(model))
    return _discover(model, batch, Reference(model, batch))


def _discover(model: nn.Module, example: Batch, reference: Reference) -> UnitGroups:
    """Find the unit groups by one capture, of the model's copy that the cuts are compared with."""
    try:
        traced = reference.trace()
    except CriaError:  # it may not run in float64; if it cannot be captured at all, the model itself says so
        traced = None
    return settle(model, follow(model, example, traced), example, reference)


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig | None = None,
    *,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    on_round: Callable[[PruneResult], None] | None = None,
    progress: Progress | None = None,
    graphs: bool = False,
    state: str | Path | None = None,
    data: str | None = None,
    scores: Scored | None = None,
) -> PruneResult:
    """Make a trained model smaller: record, score, plan and cut, round by round; no weight is trained.

    With several processes (`cria_prune.ranks`), which all make this call, the passes over the data and the
    scoring are shared out, and all return the same.

    The model is left untouched. In every round masked equals pruned is verified against it, or with repair
    against the repaired model of that round.

    With a `state`, the same call in another process goes on after the last finished round, also after a
    SIGKILL, and ends with the same bits. That asks of `batches` to be the same in every pass.

    Args:
        model: the trained model, on the device where the work is to be done.
        batches: calibration batches: tensors, (inputs, target) pairs or mappings.
        config: what to remove and how; half of the parameters in four rounds by default.
        loss: (model, batch) to a scalar, for criteria that take gradients.
        evaluate: model -> metric, shown for every round.
        on_round: called with the result so far after every round.
        progress: where to show the rounds; silent if None.
        graphs: keep the neuron graphs of the dense model, to draw them later.
        state: a folder for the finished rounds, of this pruning alone; the caller removes it. Once all are
            finished, the same call returns the same result and records nothing.
        data: fingerprint of the calibration data: a state of other data is refused. The first two examples
            are compared in any case.
        scores: of this model, from `score_once` or `load_scores`: nothing is recorded, in one round.

    Raises:
        CriaError: each stage's own; the model is then as it was.
        ArtifactError: the state cannot be kept, is damaged, or is of another pruning.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> batches = [torch.randn(32, 4) for _ in range(4)]
        >>> result = prune(net, batches, PruneConfig(plan={"reduction": 0.5, "rounds": 2}))
        >>> result.model[0].out_features < 16
        True
    """
    config = config or PruneConfig()
    config = config if scores is None else scores.applied(config)
    needs = find_criterion(config.score).needs
    batches = again(batches)
    check_finite(model)
    start = time.perf_counter()
    example = first_examples(batches, device_of(model))
    reference = Reference(model, example)
    found = check_target(model, _discover(model, example, reference), config.plan)
    # With repair every round is compared with its own repaired model: the dense copy is not held for it.
    dense_copy = None if config.compensate else reference
    del reference
    dense, allowed = found.groups, found.allowed
    if scores is not None:
        scores.check(model, dense)
    result = PruneResult(
        model, identity_plan(dense), dense, dense, (), config, time.perf_counter() - start,
        graphs={} if graphs else None,
    )  # fmt: skip
    rounds = config.plan.rounds
    run = OneRound(batches, example, dense_copy, needs, loss, evaluate, allowed, scores)
    store = None
    if state is not None:
        said = {"data": data, "device": device_of(model).type, "graphs": graphs, "scores": None}
        said["metric of every round"] = evaluate is not None
        if scores is not None:
            said["scores"] = digest("", {name: item.scores for name, item in scores.importances.items()})
        store = RoundStore(state, model, config, example, **said)
        result = store.resume(result, run.step)
    done = len(result.rounds)
    world().meet("The rounds that are kept", lambda: str(done))
    with (progress or QUIET).bar("prune", rounds) as bar:
        bar.update(max(done - 1, 0))
        for number in range(max(done, 1), rounds + 1):  # the last of those that were kept is shown again
            if number > done:
                result = run.round(result, number)
                _keep(store, result)
                passed("round", number=number, rounds=rounds)
            report = result.report
            bar.update(
                parameters=f"{report['parameters']:,.0f}",
                reduction=report["reached"],
                metric=result.rounds[-1].metric,
            )
            if on_round is not None:
                on_round(result)
    world().meet("The pruned weights", lambda: digest("", named_tensors(result.model)))
    return result


def _keep(store: RoundStore | None, result: PruneResult) -> None:
    """Keep the rounds so far, if that is wanted; of several processes the first writes."""
    if store is not None:
        world().lead("Keeping the rounds", lambda: store.write(result))


__all__ = ["PruneResult", "Round", "discover", "prune"]
