"""The order of the stages, which no other file knows: prepare, rank, cut (with its repair).

`pipeline.prune` is the loop over them; `score_once`, `cria plan`, the ablation, the pruning of folders layer
by layer and the importance for Torch-Pruning call the same functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import nn

from cria_prune.base.batches import (
    Batch,
    HeldOut,
    again,
    describe,
    first_examples,
    further_examples,
    limited,
    named_shortage,
    next_examples,
    shortened,
)
from cria_prune.base.dispatched import is_dispatched, structure_of
from cria_prune.base.errors import CaptureError, CriaError, DataError, StructureError
from cria_prune.base.hooked import check_functions
from cria_prune.base.inputs import Inputs, inputs_of, named, notes_of, read, read_one, source_of
from cria_prune.base.kinds import check_kind, of_plain_models
from cria_prune.base.metrics import Loss
from cria_prune.base.modules import device_of, digest, random_kept
from cria_prune.base.progress import QUIET, Progress, clock
from cria_prune.base.ranks import world
from cria_prune.config import PruneConfig
from cria_prune.criteria.score import find_criterion, graph_settings, score
from cria_prune.graph.graph import NeuronGraphs, keep_graphs, worth_keeping
from cria_prune.graph.moments import Moments
from cria_prune.planning.allocation import Losses
from cria_prune.planning.budget import count_parameters
from cria_prune.planning.control import on_the_way, without_control
from cria_prune.planning.latency import LatencyTable
from cria_prune.planning.plan import Plan, compose, identity_plan
from cria_prune.planning.plan import plan as make_plan
from cria_prune.planning.savable import Savable, savable
from cria_prune.planning.selection import Scope, check_reach, scope
from cria_prune.planning.stairs import Allowed
from cria_prune.recording.collect import record
from cria_prune.recording.states import States, reads_of
from cria_prune.repair.consumers import Repair, compensate
from cria_prune.repair.fidelity import AS_CUT, NORMS, REPAIRED, Fidelity, check_repeats, comparable
from cria_prune.repair.norms import Remeasured, batch_norms, remeasure
from cria_prune.repair.walk import Layers, Walked, check_distinct, walk
from cria_prune.result import Round
from cria_prune.spectrum.importance import Importance
from cria_prune.structure.discovery import discover as follow
from cria_prune.structure.groups import UnitGroups, shrink
from cria_prune.structure.trace import canonical_tensors
from cria_prune.surgery.removal import apply
from cria_prune.surgery.trial import settle
from cria_prune.surgery.verify import LESS, Reference, Verification

Consumed = Mapping[str, Mapping[str, Moments]]
"""Group name -> weight of a consumer -> second moments of the features that it reads."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model that is ready to be ranked and cut; what is found of it once, by `prepare`.

    Attributes:
        model: the model now: the one that was prepared, or after some rounds a smaller one.
        groups: its unit groups, frozen where the plan leaves them alone.
        plan: what is gone already, relative to the model that was prepared.
        batches: calibration batches, which can be gone through several times.
        example: the two examples that it was captured with, on the model's device.
        config: what to remove and how.
        structure: the model that was prepared; of a dispatched one its twin on the meta device.
        found: its unit groups, before the plan froze any.
        dense: the same with what the plan leaves alone frozen: the whole that shares are of.
        allowed: group name -> numbers of units that may stay; any number for groups not named.
        reference: the float64 copy of the model that was prepared, which its cuts are compared with; None
            where none is kept: each cut is compared with its own model then, the repaired one, or not at all.
        seconds: wall time of the capture and the discovery.
        held: the examples that no fit sees, on which a cut is compared with `structure`; and the others.
        losses: group name -> units kept -> measured loss, for the ranking `measured`; None: not measured.
        latency: measured seconds, for the cost `latency`; None: not measured.
        examples: further ones, that cuts are compared on as well.
        sizes: group name -> units that stay after the last round, where the plan says that of single groups.
        progress: share of the rounds that are done after the next cut.
    """

    model: nn.Module
    groups: UnitGroups
    plan: Plan
    batches: Iterable[Batch]
    example: Batch
    config: PruneConfig
    structure: nn.Module
    found: UnitGroups
    dense: UnitGroups
    allowed: Allowed
    reference: Reference | None
    seconds: float
    held: HeldOut
    losses: Losses | None = field(default=None, repr=False)
    latency: LatencyTable | None = field(default=None, repr=False)
    examples: tuple[Batch, ...] = field(default=(), repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict)
    progress: float = 1.0

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        units = sum(group.size for group in self.groups.prunable)
        return (
            f"{type(self.model).__name__} prepared in {self.seconds:.1f} s: {units:,} units in "
            f"{len(self.groups.prunable)} of {len(self.groups)} groups may be cut, "
            f"{count_parameters(self.groups):,.0f} parameters"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the items of the batches were taken for, a line for each kind; see `base.inputs`."""
        return notes_of(self.batches)

    def check_reach(self) -> None:
        """Raise a TargetError if the plan's reduction cannot be reached; see `selection.check_reach`.

        How fast it can get is known once seconds were measured, not before.
        """
        within, config = Scope(self.dense, self.allowed), self.config.plan
        if config.of != "latency" or self.latency is not None:
            check_reach(self.structure, self.found, config, within, self.latency)

    def savable(self) -> Savable | None:
        """Return what a plain folder can hold of the model, and what the target means there and per layer.

        None where the model is none that transformers can describe.
        """
        plain = Scope(self.dense, self.allowed)
        try:
            return savable(self.structure, self.found, self.config.plan, plain)
        except StructureError:
            return None

    def check_data(self) -> None:
        """Raise a DataError where the examples, or the outputs on them, can say nothing of a cut.

        Too few, or all alike where layers are fitted to them, or a network that is random in evaluation mode:
        known before the work, by two forwards of one batch.
        """
        held = self.held.batches
        if self.config.repair == "walk":
            with random_kept():  # a shuffling loader draws from the global generators
                check_distinct(limited(self.batches, self.config.record.examples))
        check_repeats(self.structure, held[0])

    def with_config(self, config: PruneConfig) -> Prepared:
        """Return the same model prepared for another configuration; nothing is captured again.

        Raises:
            StructureError: see `selection.scope`.
        """
        within = scope(self.structure, self.found, config.plan)
        config = config.model_copy(update={"plan": within.plan})
        return replace(
            self, config=config, groups=within.groups, dense=within.groups, allowed=within.allowed,
            sizes=within.sizes, plan=identity_plan(within.groups),
            reference=self.reference if _compared(config) else None,
            held=HeldOut(self.batches, config.record.examples), losses=None,
        )  # fmt: skip

    @of_plain_models
    def with_model(self, model: nn.Module, batches: Iterable[Batch] | None = None) -> Prepared:
        """Return another model of the same structure prepared: the trained one in place of an untrained.

        The copy that cuts are compared with takes its weights over: of the two prepared, use this one.

        Args:
            model: on the device of the one that was prepared.
            batches: calibration batches in place of those that were given.

        Raises:
            StructureError: the model has other parameters, or is elsewhere.
            DataError: the batches are not batches.
        """
        asked, todo = f"Pruning {type(model).__name__}", "Prepare this model itself"
        if device_of(model) != device_of(self.model):
            there, here = device_of(self.model), device_of(model)
            raise StructureError(asked, f"what was prepared is on {there}, the model on {here}", todo)
        if not _fits(model, self.found):
            raise StructureError(asked, "what was prepared is of a model with other parameters", todo)
        reference = self.reference
        if reference is not None:
            reference.take(model)
        batches = self.batches if batches is None else read(model, again(batches), inputs_of(self.batches))
        return replace(
            self, model=model, structure=structure_of(model) if is_dispatched(model) else model,
            batches=batches, reference=reference, held=HeldOut(batches, self.config.record.examples),
            losses=None,
        )  # fmt: skip

    def checked(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        config: PruneConfig,
        inputs: Inputs | None = None,
        examples: Sequence[Batch] = (),
    ) -> Prepared:
        """Return it for a call with this configuration, if it is of this model and these batches.

        Raises:
            StructureError: it is of another model or other batches, of batches that are read otherwise, of
                other examples, or of a model that was cut already.
        """
        asked, whole = f"Pruning {type(model).__name__}", self.groups is self.dense
        if self.model is not model or not whole or not _fits(model, self.found):
            raise StructureError(
                asked, "what was prepared is of another model",
                "Give what prepare() returned for this very model, or use with_model",
            )  # fmt: skip
        if source_of(batches) is not source_of(self.batches):
            raise StructureError(
                f"{asked} on {describe(batches)}", "what was prepared is of other batches",
                "Give prepared.batches, or use with_model(model, batches)",
            )  # fmt: skip
        if inputs is not None and named(inputs) != inputs_of(self.batches):
            raise StructureError(
                asked, f"its batches are to be read by inputs={inputs!r}, those that were prepared are not",
                "Give inputs to prepare(), and none here",
            )  # fmt: skip
        if len(examples):
            raise StructureError(
                asked, "further examples are captured when a model is prepared, and it is already",
                "Give examples to prepare(), and none here",
            )  # fmt: skip
        return self if config == self.config else self.with_config(config)

    def without_reference(self) -> Prepared:
        """Return it without the float64 copy, for what compares nothing."""
        return replace(self, reference=None)

    def with_reference(self) -> Prepared:
        """Return it with the float64 copy holding the weights of now, if cuts are compared with it."""
        if not _compared(self.config):
            return self.without_reference()
        if self.reference is None:
            return replace(self, reference=Reference(self.model, self.example, examples=self.examples))
        # The model may have been trained since it was prepared; its structure is the same.
        self.reference.take(self.model)
        return self

    def after(self, made: Cut) -> Prepared:
        """Return what the next round begins with."""
        groups = shrink(self.groups, made.plan.kept)
        return replace(self, model=made.model, groups=groups, plan=made.total)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The scores of a model's units, and what was recorded with them.

    Attributes:
        importances: group name -> importance of its units, with how far it can be trusted.
        consumed: what the repair of the consumers needs; None where it was not recorded.
        graphs: group name -> the graphs of its neurons; None if not asked for or nothing was recorded.
        seconds: stage (record, score, graphs) -> wall time.
    """

    importances: Mapping[str, Importance]
    consumed: Consumed | None = field(default=None, repr=False)
    graphs: Mapping[str, NeuronGraphs] | None = field(default=None, repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Group name -> (units,) float64, higher stays."""
        return {name: item.scores.numpy() for name, item in self.importances.items()}

    @property
    def diagnosis(self) -> dict[str, dict[str, Any]]:
        """Group name -> how far the scores can be trusted, plain JSON."""
        return {name: item.diagnosis.to_dict() for name, item in self.importances.items()}


