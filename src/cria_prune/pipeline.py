"""prune(): the only file that knows the order of the stages, and the rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cria_prune.batches import Batch, named_shortage
from cria_prune.config import PruneConfig
from cria_prune.criteria import score
from cria_prune.criteria.score import find_criterion
from cria_prune.dispatched import is_dispatched, structure_of
from cria_prune.errors import CriaError
from cria_prune.given import again, check_finite, first_examples, shortened
from cria_prune.graph import keep_graphs, worth_keeping
from cria_prune.modules import device_of, digest, named_tensors
from cria_prune.plan import Allowed, Plan, compose, identity_plan
from cria_prune.plan import plan as make_round
from cria_prune.progress import QUIET, Progress
from cria_prune.ranks import world
from cria_prune.record import States, record
from cria_prune.record.collect import limited
from cria_prune.record.norms import Remeasured, batch_norms, remeasure
from cria_prune.record.states import reads_of
from cria_prune.result import PruneResult, Round
from cria_prune.rounds import RoundStore
from cria_prune.scope import check_target
from cria_prune.scored import Consumed, Scored
from cria_prune.spectrum import Importance
from cria_prune.structure import UnitGroups, shrink
from cria_prune.structure import discover as follow
from cria_prune.surgery import Reference, Repair, Verification, apply, compensate, settle
from cria_prune.surgery.verify import LESS


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

    Example:
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
    needs = find_criterion(config.score.criterion).needs
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
    run = _Run(batches, example, dense_copy, needs, loss, evaluate, allowed, scores)
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


@dataclass(frozen=True)
class _Run:
    """What stays the same over the rounds; `dense_copy` is None where each round has its own reference."""

    batches: Iterable[Batch]
    example: Batch
    dense_copy: Reference | None
    needs: frozenset[str]
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None
    evaluate: Callable[[nn.Module], float] | None
    allowed: Allowed
    given: Scored | None = None

    def round(self, before: PruneResult, number: int) -> PruneResult:
        """Record, score, plan, cut, verify."""
        config, groups, seconds = before.config, before.groups, dict[str, float]()
        states = self._recorded(before, seconds)
        with clock(seconds, "score"):
            scores = self._scores(before, states)
        values = {name: item.scores.numpy() for name, item in scores.items()}
        with clock(seconds, "plan"):
            step = self.step(before, values, number)
            total = compose(before.plan, step)
            world().meet("The plan", lambda: digest(str(sorted(step.kept.items())), {}))
        graphs = before.graphs
        if number == 1 and graphs is not None and states is not None:
            with clock(seconds, "graphs"):
                sides = {
                    name: (item.input, item.output)
                    for name, item in states.groups.items()
                    if item.input is not None and item.output.has_pairs
                }
                graphs = keep_graphs(sides, config.score.neighbors, config.score.ridge)
        smaller, repairs, verification = self._cut(before, self._consumed(states), step, total, seconds)
        norms = Remeasured(smaller, 0)
        if config.batch_norm and number == config.plan.rounds and batch_norms(smaller):
            with clock(seconds, "batch norms"):
                norms = remeasure(smaller, limited(self.batches, config.record.examples))
        done = Round(
            number=number,
            report=step.report,
            seconds=seconds,
            scores={name: tuple(item.tolist()) for name, item in values.items()},
            kept=dict(step.kept),
            diagnosis={name: item.diagnosis.to_dict() for name, item in scores.items()},
            verification=verification,
            metric=self._measured(norms.model),
            repairs=repairs,
            batch_norms=norms.norms,
            batch_norms_kept=norms.reason,
        )
        return replace(
            before,
            model=norms.model,
            plan=total,
            groups=shrink(groups, step.kept),
            rounds=(*before.rounds, done),
            graphs=graphs,
        )

    def step(self, before: PruneResult, scores: Mapping[str, np.ndarray], number: int) -> Plan:
        """Return the plan of a round, relative to the model before it."""
        plan = before.config.plan
        target = plan.reduction * number / plan.rounds
        return make_round(
            before.groups, scores, plan, dense=before.dense, target=target, allowed=self.allowed
        )

    def _measured(self, model: nn.Module) -> float | None:
        """Return the metric of a round's model, if it is asked for."""
        evaluate = self.evaluate
        return None if evaluate is None else world().lead("Evaluating", lambda: float(evaluate(model)))

    def _recorded(self, before: PruneResult, seconds: dict[str, float]) -> States | None:
        """Record what the criterion and the repair need; None where neither needs anything."""
        config = before.config
        with clock(seconds, "record"):
            if self.given is not None or not (self.needs or config.compensate):
                return None
            widths = {group.name: group.size for group in before.groups.prunable}
            drawn = before.graphs is not None and not before.rounds
            return record_for(
                self.needs, before.model, before.groups, self.batches, config, loss=self.loss,
                consumed=config.compensate,
                graphs=worth_keeping(widths, config.score.neighbors) if drawn else (),
            )  # fmt: skip

    def _scores(self, before: PruneResult, states: States | None) -> dict[str, Importance]:
        """Score the units, or take the scores that were given."""
        if self.given is None:
            return score(before.model, before.groups, states, before.config.score)
        return {group.name: self.given.importances[group.name] for group in before.groups.prunable}

    def _consumed(self, states: States | None) -> Consumed | None:
        """Return the second moments of what the consumers read, of the groups that may be cut."""
        if self.given is not None:
            return self.given.consumed
        return None if states is None else {name: item.consumed for name, item in states.groups.items()}

    def _cut(
        self,
        before: PruneResult,
        consumed: Consumed | None,
        step: Plan,
        total: Plan,
        seconds: dict[str, float],
    ) -> tuple[nn.Module, tuple[Repair, ...], Verification | None]:
        """Repair the consumers if asked to, cut, and compare the cut with the mask."""
        source, repairs = before.model, tuple[Repair, ...]()
        if before.config.compensate and consumed is not None:
            with clock(seconds, "compensate"):
                source, repairs = compensate(before.model, before.groups, step.kept, consumed)
        with clock(seconds, "surgery"), named_shortage("Cutting the model", LESS):
            smaller = apply(source, step)
        if not before.config.verify:
            return smaller, repairs, None
        with clock(seconds, "verify"):
            if self.dense_copy is None:  # the weights are not the dense ones any more: this round's cut alone
                return smaller, repairs, Reference(source, self.example).compare(step, smaller)
            return smaller, repairs, self.dense_copy.compare(total, smaller)


def record_for(
    needs: frozenset[str],
    model: nn.Module,
    groups: UnitGroups,
    batches: Iterable[Batch],
    config: PruneConfig,
    *,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
    consumed: bool = False,
    graphs: Collection[str] = (),
) -> States:
    """Record what a criterion needs, and what the consumers read if it is `consumed`; see `record`."""
    return record(
        model, groups, batches, config.record, loss=loss, gradients="gradients" in needs,
        per_example="examples" in needs, consumed=consumed, reads=reads_of(needs), graphs=graphs,
        device=device_of(model),
    )  # fmt: skip


@contextmanager
def clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of a block to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


__all__ = ["PruneResult", "Round", "discover", "prune"]
