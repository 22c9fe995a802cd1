"""The one fine-tune after pruning: SGD or AdamW, a warm-up and a fall, and the best epoch kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from cria_prune.base.errors import ConfigError
from cria_prune.base.events import passed
from cria_prune.base.inputs import Reader
from cria_prune.base.kinds import plain
from cria_prune.base.metrics import Loss, cross_entropy
from cria_prune.base.modules import digest, modes_kept
from cria_prune.base.progress import QUIET, Progress
from cria_prune.base.ranks import world
from cria_prune.config import RecoverConfig
from cria_prune.recovery.adapter import adapters
from cria_prune.recovery.guard import (
    channels_last,
    gradients_kept,
    isolated,
    on_device,
    put_back,
    snapshot,
    trained,
)
from cria_prune.recovery.loop import Batches, Keeper, Metric, RecoverResult, Run, Source, identity
from cria_prune.recovery.step import Distilled, compiled, compiling
from cria_prune.resume.store import State, code_version


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
    state: str | Path | None = None,
    save_every: float = 300.0,
    data: str | None = None,
) -> RecoverResult:
    """Fine-tune `model` in place and leave it at its best epoch.

    Training is SGD with Nesterov momentum, or AdamW; the learning rate rises linearly and falls as a cosine
    or a line, step by step; biases and norms do not decay. The same seed, machine and thread count give the
    same weights, bit for bit. Train/eval modes, gradients, device, memory layout and the global generators
    of torch are afterwards what they were. After an error the weights are what they were, too; after a
    KeyboardInterrupt the model holds the best epoch so far.

    With several processes (`base.ranks`), which all make this call with the same batches, each trains
    on its rows of every batch and the gradients are averaged (torch's DistributedDataParallel); the first
    evaluates and keeps the state, in a folder that all can read, and all end with the same weights.

    With `fsdp` in the config every process has on `device` its share alone of the weights, the gradients and
    the optimizer's tensors (torch's `fully_shard`), also of a teacher; a block's weights are put together
    while it runs. The model waits on the CPU until the weights of the best epoch are copied back into it.
    `evaluate` is called by all processes with the model that is shared out, and has to run the same forwards
    on all. For a state and the best epoch the first process holds all weights on the CPU, and after a
    KeyboardInterrupt it alone has the best epoch. A model that `fully_shard` cannot take is refused.

    With a `state`, the same call in another process goes on where the last state was kept, also after a
    SIGKILL, and ends with the same bits. That asks of `train_batches` that the batches of an epoch depend on
    nothing but the epoch and torch's generators when the epoch begins; those already seen are skipped.

    With `compile` in the config torch.compile makes the step of the model, and what a teacher runs, in one
    process: for small networks on a GPU, and fine-tunes of thousands of steps, since the first one waits for
    it. The bits are other ones. Afterwards torch has forgotten what it compiled in this process, and compiles
    it anew when it is called.

    With `lora` in the config, low-rank adapters of peft are trained beside the linear layers but the head,
    and added to their weights at the end; every other parameter stays. The model is afterwards what it was,
    the same modules and the same parameters. Like full training, it runs with whatever learning rate it is
    given, and wants a higher one.

    Args:
        model: the network; its weights change in place.
        train_batches: an iterable of batches, or a function from the epoch (from 0) to one. An iterable
            without a length is read into memory, for the schedule needs the number of steps.
        config: epochs, learning rate and the rest; `RecoverConfig()` if None.
        evaluate: model -> metric, on data kept apart from both the training and the final
            test. The model comes in eval mode on `device`. Of equal epochs the later is kept. None: no
            metric, and the last epoch is kept.
        teacher: the dense model; used if `config.distill` > 0.
        loss: (model, batch) -> scalar; cross-entropy on the batch's target if None (`base.metrics`).
        lower_is_better: the metric's direction: False for an accuracy, True for a perplexity.
        device: where to train.
        progress: where to show loss, metric and time left; silent if None.
        state: a folder for the state, of this fine-tune alone; the caller removes it. Once the fine-tune is
            finished, the same call returns the same result and trains nothing.
        data: fingerprint of the training data: a state of other data is refused.
        save_every: seconds between two states within an epoch; one is kept after each epoch, too.

    Raises:
        ArtifactError: the state cannot be kept, is damaged, or is of another fine-tune.
        ConfigError: distillation without a teacher; FSDP in one process, or without NCCL on GPUs; compile in
            several, or where torch cannot; nothing to train; for LoRA, no linear layer or no peft.
        DataError: no batches, or a batch that the loss cannot use.
        SignalError: the loss, the metric or a weight became NaN or infinite.
        RankError: another process failed, is gone, or has other batches.
        StructureError: the model cannot be shared out.
    """
    given, model, teacher = model, plain(model), plain(teacher)
    passed("train", model=model)
    config = config or RecoverConfig()
    place = torch.device(device)
    _check(model, config, teacher, place)
    dense = teacher if config.distill else None
    shared = config.fsdp and config.epochs > 0  # a copy is trained: the model waits in nobody's way
    direction = None if evaluate is None else "lower is better" if lower_is_better else "higher is better"
    asked = {
        "config": config.model_dump(mode="json"),
        "device": place.type,
        "metric": direction,
        "data": data,
    }
    keeper = None if state is None else _keeper(state, model, dense, asked, save_every)
    with ExitStack() as stack:
        # What is entered first is left last: the generators are put back after all
        # else, and adapters are merged while the model is still on its device.
        stack.enter_context(isolated(config.seed, place))
        stack.enter_context(gradients_kept(model))
        for network in [model] if dense is None else [model, dense]:
            stack.enter_context(modes_kept(network))
            if place.type in ("cpu", "cuda") and not shared:
                stack.enter_context(channels_last(network))
            stack.enter_context(on_device(network, torch.device("cpu") if shared else place))
        if config.lora and config.epochs:
            stack.enter_context(adapters(model, config.lora))
        objective = loss or cross_entropy
        if dense is not None:
            forward = compiled(dense, place) if config.compile and config.epochs else None
            objective = Distilled(objective, dense.eval(), config.distill, config.temperature, forward)
        # Taken with the adapters in place: an error is mended
        # while they are, before the stack takes them out again.
        before: State = {} if shared else snapshot(model)
        if config.compile:
            stack.enter_context(compiling(model))
        run = Run(model, config, objective, evaluate, lower_is_better, place, keeper)
        try:
            with run.here.together("Recovering"):
                run.fit(Source(train_batches, None if loss else Reader(model)), progress or QUIET)
            if shared:  # not touched so far
                before = snapshot(model)
            put_back(model, run.best_state or before)
            if shared:
                run.here.spread(trained(model).values())
            run.here.meet("The recovered weights", lambda: digest("", trained(model)))
        except KeyboardInterrupt:
            put_back(model, run.best_state or before)
            raise
        except BaseException:
            put_back(model, before)
            raise
    best = run.history[run.best_epoch]
    return RecoverResult(given, tuple(run.history), best.epoch, best.metric, run.history[-1].metric)


def _keeper(
    state: str | Path,
    model: nn.Module,
    dense: nn.Module | None,
    asked: Mapping[str, Any],
    save_every: float,
) -> Keeper:
    """Return what keeps a fine-tune in a folder; a state of another model, request or code is refused."""
    said = {**asked, "torch": torch.__version__, "code": code_version()}
    if world().size > 1:
        said["processes"] = world().size
    return Keeper(state, identity(model, dense, **said), save_every)


def check_possible(config: RecoverConfig, device: torch.device) -> None:
    """Check that the processes and their devices can train so, whatever the model.

    Raises:
        ConfigError: they cannot.
    """
    if config.fsdp and world().size == 1:
        raise ConfigError(
            "A fine-tune by FSDP", "this is one process", "Start several, with torchrun, or set fsdp to false"
        )
    if config.fsdp and device.type == "cuda" and "nccl" not in dist.get_backend_config():
        raise ConfigError(
            "A fine-tune by FSDP on GPUs",
            f"the processes talk by {dist.get_backend_config()}, with which torch crashes there",
            "Start one process for each GPU, so that NCCL joins them, or set fsdp to false",
        )
    if config.compile and world().size > 1:
        raise ConfigError(
            f"A compiled fine-tune in {world().size} processes", "it is for one", "Leave compile out"
        )


def _check(model: nn.Module, config: RecoverConfig, teacher: nn.Module | None, device: torch.device) -> None:
    if config.distill and (teacher is None or teacher is model):
        found = "no teacher was passed" if teacher is None else "the teacher is the model itself"
        raise ConfigError(
            f"Distillation with weight {config.distill}",
            found,
            "Pass teacher=<a copy of the dense model>, or set distill to 0",
        )
    check_possible(config, device)
    if config.epochs and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("A fine-tune", "no parameter of the model requires a gradient", "Unfreeze some")