@dataclass(frozen=True, eq=False)
class Cut:
    """What one cut did.

    Attributes:
        model: the smaller model.
        plan: what was removed, relative to the model before the cut; `plan.report` has shares and counts.
        total: what was removed since the model was prepared.
        repairs: what became of each consumer that was repaired.
        verification: how far it is from the masked model, before batch norms are measured again; None if
            not asked for.
        norms: what became of the batch norms.
        fidelity: stage, of `repair.fidelity.STAGES` -> how far the model was after it from the dense one.
        seconds: stage (plan, repair, surgery, verify, fidelity, batch norms) -> wall time.
        unrepaired: weight -> why it was not repaired, though it reads what was cut; under the empty name, why
            none was.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    total: Plan = field(repr=False)
    repairs: tuple[Repair, ...]
    verification: Verification | None
    norms: Remeasured = field(repr=False)
    fidelity: Mapping[str, Fidelity]
    seconds: Mapping[str, float]
    unrepaired: Mapping[str, str] = field(default_factory=dict)


@of_plain_models
def discover(
    model: nn.Module, example: Batch, *, inputs: Inputs | None = None, examples: Sequence[Batch] = ()
) -> UnitGroups:
    """Find what can be removed from a model: its unit groups, and why the frozen ones are frozen.

    Args:
        model: any module that torch.export can follow; it is left as it was.
        example: one batch, as its forward takes it; two examples are enough.
        inputs: as in `prune`.
        examples: further batches, for code that the first does not run: a branch on a length, images beside
            text, targets that its training mode needs. Cuts are tried on them too.

    Raises:
        CaptureError: the operations cannot be captured.
        DataError: the forward does not accept the example.
    """
    check_kind(model)
    if is_dispatched(model):  # its shapes decide, for there is no room for a copy with values
        model = structure_of(model)
    device = device_of(model)
    example, further = read_one(model, example, inputs), _further(model, examples, inputs)
    found, _ = _discover(model, shortened(example, device), further, lambda: next_examples([example], device))
    return found


def _further(model: nn.Module, examples: Sequence[Batch], inputs: Inputs | None) -> tuple[Batch, ...]:
    """Return further examples, read as the first one is; an error says which of them it is about."""
    found = list[Batch]()
    for number, item in enumerate(further_examples(examples), 1):
        try:
            found.append(read_one(model, shortened(item, device_of(model)), inputs))
        except DataError as error:
            asked = f"{error.asked}, further example {number} of {len(examples)}"
            raise DataError(asked, error.found, error.todo) from error
    return tuple(found)


def _discover(
    model: nn.Module, example: Batch, examples: tuple[Batch, ...], spare: Callable[[], Batch | None]
) -> tuple[UnitGroups, Reference]:
    """Find the unit groups by one capture, of the model's copy that the cuts are compared with.

    Args:
        model: the model; example, examples: two examples each, on its device.
        spare: gives further ones, for operations that depend on values of the data.
    """
    check_functions(model, example)
    # One capture of one float64 copy: the structure is read off it, the trial
    # cuts mask it, and the cuts of all rounds are compared with it. The trials
    # belong to the discovery, for only they show which of its assumptions hold.
    reference = Reference(model, example, examples=examples)
    try:
        traced = reference.trace()
        other = spare() if traced.reads else None
        if other is not None:  # it may take another way
            examples = (*examples, other)
            reference = Reference(model, example, examples=examples)
            traced = reference.trace()
    except CriaError:  # it may not run in float64; if it cannot be captured at all, the model itself says so
        traced = None
    return settle(model, follow(model, example, traced, examples), example, reference), reference


@of_plain_models
def prepare(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruneConfig | None = None,
    *,
    example: Batch | None = None,
    inputs: Inputs | None = None,
    examples: Sequence[Batch] = (),
) -> Prepared:
    """Find what a model's pruning needs once: its batches, its structure, and what may be cut of it.

    What is prepared can be ranked and cut several times, for other reductions too (`with_config`), and
    `prune` takes it, so that a command captures its model once. Whether the reduction can be reached is not
    looked at: `check_reach` does that.

    Args:
        model: the model, on the device where the work is to be done; it is left as it was. Of one that
            accelerate dispatched the shapes alone decide.
        batches: calibration batches: tensors, (inputs, target) pairs or mappings; an iterator is read into a
            list. Empty will do with an `example`, until `with_model` gives others.
        config: what to remove and how; the usual one by default.
        example: one batch to capture the model with; the first of `batches` by default. MACs are counted at
            its size.
        inputs: as in `prune`.
        examples: further batches, for code that the first does not run; see `discover`.

    Raises:
        CaptureError: the operations cannot be captured.
        DataError: the batches are not batches, or the forward does not accept them.
        StructureError: the plan asks for `vanilla`, and no configuration of transformers describes the model.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> ready = prepare(net, [torch.randn(32, 4) for _ in range(4)])
        >>> made = cut(ready, rank(ready), target=0.5)
        >>> made.model[0].out_features < 16
        True
    """
    check_kind(model)
    start, config = time.perf_counter(), config or PruneConfig()
    given = example
    batches, example = _read(model, batches, example, inputs)
    structure = structure_of(model) if is_dispatched(model) else model
    further = _further(model, examples, inputs)
    spare = batches if given is None else [read_one(model, given, inputs)]
    found, reference = _discover(structure, example, further, lambda: next_examples(spare, device_of(model)))
    # What the plan leaves alone is frozen on top of what was found. So another plan needs no other discovery.
    within = scope(structure, found, config.plan)
    config = config.model_copy(update={"plan": within.plan})
    return Prepared(
        model, within.groups, identity_plan(within.groups), batches, example, config, structure, found,
        within.groups, within.allowed, reference if _compared(config) else None, time.perf_counter() - start,
        HeldOut(batches, config.record.examples), examples=tuple(reference.batches[1:]), sizes=within.sizes,
    )  # fmt: skip


def _read(
    model: nn.Module, batches: Iterable[Batch], example: Batch | None, inputs: Inputs | None = None
) -> tuple[Iterable[Batch], Batch]:
    """Return batches read by the signature of the forward, and two examples on the model's device."""
    batches, device = read(model, again(batches), inputs), device_of(model)
    if example is None:
        return batches, first_examples(batches, device)
    return batches, shortened(read_one(model, example, inputs), device)


