"""What a step of a fine-tune is made of: the loss, with soft targets from a teacher; optimizer and rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from cria_prune.base.batches import Batch, by_name, model_inputs
from cria_prune.base.errors import ConfigError, DataError
from cria_prune.base.metrics import Loss, logits_of
from cria_prune.base.modules import forward_of
from cria_prune.config import RecoverConfig

SHAPES = 64
"""Shapes of a batch that are compiled for, at most; torch's own limit, 8, counts all models of a class."""


def compiled(model: nn.Module, device: torch.device) -> Callable[..., Any]:
    """Return the compiled forward of a model.

    On CUDA the kernels of a step are kept as graphs: a small network spends most of a step on starting
    them. Batches of another shape are compiled anew, from the second on for any length.
    """
    return torch.compile(model.forward, mode="reduce-overhead" if device.type == "cuda" else "default")


@contextmanager
def compiling(model: nn.Module) -> Iterator[None]:
    """Compile inside for as many shapes as a fine-tune has; forget on leaving all that torch has compiled.

    Raises:
        ConfigError: torch cannot compile a step.
    """
    import torch._dynamo.config
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
    except (TorchDynamoException, InductorError) as error:
        raise ConfigError(
            f"A fine-tune of {type(model).__name__} with compile",
            f"torch.compile fails with {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "It needs a C++ compiler, on CUDA Triton, and a forward to trace; or train without compile",
        ) from error
    finally:
        torch.compiler.reset()  # or its graphs keep the memory of a GPU


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) at temperature T, in nats per prediction.

    Both logits are (..., classes); Hinton, Vinyals and Dean 2015, section 2.

    Raises:
        DataError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise DataError(
            "Distillation",
            f"the logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            "Pass as teacher the dense model of the same task",
        )
    classes = student.shape[-1]
    goal = functional.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1)
    found = functional.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    # Gradients of soft targets fall as 1 / T²; the factor keeps their size beside those of the labels.
    return temperature**2 * functional.kl_div(found, goal, reduction="batchmean", log_target=True)


@dataclass
class Distilled:
    """(1 - weight) * loss + weight * soft targets, from one forward of the model.

    The model's output is taken while `loss` runs it, by a hook that is released at once.

    Args:
        loss: the loss on the targets.
        teacher: a model in eval mode on the batches' device; its outputs are not differentiated.
        weight: share of the soft targets, from 0 to 1.
        temperature: divides both logits.
        forward: what the teacher runs in place of its own forward, such as that one compiled.
    """

    loss: Loss
    teacher: nn.Module
    weight: float
    temperature: float
    forward: Callable[..., Any] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the combined loss of a batch, a scalar in nats."""
        # The loss calls the model in its own way. A hook takes
        # the output of that call, so the forward runs once.
        outputs: list[Any] = []
        handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            hard = self.loss(model, batch)
        finally:
            handle.remove()
        if not outputs:
            raise DataError("Distillation", "the loss did not call the model", "Call model(...) in the loss")
        args, kwargs = model_inputs(batch)
        with torch.no_grad(), forward_of(self.teacher, self.forward):
            goal = logits_of(self.teacher(*args, **kwargs))
        found = logits_of(outputs[-1])
        soft = soft_targets(without_padding(found, batch), without_padding(goal, batch), self.temperature)
        return (1 - self.weight) * hard + self.weight * soft


def without_padding(logits: Tensor, batch: Batch) -> Tensor:
    """Return the logits of the tokens that the batch's `attention_mask` keeps; (batch, classes) as they are.

    Args:
        logits: (batch, classes) or (batch, tokens, classes).
        batch: where its mask is not (batch, tokens), all tokens stay.
    """
    mask = by_name(batch).get("attention_mask")
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:-1] else logits


SECOND_DECAY = 0.98
"""AdamW's second decay rate: short runs have no time for 0.999."""


def rate(step: int, steps: int, peak: float, warmup: float, schedule: str = "cosine") -> float:
    """Return the learning rate of `step` (from 0) of `steps`: a linear rise, then a fall to zero.

    The fall is half a cosine, or a straight line if `schedule` is `linear`.

    >>> [round(rate(step, 10, 1.0, 0.2), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    >>> [round(rate(step, 5, 1.0, 0.2, "linear"), 2) for step in range(5)]
    [1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    share = min(1.0, (step - rising) / max(1, steps - rising))
    if schedule == "linear":
        return peak * (1 - share)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: matrices and kernels decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: RecoverConfig) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW, on the parameters that are trained."""
    groups = decay_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, SECOND_DECAY))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors (momentum, moments, steps), named `<index of the parameter>.<key>`."""
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def share(value: Tensor, like: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, where nothing is shared out by FSDP.

    Args:
        value: the same on all processes.
        like: what the result is to be like; not everything is shared out.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def set_moments(optimizer: torch.optim.Optimizer, held: dict[str, Tensor]) -> None:
    """Give an optimizer the tensors that `moments` returned, or this process's shares of them."""
    parameters = _parameters(optimizer)
    for name, value in held.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        # In the parameter's memory layout: sums over other layouts may round differently.
        optimizer.state[parameter][key] = (
            value if key == "step" else torch.empty_like(parameter).copy_(share(value, parameter))
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
