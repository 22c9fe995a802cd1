"""From a model, its unit groups and one batch to the memory that recording and scoring will take."""

from __future__ import annotations

from torch import nn

from cria_prune.batches import Batch, batch_size
from cria_prune.config import PruneConfig
from cria_prune.criteria.memory import score_bytes
from cria_prune.criteria.score import find_criterion
from cria_prune.graph import worth_keeping
from cria_prune.loss import Loss
from cria_prune.memory.live import storages
from cria_prune.memory.observe import Pass, carried_on, observe, reading_of
from cria_prune.memory.prediction import MemoryPrediction, Stage
from cria_prune.modules import device_of, named_tensors
from cria_prune.record.memory import (
    GroupMemory,
    Tapped,
    closing_peak,
    group_bytes,
    held_back,
    reading_bytes,
    taps_of,
)
from cria_prune.record.norms import batch_norms
from cria_prune.record.states import reads_for, reads_of
from cria_prune.structure.groups import UnitGroups

HOST = ("pencil", "solver", "edges")
"""Steps of scoring that are done on the CPU, wherever the model is."""
NOTICEABLE = 0.05
"""Share of the peak that a change has to save to be named."""


def predict_memory(
    model: nn.Module,
    groups: UnitGroups,
    batch: Batch,
    config: PruneConfig | None = None,
    *,
    loss: Loss | None = None,
    graphs: bool = False,
) -> MemoryPrediction:
    """Predict the memory that recording and scoring a model takes, without recording.

    What is kept of every group is exact. What a forward pass takes is counted on one and on two examples and
    carried on to the whole batch; what an operation allocates and frees inside itself is not counted, nor
    what the allocator of the system holds back. Later rounds see a smaller model and take less.

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
        CriterionError: no such criterion, or gradients are asked for on the meta device.

    Example:
        >>> import torch
        >>> from cria_prune import discover
        >>> net = nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 3))
        >>> batch = torch.randn(32, 4)
        >>> found = predict_memory(net, discover(net, batch), batch)
        >>> [(stage.name, stage.largest) for stage in found.stages]
        [('record', 'moments'), ('score', 'inverse')]
    """
    config = config or PruneConfig()
    needs, size = find_criterion(config.score).needs, batch_size(batch)
    tensors = list(named_tensors(model).values())
    widths = {group.name: group.size for group in groups.prunable}
    drawn = worth_keeping(widths, config.score.neighbors) if graphs else frozenset[str]()
    recorded = bool(needs or config.compensate)
    passes = observe(model, groups.prunable, batch, needs, loss, drawn) if recorded else None
    assembled = _Assembled(groups, passes, size, device_of(model).type, needs, drawn)
    stages = assembled.stages(config)
    passes_recorded = config.plan.rounds if passes else 0
    return MemoryPrediction(
        model=storages(tensors),
        stages=stages,
        groups=tuple(assembled.kept(config)),
        passes=passes_recorded + bool(config.batch_norm and batch_norms(model)),
        recorded=passes_recorded,
        gradients="example" if "examples" in needs else "batch" if "gradients" in needs else None,
        batch=size,
        device=device_of(model).type,
        savings=assembled.savings(config, max(stage.peak for stage in stages)),
    )