def prepared_with(
    model: nn.Module,
    groups: UnitGroups,
    batches: Iterable[Batch],
    config: PruneConfig,
    *,
    example: Batch | None = None,
) -> Prepared:
    """Return a model prepared whose groups are known: nothing is captured, and nothing but they is frozen.

    Its cuts are compared with its own copies. The arguments are those of `prepare`, and its groups.

    Raises:
        DataError: the batches are not batches, or empty.
    """
    batches, example = _read(model, batches, example)
    return Prepared(
        model, groups, identity_plan(groups), batches, example, config, model, groups, groups, {}, None, 0.0,
        HeldOut(batches, config.record.examples),
    )  # fmt: skip


def rank(
    prepared: Prepared, *, loss: Loss | None = None, graphs: bool = False, whole: bool = True
) -> Ranking:
    """Record what the criterion and the repair need, in one pass over the batches, and score the units.

    Args:
        prepared: its model is read, and run in evaluation mode; it is left as it was. With the
            repair `once` in its configuration the moments for it are recorded too.
        loss: (model, batch) to a scalar, for criteria that take gradients; cross-entropy by default.
        graphs: keep the neuron graphs of as many groups as `keep_graphs` takes.
        whole: the groups are all that will be cut; of a part the scores may be alike.

    Raises:
        CriterionError: no such criterion, or it needs targets that the batches lack.
        DataError: the model fails on a batch, or there is none.
        SignalError: a weight or a signal holds NaN or infinity.
    """
    config, groups, seconds = prepared.config, prepared.groups, dict[str, float]()
    with clock(seconds, "record"):
        # The pass over the data is the dear part. Criterion, repair and graphs take what they
        # need from the same one, and signals are not kept: what is not added up here is gone.
        states = _recorded(prepared, loss, graphs)
    with clock(seconds, "score"):
        importances = score(prepared.model, groups, states, config.score, whole=whole)
    if states is None:
        return Ranking(importances, seconds=seconds)
    kept = None
    if graphs:
        with clock(seconds, "graphs"):
            sides = {
                name: (item.input, item.output)
                for name, item in states.groups.items()
                if item.input is not None and item.output.has_pairs
            }
            kept = keep_graphs(sides, **graph_settings(config.score))
    # The moments of the consumers outlive the scoring: the repair comes after the
    # choice of units, and what it needs has to be of the network before the cut.
    moments = {name: item.consumed for name, item in states.groups.items()}
    consumed = moments if _keeps_moments(config) else None
    return Ranking(importances, consumed, kept, seconds)


