"""What recording and scoring will take, before they run: who allocates says how much, here it is added up.

The tensors of a forward pass are counted on one and on two examples and carried on to a whole batch. All else
is what the `Collector` of the recording and the row of the criterion say of themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import Batch, batch_size, cut, forward, map_tensors
from cria_prune.base.errors import CaptureError, CriterionError
from cria_prune.base.inputs import read_one
from cria_prune.base.kinds import of_plain_models
from cria_prune.base.metrics import Loss, cross_entropy
from cria_prune.base.modules import buffers_kept, device_of, named_tensors, unchanged
from cria_prune.config import PruneConfig
from cria_prune.criteria.evidence import Sizes
from cria_prune.criteria.score import find_criterion
from cria_prune.graph.graph import worth_keeping
from cria_prune.recording.gradients import FisherSums, TaylorSums
from cria_prune.recording.signals import Call, Collector, GroupMemory
from cria_prune.recording.states import reads_of
from cria_prune.recording.taps import Taps
from cria_prune.repair.foretell import Course, course, largest, largest_of_losses
from cria_prune.repair.norms import batch_norms
from cria_prune.structure.groups import Site, UnitGroup, UnitGroups

UNITS = ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB"))
HOST = ("pencil", "solver", "edges")
"""Steps of scoring that are done on the CPU, wherever the model is."""
NOTICEABLE = 0.05
"""Share of the peak that a change has to save to be named."""


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes(...) as live:`, adds up the storages that operations make, until they are freed.

    Also right on the meta device, where nothing is allocated. What an operation allocates and frees inside
    itself is not seen.

    Args:
        known: tensors that were there before; their storages do not count, nor do views of them.

    Attributes:
        now: bytes that are alive.
        trace: what was alive after each operation.

    Example:
        >>> import torch
        >>> with LiveBytes([]) as live:
        ...     x = torch.zeros(1000)
        ...     x = (x + 1) * 2
        >>> live.now, live.peak
        (4000, 12000)
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.trace: list[int] = []
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._meet(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf, counted=True)
        self.trace.append(self.now)
        return out

    @property
    def peak(self) -> int:
        """The most that was alive after any operation."""
        return max(self.trace, default=0)

    def _meet(self, tensor: Tensor, counted: bool) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a sparse tensor has none
            return
        key = id(storage)
        if key in self._seen and self._seen[key]() is storage:
            return
        size = storage.nbytes() if counted else 0

        def free(gone: weakref.ref[Any]) -> None:
            self.now -= size
            if self._seen.get(key) is gone:  # another storage may have the id by now
                del self._seen[key]

        self._seen[key] = weakref.ref(storage, free)
        self.now += size


def storages(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind some tensors, each counted once."""
    found = {id(item): item for item in (tensor.untyped_storage() for tensor in tensors)}
    return sum(item.nbytes() for item in found.values())


def batch_bytes(batch: Batch) -> int:
    """Return the bytes of the numbers in a batch, labels too."""
    return sum(item.nbytes for item in _tensors(batch))


def largest_batch(batches: Iterable[Batch]) -> Batch:
    """Return the batch of the most bytes, the one that a prediction is to be made for."""
    return max(batches, key=batch_bytes)


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(map_tensors(batch, lambda item: item)) if isinstance(leaf, Tensor)]


class Pass(NamedTuple):
    """One pass over some examples, as recording makes it.

    Attributes:
        examples: how many.
        trace: bytes of activations, and gradients where they are taken, after every operation.
        calls: the activations that were read, in order.
        alive: bytes of activations when each of them was read.
    """

    examples: int
    trace: tuple[int, ...]
    calls: tuple[Call, ...]
    alive: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.trace, default=0)


