"""Training with weights, gradients and the optimizer's tensors shared out over all processes (FSDP).

Every process holds its share of each. The weights of a block are put together while it runs, forwards or
backwards, and no longer. The model that is recovered is not touched meanwhile: a copy of it is shared out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cria_prune.batches import Batch
from cria_prune.errors import StructureError
from cria_prune.loss import Loss
from cria_prune.modules import copy_of
from cria_prune.ranks import World, lost
from cria_prune.recover.loss import Distilled
from cria_prune.recover.parallel import Parallel, of_others
from cria_prune.resume.store import State

DOING = "Recovering by FSDP"

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward, before which nothing could be put together."""

_NUMBERS = count()


class Sharded(Parallel):
    """The steps of a training that all processes take together, by torch's `fully_shard` (FSDP).

    The gradients are those of `Parallel`, up to rounding. All processes have to run the same blocks: where
    one leaves a block out, the others wait for its share in vain.

    Args:
        here: this process among the others; more than one.
        model: the same on all processes; it is only read.
        loss: (model, batch) -> scalar; it calls the model as a whole. A teacher in it is shared out, too.
        device: where the shares are to be.
        seed: of the dropout.

    Raises:
        StructureError: the model cannot be copied or shared out.
    """

    def __init__(self, here: World, model: nn.Module, loss: Loss, device: torch.device, seed: int) -> None:
        self.mesh = _mesh(device)
        super().__init__(here, shared_out(model, self.mesh), loss, device, seed)

    def wrapped(self, loss: Loss) -> Callable[[Batch], Tensor]:
        """Return what gives the loss of a batch, and in its backward pass the averages of the gradients."""
        if isinstance(loss, Distilled):
            teacher = shared_out(loss.teacher, self.mesh).eval()
            loss = Distilled(loss.loss, teacher, loss.weight, loss.temperature)
        return lambda batch: loss(self.model, batch)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, float]:
        """Return the loss of this process's rows, weighed for the backward pass, and that of the batch.

        Raises:
            RankError: another process failed, is gone, or has another batch.
        """
        self.meet(batch, step)  # before one waits in the middle of its forward for one that never comes there
        return super().loss(batch, step)

    def backward(self, loss: Tensor) -> None:
        """Run a loss backwards; the gradients are then the average of all processes."""
        loss.backward()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Train inside, and close the connection at the end.

        Where another process fails in the middle of a step, this one waits for its share, half as long as
        processes wait for each other, and then asks what has happened.

        Raises:
            RankError: another process failed, or is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if not of_others(error):
                raise
            self.here.meet(DOING)
            raise lost(DOING, error) from error
        finally:
            dist.destroy_process_group(self.mesh.get_group())

    def whole(self, state: Mapping[str, Tensor]) -> State:
        """Return what all processes hold shares of, on the CPU: on the first process, to the others nothing.

        All processes call it with the same names.
        """
        found: State = {}
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.here.first:
                found[name] = full.detach().to("cpu", copy=True)
        return found

    @staticmethod
    def share(value: Tensor, like: Tensor) -> Tensor:
        """Return what this process holds of a tensor.

        Args:
            value: the same on all processes.
            like: what the result is to be like; not everything is shared out.
        """
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shared_out(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Return a copy of a model whose weights are shared out, those of each block by themselves.

    Raises:
        StructureError: the model cannot be copied, or torch cannot share it out.
    """
    copied = copy_of(model)
    for weight in copied.parameters():
        weight.data = weight.data.contiguous()
    everywhere = _holders(copied)
    try:
        for block in dict.fromkeys(_blocks(copied)):
            # A weight that others hold too, such as a tied one, is shared out with what holds them all.
            if all(places == everywhere[weight] for weight, places in _holders(block).items()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(copied, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError, AssertionError) as error:  # a weight without dimensions
        raise StructureError(
            f"Sharing {type(model).__name__} out over the processes",
            (str(error).strip().splitlines() or [type(error).__name__])[0],
            "Recover it without fsdp",
        ) from error
    for item in copied.modules():
        if isinstance(item, FSDPModule):
            # What a block's weights are put together in is made here and kept. Made by a look at the metric
            # in torch's inference mode, it would be of no use in training.
            item.unshard()
            item.reshard()
    return copied


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists and sequences of modules."""
    for child in module.children():
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        if listed and not isinstance(child, CONTAINERS):
            yield child
        else:
            yield from _blocks(child)


def _holders(module: nn.Module) -> Counter[int]:
    """Return in how many places each parameter is held: id -> count."""
    return Counter(
        id(value) for item in module.modules() for value in item._parameters.values() if value is not None
    )


def _mesh(device: torch.device) -> DeviceMesh:
    """Return all processes, with a connection of their own.

    One that fails tells the others so over the usual connection, while they may wait for its share over this
    one. They turn there when half of the time is over that processes wait for each other.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    usual = everyone._get_backend(torch.device("cpu" if "gloo" in dist.get_backend_config() else device))
    group = dist.new_group(timeout=usual.options._timeout / 2)
    # Torch remembers plans of exchange by the mesh; one of another name is another mesh.
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=(f"fsdp{next(_NUMBERS)}",))