def _recorded(prepared: Prepared, loss: Loss | None, graphs: bool) -> States | None:
    """Record what the criterion and the repair need; None where neither needs anything."""
    config, groups = prepared.config, prepared.groups
    needs = find_criterion(config.score).needs
    if not (needs or _keeps_moments(config)):
        return None
    widths = {group.name: group.size for group in groups.recorded}
    return record_for(
        needs, prepared.model, groups, prepared.batches, config, loss=loss, consumed=_keeps_moments(config),
        graphs=worth_keeping(widths, config.score.neighbors) if graphs else (),
    )  # fmt: skip


def record_for(
    needs: frozenset[str],
    model: nn.Module,
    groups: UnitGroups,
    batches: Iterable[Batch],
    config: PruneConfig,
    *,
    loss: Loss | None = None,
    consumed: bool = False,
    graphs: Collection[str] = (),
) -> States:
    """Record what a criterion needs, and what the consumers read if it is `consumed`; see `record`."""
    return record(
        model, groups, batches, config.record, loss=loss, gradients="gradients" in needs,
        per_example="examples" in needs, consumed=consumed, reads=reads_of(needs), graphs=graphs,
        device=device_of(model),
    )  # fmt: skip


def plan_cut(prepared: Prepared, scores: Mapping[str, np.ndarray], target: float | None = None) -> Plan:
    """Return which units stay, relative to the model now.

    Args:
        prepared: what may be cut of it, and the whole that the target is a share of.
        scores: group name -> (units,) importance, higher stays.
        target: share to be gone after the cut, earlier ones counted in; the plan's reduction by default.

    Raises:
        TargetError, StructureError, SignalError: see `plan`.
    """
    plan, given = prepared.config.plan, {}
    if prepared.sizes:  # they are reached in as many steps as there are rounds
        given = on_the_way(prepared.groups, prepared.sizes, plan, prepared.progress)
    return make_plan(
        prepared.groups, scores, without_control(plan), dense=prepared.dense, target=target,
        allowed={**prepared.allowed, **given}, losses=prepared.losses, latency=prepared.latency,
    )  # fmt: skip


