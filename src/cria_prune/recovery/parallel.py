"""One training step on all processes: rows of the batch shared out, or weights and gradients too."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cria_prune.base.batches import Batch, batch_size, map_tensors, told_apart
from cria_prune.base.errors import StructureError, first_line
from cria_prune.base.metrics import Loss
from cria_prune.base.modules import copy_of
from cria_prune.base.ranks import World, lost
from cria_prune.recovery.guard import generators, isolated, set_generators
from cria_prune.recovery.step import Distilled
from cria_prune.resume.store import State


class _Step(nn.Module):
    """A model and its loss as one module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        # Torch warns where it is asked to look for unread parameters and finds none: here it finds one.
        self.unread = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


class Parallel:
    """The steps of a training that all processes take together, by torch's DistributedDataParallel.

    With a loss that is a mean over the examples, and without batch norms and dropout, the gradients are those
    of one process, up to rounding. As there, a batch norm sees the rows of its own process alone; their
    statistics are averaged after each epoch. Dropout draws differently on every process.

    Args:
        here: this process among the others; more than one.
        model: on `device`, the same on all processes.
        loss: (model, batch) -> scalar.
        device: where the model is.
        seed: of the dropout.
    """

    def __init__(self, here: World, model: nn.Module, loss: Loss, device: torch.device, seed: int) -> None:
        self.here, self.model, self.device, self.seed = here, model, device, seed
        self._step = self.wrapped(loss)

    def wrapped(self, loss: Loss) -> Callable[[Batch], Tensor]:
        """Return what gives the loss of a batch, and in its backward pass the averages of the gradients."""
        with warnings.catch_warnings():
            # `broadcast_buffers` has another name in newer versions of torch, which older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                _Step(self.model, loss, self.device),
                broadcast_buffers=False,
                process_group=self.here.group if self.device.type == "cpu" else None,
                # Not every loss reads every parameter, and a pruned network may have some that nothing reads.
                find_unused_parameters=True,
            )

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, float]:
        """Return the loss of this process's rows, weighed for the backward pass, and that of the batch.

        Raises:
            RankError: another process failed, is gone, or has another batch.
        """
        # Rows are dealt like cards. A process with more rows than another counts more, so
        # that the average over the processes is the mean over the batch, whatever its size.
        size, rank, examples = self.here.size, self.here.rank, batch_size(batch)
        rows, weight = slice(rank, None, size), len(range(rank, examples, size)) * size / examples
        if examples < 2 * size:  # a batch norm needs two rows: each process takes them all
            rows, weight = slice(None), 1.0
        share = map_tensors(batch, lambda item: item[rows] if item.ndim and len(item) == examples else item)
        # Dropout differs between processes and depends on the
        # step alone, so a run that goes on draws the same.
        with isolated(hash((self.seed, rank, step)) % 2**63, self.device):
            found = self._step(share) * weight
        self.meet(batch, step)
        return found, float(self.here.total(found.detach().double())) / size

    def meet(self, batch: Batch, step: int) -> None:
        """Wait for all processes, and check that they are at the same step with the same batch."""
        self.here.meet("A training step", lambda: f"{step} {told_apart(batch)}")

    def backward(self, loss: Tensor) -> None:
        """Run a loss backwards; the gradients are then the average of all processes.

        Raises:
            RankError: another process is gone.
        """
        try:
            with warnings.catch_warnings():
                # Weights lie channels last on a CPU; a copy of each small gradient is all that it costs.
                warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
                loss.backward()
        except RuntimeError as error:
            if of_others(error):
                raise lost("A training step", error) from error
            raise

    def agree(self) -> None:
        """Make the buffers alike: averages of what the batch norms saw, all else from the first process."""
        self.here.meet("The end of an epoch")
        norms = statistics(self.model)
        for value in norms.values():
            value.copy_(self.here.total(value.double()) / self.here.size)
        seen = {id(value) for value in norms.values()}
        self.here.spread(value for value in self.model.buffers() if id(value) not in seen)

    def each(self) -> State:
        """Return what the batch norms of every process have seen: name -> (processes, channels), float64."""
        found: State = {}
        for name, value in statistics(self.model).items():
            # A sum of zeros and one part is that part, bit for bit:
            # no average would bring a process back to where it was.
            stacked = torch.zeros(self.here.size, *value.shape, dtype=torch.float64)
            stacked[self.here.rank] = value
            found[name] = self.here.total(stacked)
        return found

    def take(self, held: State) -> None:
        """Put back what `each` returned: every process takes its own."""
        for name, value in statistics(self.model).items():
            value.copy_(held[name][self.here.rank])


def statistics(model: nn.Module) -> State:
    """Return the running means and variances of a model's batch norms, by name."""
    return {
        f"{path}.{local}".strip("."): value
        for path, item in model.named_modules()
        if isinstance(item, nn.modules.batchnorm._BatchNorm)
        for local, value in (("running_mean", item.running_mean), ("running_var", item.running_var))
        if value is not None
    }


def of_others(error: BaseException) -> bool:
    """Say whether an error is of the exchange with another process, which is gone or silent."""
    words = ("gloo", "nccl", "connection")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put the generators back on leaving: what one process draws for itself must not set it apart."""
    now = generators(device)
    try:
        yield
    finally:
        set_generators(now, device)


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
            # All call it, for each holds a share; the first alone keeps the result.
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.here.first:
                found[name] = full.detach().to("cpu", copy=True)
        return found


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
            first_line(error),
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