class _Assembled:
    """Puts together what was observed and what is in closed form, for any configuration.

    Args:
        groups: the structure.
        passes: of one and of two examples; None where nothing is recorded.
        size: examples of a batch.
        device: type of the device where the model is.
        needs: of the criterion.
        graphs: the groups whose graphs are kept.
    """

    def __init__(
        self,
        groups: UnitGroups,
        passes: tuple[Pass, Pass] | None,
        size: int,
        device: str,
        needs: frozenset[str],
        graphs: frozenset[str],
    ) -> None:
        self._groups, self._passes, self._size, self._device = groups, passes, size, device
        self._reads, self._graphs = reads_of(needs), graphs
        self._taps: dict[tuple[str, str], list[Tapped]] = {}
        for item in taps_of(groups.prunable, self._reads, graphs):
            self._taps.setdefault((item.tap.tensor, item.tap.site), []).append(item)

    def stages(self, config: PruneConfig, size: int | None = None) -> tuple[Stage, ...]:
        """Return recording, if there is any, and scoring."""
        score = self._score(config)
        return (score,) if self._passes is None else (self._record(config, size or self._size), score)

    def kept(self, config: PruneConfig, size: int | None = None) -> list[GroupMemory]:
        """Return what every group keeps; nothing where nothing is recorded."""
        if self._passes is None:
            return []
        run = carried_on(*self._passes, size or self._size)
        batches = -(-config.record.examples // run.examples)
        held = {group.name: 0 for group in self._groups.prunable}
        for call in run.calls:
            for group, tap, _ in self._taps[call.name, call.site]:
                reading = reading_of(call, tap.dim, config.record, run.examples)
                signals = -(-reading.taken // 2) * tap.positions.shape[1]
                held[group.name] = max(held[group.name], held_back(signals, group.size, batches))
        return [
            group_bytes(
                group,
                config.record,
                config.compensate,
                held[group.name],
                reads_for(group.name, self._reads, self._graphs),
            )
            for group in self._groups.prunable
        ]

    def _record(self, config: PruneConfig, size: int) -> Stage:
        assert self._passes is not None
        run, kept = carried_on(*self._passes, size), self.kept(config, size)
        held = {
            "moments": sum(item.collected for item in kept),
            "for the repair": sum(item.collected_consumed for item in kept),
            "buffers": sum(item.buffered for item in kept),
        }
        moments = [{**held, "activations": run.peak}]
        for call in run.calls:
            readers: dict[int, list[Tapped]] = {}
            for item in self._taps[call.name, call.site]:
                readers.setdefault(item.tap.dim, []).append(item)
            taken = max(
                reading_bytes(
                    reading_of(call, dim, config.record, run.examples), taps, config.record, config.compensate
                )
                for dim, taps in readers.items()
            )
            moments.append({**held, "activations": call.alive, "taking in": taken})
        moments.append(closing_peak(kept))
        return Stage("record", max(moments, key=lambda parts: sum(parts.values())))

    def _score(self, config: PruneConfig) -> Stage:
        kept = self.kept(config)
        held = {
            "states": sum(item.states for item in kept),
            "for the repair": sum(item.consumed for item in kept),
        }
        steps = [
            (size, step, group.name)
            for group in self._groups.prunable
            for step, size in score_bytes(group, self._groups.shapes, config.score, config.record).items()
            if self._device in ("cpu", "meta") or step not in HOST
        ]
        size, step, name = max(steps, default=(0, "", ""), key=lambda item: item[0])
        return Stage("score", {**held, step: size} if size else held, name if size else "")

    def savings(self, config: PruneConfig, peak: int) -> tuple[tuple[str, int], ...]:
        """Return (what to change, the peak then) of every single change that saves something."""
        record = config.record
        widest = max((group.size for group in self._groups.prunable), default=0)
        exact = max((g.size for g in self._groups.prunable if g.size <= record.exact_units), default=0)
        changes: list[tuple[str, PruneConfig, int]] = []
        if self._size > 1 and self._passes is not None:
            half = self._size // 2
            changes.append((f"batches of {half} examples", config, half))
        if config.compensate:
            changes.append(
                ("no repair (--no-compensate)", config.model_copy(update={"compensate": False}), 0)
            )
        for name, value, there in (
            ("exact_units", exact // 2, exact > 64),
            ("sketch_columns", record.sketch_columns // 2, widest > record.exact_units),
        ):
            if there:
                changed = record.model_copy(update={name: value})
                text = f"record.{name}: {value} (in --config), which is less exact"
                changes.append((text, config.model_copy(update={"record": changed}), 0))
        found = [
            (text, max(stage.peak for stage in self.stages(changed, size or None)))
            for text, changed, size in changes
        ]
        return tuple(
            sorted(((t, now) for t, now in found if now < (1 - NOTICEABLE) * peak), key=lambda i: i[1])
        )