class InMemory:
    """How a cut changes a model: whole, in memory. `offload.rounds.OnDisk` does the same layer by layer.

    Args:
        progress: where to show how far the walk is.
        layers: plan of all that was removed -> what keeps the layers that are refitted then; None keeps none.

    Attributes:
        times: stage -> under which name its wall time is kept.
    """

    times: ClassVar[Mapping[str, str]] = {"repair": "repair", "remove": "surgery"}

    def __init__(
        self, progress: Progress | None = None, layers: Callable[[Plan], Layers] | None = None
    ) -> None:
        self._progress, self._layers = progress or QUIET, layers

    def once(self, prepared: Prepared, step: Plan, ranking: Ranking) -> tuple[Any, tuple[Repair, ...]]:
        """Return the model with its consumers repaired for the units that leave, which are still there.

        All at once, by what was recorded before the cut.
        """
        assert ranking.consumed is not None
        return compensate(prepared.model, prepared.groups, step.kept, ranking.consumed)

    def walk(self, prepared: Prepared, total: Plan, smaller: nn.Module) -> Walked:
        """Return the cut model with its layers refitted towards the dense one, in the order of the data."""
        record = prepared.config.record
        return walk(
            prepared.structure, smaller, total, prepared.batches, examples=record.examples, seed=record.seed,
            progress=self._progress, kept=None if self._layers is None else self._layers(total),
        )  # fmt: skip

    def back(self, smaller: nn.Module) -> nn.Module:
        """Return the cut model without what the walk has changed; `smaller` is as it was before."""
        return smaller

    def remove(self, source: Any, step: Plan) -> nn.Module:
        """Return the smaller model; `source` is the model, repaired where that was asked for."""
        return remove(source, step)

    def verify(
        self, prepared: Prepared, step: Plan, total: Plan, source: Any, smaller: nn.Module
    ) -> Verification | None:
        """Compare the cut with the masked model."""
        # Once something was repaired, the weights are not the dense ones any more: this cut alone. So
        # it is too where no copy was kept; no cut of a configuration that verifies goes unproven.
        dense = source is prepared.model and (
            prepared.config.repair == "none" or prepared.groups is prepared.dense
        )
        if not dense or prepared.reference is None:
            return Reference(source, prepared.example, examples=prepared.examples).compare(step, smaller)
        # Otherwise all that was ever removed is compared at once, with the dense network itself.
        return prepared.reference.compare(total, smaller)

    def measure(self, prepared: Prepared, smaller: nn.Module) -> Fidelity | None:
        """Compare a cut model with the dense one, on the examples that are held out; any number of times.

        None where no output of the two has the same shape.
        """
        return comparable(prepared.structure, smaller, prepared.held.batches)

    def norms(
        self, prepared: Prepared, smaller: nn.Module, before: Fidelity | None
    ) -> tuple[Remeasured, Fidelity | None]:
        """Measure the batch norms again, for what stays is fed by fewer units; keep that if it is nearer.

        Args:
            prepared: with the dense network, and examples in two parts: to measure on, and to judge by.
            smaller: the model; it is left as it was.
            before: how far it is from the dense network.

        Returns:
            What became of them, and how far the model is then; None where it is as it was.
        """
        if not batch_norms(smaller):
            return Remeasured(smaller, 0), None
        if before is None:
            return Remeasured(smaller, 0, "no output can be compared with the dense network's"), None
        found = remeasure(smaller, prepared.held.fit())
        after = self.measure(prepared, found.model) if found.norms else None
        if after is None:
            return found, None
        # The calibration examples need not be like those that the network was trained on. Then its own
        # statistics are the better ones, even after a cut: a trained EfficientNet-Lite0 with a tenth removed
        # went from 52.3 to 25.0 % by new ones.
        if not after.loss < before.loss:
            reason = f"measured again {after.unit} {after.loss:.3g}, as they were {before.loss:.3g}"
            return Remeasured(smaller, 0, reason), None
        return found, after


