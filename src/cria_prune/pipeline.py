"""prune(): the rounds, one after another, and how a stopped one goes on; the order within is in `stages`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cria_prune.base.batches import Batch
from cria_prune.base.errors import StructureError
from cria_prune.base.events import passed
from cria_prune.base.inputs import Inputs
from cria_prune.base.kinds import check_kind, of_texts, unwrap
from cria_prune.base.modules import (
    check_finite,
    check_in_memory,
    device_of,
    digest,
    named_tensors,
)
from cria_prune.base.progress import QUIET, Progress, clock
from cria_prune.base.ranks import world
from cria_prune.config import PruneConfig
from cria_prune.criteria.score import find_criterion
from cria_prune.latency import TRIES, compare_speed, next_aim, timing_batch
from cria_prune.measured import measure_losses, with_latency
from cria_prune.planning.allocation import Losses
from cria_prune.planning.plan import Plan
from cria_prune.result import PruneResult, Round
from cria_prune.resume.rounds import RoundStore
from cria_prune.scores import Scored
from cria_prune.stages import (
    Cut,
    InMemory,
    Prepared,
    Ranking,
    cut,
    plan_cut,
    prepare,
    rank,
    remove,
    said,
    target_of,
)


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
    prepared: Prepared | None = None,
    inputs: Inputs | None = None,
    examples: Sequence[Batch] = (),
) -> PruneResult:
    """Make a trained model smaller: record, score, plan and cut, round by round; no weight is trained.

    With several processes (`base.ranks`), which all make this call, the passes over the data and the
    scoring are shared out, and all return the same.

    The model is left untouched. In every round masked equals pruned is verified against it, or after
    a repair against the model that the round began with.

    With a `state`, the same call in another process goes on after the last finished round, or the last layer
    that was refitted, also after a SIGKILL, and ends with the same bits. That asks of `batches` to be the
    same in every pass.

    Args:
        model: the trained model, on the device where the work is to be done. One in DataParallel or
            torch.compile is worked on without it, and the result's is wrapped alike; see `base.kinds`. Of a
            SentenceTransformer its encoder is pruned.
        batches: calibration batches: tensors, (inputs, target) pairs, mappings, or tuples of several inputs;
            for a SentenceTransformer texts will do.
        config: what to remove and how; half of the parameters in one round by default.
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
        prepared: what `prepare` found of this model and these batches: nothing is captured again; it
            was given the `inputs` and `examples`.
        inputs: what of a tuple the forward is given, where that cannot be told (an error says so): the first
            so many items, or the arguments that the first items are, by name. One more item is the target.
        examples: further batches, for code that calibration does not run, see `discover`: cuts are tried and
            compared on them too.

    Raises:
        CriaError: each stage's own; the model is then as it was.
        StructureError: what was prepared is of another model, of other batches, or of the same that are
            read otherwise.
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
    batches = of_texts(model, batches)
    model, wrap, taken = unwrap(model)
    ready = _ready(model, batches, config or PruneConfig(), scores, prepared, inputs, examples)
    ready = with_latency(ready, keep=_file(state, LATENCIES), progress=progress)
    config, rounds = ready.config, ready.config.plan.rounds
    result = PruneResult(
        model, ready.plan, ready.dense, ready.dense, (), config, ready.seconds, {} if graphs else None
    )

    def shown(result: PruneResult) -> PruneResult:
        notes = (*ready.notes, taken) if taken else ready.notes
        return replace(result, model=result.model if wrap is None else wrap(result.model), notes=notes)

    def planned(before: PruneResult, item: Round) -> Plan:
        values = {name: np.array(found) for name, found in item.scores.items()}
        now = replace(
            ready, groups=before.groups, losses=_losses(ready, (*before.rounds, item)),
            progress=item.number / rounds,
        )  # fmt: skip
        # The choice may have been corrected after the first one was measured.
        aimed = float(item.report.get("aimed", target_of(config, item.number)))
        return replace(plan_cut(now, values, aimed), report=dict(item.report))

    store = None
    if state is not None:
        said = {"data": data, "device": device_of(model).type, "graphs": graphs, "scores": None}
        said["metric of every round"] = evaluate is not None
        if scores is not None:
            said["scores"] = digest("", {name: item.scores for name, item in scores.importances.items()})
        store = RoundStore(state, model, config, ready.example, **said)
        result = store.resume(result, planned)
    done = len(result.rounds)
    # One process may not see the folder, and would begin anew while the others go on.
    world().meet("The rounds that are kept", lambda: str(done))
    hands = InMemory(progress, None if store is None else store.layers)
    with (progress or QUIET).bar("prune", rounds) as bar:
        bar.update(max(done - 1, 0))
        for number in range(max(done, 1), rounds + 1):  # the last of those that were kept is shown again
            if number > done:
                now = replace(
                    ready, model=result.model, groups=result.groups, plan=result.plan,
                    losses=_losses(ready, result.rounds), progress=number / rounds,
                )  # fmt: skip
                measure = partial(measure_losses, keep=_file(state, LOSSES), progress=progress)
                result = _round(now, result, number, loss, evaluate, scores, measure, hands)
                _keep(store, result)
                passed("round", number=number, rounds=rounds)
            report = result.report
            bar.update(
                parameters=f"{report['parameters']:,.0f}",
                reduction=report["reached"],
                metric=result.rounds[-1].metric,
            )
            given = shown(result)
            if on_round is not None:
                on_round(given)
    world().meet("The pruned weights", lambda: digest("", named_tensors(result.model)))
    return given