def observe(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    batch: Batch,
    needs: frozenset[str],
    loss: Loss | None = None,
    graphs: Collection[str] = (),
    examples: int = 1,
) -> Pass:
    """Return a pass over the first examples of a batch: as recording makes it, keeping nothing.

    Args:
        model: the live model; it is left as it was. On the meta device the shapes do.
        groups: those that are recorded.
        batch: as in `record`.
        needs: of the criterion.
        loss, graphs: as in `record`.
        examples: how many of the batch.

    Raises:
        DataError: the model does not run on the batch.
        CriterionError: gradients are asked for on the meta device.
    """
    device, gradients = device_of(model), "gradients" in needs
    if gradients and device.type == "meta":
        raise CriterionError(
            "Counting what gradients take",
            "the model is on the meta device, where there are none",
            "Load its weights, or use a criterion without gradients",
        )
    # One and two examples are run: what the second adds to every operation, each
    # further one adds as well. So a batch that would not fit can be predicted.
    batch = cut(batch, batch_size(batch), examples)
    wanted = Collector(groups, PruneConfig().record, reads=reads_of(needs), graphs=graphs).wanted
    calls: list[Call] = []
    alive: list[int] = []
    with unchanged(model), buffers_kept(model), torch.set_grad_enabled(gradients):
        model.eval()
        taylor = TaylorSums(model, groups, loss or cross_entropy) if gradients else None
        fisher = FisherSums(groups) if "examples" in needs else None
        # What was there before is not counted: the model is a part of its own.
        live = LiveBytes([*named_tensors(model).values(), *_tensors(batch)])

        def receive(name: str, site: Site, activation: Tensor) -> None:
            calls.append(Call(name, site, tuple(activation.shape), activation.element_size()))
            alive.append(live.now)

        if fisher:
            fisher.begin(examples)
        with live, Taps(model, wanted, receive, fisher.watch if fisher else None):
            copied = map_tensors(batch, lambda item: item.to(device, copy=True))
            forward(model, copied, taylor.add if taylor else None)
        if fisher:
            fisher.finish()
    return Pass(examples, tuple(live.trace), tuple(calls), tuple(alive))


def carried_on(one: Pass, two: Pass, examples: int) -> Pass:
    """Return the pass of a whole batch: after every operation, each further example adds the same bytes.

    Where the operations of both passes are not the same ones, those of two examples grow in proportion.
    """
    if examples == 1:
        return one
    names = [[item.name for item in part.calls] for part in (one, two)]
    alike = names[0] == names[1] and len(one.trace) == len(two.trace)

    def grown(first: int, second: int) -> int:
        if not alike:
            return second * examples // 2
        return max(second, second + (examples - 2) * (second - first))

    first = one if alike else two
    calls = tuple(
        more._replace(shape=(grown(less.shape[0], more.shape[0]), *more.shape[1:])) if more.shape else more
        for less, more in zip(first.calls, two.calls, strict=True)
    )
    trace, alive = (
        tuple(grown(*now) for now in zip(*both, strict=True))
        for both in ((first.trace, two.trace), (first.alive, two.alive))
    )
    return Pass(examples, trace, calls, alive)


@dataclass(frozen=True)
class Stage:
    """The largest moment of one stage.

    Attributes:
        name: `record`, `score`, `losses` (of groups cut alone) or `repair`.
        parts: what it is made of, in bytes, beyond the model.
        group: the group that it is about, or the weight of the layer; or empty.
    """

    name: str
    parts: Mapping[str, int]
    group: str = ""

    @property
    def peak(self) -> int:
        """All parts, in bytes."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class MemoryPrediction:
    """The memory that pruning will take, in the first round; prints as a table.

    Attributes:
        model: bytes of its parameters and buffers.
        stages: recording, where the criterion or the repair needs it, scoring, measuring losses where shares
            of the layers follow from them, and the walk; beyond the model.
        groups: what every group keeps; empty where nothing is recorded.
        passes: over the calibration data, of all rounds, with that for the batch norms.
        recorded: passes that record.
        walked: passes of the walk, in each of which two networks run.
        measured: 1 where losses are measured: a pass, and the rest of the network for each loss.
        gradients: of what the gradients are taken: `batch`, `example`, or None.
        batch: examples in the batch that was counted.
        device: type of the device that the prediction is for; `meta` counts as a CPU.
        savings: what can be changed, and the peak of the stages then; the most effective first.
    """

    model: int
    stages: tuple[Stage, ...]
    groups: tuple[GroupMemory, ...] = field(repr=False)
    passes: int
    recorded: int
    gradients: str | None
    batch: int
    device: str
    savings: tuple[tuple[str, int], ...] = ()
    walked: int = 0
    measured: int = 0

    @property
    def peak(self) -> int:
        """The most at any moment, the model counted in."""
        return self.model + max(stage.peak for stage in self.stages)

    @property
    def largest_group(self) -> GroupMemory | None:
        """The group that keeps most; None where nothing is recorded."""
        return max(self.groups, key=lambda item: max(item.while_recording, item.afterwards), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them, in bytes."""
        largest = self.largest_group
        return {
            "model": self.model,
            **{
                stage.name: {"peak": stage.peak, "parts": dict(stage.parts), "group": stage.group or None}
                for stage in self.stages
            },
            "peak": self.peak,
            "largest_group": None if largest is None else largest.name,
            "batch": self.batch,
            "savings": {text: self.model + size for text, size in self.savings},
        }

    def __str__(self) -> str:
        width = max(len(name) for stage in self.stages for name in ("model", *stage.parts))
        lines = []
        for stage in self.stages:
            about = f" (group {stage.group})" if stage.group else ""
            lines.append(f"{stage.name}: {amount(self.model + stage.peak)} at most{about}")
            parts = {"model": self.model, **stage.parts}
            lines += [f"  {name:{width}}  {amount(size):>9}" for name, size in parts.items() if size]
        return "\n".join([*lines, f"peak {amount(self.peak)}, batches of {self.batch} examples"])


