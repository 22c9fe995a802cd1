"""The tensors of one pass: counted on one and on two examples, and carried on to a whole batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.batches import Batch, batch_size, cut, forward, map_tensors
from cria_prune.config import RecordConfig
from cria_prune.errors import CriterionError
from cria_prune.loss import Loss, cross_entropy
from cria_prune.memory.live import LiveBytes
from cria_prune.modules import device_of, named_tensors
from cria_prune.record.fisher import FisherSums
from cria_prune.record.keep import unchanged
from cria_prune.record.memory import Reading, taps_of
from cria_prune.record.sampling import tokens_drawn
from cria_prune.record.states import reads_of
from cria_prune.record.taps import Taps
from cria_prune.record.taylor import TaylorSums
from cria_prune.structure.groups import Site, UnitGroup


@dataclass(frozen=True)
class Call:
    """One activation that was read: `name` and `site` of its tap, its `shape`, and what was `alive` then."""

    name: str
    site: Site
    shape: tuple[int, ...]
    itemsize: int
    alive: int


@dataclass(frozen=True)
class Pass:
    """One pass over some examples.

    Attributes:
        examples: how many.
        trace: bytes of activations, and gradients where they are taken, after every operation.
        calls: the activations that were read, in order.
    """

    examples: int
    trace: tuple[int, ...]
    calls: tuple[Call, ...]

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.trace, default=0)


def observe(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    batch: Batch,
    needs: frozenset[str],
    loss: Loss | None = None,
    graphs: Collection[str] = (),
) -> tuple[Pass, Pass]:
    """Return a pass of one example, and one of two, of this batch: as recording makes them, keeping nothing.

    Args:
        model: the live model; it is left as it was. On the meta device the shapes do.
        groups: those that are recorded.
        batch: as in `record`, at least two examples.
        needs: of the criterion.
        loss, graphs: as in `record`.

    Raises:
        DataError: the model does not run on the batch.
        CriterionError: gradients are asked for on the meta device.
    """
    size = batch_size(batch)
    one, two = (_pass(model, groups, cut(batch, size, count), count, needs, loss, graphs) for count in (1, 2))
    return one, two


def _pass(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    batch: Batch,
    examples: int,
    needs: frozenset[str],
    loss: Loss | None,
    graphs: Collection[str],
) -> Pass:
    device, gradients = device_of(model), "gradients" in needs
    if gradients and device.type == "meta":
        raise CriterionError(
            "Counting what gradients take",
            "the model is on the meta device, where there are none",
            "Load its weights, or use a criterion without gradients",
        )
    wanted = dict.fromkeys(
        (item.tap.tensor, item.tap.site) for item in taps_of(groups, reads_of(needs), graphs)
    )
    calls: list[Call] = []
    with unchanged(model), torch.set_grad_enabled(gradients):
        model.eval()
        taylor = TaylorSums(model, groups, loss or cross_entropy) if gradients else None
        fisher = FisherSums(groups) if "examples" in needs else None
        known = [*named_tensors(model).values(), *_tensors(batch)]
        live = LiveBytes(known)

        def receive(name: str, site: Site, activation: Tensor) -> None:
            calls.append(Call(name, site, tuple(activation.shape), activation.element_size(), live.now))

        if fisher:
            fisher.begin(examples)
        with live, Taps(model, wanted, receive, fisher.watch if fisher else None):
            copied = map_tensors(batch, lambda item: item.to(device, copy=True))
            forward(model, copied, taylor.add if taylor else None)
        if fisher:
            fisher.finish()
    return Pass(examples, tuple(live.trace), tuple(calls))


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(map_tensors(batch, lambda item: item)) if isinstance(leaf, Tensor)]


def batch_bytes(batch: Batch) -> int:
    """Return the bytes of the numbers in a batch, labels too."""
    return sum(item.numel() * item.element_size() for item in _tensors(batch))


def largest_batch(batches: Iterable[Batch]) -> Batch:
    """Return the batch of the most bytes, the one that a prediction is to be made for."""
    return max(batches, key=batch_bytes)


def carried_on(one: Pass, two: Pass, examples: int) -> Pass:
    """Return the pass of a whole batch: after every operation, each further example adds the same bytes.

    Where the operations of both passes are not the same ones, those of two examples grow in proportion.
    """
    if examples == 1:
        return one
    names = [[item.name for item in part.calls] for part in (one, two)]
    alike = names[0] == names[1] and len(one.trace) == len(two.trace)

    def grown(first: int, second: int) -> int:
        if not alike:
            return second * examples // 2
        return max(second, second + (examples - 2) * (second - first))

    first = one if alike else two
    calls = []
    for less, more in zip(first.calls, two.calls, strict=True):
        rows = grown(less.shape[0], more.shape[0]) if more.shape else 0
        alive = grown(less.alive, more.alive)
        calls.append(Call(more.name, more.site, (rows, *more.shape[1:]), more.itemsize, alive))
    trace = tuple(grown(*now) for now in zip(first.trace, two.trace, strict=True))
    return Pass(examples, trace, tuple(calls))


def reading_of(call: Call, dim: int, config: RecordConfig, examples: int) -> Reading:
    """Return what a tap along `dim` of an activation of so many examples takes; see `Collector`."""
    shape, features = call.shape, call.shape[dim]
    samples = 1
    for size in shape:
        samples *= size
    samples //= max(features, 1)
    spatial = len(shape) > 2 and dim == 1
    each = samples // max(shape[0], 1)
    taken = shape[0] * min(each, config.positions) if spatial else samples
    if not spatial and len(shape) > 2 and shape[0] % examples == 0:  # of a matrix all rows, if no mask fits
        taken = examples * tokens_drawn(samples // examples, config.tokens)
    return Reading(samples, taken, features, call.itemsize, strided=taken > shape[0])