def cut(
    prepared: Prepared,
    ranking: Ranking,
    target: float | None = None,
    *,
    last: bool = True,
    hands: InMemory | None = None,
) -> Cut:
    """Choose what leaves, let the rest take its work over, remove it, and prove that it was done right.

    Args:
        prepared: its model is left as it was.
        ranking: of that model.
        target: see `plan_cut`.
        last: no cut follows: batch norms are measured again, if the configuration says so.
        hands: what repairs, removes and verifies; in memory by default.

    Raises:
        TargetError: the target cannot be reached.
        VerificationError: the cut model and the masked one differ.
    """
    # The order, and why:
    # 1. The units are chosen first, for the repair has to know who leaves.
    # 2. The repair `once` comes before the cut: it reads the weights of the units
    #    that leave, and moments that were recorded while they were there.
    # 3. The cut is compared before anything else changes. The network masked and the cut one are the
    #    same function; with other weights or statistics they would not be (docs/decisions/0012).
    # 4. How far it is from the dense network is measured where nothing was fitted, now and after
    #    each step that follows: what does not bring it nearer is not kept.
    # 5. The walk refits the layers of the cut network: what it regresses on is what these really read.
    # 6. Batch norms are measured last, on the network that will run, and only after the last
    #    cut: after each one it was worse in six of six comparisons (docs/decisions/0013).
    config, seconds, hands = prepared.config, dict[str, float](), hands or InMemory()
    with clock(seconds, "plan"):
        step = plan_cut(prepared, ranking.scores, target)
        total = compose(prepared.plan, step)
        # Processes whose networks are cut differently can add up
        # nothing any more: all end here, with an error that says so.
        world().meet("The plan", lambda: digest(str(sorted(step.kept.items())), {}))
    source, verification, repairs = prepared.model, None, tuple[Repair, ...]()
    if _repairs_before(config, ranking):
        with clock(seconds, hands.times["repair"]):
            source, repairs = hands.once(prepared, step, ranking)
    with clock(seconds, hands.times["remove"]):
        smaller = hands.remove(source, step)
    if config.verify:
        with clock(seconds, "verify"):
            verification = hands.verify(prepared, step, total, source, smaller)
    fidelity = dict[str, Fidelity | None]()
    with clock(seconds, "fidelity"):
        far = fidelity[REPAIRED if repairs else AS_CUT] = hands.measure(prepared, smaller)
    unrepaired: Mapping[str, str] = {}
    if config.repair == "walk":
        with clock(seconds, hands.times["repair"]):
            smaller, repairs, unrepaired, near = _walked(hands, prepared, total, smaller, far)
        fidelity[REPAIRED], far = near, near or far
    norms = Remeasured(smaller, 0)
    if config.batch_norm and last:
        with clock(seconds, "batch norms"):
            norms, fidelity[NORMS] = hands.norms(prepared, smaller, far)
    known = {stage: item for stage, item in fidelity.items() if item is not None}
    return Cut(norms.model, step, total, repairs, verification, norms, known, seconds, unrepaired)


