"""One training step on all processes: each runs its rows of the batch, and the gradients are averaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from cria_prune.batches import Batch, batch_size, map_tensors
from cria_prune.loss import Loss
from cria_prune.modules import digest
from cria_prune.ranks import World, lost
from cria_prune.recover.guard import generators, isolated, set_generators
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
        size, rank, examples = self.here.size, self.here.rank, batch_size(batch)
        rows, weight = slice(rank, None, size), len(range(rank, examples, size)) * size / examples
        if examples < 2 * size:  # a batch norm needs two rows: each process takes them all
            rows, weight = slice(None), 1.0
        share = map_tensors(batch, lambda item: item[rows] if item.ndim and len(item) == examples else item)
        with isolated(hash((self.seed, rank, step)) % 2**63, self.device):
            found = self._step(share) * weight
        self.meet(batch, step)
        return found, float(self.here.total(found.detach().double())) / size

    def meet(self, batch: Batch, step: int) -> None:
        """Wait for all processes, and check that they are at the same step with the same batch."""
        self.here.meet("A training step", lambda: f"{step} {_told_apart(batch)}")

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


def _told_apart(batch: Batch) -> str:
    """Return a digest of the first example of a batch, and its size."""
    size = batch_size(batch)
    first = [item[:1] if item.ndim else item for item in tree_leaves(batch) if isinstance(item, Tensor)]
    return digest(str(size), {str(number): item for number, item in enumerate(first)})
