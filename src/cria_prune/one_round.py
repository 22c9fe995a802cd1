"""One round of a pruning: record, score, plan, repair, cut, verify."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from cria_prune.batches import Batch, named_shortage
from cria_prune.config import PruneConfig
from cria_prune.criteria import score
from cria_prune.criteria.score import graph_settings
from cria_prune.graph import keep_graphs, worth_keeping
from cria_prune.modules import device_of, digest
from cria_prune.plan import Allowed, Plan, compose
from cria_prune.plan import plan as make_round
from cria_prune.progress import clock
from cria_prune.ranks import world
from cria_prune.record import States, record
from cria_prune.record.collect import limited
from cria_prune.record.norms import Remeasured, batch_norms, remeasure
from cria_prune.record.states import reads_of
from cria_prune.result import PruneResult, Round
from cria_prune.scored import Consumed, Scored
from cria_prune.spectrum import Importance
from cria_prune.structure import UnitGroups, shrink
from cria_prune.surgery import Reference, Repair, Verification, apply, compensate
from cria_prune.surgery.verify import LESS


@dataclass(frozen=True)
class OneRound:
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
                graphs = keep_graphs(sides, **graph_settings(config.score))
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
