"""The loop of a fine-tune: steps, epochs, the best of them; kept on disk, and gone on from there."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, move
from cria_prune.base.errors import DataError, SignalError
from cria_prune.base.events import passed
from cria_prune.base.inputs import Read, Reader
from cria_prune.base.metrics import Loss
from cria_prune.base.modules import forward_of
from cria_prune.base.progress import Bar, Progress
from cria_prune.base.ranks import alone, world
from cria_prune.config import RecoverConfig
from cria_prune.recovery.guard import (
    generators,
    is_finite,
    lower_precision,
    put_back,
    set_generators,
    snapshot,
    trained,
)
from cria_prune.recovery.parallel import Parallel, Sharded, generators_kept
from cria_prune.recovery.step import compiled, make_optimizer, moments, rate, set_moments, share
from cria_prune.resume.store import Facts, State, Store, TypedStore, weights_of

FORMAT = "cria-recovery-1"
NAME = "recovery.safetensors"
BATCHES = "batches per epoch"


@dataclass(frozen=True)
class Epoch:
    """One epoch of the history.

    Attributes:
        epoch: 0 is the model as it came, before any step.
        lr: learning rate of the epoch's last step (0 for epoch 0).
        loss: mean training loss, in nats for the default loss (None for epoch 0).
        metric: what `evaluate` returned after the epoch (None without `evaluate`).
    """

    epoch: int
    lr: float
    loss: float | None
    metric: float | None


@dataclass(frozen=True)
class RecoverResult:
    """What `recover` gives back.

    Attributes:
        model: the given model, holding the weights of `best_epoch`.
        history: one entry per epoch, the first for the model as it came.
        best_epoch: epoch whose weights the model holds; the last one without `evaluate`.
        best: metric of that epoch.
        last: metric of the last epoch.
    """

    model: nn.Module = field(repr=False)
    history: tuple[Epoch, ...] = field(repr=False)
    best_epoch: int
    best: float | None
    last: float | None

    def __str__(self) -> str:
        lines = [f"{'epoch':>5} {'lr':>8} {'loss':>8} {'metric':>8}"]
        for row in self.history:
            loss = "" if row.loss is None else f"{row.loss:.4f}"
            metric = "" if row.metric is None else f"{row.metric:.4f}"
            mark = "  <- kept" if row.epoch == self.best_epoch else ""
            lines.append(f"{row.epoch:>5} {row.lr:>8.4f} {loss:>8} {metric:>8}{mark}")
        return "\n".join(lines)


class RecoveryFacts(Facts):
    """What a state says beside its tensors; to its identity belongs the number of batches per epoch.

    Attributes:
        history: the epochs that are over, the first for the model as it came.
        best_epoch: epoch of the weights `best`.
        step: optimizer steps taken.
        finished: nothing is left to do, and only `best` is kept of the tensors.
    """

    history: list[Epoch]
    best_epoch: int
    step: int
    finished: bool


class Keeper(TypedStore[RecoveryFacts]):
    """Keeps the state of one fine-tune in a folder.

    Args:
        folder: made when the first state is written.
        identity: what makes the fine-tune this one.
        every: seconds between two states within an epoch.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], every: float) -> None:
        super().__init__(Store(folder, NAME, FORMAT, "recovery"), RecoveryFacts, identity)
        self.every, self._last = every, time.monotonic()

    def due(self, run: Run) -> bool:
        """Say whether the last state is older than it may become; of several processes the first one's is."""
        # The clocks of processes differ. If each went by its own,
        # some would write a state while others wait for their step.
        late = time.monotonic() - self._last >= self.every
        if run.parallel is None:
            return late
        return bool(run.here.total(torch.tensor(float(late and run.here.first))))

    def keep(self, run: Run) -> None:
        """Write the state of a fine-tune; all processes call it, and the first one writes."""
        parts: dict[str, State] = {"best": run.best_state or {}}
        if not run.finished:
            # What follows are sums over all processes, so none may
            # leave before them, though the first one alone writes.
            if run.parallel is not None:
                parts["norms"] = run.parallel.each()
            if run.sharded is not None:
                parts["optimizer"] = run.sharded.whole(moments(run.optimizer))
            elif run.here.first:
                parts["optimizer"] = moments(run.optimizer)
            else:  # it writes nothing
                return
            parts["weights"] = run.copied()
            # Their number says how many batches of the epoch were
            # seen; the generators, what the next dropout draws.
            parts["losses"] = {"epoch": torch.tensor(run.losses, dtype=torch.float64)}
            parts["generators"], parts["opened"] = generators(run.device), run.opened or {}
        if run.here.first:
            self.write(
                parts,
                identity={**self.identity, BATCHES: run.count},
                history=run.history,
                best_epoch=run.best_epoch,
                step=run.step,
                finished=run.finished,
            )
            self._last = time.monotonic()

    def go_on(self, run: Run, source: Source) -> bool:
        """Bring a fine-tune to the state on disk; say whether there was one.

        Raises:
            ArtifactError: it is damaged, or of another fine-tune.
        """

        def batches() -> dict[str, int]:
            run.count = source.sized(0)[1]
            return {BATCHES: run.count}

        found = self.read(batches)
        if found is None:
            return False
        facts, parts = found
        run.history, run.best_epoch, run.step = list(facts.history), facts.best_epoch, facts.step
        run.finished = facts.finished
        own = trained(run.model)
        try:
            # Both go through the model, which checks names and shapes.
            # The later one stays: best at the end, else weights.
            for part in ("best",) if run.finished else ("best", "weights"):
                if parts[part].keys() != own.keys():
                    raise LookupError("they have other names")
                put_back(run.model, {name: share(value, own[name]) for name, value in parts[part].items()})
            if not run.finished:
                set_moments(run.optimizer, parts.get("optimizer", {}))
                if run.parallel is not None:
                    run.parallel.take(parts.get("norms", {}))
                run.losses = parts["losses"]["epoch"].tolist()
                run.opened = parts.get("opened")
                set_generators(parts["generators"], run.device)
        except (LookupError, ValueError, RuntimeError) as error:
            raise self.store.damaged(f"its tensors do not fit the model: {error}") from error
        run.best_state = parts["best"] if run.sharded is None or run.here.first else {}
        return True