def _walked(
    hands: InMemory, prepared: Prepared, total: Plan, smaller: nn.Module, before: Fidelity | None
) -> tuple[nn.Module, tuple[Repair, ...], Mapping[str, str], Fidelity | None]:
    """Refit a cut model; return it, what became of its layers, why some stayed, and how far it is now.

    The model stays as it was cut where that is nearer to the dense one, and where its operations cannot
    be run step by step.
    """
    try:
        found = hands.walk(prepared, total, smaller)
    except (CaptureError, StructureError) as error:
        return smaller, (), {"": f"{error.asked}: {error.found}"}, None
    after = hands.measure(prepared, found.model) if found.repairs else None
    if before is not None and after is not None and not after.loss <= before.loss:
        reason = f"as cut {before.unit} {before.loss:.3g}, repaired {after.loss:.3g}: left as cut"
        return hands.back(smaller), (), {**found.left, "": reason}, None
    return found.model, found.repairs, found.left, after


def removed(prepared: Prepared, ranking: Ranking, step: Plan) -> tuple[nn.Module, Verification | None]:
    """Return the model cut by a plan and repaired, as its configuration says, and how the cut compared.

    Args:
        prepared: its model is left as it was.
        ranking: of that model, with what the repair needs.
        step: relative to that model.

    Raises:
        VerificationError: the cut model and the masked one differ.
    """
    hands, source, total = InMemory(), prepared.model, compose(prepared.plan, step)
    if _repairs_before(prepared.config, ranking):
        source = hands.once(prepared, step, ranking)[0]
    smaller = hands.remove(source, step)
    verification = hands.verify(prepared, step, total, source, smaller)
    if prepared.config.repair == "walk":
        smaller = hands.walk(prepared, total, smaller).model
    return smaller, verification


