"""What a batch is: a tensor, a (inputs, target) pair, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_unflatten

from cria_prune.base.errors import CriaError, DataError, ResourceError, first_line
from cria_prune.base.modules import cache_off, digest, random_kept, state_kept

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]

EXAMPLES = 2
"""Examples in the batch that captures and verifies a model."""

HELD = 32
"""Examples that are held out from every fit, at least, of as many as allow it."""

SMALLER = "Pass smaller batches or shorter inputs, or run on a device with more memory"

LABEL_KEYS = ("labels", "label", "target", "targets")


class Items(tuple[Any, ...]):
    """A batch of several inputs, and any target behind them: a tuple that knows how many are inputs.

    Attributes:
        inputs: so many of the first items are inputs.
        names: the arguments of the forward that they are; None where they are given by position.
    """

    inputs: int
    names: tuple[str, ...] | None

    def __new__(cls, items: Iterable[Any], inputs: int, names: Sequence[str] | None = None) -> Self:
        """Make it of its items."""
        made = super().__new__(cls, items)
        made.inputs, made.names = inputs, None if names is None else tuple(names)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:  # a copy is made of them
        return tuple(self), self.inputs, self.names

    def like(self, items: Iterable[Any]) -> Items:
        """Return other items that are read the same way."""
        return Items(items, self.inputs, self.names)


class Named(dict[str, Any]):
    """A batch of keyword arguments that knows which of them the forward is given.

    Attributes:
        given: their keys; what else there is may be a target, or is left out.
    """

    given: tuple[str, ...]

    def __init__(self, items: Mapping[str, Any], given: Iterable[str]) -> None:
        super().__init__(items)
        self.given = tuple(given)

    def __reduce__(self) -> Any:
        return Named, (dict(self), self.given)


# The functions of torch that take batches apart know the exact types alone.
register_pytree_node(
    Items, lambda item: (list(item), (item.inputs, item.names)), lambda items, how: Items(items, *how)
)
register_pytree_node(
    Named,
    lambda item: (list(item.values()), (tuple(item), item.given)),
    lambda items, how: Named(dict(zip(how[0], items, strict=True)), how[1]),
)


def model_inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into the positional and keyword arguments of the model's forward.

    A tensor is the one input. Of a tuple or list the first item is the input and the
    second, if any, the target. A mapping is passed by keyword, without its labels. Other batches are read
    by the signature of the forward, see `base.inputs`, which makes `Items` and `Named` of them.

    Raises:
        DataError: the batch is of another type or empty.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Items):
        inputs = tuple(batch)[: batch.inputs]
        return (inputs, {}) if batch.names is None else ((), dict(zip(batch.names, inputs, strict=True)))
    if isinstance(batch, Named):
        return (), {key: batch[key] for key in batch.given if key in batch}
    if isinstance(batch, Mapping):
        if batch:
            return (), {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    elif isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2 and isinstance(batch[0], Tensor):
        return (batch[0],), {}
    raise DataError(
        "A batch for the model",
        f"found {describe(batch)}",
        "Turn texts into tensors with the model's tokenizer first"
        if texts(batch)
        else "Pass a tensor, an (inputs, target) pair of tensors, or a mapping of keyword arguments "
        "(for several inputs)",
    )


def texts(value: Any) -> bool:
    """Say whether a batch, or an item of one, is a text or a list of texts."""
    return isinstance(value, str) or (
        isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(item, str) for item in value)
    )


def by_name(batch: Batch) -> Mapping[str, Any]:
    """Return the items of a batch that have names, its targets too; none of a tensor or a pair."""
    if isinstance(batch, Items):
        return model_inputs(batch)[1]
    return batch if isinstance(batch, Mapping) else {}


def without_target(batch: Batch) -> Any:
    """Return the inputs of a batch alone, as a batch."""
    args, kwargs = model_inputs(batch)
    if isinstance(batch, Items):
        return batch.like(tuple(batch)[: batch.inputs])
    if isinstance(batch, Named):
        return Named(kwargs, batch.given)
    return kwargs if kwargs else args[0]


def forward(model: Callable[..., Any], batch: Batch, step: Callable[[Batch], Any] | None = None) -> None:
    """Run a model on a calibration batch, or `step` on the batch, which runs it in its own way.

    Raises:
        DataError: the model raised; its own text is kept.
        ResourceError: the memory does not suffice.
    """
    args, kwargs = model_inputs(batch)
    try:
        if step is None:
            model(*args, **kwargs)
        else:
            step(batch)
    except CriaError:
        raise
    except Exception as error:
        shapes = [describe(value) for value in (*args, *kwargs.values())]
        asked = f"Running {type(model).__name__} on a calibration batch ({', '.join(shapes)})"
        check_memory(error, asked, SMALLER)
        raise DataError(
            asked,
            f"{type(error).__name__}: {error}",
            "Pass batches that the model's forward accepts",
        ) from error


ALONE = "output"
"""Name of an output that is one tensor."""


def names_along(path: Iterable[Any]) -> list[str]:
    """Return the names of the keys, places and attributes on the way to a leaf of a tree of torch."""
    return [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]


def outputs(model: nn.Module, example: Batch) -> list[Tensor]:
    """Return the tensors of a model's output for an example, in evaluation mode, without gradients.

    What the forward leaves on the model is put back, but for its buffers: give a copy where they matter.
    """
    args, kwargs = model_inputs(map_tensors(example, torch.clone))  # a forward may write into its input
    model.eval()
    with cache_off(model), random_kept(), torch.no_grad(), state_kept(model) as written:
        found = [item for item in tree_leaves(model(*args, **kwargs)) if isinstance(item, Tensor)]
        # An output may be a weight, which is put back.
        return [item.clone() for item in found] if written else found


def ran_out(error: BaseException) -> bool:
    """Say whether an error means that a device or the machine has no memory left."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in str(error)  # the CPU has no class of its own


