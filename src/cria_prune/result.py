"""What pruning gives back: what each round did, and the smaller model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cria_prune.base.metrics import percent
from cria_prune.config import PruneConfig
from cria_prune.graph.graph import NeuronGraphs
from cria_prune.planning.plan import Plan
from cria_prune.repair.consumers import Repair
from cria_prune.repair.fidelity import Fidelity
from cria_prune.structure.groups import UnitGroups
from cria_prune.surgery.verify import Verification


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        number: from 1.
        report: shares asked, reached and reachable; parameters and MACs per example, dense and now.
        seconds: wall time per stage: record, score, plan, (graphs,) surgery, verify.
        scores: group name -> one score per unit that was there.
        kept: group name -> the units, of those, that stayed.
        diagnosis: group name -> how far the scores can be trusted.
        verification: masked against pruned (None if not asked for): from the dense model to this one, after
            a repair from the model that the round began with; before the walk and the batch norms.
        metric: of the pruned model, if `evaluate` was given.
        repairs: what the repair did, consumer by consumer.
        batch_norms: how many batch norms were measured again; 0 but in the last round.
        batch_norms_kept: why none was, where that was asked for and there are some.
        fidelity: stage (as cut, repaired, norms) -> how far the model was after it from the dense network
            that was given, on calibration examples that nothing was fitted on.
        unrepaired: weight -> why it was not repaired, though it reads what was cut; under the empty name, why
            none was.
        losses: group name -> units kept -> loss of the dense network with only this group cut, by which the
            shares were chosen; empty but in the round that measured them.
    """

    number: int
    report: Mapping[str, float | str]
    seconds: Mapping[str, float]
    scores: Mapping[str, tuple[float, ...]] = field(repr=False)
    kept: Mapping[str, tuple[int, ...]] = field(repr=False)
    diagnosis: Mapping[str, dict[str, Any]] = field(repr=False)
    verification: Verification | None
    metric: float | None
    repairs: tuple[Repair, ...] = field(default=(), repr=False)
    batch_norms: int = 0
    batch_norms_kept: str = ""
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict, repr=False)
    unrepaired: Mapping[str, str] = field(default_factory=dict, repr=False)
    losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict, repr=False)

    @property
    def nearness(self) -> Fidelity | None:
        """How far the model was from the dense one after the last stage; None where nothing was compared."""
        return ([None, *self.fidelity.values()])[-1]


@dataclass(frozen=True)
class OffloadedRound(Round):
    """What one round did; its verification is against the folder that the round began with, repaired.

    Attributes:
        turns: in how many parts the groups were recorded; 0 where nothing was.
    """

    turns: int = 0


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What `prune` gives back; prints as a table of the rounds.

    Attributes:
        model: the smaller model.
        plan: what stays, relative to the dense model.
        dense: structure of the dense model; groups: structure of the smaller one.
        rounds: what each round did.
        config: what was asked.
        seconds: wall time of capture and discovery.
        graphs: group name -> the graphs of the dense model's neurons, of as many groups as `keep_graphs`
            takes; empty where nothing is recorded, None if not asked for.
        notes: what the items of the batches were taken for, and out of what the model was taken.
    """

    model: nn.Module
    plan: Plan
    dense: UnitGroups
    groups: UnitGroups
    rounds: tuple[Round, ...]
    config: PruneConfig
    seconds: float
    graphs: Mapping[str, NeuronGraphs] | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        reached, of = self.report["reached"], self.config.plan.of
        return f"PruneResult({reached:.2%} of the {of} removed in {len(self.rounds)} rounds)"

    @property
    def report(self) -> Mapping[str, float | str]:
        """Shares and counts after the last round."""
        return self.rounds[-1].report

    @property
    def seconds_by_stage(self) -> dict[str, float]:
        """Wall time of discovery, and of each stage over all rounds."""
        total = {"discover": self.seconds}
        for item in self.rounds:
            for stage, spent in item.seconds.items():
                total[stage] = total.get(stage, 0.0) + spent
        return total

    @property
    def changed(self) -> str:
        """What was done to the parts that stay, in words; empty for nothing."""
        return changed_said(self.rounds)

    @property
    def remarks(self) -> list[str]:
        """What to know of scores and repair in the last round: a line each, none where all went well."""
        return remarks_said(self.rounds[-1])

    def __str__(self) -> str:
        of, far = self.config.plan.of, column(self.rounds)
        lines = [
            f"{'round':>5} {'parameters':>12} {'MACs':>14} {'reduction':>10} "
            f"{'masked=pruned':>14} {far:>20} {'metric':>8}"
        ]
        for item in self.rounds:
            check = "" if item.verification is None else f"{item.verification.difference:.1e}"
            metric = "" if item.metric is None else f"{item.metric:.4f}"
            now = "" if item.nearness is None else item.nearness.brief
            lines.append(
                f"{item.number:>5} {item.report['parameters']:>12,.0f} {item.report['macs']:>14,.0f} "
                f"{item.report['reached']:>10.1%} {check:>14} {now:>20} {metric:>8}"
            )
        last = self.report
        lines.append(
            f"{self.config.score.criterion}: asked {last['asked']:.1%} of {of}, "
            f"reached {last['reached']:.1%}, reachable {last['reachable']:.1%}; "
            f"dense {last['parameters_dense']:,.0f} parameters, "
            f"{last['macs_dense']:,.0f} MACs"
        )
        lines += speed_said(last)
        if self.changed:
            lines.append(self.changed)
        lines += [*self.remarks, *self.dense.notes]
        lines += stages_said(self.rounds[-1].fidelity)
        lines += self.notes
        return "\n".join(lines)


def changed_said(rounds: Sequence[Round]) -> str:
    """Return what rounds did to the parts that stay, in words; empty for nothing."""
    # What was looked at, and is best as it was, is not repaired.
    repaired = len({repair.tensor for item in rounds for repair in item.repairs if repair.recovered})
    last = rounds[-1]
    norms, reason, without = last.batch_norms, last.batch_norms_kept, last.unrepaired.get("")
    said = [
        *([f"{repaired} consumer{'s' * (repaired > 1)} repaired in closed form"] if repaired else []),
        *([f"nothing repaired in the last round: {without}"] if without else []),
        *([f"{norms} batch norms measured again"] if norms else []),
        *([f"batch norms left as they were: {reason}"] if reason else []),
    ]
    return ", ".join(said)


def remarks_said(last: Round) -> list[str]:
    """Return a line for everything that one should know of the scores and the repair of a round."""
    return unreached_said(last.diagnosis) + repairs_said(last.repairs) + left_said(last.unrepaired)


def unreached_said(diagnosis: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line that names the experts which the calibration never reached; or none."""
    found = [(name, item["unreached"]) for name, item in diagnosis.items() if item.get("unreached")]
    if not found:
        return []
    names = [f"{name} ({', '.join(map(str, experts))})" for name, experts in found]
    return [
        f"the calibration never reaches these experts: {_some(names)}; their neurons are judged by the "
        "signals of the others, so give more, or more varied, examples"
    ]


