"""The one fine-tune after pruning: SGD or AdamW, a warm-up and a fall, and the best epoch kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cria_prune.batches import Batch, move
from cria_prune.config import RecoverConfig
from cria_prune.errors import ConfigError, DataError, SignalError
from cria_prune.loss import Loss, cross_entropy
from cria_prune.modules import modes_kept
from cria_prune.progress import QUIET, Bar, Progress
from cria_prune.recover.guard import (
    State,
    channels_last,
    gradients_kept,
    lower_precision,
    on_device,
    snapshot,
)
from cria_prune.recover.loss import Distilled
from cria_prune.recover.result import Epoch, RecoverResult
from cria_prune.recover.schedule import make_optimizer, rate

Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]
Metric = Callable[[nn.Module], float]


def recover(
    model: nn.Module,
    train_batches: Batches,
    config: RecoverConfig | None = None,
    *,
    evaluate: Metric | None = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    lower_is_better: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> RecoverResult:
    """Fine-tune `model` in place and leave it at its best epoch.

    Training is SGD with Nesterov momentum, or AdamW; the learning rate rises linearly and falls as a cosine
    or a line, step by step; biases and norms do not decay. The same seed, machine and thread count give the
    same weights, bit for bit. Train/eval modes, gradients, device, memory layout and the global generators
    of torch are afterwards what they were. After an error the weights are what they were, too; after a
    KeyboardInterrupt the model holds the best epoch so far.

    Args:
        model: the network; its weights change in place.
        train_batches: an iterable of batches, or a function from the epoch (from 0) to one. An iterable
            without a length is read into memory, for the schedule needs the number of steps.
        config: epochs, learning rate and the rest; `RecoverConfig()` if None.
        evaluate: model -> metric, on data kept apart from both the training and the final
            test. The model comes in eval mode on `device`. Of equal epochs the later is kept. None: no
            metric, and the last epoch is kept.
        teacher: the dense model; used if `config.distill` > 0.
        loss: (model, batch) -> scalar; cross-entropy on the batch's target if None (`loss.cross_entropy`).
        lower_is_better: the metric's direction: False for an accuracy, True for a perplexity.
        device: where to train.
        progress: where to show loss, metric and time left; silent if None.

    Raises:
        ConfigError: distillation without a teacher, or the model has nothing to train.
        DataError: no batches, or a batch that the loss cannot use.
        SignalError: the loss, the metric or a weight became NaN or infinite.
    """
    config = config or RecoverConfig()
    _check(model, config, teacher)
    place = torch.device(device)
    before = snapshot(model)
    with ExitStack() as stack:
        stack.enter_context(_isolated(config.seed, place))
        stack.enter_context(gradients_kept(model))
        for network in [model] if teacher is None or not config.distill else [model, teacher]:
            for guard in (modes_kept, channels_last) if place.type == "cpu" else (modes_kept,):
                stack.enter_context(guard(network))
            stack.enter_context(on_device(network, place))
        objective = loss or cross_entropy
        if teacher is not None and config.distill:
            objective = Distilled(objective, teacher.eval(), config.distill, config.temperature)
        run = _Run(model, config, objective, evaluate, lower_is_better, place)
        try:
            run.fit(_Source(train_batches), progress or QUIET)
            model.load_state_dict(run.best_state or before)
        except KeyboardInterrupt:
            model.load_state_dict(run.best_state or before)
            raise
        except BaseException:
            model.load_state_dict(before)
            raise
    best = run.history[run.best_epoch]
    return RecoverResult(model, tuple(run.history), best.epoch, best.metric, run.history[-1].metric)


def _check(model: nn.Module, config: RecoverConfig, teacher: nn.Module | None) -> None:
    if config.distill and (teacher is None or teacher is model):
        found = "no teacher was passed" if teacher is None else "the teacher is the model itself"
        raise ConfigError(
            f"Distillation with weight {config.distill}",
            found,
            "Pass teacher=<a copy of the dense model>, or set distill to 0",
        )
    if config.epochs and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("A fine-tune", "no parameter of the model requires a gradient", "Unfreeze some")


@contextmanager
def _isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators (dropout, a shuffling DataLoader) and put them back on leaving."""
    cuda = device.type == "cuda"
    devices = [torch.cuda.current_device() if device.index is None else device.index] if cuda else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(deterministic=True):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


class _Source:
    """Batches of one epoch, always with a length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = list(batches) if isinstance(batches, Iterator) else batches

    def epoch(self, epoch: int) -> Iterable[Batch]:
        return self.batches(epoch) if callable(self.batches) else self.batches

    def sized(self, epoch: int) -> tuple[Iterable[Batch], int]:
        batches = self.epoch(epoch)
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:
            batches = list(batches)
            count = len(batches)
        if count == 0:
            raise DataError(
                "A fine-tune", f"epoch {epoch} has no batches", "Pass at least one training batch"
            )
        return batches, count


class _Run:
    """The state of one fine-tune: history, and the weights of the best epoch so far."""

    def __init__(
        self,
        model: nn.Module,
        config: RecoverConfig,
        loss: Loss,
        evaluate: Metric | None,
        lower_is_better: bool,
        device: torch.device,
    ) -> None:
        self.model, self.config, self.loss, self.evaluate, self.device = model, config, loss, evaluate, device
        self.sign = -1 if lower_is_better else 1
        self.history: list[Epoch] = []
        self.best_epoch = 0
        self.best_state: State | None = None
        self.step = self.steps = 0

    def fit(self, source: _Source, progress: Progress) -> None:
        self.finish(Epoch(0, 0.0, None, self.measure()))
        if not self.config.epochs:
            return
        optimizer = make_optimizer(self.model, self.config)
        batches, count = source.sized(0)
        self.steps = self.config.epochs * count
        with progress.bar("train", self.steps) as bar:
            for epoch in range(self.config.epochs):
                if epoch:
                    batches, count = source.sized(epoch)
                losses = self.train(batches, optimizer, bar)
                lr = optimizer.param_groups[0]["lr"]
                self.finish(Epoch(epoch + 1, lr, sum(losses) / len(losses), self.measure()))
                bar.update(0, epoch=epoch + 1, metric=self.history[-1].metric)

    def train(self, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, bar: Bar) -> Sequence[float]:
        config = self.config
        self.model.train()
        losses = []
        for batch in batches:
            lr = rate(self.step, self.steps, config.lr, config.warmup, config.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            with lower_precision(config.precision, self.device):
                loss = self.loss(self.model, move(batch, self.device))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise self.broken(f"the loss is {losses[-1]} at step {self.step + 1} of {self.steps}")
            loss.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            optimizer.step()
            self.step += 1
            bar.update(loss=losses[-1])
        return losses

    def measure(self) -> float | None:
        broken = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        if broken:
            raise self.broken(f"{broken[0]} holds NaN or infinity after step {self.step}")
        if self.evaluate is None:
            return None
        self.model.eval()
        metric = float(self.evaluate(self.model))
        if not math.isfinite(metric):
            raise self.broken(f"the metric is {metric} after step {self.step}")
        return metric

    def finish(self, row: Epoch) -> None:
        self.history.append(row)
        best = self.history[self.best_epoch].metric
        if row.metric is None or best is None or self.sign * row.metric >= self.sign * best:
            self.best_epoch, self.best_state = row.epoch, snapshot(self.model)

    def broken(self, found: str) -> SignalError:
        return SignalError(
            f"A fine-tune with learning rate {self.config.lr}",
            found,
            "The weights were put back; try a lower learning rate or a longer warm-up, and check the inputs",
        )