def remove(model: nn.Module, step: Plan) -> nn.Module:
    """Return a smaller copy of a model; see `apply`.

    Raises:
        ResourceError: the memory does not suffice.
    """
    with named_shortage("Cutting the model", LESS):
        return apply(model, step)


def target_of(config: PruneConfig, number: int) -> float:
    """Return the share that is to be gone after a round, from 1: the same share more in each."""
    return config.plan.reduction * number / config.plan.rounds


Kind = TypeVar("Kind", bound=Round)


def said(
    kind: type[Kind], number: int, ranking: Ranking, made: Cut, metric: float | None = None, **more: Any
) -> Kind:
    """Return what a round did, for its number from 1; `more` are further fields of its kind."""
    return kind(
        number=number,
        report=made.plan.report,
        seconds={**ranking.seconds, **made.seconds},
        scores={name: tuple(item.tolist()) for name, item in ranking.scores.items()},
        kept=dict(made.plan.kept),
        diagnosis=ranking.diagnosis,
        verification=made.verification,
        metric=metric,
        repairs=made.repairs,
        batch_norms=made.norms.norms,
        batch_norms_kept=made.norms.reason,
        fidelity=dict(made.fidelity),
        unrepaired=dict(made.unrepaired),
        **more,
    )


def _compared(config: PruneConfig) -> bool:
    """Say whether cuts are compared with the dense model: a repair before the cut makes another of it."""
    return config.verify and config.repair != "once"


def _keeps_moments(config: PruneConfig) -> bool:
    """Say whether what consumers read is recorded with the scores; the walk looks for itself."""
    return config.repair == "once"


def _repairs_before(config: PruneConfig, ranking: Ranking) -> bool:
    """Say whether consumers are repaired before a cut; they cannot where nothing was recorded for it."""
    return _keeps_moments(config) and ranking.consumed is not None


def _fits(model: nn.Module, groups: UnitGroups) -> bool:
    """Say whether a model has the parameters and buffers that its groups were found in."""
    shapes = {name: tuple(tensor.shape) for name, tensor in canonical_tensors(model).items()}
    return shapes == groups.shapes
