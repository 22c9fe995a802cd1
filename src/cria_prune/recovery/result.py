"""What a fine-tune gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


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
