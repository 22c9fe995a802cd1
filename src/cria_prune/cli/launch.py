"""A command in one of several processes, as torchrun and accelerate launch start them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from cria_prune.base.errors import ConfigError, RankError, first_line

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = "CRIA_TIMEOUT"
SECONDS = 600.0  # that one process waits for another


def size() -> int:
    """Return how many processes were launched together, as the environment says."""
    given = all(os.environ.get(name) for name in NAMES)
    return int(os.environ["WORLD_SIZE"]) if given else 1


def rank() -> int:
    """Return the number of this process among them."""
    return int(os.environ["RANK"]) if size() > 1 else 0


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that were launched together, and leave them at the end; nothing for one alone.

    A process waits CRIA_TIMEOUT seconds, 600 by default, for another that is silent.
    """
    if size() == 1:
        yield
        return
    from datetime import timedelta

    import torch
    from torch import distributed as dist

    try:
        seconds = _seconds()
        backend, devices = "gloo", torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % devices)
            each = int(os.environ.get("LOCAL_WORLD_SIZE") or size()) <= devices
            backend = "cpu:gloo,cuda:nccl" if each else "gloo"  # NCCL wants a device for each process
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        found = error if isinstance(error, ConfigError) else RankError(
            f"Joining {size()} processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            first_line(error),
            "Start all of them with one torchrun or accelerate launch for each machine",
        )  # fmt: skip
        print(f"error on rank {rank()}: {found}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharing(several: bool) -> AbstractContextManager[None]:
    """Return what a command runs in: where it fails in one of several processes, it ends in all.

    Args:
        several: the command can be shared out over processes.

    Raises:
        ConfigError: it cannot, and there are several.
    """
    if size() == 1:
        return nullcontext()
    if not several:
        raise ConfigError(
            "This command", f"{size()} processes were launched for it", "Start it alone, without torchrun"
        )
    from cria_prune.base.ranks import world

    return world().together("The command")


def _seconds() -> float:
    given = os.environ.get(TIMEOUT) or str(SECONDS)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise ConfigError(f"The environment's {TIMEOUT}", f"found {given!r}", "Give seconds, more than 0")
    return seconds