def amount(size: float) -> str:
    """Return bytes as a person reads them.

    >>> amount(3 * 2**30), amount(1500), amount(12)
    ('3.00 GB', '1.46 kB', '12 B')
    """
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size >= 10 * unit else f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


@of_plain_models
def predict_memory(
    model: nn.Module,
    groups: UnitGroups,
    batch: Batch,
    config: PruneConfig | None = None,
    *,
    loss: Loss | None = None,
    graphs: bool = False,
) -> MemoryPrediction:
    """Predict the memory that recording, scoring and repairing a model takes, without any of it.

    What is kept of every group is exact. What a forward pass takes is counted on one and on two examples and
    carried on to the whole batch; what an operation allocates and frees inside itself is not counted, nor
    what the allocator of the system holds back. Later rounds see a smaller model and take less. Of the walk,
    the streams of both networks over all examples are those of the dense one for two, carried on, and no more
    than half of what is free on this device now: the others wait in files.

    Args:
        model: the model, on the device where the work is to be done, or on the meta device; it is left as it
            was.
        groups: its unit groups, frozen where the plan leaves them alone.
        batch: the largest calibration batch, as `record` takes it; all of it counts, two examples are run.
        config: the whole configuration of the pruning.
        loss: as in `record`.
        graphs: neuron graphs are kept, as by `cria prune`: of their layers both sides are recorded.

    Raises:
        DataError: the model does not run on the batch.
        CriterionError: no such criterion, one that does not read a setting that is given, or gradients are
            asked for on the meta device.

    Example:
        >>> import torch
        >>> from cria_prune import discover
        >>> net = nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 3))
        >>> batch = torch.randn(32, 4)
        >>> found = predict_memory(net, discover(net, batch), batch)
        >>> [(stage.name, stage.largest) for stage in found.stages]
        [('record', 'moments'), ('score', 'inverse'), ('repair', 'solving')]
    """
    config, batch = config or PruneConfig(), read_one(model, batch)
    needs, size = find_criterion(config.score).needs, batch_size(batch)
    widths = {group.name: group.size for group in groups.recorded}
    drawn = worth_keeping(widths, config.score.neighbors) if graphs else frozenset[str]()
    passes = None
    if needs or config.repair == "once":
        one, two = (observe(model, groups.recorded, batch, needs, loss, drawn, count) for count in (1, 2))
        passes = one, two
    own = storages(named_tensors(model).values())
    shared = config.plan.shared_by == "measured"
    way = _course(model, batch) if config.repair == "walk" or shared else Course()
    work = _Work(groups, passes, size, device_of(model).type, needs, drawn, way, own)
    stages, kept = work.stages(config, size)
    recorded = config.plan.rounds if passes else 0
    walked = config.plan.rounds if config.repair == "walk" and way.stops else 0
    return MemoryPrediction(
        model=own,
        stages=stages,
        groups=tuple(kept),
        passes=recorded + walked + shared + bool(config.batch_norm and batch_norms(model)),
        recorded=recorded,
        gradients="example" if "examples" in needs else "batch" if "gradients" in needs else None,
        batch=size,
        device=device_of(model).type,
        savings=work.savings(config, max(stage.peak for stage in stages)),
        walked=walked,
        measured=int(shared),
    )


def _course(model: nn.Module, batch: Batch) -> Course:
    """Return the layers that the walk stops at; none where it cannot walk, for nothing is repaired then."""
    try:
        return course(model, batch)
    except (CaptureError, RuntimeError):
        return Course()