def column(rounds: Sequence[Round]) -> str:
    """Return the head of the column with the fidelity of rounds, by what their logits are or are not."""
    last = next((item.nearness for item in reversed(rounds) if item.nearness is not None), None)
    return "KL / same class" if last is None or last.worst.divergence is not None else "rel. error / cosine"


def fidelity_rows(fidelity: Mapping[str, Fidelity]) -> list[dict[str, str]]:
    """Return a row of texts for each stage, all with the same columns: the figures of the worst output."""
    rows = []
    for stage, item in fidelity.items():
        worst = item.worst
        row = {"after": stage, "output": worst.name}
        if worst.divergence is not None:
            row |= {"KL (nats)": f"{worst.divergence:.3g}", "same class": percent(worst.agreement)}
        rows.append({**row, "relative error": f"{worst.relative_error:.3g}", "cosine": f"{worst.cosine:.3f}"})
    return rows


def speed_said(report: Mapping[str, float | str]) -> list[str]:
    """Return the line that says how much faster a network was asked, foretold and measured to be; or none."""
    if "speedup" not in report:
        return []
    return [
        f"speed-up: asked {report['speedup_asked']:.2f}, predicted {report['speedup_predicted']:.2f}, "
        f"reached {report['speedup']:.2f} times"
    ]


def stages_said(fidelity: Mapping[str, Fidelity]) -> list[str]:
    """Return a line for each stage: how far the model was after it from the dense one."""
    return [f"from the dense network, {stage}: {item}" for stage, item in fidelity.items()]


LITTLE = 0.1
"""Share of what a consumer had lost that is too little to pass over in silence."""


def repairs_said(repairs: Sequence[Repair]) -> list[str]:
    """Return a line where layers were fitted to too few samples, and one where little was given back."""
    lines, short = [], [item for item in repairs if item.lacking]
    if short:
        worst = max(short, key=lambda item: item.lacking)
        lines.append(
            f"{len(short)} of {len(repairs)} layers were fitted to fewer than four samples for each "
            f"feature that they read ({worst.tensor}: {worst.effective:,} for {worst.regressors:,}): "
            f"{worst.lacking:,} more examples would do"
        )
    little = [item for item in repairs if item.cut and item.recovered < LITTLE]
    if little:
        names = _some([f"{item.tensor} ({percent(item.recovered)})" for item in little])
        lines.append(f"little of what they lost could be given back to {names}")
    return lines


def left_said(unrepaired: Mapping[str, str]) -> list[str]:
    """Return a line that names weights that read what was cut and stayed as they were; or none."""
    names = [f"{name} ({why})" for name, why in unrepaired.items() if name]
    return [f"not repaired, though they read what was cut: {_some(names)}"] if names else []


def repairs_of(item: Round) -> dict[str, Any]:
    """Return what became of each layer in the repair of a round, as plain JSON; without empty parts.

    `repairs` has `FIGURES` of each layer, the least given back first, and `unrepaired` why others stayed.
    """
    worst = sorted(item.repairs, key=lambda repair: repair.recovered)
    found = {
        "repairs": [{name: getattr(repair, name) for name in FIGURES} for repair in worst],
        "unrepaired": dict(item.unrepaired),
    }
    return {name: part for name, part in found.items() if part}


FIGURES = ("tensor", "recovered", "cut", "effective", "regressors", "lacking")
"""What reports say of a `Repair`."""


def given_back_said(repairs: Sequence[Mapping[str, Any]]) -> str:
    """Return how much the layers got back of what they had lost, in one sentence; empty where none lost any.

    Args:
        repairs: of `repairs_of`, or of what it has written.
    """
    found = sorted((float(item["recovered"]), item["tensor"]) for item in repairs if item.get("cut", True))
    if not found:
        return ""
    share, name = found[0]
    several = f"of {len(found)} layers the middle one got {percent(found[len(found) // 2][0])} back, and "
    return (
        f"Of what the layers had lost that read units that left: {several if len(found) > 1 else ''}"
        f"{name} {'least, ' if len(found) > 1 else 'got back '}{percent(share)}"
    )


def _some(names: Sequence[str]) -> str:
    """Return a few names of many."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def said_of(item: Round) -> dict[str, dict[str, Any]]:
    """Return the fidelity of a round by stage, as plain JSON."""
    return {stage: found.to_dict() for stage, found in item.fidelity.items()}