def _ready(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig,
    scores: Scored | None,
    prepared: Prepared | None,
    inputs: Inputs | None,
    examples: Sequence[Batch],
) -> Prepared:
    """Return the model prepared, once it is known that it can be pruned as is asked."""
    # A criterion that there is not and weights that are no numbers are refused before the capture.
    # Whether the target can be reached is known after it, and still before anything is recorded.
    config = config if scores is None else scores.applied(config)
    find_criterion(config.score)
    check_kind(model)
    check_in_memory(model)
    check_finite(named_tensors(model))
    if prepared is not None and not isinstance(prepared, Prepared):
        raise StructureError(
            f"Pruning {type(model).__name__}", f"what was prepared is a {type(prepared).__name__}",
            "Give what prepare(model, batches, config) returned",
        )  # fmt: skip
    if prepared is None:
        prepared = prepare(model, batches, config, inputs=inputs, examples=examples)
    else:
        prepared = prepared.checked(model, batches, config, inputs, examples)
    prepared.check_reach()
    prepared.check_data()
    if scores is not None:
        scores.check(model, prepared.dense)
    return prepared.with_reference()


LOSSES, LATENCIES = "losses.json", "latencies.json"
"""What is kept beside the rounds in a state: so a pruning that goes on chooses the same shares."""


def _file(state: str | Path | None, name: str) -> Path | None:
    return None if state is None else Path(state) / name


def _losses(ready: Prepared, rounds: Sequence[Round]) -> Losses | None:
    """Return the losses that were given, or that the first round measured; None where there are none."""
    # They are of numbers of units in the dense network, so that they hold for every round.
    return ready.losses or next((item.losses for item in rounds if item.losses), None)


def _cut(now: Prepared, ranking: Ranking, number: int, hands: InMemory) -> Cut:
    """Cut; of latency the last time so that the network is measured to be as fast as was asked."""
    target, last = target_of(now.config, number), number == now.config.plan.rounds
    if now.config.plan.of != "latency" or not last:
        return cut(now, ranking, target, last=last, hands=hands)
    aimed = _aimed(now, ranking, target)
    made = cut(now, ranking, aimed, last=last, hands=hands)
    # Measured anew: the best of several measurements would say too much.
    return _with_speed(now, made, target, **({} if aimed == target else {"aimed": aimed}))


def _aimed(now: Prepared, ranking: Ranking, target: float) -> float:
    """Return the share of the seconds to aim for, which the table foretells too high or too low.

    Networks are cut without a repair, for it changes nothing in their speed, and measured.
    """
    tried, aim = list[tuple[float, float, float]](), target  # aimed for, foretold, reached
    while len(tried) < TRIES:
        step = plan_cut(now, ranking.scores, aim)
        reached = 1 - 1 / _speedup(now, remove(now.model, step))
        tried.append((aim, float(step.report["reached"]), reached))
        points = [(foretold, found) for _, foretold, found in tried]
        further = next_aim(target, points, float(step.report["reachable"]))
        if further is None:
            break
        aim = further
    return min(tried, key=lambda item: abs(item[2] - target))[0]


def _speedup(now: Prepared, smaller: nn.Module) -> float:
    batch = timing_batch(now.batches, device_of(smaller), now.config.plan.latency_batch)
    # Processes that measure something else would choose something else.
    return world().lead("Measuring the speed", lambda: compare_speed(now.structure, smaller, batch).speedup)


def _with_speed(now: Prepared, made: Cut, target: float, **more: float) -> Cut:
    """Return a cut whose reports say how fast the network is beside the dense one."""
    said = {
        "asked": target,
        "speedup_asked": 1 / (1 - target),
        "speedup_predicted": 1 / (1 - float(made.plan.report["reached"])),
        "speedup": _speedup(now, made.model),
        **more,
    }
    return replace(
        made,
        plan=replace(made.plan, report={**made.plan.report, **said}),
        total=replace(made.total, report={**made.total.report, **said}),
    )


def _round(
    now: Prepared,
    before: PruneResult,
    number: int,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None,
    evaluate: Callable[[nn.Module], float] | None,
    scores: Scored | None,
    measure: Callable[[Prepared, Ranking], Losses],
    hands: InMemory,
) -> PruneResult:
    """Do a round: rank the units, or take the scores that were given, and cut by shares that are measured."""
    # The graphs that are drawn are the dense model's: the first round is the only one that sees it.
    drawn = before.graphs is not None and number == 1
    ranking = rank(now, loss=loss, graphs=drawn) if scores is None else scores.ranking(now.groups)
    losses = dict[str, Any]()
    if now.config.plan.shared_by == "measured" and now.losses is None:
        seconds = dict[str, float]()
        with clock(seconds, "losses"):
            losses["losses"] = measure(now, ranking)
        now = replace(now, losses=losses["losses"])
        ranking = replace(ranking, seconds={**ranking.seconds, **seconds})
    made = _cut(now, ranking, number, hands)
    metric = None
    if evaluate is not None:
        metric = world().lead("Evaluating", lambda: float(evaluate(made.model)))
    after = now.after(made)
    return replace(
        before,
        model=after.model,
        plan=after.plan,
        groups=after.groups,
        rounds=(*before.rounds, said(Round, number, ranking, made, metric, **losses)),
        graphs=before.graphs if ranking.graphs is None else ranking.graphs,
    )


def _keep(store: RoundStore | None, result: PruneResult) -> None:
    """Keep the rounds so far, if that is wanted; of several processes the first writes."""
    if store is not None:
        world().lead("Keeping the rounds", lambda: store.write(result))