def check_memory(error: Exception, asked: str, mend: str) -> None:
    """Raise a ResourceError where an error means that memory is lacking, for it says nothing of a model.

    Raises:
        ResourceError: that is so.
    """
    if isinstance(error, ResourceError):
        raise error
    if ran_out(error):
        raise ResourceError(asked, f"the memory does not suffice ({first_line(error)})", mend) from error


@contextmanager
def named_shortage(asked: str, mend: str) -> Iterator[None]:
    """Name what was asked, where memory is lacking inside; other errors pass.

    Raises:
        ResourceError: that is so.
    """
    try:
        yield
    except Exception as error:
        check_memory(error, asked, mend)
        raise


def batch_target(batch: Batch) -> Tensor | None:
    """Return the target of a batch, or None where it has none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    place = batch.inputs if isinstance(batch, Items) else 1
    if isinstance(batch, (tuple, list)) and len(batch) == place + 1 and isinstance(batch[place], Tensor):
        return batch[place]
    return None


def batch_size(batch: Batch) -> int:
    """Return the number of examples in a batch (the first dimension of its first tensor).

    Numbers, or pictures, of another length than the first tensor make it one example: the edges of a graph
    name its nodes by number, and the places for pictures in a text are as many as the pictures, so that
    neither can be taken apart. A table or a scale of its own length belongs to all examples.

    Raises:
        DataError: its inputs hold no tensor with a leading dimension, or no example.
    """
    args, kwargs = model_inputs(batch)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors or tensors[0].ndim == 0:
        raise DataError(
            "The number of examples in a batch",
            f"found {describe(batch)}",
            "The first tensor of a batch needs a leading batch dimension",
        )
    size = len(tensors[0])
    if not size:
        raise DataError(
            "The number of examples in a batch",
            f"found none in {describe(tensors[0])}",
            "Leave empty batches out",
        )
    others = [item for item in tensors[1:] if item.ndim and len(item) not in (1, size)]
    return 1 if any(not item.is_floating_point() or item.ndim > 2 for item in others) else size


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with `function` applied to every tensor; a tuple or list keeps its kind."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Items):
        return batch.like(map_tensors(value, function) for value in batch)
    if isinstance(batch, Mapping):
        made = {key: map_tensors(value, function) for key, value in batch.items()}
        return Named(made, batch.given) if isinstance(batch, Named) else made
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def joined(batches: Iterable[Batch], least: int) -> Iterator[Batch]:
    """Yield the inputs of batches, without targets, in batches of at least `least` examples.

    Smaller ones are joined where it is plain that they belong together: the same names, shapes, types and
    devices, and all that is not per example equal. The last may be smaller.
    """
    waiting: Batch | None = None
    for batch in batches:
        # The map makes plain dictionaries of inner mappings, which alone can be taken apart and compared.
        inputs: Batch = map_tensors(without_target(batch), lambda item: item)
        whole = inputs if waiting is None else _together(waiting, inputs)
        if whole is None:
            assert waiting is not None
            yield waiting
            whole = inputs
        waiting = whole
        if batch_size(whole) >= least:
            yield whole
            waiting = None
    if waiting is not None:
        yield waiting


def _together(one: Batch, other: Batch, parted: bool = False) -> Any:
    """Return two batches as one; None where they do not plainly belong together.

    They are `parted` where `rows_of` gave them: what has their length is per example then.
    """
    (ours, structure), (theirs, same) = tree_flatten(one), tree_flatten(other)
    if structure != same:
        return None
    sizes, leaves = (batch_size(one), batch_size(other)), list[Any]()
    for left, right in zip(ours, theirs, strict=True):
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            if isinstance(left, Tensor) or isinstance(right, Tensor) or left != right:
                return None
            leaves.append(left)
            continue
        alike = (left.dtype, left.device, left.shape[1:]) == (right.dtype, right.device, right.shape[1:])
        if not alike or left.ndim != right.ndim:
            return None
        equal = left.shape == right.shape and torch.equal(left, right)
        # An equal tensor of the batch's length may be one of each batch's own, or a
        # table (of positions) that has this length by chance. Whether to double it
        # cannot be told, so such batches are not joined. The first tensor is the input.
        per_example = left.ndim > 0 and (len(left), len(right)) == sizes
        known = parted or not equal or not any(isinstance(item, Tensor) for item in leaves)
        if per_example and known:
            leaves.append(torch.cat([left, right]))
        elif equal and not per_example:
            leaves.append(left)
        else:  # a table of the batch's length, or something of each batch's own
            return None
    return tree_unflatten(leaves, structure)


def move(batch: Any, device: torch.device | str) -> Any:
    """Return the batch with every tensor on `device`."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def describe(value: Any) -> str:
    """Name a value's type, and for containers the types inside, for an error text."""
    name = type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{name} of {len(value)}: ({', '.join(type(item).__name__ for item in value[:4])})"
    return f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name