@dataclass(frozen=True)
class _Work:
    """What is done, for any configuration of it.

    Attributes:
        groups: the structure.
        passes: of one and of two examples; None where nothing is recorded.
        size: examples of a batch.
        device: type of the device where the model is.
        needs: of the criterion.
        graphs: the groups whose graphs are kept.
        course: of the walk, and of measuring losses.
        model: bytes of its parameters and buffers.
    """

    groups: UnitGroups
    passes: tuple[Pass, Pass] | None
    size: int
    device: str
    needs: frozenset[str]
    graphs: frozenset[str]
    course: Course
    model: int

    def stages(self, config: PruneConfig, size: int) -> tuple[tuple[Stage, ...], list[GroupMemory]]:
        """Return recording by batches of so many examples, if there is any, scoring, and what groups keep."""
        if self.passes is None:
            return (self._score(config, []), *self._losses(config), *self._repair(config)), []
        collector = Collector(
            self.groups.recorded, config.record, config.repair == "once", reads_of(self.needs), self.graphs
        )
        run = carried_on(*self.passes, size)
        kept = collector.memory(run.calls, size)
        held = {
            "moments": sum(item.collected for item in kept),
            "for the repair": sum(item.collected_consumed for item in kept),
            "buffers": sum(item.buffered for item in kept),
        }
        moments = [{**held, "activations": run.peak}]
        # Taking an activation in costs most where much else is alive,
        # so each call is a moment of its own and the largest counts.
        for call, alive in zip(run.calls, run.alive, strict=True):
            taking = collector.receiving_bytes(call, size)
            moments.append({**held, "activations": alive, "taking in": taking})
        most = max(*moments, _closing(kept), key=lambda parts: sum(parts.values()))
        after = (*self._losses(config), *self._repair(config))
        return (Stage("record", most), self._score(config, kept), *after), kept

    def _losses(self, config: PruneConfig) -> list[Stage]:
        """Return measuring the losses; nothing where it is not done, or not in one pass."""
        if config.plan.shared_by != "measured" or not self.course.stops:
            return []
        groups, device = self.groups.recorded, torch.device(self.device)
        parts, weight = largest_of_losses(
            self.course, groups, config.record.examples, self.size, device, config.repair != "none"
        )
        return [Stage("losses", parts, weight)] if parts else []

    def _repair(self, config: PruneConfig) -> list[Stage]:
        """Return the walk; nothing where there is none."""
        if config.repair != "walk" or not self.course.stops:
            return []
        device = torch.device(self.device)
        parts, weight = largest(self.course.stops, config.record.examples, self.size, device)
        # The model as it was cut is there, and the copy that is refitted; both are smaller than this one.
        return [Stage("repair", {"smaller models": 2 * self.model, **parts}, weight)]

    def _score(self, config: PruneConfig, kept: Sequence[GroupMemory]) -> Stage:
        held = {
            "states": sum(item.states for item in kept),
            "for the repair": sum(item.consumed for item in kept),
        }
        memory, record = find_criterion(config.score).memory, config.record
        size, step, name = 0, "", ""
        for group in self.groups.recorded:
            columns = None if group.size <= record.exact_units else record.sketch_columns
            for key, found in memory(Sizes(group, self.groups.shapes, columns), config.score).items():
                if found > size and (self.device in ("cpu", "meta") or key not in HOST):
                    size, step, name = found, key, group.name
        return Stage("score", {**held, step: size} if size else held, name)

    def savings(self, config: PruneConfig, peak: int) -> tuple[tuple[str, int], ...]:
        """Return (what to change, the peak then) of every single change that saves something."""
        record, half, widths = config.record, self.size // 2, [group.size for group in self.groups.recorded]
        exact = max((width for width in widths if width <= record.exact_units), default=0)
        changes: list[tuple[str, PruneConfig, int]] = []
        if half and self.passes is not None:
            changes.append((f"batches of {half} examples", config, half))
        if config.repair != "none":
            without = config.model_copy(update={"repair": "none"})
            changes.append(("no repair (--repair none)", without, self.size))
        if (config.repair == "walk" or config.plan.shared_by == "measured") and record.examples > 1:
            fewer = record.model_copy(update={"examples": record.examples // 2})
            text = f"{fewer.examples} examples (--examples)"
            changes.append((text, config.model_copy(update={"record": fewer}), self.size))
        for name, value, there in (
            ("exact_units", exact // 2, exact > 64),
            ("sketch_columns", record.sketch_columns // 2, max(widths, default=0) > record.exact_units),
        ):
            if there:
                text = f"record.{name}: {value} (in --config), which is less exact"
                changed = record.model_copy(update={name: value})
                changes.append((text, config.model_copy(update={"record": changed}), self.size))
        found = [
            (text, max(stage.peak for stage in self.stages(changed, size)[0]))
            for text, changed, size in changes
        ]
        saving = [(text, now) for text, now in found if now < (1 - NOTICEABLE) * peak]
        return tuple(sorted(saving, key=lambda item: item[1]))


def _closing(groups: Iterable[GroupMemory]) -> dict[str, int]:
    """Return what is held at most while accumulators become moments, one group after the other, by part."""
    groups = list(groups)
    moments = sum(group.collected + group.buffered for group in groups)
    consumed = sum(group.collected_consumed for group in groups)
    most = {"moments": moments, "for the repair": consumed, "closing": 0}
    for group in groups:
        moments, consumed = moments + group.states, consumed + group.consumed
        now = {"moments": moments, "for the repair": consumed, "closing": group.closing}
        most = max(most, now, key=lambda parts: sum(parts.values()))
        # A group's sums go as soon as its moments are there, so all of both is never held at once.
        moments -= group.collected + group.buffered
        consumed -= group.collected_consumed
    return most
