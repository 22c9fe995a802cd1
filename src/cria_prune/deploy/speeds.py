"""How fast a network is beside another one: in turns, by batch size and by what runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from cria_prune.base.batches import Batch, batch_size, check_memory, model_inputs, move, rows_of
from cria_prune.base.errors import ConfigError, DataError, said, some
from cria_prune.base.modules import cache_off
from cria_prune.base.progress import QUIET, Progress
from cria_prune.deploy.int8 import quantize_file
from cria_prune.deploy.onnx import calm, export_file
from cria_prune.deploy.session import Flat, OnnxModule, tensors_of
from cria_prune.latency import FINAL, Speed, Timer, compare_speed, wall

RUNTIMES = {
    "eager": "torch as it is",
    "compiled": "torch.compile",
    "onnxruntime": "the ONNX file",
    "int8": "the ONNX file in int8",
}
"""What runs a network -> what that is, in words."""
BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Latency:
    """Two networks at one batch size in one runtime.

    Attributes:
        runtime: one of `RUNTIMES`.
        batch: examples.
        speed: the dense network's seconds of a batch and the other one's, measured in turns.
    """

    runtime: str
    batch: int
    speed: Speed

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON; seconds of a batch."""
        found = self.speed
        return {
            "runtime": self.runtime, "batch": self.batch, "dense": found.dense, "pruned": found.pruned,
            "ratio": found.ratio, "error": found.error, "speedup": found.speedup, "turns": found.turns,
        }  # fmt: skip


def compare_latency(
    dense: nn.Module,
    pruned: nn.Module,
    example: Batch,
    *,
    batches: Sequence[int] = BATCHES,
    runtimes: Sequence[str] = ("eager",),
    threads: int | None = None,
    device: torch.device | str = "cpu",
    seconds: float = FINAL,
    timer: Timer = wall,
    progress: Progress | None = None,
) -> list[Latency]:
    """Measure two networks in turns, at every batch size in every runtime, in this one process.

    Args:
        dense, pruned: on any device; they are moved to `device` and stay there.
        example: one batch that both take; its rows are repeated.
        batches: numbers of examples, each 1 at least.
        runtimes: of `RUNTIMES`; the last two need onnxruntime.
        threads: that a forward may use, of torch and onnxruntime; what torch has now if None.
        device: where.
        seconds: of measuring, for both together, in each cell.
        timer: what measures a run; for tests.
        progress: where to show it.

    Raises:
        ConfigError: a number or a runtime is none, or onnxruntime has no provider for the device.
        DataError: the two do not take the same inputs, or do not run on the example.
        ArtifactError, CertificateError, PackageError: see `export_onnx`.
    """
    _check_asked(batches, runtimes, threads)
    check_same_inputs(dense, pruned, example)
    device, found = torch.device(device), list[Latency]()
    dense, pruned, example = dense.to(device), pruned.to(device), move(example, device)
    cells = len(batches) * len(runtimes)
    with (
        threads_set(threads), cache_off(dense), cache_off(pruned), TemporaryDirectory() as folder,
        (progress or QUIET).bar("measure latency", cells) as bar,
    ):  # fmt: skip
        for runtime in dict.fromkeys(runtimes):
            both = [
                running(net, runtime, example, Path(folder) / f"{place}.onnx", threads, device)
                for place, net in enumerate((dense, pruned))
            ]
            for size in batches:
                batch = rows_of(example, list(islice(cycle(range(batch_size(example))), size)))
                with calm() if runtime == "compiled" else nullcontext():
                    speed = _speed(both, batch, runtime, seconds, timer)
                found.append(Latency(runtime, size, speed))
                bar.update(ms=1e3 * speed.pruned)
    return found


def _speed(both: Sequence[nn.Module], batch: Batch, runtime: str, seconds: float, timer: Timer) -> Speed:
    try:
        return compare_speed(both[0], both[1], batch, seconds=seconds, timer=timer)
    except Exception as error:  # whatever a compiler or a forward raises
        asked = f"The latency of a batch of {batch_size(batch)} by {RUNTIMES[runtime]}"
        check_memory(error, asked, "Measure smaller batches")
        raise DataError(asked, f"it stops with {said(error)}", "Leave this runtime or batch out") from error


def running(
    model: nn.Module, runtime: str, example: Batch, path: Path, threads: int | None, device: torch.device
) -> nn.Module:
    """Return a network as a runtime has it; ONNX files are written to `path` and beside it."""
    if runtime == "eager":
        return model
    if runtime == "compiled":
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        return compiled
    export_file(model, example, path)
    if runtime == "int8":
        source, path = path, path.with_suffix(".int8.onnx")
        quantize_file(source, path)
    order = Flat(model, example).names
    return OnnxModule(path, order, torch.get_num_threads() if threads is None else threads, str(device))


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads inside; as many as before if None."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_asked(batches: Sequence[int], runtimes: Sequence[str], threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError("Threads of a forward", f"found {threads}", "Give 1 or more, or leave it out")
    if not batches or min(batches) < 1:
        raise ConfigError("Batch sizes", f"found {list(batches)}", "Give numbers from 1 on, such as 1,8,64")
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        found = f"found {', '.join(unknown) or 'none'}"
        raise ConfigError("A runtime", found, f"Known runtimes: {', '.join(RUNTIMES)}")


def check_same_inputs(dense: nn.Module, pruned: nn.Module, *examples: Batch) -> None:
    """Raise a DataError unless the examples of two networks are alike, and both run on the first."""
    asked, todo = "Comparing the latency of two networks", "Give the pruned network and the dense one of it"
    said_of = [
        {
            name: f"{str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}"
            for name, item in zip(Flat(net, example).names, tensors_of(example), strict=True)
        }
        for net, example in zip((pruned, dense), examples, strict=False)
    ]
    if len(said_of) == 2 and said_of[0] != said_of[1]:
        names = sorted(
            name for name in said_of[0] | said_of[1] if said_of[0].get(name) != said_of[1].get(name)
        )
        apart = [f"{name!r} is {said_of[0].get(name)} and {said_of[1].get(name)}" for name in names]
        raise DataError(asked, f"their inputs differ: {some(apart)}", todo)
    args, kwargs = model_inputs(examples[0])
    for title, net in (("pruned", pruned), ("dense", dense)):
        try:
            with cache_off(net), torch.no_grad():
                net(*args, **kwargs)
        except Exception as error:  # whatever a forward raises
            raise DataError(
                asked, f"the {title} one does not run on the inputs, {said(error)}", todo
            ) from error