def identity(model: nn.Module, teacher: nn.Module | None, **said: Any) -> dict[str, Any]:
    """Return what makes a fine-tune this one: what is `said`, and its networks; errors as in `weights_of`."""
    networks = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    return {**said, **weights_of(networks, "recovery")}


Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]
"""The training batches of a fine-tune: one collection for all epochs, or one for each, by its number."""
Metric = Callable[[nn.Module], float]


class Source:
    """Batches of one epoch, always with a length; read by the model's signature where a reader is given."""

    def __init__(self, batches: Batches, reader: Reader | None = None) -> None:
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.reader = reader

    def sized(self, epoch: int) -> tuple[Iterable[Batch], int]:
        """Return the batches of an epoch (from 0) and their number.

        Raises:
            DataError: there are none.
        """
        passed("epoch", epoch=epoch)
        batches = self.batches(epoch) if callable(self.batches) else self.batches
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            batches = list(batches)
            count = len(batches)
        if count == 0:
            raise DataError(
                "A fine-tune", f"epoch {epoch} has no batches", "Pass at least one training batch"
            )
        return batches if self.reader is None else Read(batches, self.reader), count


@dataclass(eq=False)
class Run:
    """One fine-tune: how far it is, and the weights of the best epoch so far.

    Args:
        model: on `device`, and trained in place; by FSDP wherever it is, and a copy is trained.
        config: the training.
        loss: (model, batch) -> scalar.
        evaluate: model -> metric, or None.
        lower_is_better: the metric's direction.
        device: where the model is.
        keeper: keeps the state on disk, or None.
    """

    model: nn.Module
    config: RecoverConfig
    loss: Loss
    evaluate: Metric | None
    lower_is_better: bool
    device: torch.device
    keeper: Keeper | None

    def __post_init__(self) -> None:
        compile_it = self.config.compile and self.config.epochs
        self.compiled = compiled(self.model, self.device) if compile_it else None
        self.history: list[Epoch] = []
        self.best_epoch = 0
        self.best_state: State | None = None
        self.step = self.count = 0
        self.losses: list[float] = []  # of the epoch in progress, one per batch
        self.unread: tuple[int, Tensor | float] | None = None  # the last step and its loss, on a GPU still
        self.opened: State | None = None  # the generators before that epoch's batches were asked for
        self.finished = False
        self.here = world()
        self.parallel: Parallel | None = None
        self.sharded: Sharded | None = None

    def fit(self, source: Source, progress: Progress) -> None:
        """Train from the start, or from the state that was kept, to the last epoch."""
        if not (self.config.fsdp and self.config.epochs):
            return self.go(source, progress)
        self.sharded = Sharded(self.here, self.model, self.loss, self.device, self.config.seed)
        self.parallel, self.model = self.sharded, self.sharded.model
        with self.sharded.open():
            self.go(source, progress)

    def go(self, source: Source, progress: Progress) -> None:
        """Take the epochs that are left."""
        epochs = self.config.epochs
        if epochs:
            # The optimizer and the exchange between processes are
            # there before a state is read: parts of it go into both.
            self.optimizer = make_optimizer(self.model, self.config)
            if self.here.size > 1 and self.parallel is None:
                self.parallel = Parallel(self.here, self.model, self.loss, self.device, self.config.seed)
        resumed = self.resume(source)
        kept = self.keeper is not None
        # One process may not see the folder: then all go on from the state, or none does.
        self.here.meet(
            "The state of the recovery", lambda: f"{kept} {resumed} {self.step} {len(self.history)}"
        )
        if not resumed:
            self.finish(Epoch(0, 0.0, None, self.measure()))
            self.finished = not epochs
        if self.finished:
            return
        first = len(self.history) - 1
        batches = self.open(source, first)
        # A state from before the first step: a kill in the
        # first epoch does not cost the first measurement again.
        if not self.step:
            self.save()
        with progress.bar("train", self.config.epochs * self.count) as bar:
            if self.step:
                bar.update(self.step)
            for epoch in range(first, epochs):
                if epoch > first:
                    batches = self.open(source, epoch)
                self.train(batches, bar)
                if self.parallel is not None:
                    self.parallel.agree()
                loss = sum(self.losses) / len(self.losses)
                self.finish(Epoch(epoch + 1, self.lr(self.step - 1), loss, self.measure()))
                bar.update(0, epoch=epoch + 1, metric=self.history[-1].metric)
                # The epoch's own things go before it is kept. A state between two epochs has neither losses
                # nor the generators of a beginning, and the next epoch begins from the generators of now.
                self.losses, self.opened, self.finished = [], None, epoch + 1 == epochs
                self.save()

    def open(self, source: Source, epoch: int) -> Iterator[Batch]:
        """Return the batches of an epoch that are left to do.

        A loader may shuffle by torch's generators, so they are meanwhile what they were when it began.
        """
        # To get the bits of a run that was not stopped, a loader has to shuffle as it did: it is
        # asked again with the generators of the epoch's beginning, and what was seen is drawn and
        # passed over. Then the generators are those of the state, for dropout goes on from there.
        now, resumed = generators(self.device), self.opened
        if resumed:
            set_generators(resumed, self.device)
        else:
            self.opened = now
        batches, count = source.sized(epoch)
        self.count = self.count or count
        left = iter(batches)
        if resumed:
            for _ in islice(left, len(self.losses)):
                pass
            set_generators(now, self.device)
        return left

    def train(self, batches: Iterable[Batch], bar: Bar) -> None:
        """Take one step per batch."""
        config, optimizer = self.config, self.optimizer
        self.model.train()
        for batch in batches:
            passed("step", step=self.step + 1)
            # The rate follows from the number of the step alone, so
            # there is no scheduler whose state would have to be kept.
            for group in optimizer.param_groups:
                group["lr"] = self.lr(self.step)
            optimizer.zero_grad()
            try:
                with lower_precision(config.precision, self.device):
                    loss, value = self.forward(move(batch, self.device))
            except Exception:
                self.read(bar)  # it may have failed on what a loss that was not finite made of the weights
                raise
            loss.backward() if self.parallel is None else self.parallel.backward(loss)
            # A loss is read a step late. Reading waits until the GPU is done; in time for
            # each step it would leave the GPU idle while the next is prepared. So a loss
            # that is not finite is seen one step late, and the weights are put back anyway.
            self.read(bar)  # that of the step before: a GPU has both passes of this one to do meanwhile
            self.unread = self.step + 1, value
            if not isinstance(value, Tensor) or value.device.type == "cpu":  # there is nothing to wait for
                self.read(bar)
            if config.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            optimizer.step()
            self.step += 1
            if self.keeper is not None and self.keeper.due(self):
                self.read(bar)
                self.save()
        self.read(bar)

    def read(self, bar: Bar) -> None:
        """Read the loss of the last step whose loss is not read, if there is one; a GPU is waited for.

        Raises:
            SignalError: it is NaN or infinite.
        """
        if self.unread is None:
            return
        (step, unread), self.unread = self.unread, None
        value = float(unread)
        self.losses.append(value)
        if not math.isfinite(value):
            raise self.broken(f"the loss is {value} at step {step} of {self.config.epochs * self.count}")
        bar.update(loss=value)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """Return the loss of a batch to run backwards, and its value."""
        if self.parallel is not None:
            return self.parallel.loss(batch, self.step)
        if self.compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the step before is held any more
        with forward_of(self.model, self.compiled):
            loss = self.loss(self.model, batch)
        return loss, loss.detach().clone()  # a graph of CUDA kernels writes the next loss where this one is

    def lr(self, step: int) -> float:
        """Return the learning rate of a step (from 0)."""
        config = self.config
        return rate(step, config.epochs * self.count, config.lr, config.warmup, config.schedule)

    def measure(self) -> float | None:
        """Return the metric, if any.

        Raises:
            SignalError: it, or a weight, is NaN or infinite.
        """
        broken = [name for name, value in self.model.named_parameters() if not is_finite(value)]
        if self.sharded is not None and self.here.total(torch.tensor(float(len(broken)))) and not broken:
            broken = ["a weight on another process"]  # all stop: none waits for a share in vain
        if broken:
            raise self.broken(f"{broken[0]} holds NaN or infinity after step {self.step}")
        if self.evaluate is None:
            return None
        self.model.eval()
        if self.sharded is None:
            metric = self.here.lead("Evaluating", self.look)
        else:  # the weights are everybody's, so all look; the first one's word counts
            with alone():
                found = self.look()
            metric = self.here.lead("Evaluating", lambda: found)
        if not math.isfinite(metric):
            raise self.broken(f"the metric is {metric} after step {self.step}")
        return metric

    def look(self) -> float:
        """Return what `evaluate` finds."""
        assert self.evaluate is not None
        passed("measure", model=self.model)
        with generators_kept(self.device) if self.parallel is not None else nullcontext():
            return float(self.evaluate(self.model))

    def finish(self, row: Epoch) -> None:
        """Add an epoch to the history; keep its weights if none was better."""
        self.history.append(row)
        best = self.history[self.best_epoch].metric
        worse = operator.gt if self.lower_is_better else operator.lt
        if row.metric is None or best is None or not worse(row.metric, best):
            self.best_epoch, self.best_state = row.epoch, self.copied()

    def copied(self) -> State:
        """Return a copy of what is trained; by FSDP to the first process alone, and all have to call it."""
        if self.sharded is None:
            return snapshot(self.model)
        return self.sharded.whole(trained(self.model))

    def save(self) -> None:
        """Keep the state on disk, if that is wanted; all processes call it, and the first one writes."""
        if self.keeper is not None:
            self.keeper.keep(self)

    def resume(self, source: Source) -> bool:
        """Go on from the state on disk; say whether there was one. Errors as in `Keeper.go_on`."""
        return self.keeper is not None and self.config.epochs > 0 and self.keeper.go_on(self, source)

    def broken(self, found: str) -> SignalError:
        """Return the error for a training that diverged."""
        return SignalError(
            f"A fine-tune with learning rate {self.config.lr}",
            found,
            "The weights were put back; try a lower learning rate or a longer warm-up, and check the inputs",
        )