def cut(batch: Any, size: int, examples: int) -> Any:
    """Return the first examples of a batch: every tensor of leading length `size` is cut."""
    return map_tensors(batch, lambda item: item[:examples] if item.ndim and len(item) == size else item)


def limited(batches: Iterable[Batch], examples: int) -> Iterator[Batch]:
    """Yield batches until `examples` examples have come; the last batch is cut.

    Raises:
        DataError: the batches are not an iterable of batches.
    """
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise DataError(
            "Calibration batches",
            f"found {describe(batches)}",
            "Pass an iterable of batches, such as a DataLoader",
        )
    for batch in batches:
        size = batch_size(batch)
        yield batch if size <= examples else cut(batch, size, examples)
        examples -= size
        if examples <= 0:
            return


def hold_out_every(examples: int) -> int:
    """Return k for a number of calibration examples: of each k in a row the last is held out from every fit.

    About a tenth, and more where that would be fewer than 32: half of 64, one of two.

    Raises:
        DataError: there is one example, or none, so that nothing is left to fit or to measure on.

    >>> [hold_out_every(examples) for examples in (1024, 256, 64, 10)]
    [10, 8, 2, 2]
    """
    if examples < 2:
        raise DataError(
            "Holding calibration examples out, to measure what a cut has done",
            f"found {'one calibration example' if examples else 'no calibration examples'}",
            "Pass two examples or more; some hundreds are usual",
        )
    return max(2, min(10, examples // HELD))


def is_held(number: Any, every: int) -> Any:
    """Say whether examples are held out, by their numbers over all batches: an int, or a tensor of them."""
    return number % every == every - 1


def count_examples(batches: Iterable[Batch], examples: int) -> int:
    """Return how many examples batches hold, at most `examples`; errors as in `limited`."""
    with random_kept():  # a shuffling loader draws from the global generators
        return sum(batch_size(batch) for batch in limited(batches, examples))


def rows_of(batch: Any, rows: Sequence[int]) -> Any:
    """Return some examples of a batch, by their places in it: every tensor of its length is picked from."""
    size, index = batch_size(batch), torch.tensor(list(rows), dtype=torch.long)

    def picked(item: Tensor) -> Tensor:
        per_example = item.ndim > 0 and len(item) == size
        return item.index_select(0, index.to(item.device)) if per_example else item

    return map_tensors(batch, picked)


def held_batches(batches: Iterable[Batch], examples: int) -> list[Batch]:
    """Return the calibration examples that no fit sees, with their targets and masks.

    The example with number i over all batches, from 0, is held out where i % k = k - 1, with k from
    `hold_out_every`: spread, so that a loader sorted by class is no trap. Few of each batch are left, so
    they are joined, up to the size of the first batch, where they have the same names and shapes.

    Args:
        batches: calibration batches, which can be gone through several times, the same each time.
        examples: at most so many are used, see `limited`.

    Raises:
        DataError: there is one example or none, or these are no batches.
    """
    every = hold_out_every(count_examples(batches, examples))
    found, most = list[Batch](), 0
    with random_kept():
        for batch, rows in _numbered(batches, examples):
            most = most or batch_size(batch)
            held = [row for row, number in rows if is_held(number, every)]
            if not held:
                continue
            picked = rows_of(batch, held)
            whole = _together(found[-1], picked, parted=True) if found else None
            if whole is not None and batch_size(whole) <= most:
                found[-1] = whole
            else:
                found.append(picked)
    return found


def fit_batches(batches: Iterable[Batch], examples: int) -> Iterator[Batch]:
    """Yield the examples that `held_batches` leaves, batch by batch; its arguments and errors."""
    every = hold_out_every(count_examples(batches, examples))
    for batch, rows in _numbered(batches, examples):
        left = [row for row, number in rows if not is_held(number, every)]
        if left:
            yield rows_of(batch, left)


class HeldOut:
    """The calibration examples in two parts, read once when they are first asked for; see `held_batches`."""

    def __init__(self, batches: Iterable[Batch], examples: int) -> None:
        self._batches, self._examples = batches, examples

    @cached_property
    def batches(self) -> list[Batch]:
        """Those that no fit sees; errors as in `held_batches`."""
        return held_batches(self._batches, self._examples)

    def fit(self) -> Iterator[Batch]:
        """Yield the others."""
        return fit_batches(self._batches, self._examples)


def _numbered(batches: Iterable[Batch], examples: int) -> Iterator[tuple[Batch, list[tuple[int, int]]]]:
    """Yield batches with their examples' places in them and numbers over all."""
    first = 0
    for batch in limited(batches, examples):
        size = batch_size(batch)
        yield batch, [(row, first + row) for row in range(size)]
        first += size


def told_apart(batch: Batch) -> str:
    """Return a digest of a batch's size and its first example."""
    size = batch_size(batch)
    first = [item for item in tree_leaves(cut(batch, size, 1)) if isinstance(item, Tensor)]
    return digest(str(size), {str(number): item for number, item in enumerate(first)})


def shortened(batch: Batch, device: torch.device) -> Batch:
    """Return the first two examples of a batch, on the device."""
    return move(cut(batch, batch_size(batch), EXAMPLES), device)


def next_examples(batches: Iterable[Batch], device: torch.device) -> Batch | None:
    """Return the two examples that follow `first_examples` in the first batch; None where there are none."""
    with random_kept():
        for batch in batches:
            rows = range(EXAMPLES, min(2 * EXAMPLES, batch_size(batch)))
            return move(rows_of(batch, rows), device) if rows else None
    return None


def again(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Return batches that can be gone through once per round; an iterator is read into a list."""
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise DataError(
            "Calibration batches", f"found {describe(batches)}", "Pass a list or loader of batches"
        )
    return list(batches) if iter(batches) is batches else batches


def further_examples(examples: Sequence[Batch]) -> Sequence[Batch]:
    """Return further batches.

    Raises:
        DataError: they are no list of batches.
    """
    if not isinstance(examples, (tuple, list)):
        raise DataError(
            "Further examples (examples=)", f"found {describe(examples)}",
            "Pass a list of batches: examples=[batch]",
        )  # fmt: skip
    return examples


def first_examples(batches: Iterable[Batch], device: torch.device) -> Batch:
    """Return the first examples of the first batch, on the device.

    Raises:
        DataError: there is no batch.
    """
    with random_kept():  # a shuffling loader draws from the global generators
        for batch in batches:
            return shortened(batch, device)
    raise DataError(
        "Calibration batches", "found none", "Pass at least one batch; a used-up iterator has none"
    )
