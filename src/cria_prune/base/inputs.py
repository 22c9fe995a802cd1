"""What the items of a batch are taken for, by the signature of the model's forward.

    ==================================  ======================================================================
    batch                               what its items are
    ==================================  ======================================================================
    tensor                              the input
    (x, y), forward takes one           input and target
    (x, y), forward may take a second   the target, if the forward fails with y or is plainly not moved by it;
                                        else refused, for y may be a mask
    (x, y), forward needs two           refused: it may be a pair of inputs, or lack one
    three items or more                 as many inputs as the forward needs, and one target; else refused
    mapping                             keyword arguments; a target where the forward can do without it;
                                        what the forward does not take is left out, and said
    ==================================  ======================================================================

`inputs` decides where that is refused: a number of items, or the names of the arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune.base.batches import (
    LABEL_KEYS,
    Batch,
    Items,
    Named,
    describe,
    outputs,
    shortened,
    texts,
)
from cria_prune.base.errors import DataError
from cria_prune.base.events import passed
from cria_prune.base.modules import device_of, named_tensors, shared_copy

Inputs = int | Sequence[str]
"""How many of the first items of a tuple are inputs, or which arguments of the forward they are; of a
mapping, which keys the forward is given."""

HOW = (
    'Pass a mapping of keyword arguments, {"left": ..., "right": ...}, with a target under "labels"; '
    'or say inputs=2, or inputs=("left", "right"), for the first items that are inputs'
)
PLACES = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
HIDDEN = -1e4
"""A floating mask that is added has 0 for what is seen, and this or less for what is hidden."""


def named(inputs: Inputs | None) -> Inputs | None:
    """Return what decides the inputs in one form: a number, or a tuple of names."""
    return (
        (inputs,)
        if isinstance(inputs, str)
        else inputs
        if inputs is None or isinstance(inputs, int)
        else tuple(inputs)
    )


class Reader:
    """Reads batches by the signature of a model's forward; of a kind that it has seen it knows how.

    Args:
        model: unwrapped; it is run, on copies, where a second item may be an input or a target.
        inputs: decides instead, see `Inputs`.

    Attributes:
        inputs: as they were said.
        notes: what the items were taken for, a line for each kind of batch.
    """

    def __init__(self, model: nn.Module, inputs: Inputs | None = None) -> None:
        self._model, self._name = model, type(model).__name__
        self.inputs = self._inputs = named(inputs)
        self._known: dict[Any, tuple[int, tuple[str, ...] | None] | tuple[str, ...] | None] = {}
        self.notes: list[str] = []
        parameters = _parameters(model)
        self._parameters = parameters or {}
        places = [item for item in self._parameters.values() if item.kind in PLACES]
        self._places = places
        self._variable = [item for item in self._parameters.values() if item.kind is Parameter.VAR_POSITIONAL]
        self._needed = [item for item in places if item.default is Parameter.empty]
        self._open = parameters is None or Parameter.VAR_KEYWORD in {
            item.kind for item in parameters.values()
        }

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch that `batches.model_inputs` can take apart: the very same where it can already.

        Raises:
            DataError: it cannot be told what an item is, or an item is no input of a model.
        """
        if isinstance(batch, (Items, Named)):
            return batch
        if isinstance(batch, Mapping):
            keys = tuple(batch)
            if keys not in self._known:
                self._known[keys] = self._mapping(batch)
            given = self._known[keys]
            return batch if given is None else Named(batch, given)  # type: ignore[arg-type]
        if isinstance(batch, Tensor):
            if len(self._needed) > 1 and self._inputs is None:
                raise self._refused(batch, f"its forward needs {_names(self._needed)}")
            return batch
        if isinstance(batch, (tuple, list)):
            kind = tuple(type(item) if item is None or texts(item) else Tensor for item in batch)
            if kind not in self._known:
                self._check_items(batch)
                self._known[kind] = self._tuple(batch)
            how = self._known[kind]
            return batch if how is None else Items(batch, *how)
        return batch  # of another kind: `model_inputs` says so

    def _refused(self, batch: Any, found: str, todo: str = HOW) -> DataError:
        return DataError(f"Reading a batch for {self._name}, {describe(batch)}", found, todo)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        passed("inputs", model=self._model, text=text)

    # Tuples and lists.

    def _check_items(self, batch: Sequence[Any]) -> None:
        count = self._inputs if isinstance(self._inputs, int) else len(self._inputs or "1")
        for item in batch[:count]:
            if texts(item):
                raise self._refused(
                    batch, "texts are among its inputs",
                    "Turn them into tensors with the model's tokenizer first",
                )  # fmt: skip
            if isinstance(item, (tuple, list, Mapping)):
                raise self._refused(
                    batch, f"an input is a {describe(item)}: tuples within tuples are not read",
                    'Pass a mapping of keyword arguments, with a target under "labels"',
                )  # fmt: skip

    def _tuple(self, batch: Sequence[Any]) -> tuple[int, tuple[str, ...] | None] | None:
        """Return how many items are inputs, and their names; None for an input and any target."""
        if self._inputs is not None:
            return self._decided(batch, self._inputs)
        count, needed = len(batch), len(self._needed)
        if count < 3:
            if needed > 1:
                raise self._refused(
                    batch,
                    f"its forward needs {_names(self._needed)}, and a second item is a target elsewhere"
                    if count == 2
                    else f"its forward needs {_names(self._needed)}",
                )
            if count == 2 and isinstance(batch[1], Tensor):
                self._check_target(batch, 1)
                self._note(f"batches: item 1 is the input{self._called(0)}, item 2 the target")
            return None
        if any(item is None for item in batch[:needed]):
            raise self._refused(batch, "an input is None", "Pass a mapping without it")
        if needed == count - 1:
            self._check_target(batch, needed)
        elif needed != count:
            raise self._refused(
                batch, f"its forward needs {_names(self._needed) or 'none'}, and may take more"
            )
        return self._read(batch, needed)

    def _read(
        self, batch: Sequence[Any], count: int, names: tuple[str, ...] | None = None
    ) -> tuple[int, tuple[str, ...] | None]:
        """Return so many first items as inputs, and say so."""
        if names is None:
            places = self._places[:count]
            plain = len(places) == count and all(item.kind is PLACES[1] for item in places)
            names = tuple(item.name for item in places) if plain else None
        said = [f"item {place + 1} is the input {name!r}" for place, name in enumerate(names or ())]
        said = said or [f"the first {count} items are inputs"]
        if len(batch) > count:
            said.append(f"item {count + 1} the target")
        self._note(f"batches: {', '.join(said)}")
        return count, names

    def _decided(self, batch: Sequence[Any], inputs: Inputs) -> tuple[int, tuple[str, ...] | None]:
        """Return what the caller says."""
        count = inputs if isinstance(inputs, int) else len(inputs)
        if not 1 <= count <= len(batch) <= count + 1:
            raise self._refused(
                batch, f"inputs={inputs!r} says that {count} of its items are inputs, and one more a target",
                "Say how many of the first items are inputs; or pass a mapping of keyword arguments",
            )  # fmt: skip
        if isinstance(inputs, int):
            return self._read(batch, count)
        unknown = [name for name in inputs if name not in self._parameters]
        if unknown and not self._open:
            raise self._refused(
                batch, f"inputs={inputs!r} names {', '.join(unknown)}, which its forward does not take",
                f"Its arguments are {', '.join(self._parameters)}",
            )  # fmt: skip
        return self._read(batch, count, tuple(inputs))

    def _called(self, place: int) -> str:
        return f" {self._places[place].name!r}" if place < len(self._places) else ""

    def _check_target(self, batch: Sequence[Any], place: int) -> None:
        """Refuse a last item that may as well be an input that the forward can do without."""
        item, first = batch[place], batch[0]
        if not isinstance(item, Tensor) or not isinstance(first, Tensor):
            return
        masks = like_a_mask(item)
        # `model(*batch)` would give it to the next argument; a mask may be meant for any of that name.
        following = next(iter([*self._places[place:], *self._variable]), None)
        for other in (*self._places[place:], *self._variable):
            mask, label = "mask" in other.name, _is_label(other.name)
            if not _takes_tensor(other) or not (masks if mask else other is following):
                continue
            if self._is_read(batch[: place + 1], None if other is following else other.name, mask, label):
                raise self._refused(
                    batch,
                    f"item {place + 1}, {describe(item)}, may be a target, or the argument {other.name!r} "
                    "of its forward",
                    f"Say inputs={place} if it is a target, or inputs={place + 1} or the names of the "
                    "arguments if it is an input; or pass a mapping of keyword arguments",
                )

    def _is_read(self, items: Sequence[Any], name: str | None, mask: bool, label: bool) -> bool:
        """Say whether the forward runs with the last item, by its place or a name, and is moved by it."""
        if _is_elsewhere(self._model):
            return not label  # nothing can be tried
        count = len(items)
        names = None if name is None else (*(other.name for other in self._places[: count - 1]), name)
        example = shortened(Items(items, count, names), device_of(self._model))
        try:
            found = outputs(shared_copy(self._model), example)
        except Exception:  # whatever a forward raises that is given a target
            return False
        if label and any(not tensor.ndim for tensor in found):
            return False  # with it a loss is given
        # A mask that hides nothing in two examples may hide something in others.
        if mask:
            return True
        try:
            alone = outputs(shared_copy(self._model), Items(tuple(example)[:-1], count - 1))
        except Exception:  # it cannot do without
            return True
        return len(found) != len(alone) or not all(map(torch.equal, found, alone))

    # Mappings.

    def _mapping(self, batch: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the keys that the forward is given; None for all but the targets."""
        if isinstance(self._inputs, int):
            raise self._refused(
                batch, f"inputs={self._inputs} counts the items of a tuple", "Name the keys that are inputs"
            )
        if self._inputs is not None:
            absent = [name for name in self._inputs if name not in batch]
            if absent:
                raise self._refused(
                    batch, f"it has no {', '.join(absent)}", f"Its keys are {', '.join(batch)}"
                )
            given = list(self._inputs)
        else:
            given = [key for key in batch if self._takes(batch, key)]
        left = [key for key in batch if key not in given and key not in LABEL_KEYS]
        if not given:
            raise self._refused(
                batch, f"of its keys ({', '.join(map(str, batch)) or 'none'}) the forward takes none",
                f"Its arguments are {', '.join(self._parameters)}",
            )  # fmt: skip
        self._check_left(batch, given, left)
        for key in given:
            if texts(batch[key]) and not isinstance(batch[key], str):
                raise self._refused(
                    batch, f"{key!r} holds texts", "Turn them into tensors with the model's tokenizer first"
                )
        labels = [key for key in batch if key in LABEL_KEYS]
        said = [f"{key!r} is {'given to the forward' if key in given else 'the target'}" for key in labels]
        said += [f"{key!r} is left out, for the forward does not take it" for key in left]
        if said:
            self._note(f"batches: {', '.join(said)}")
        usual = [key for key in batch if key not in LABEL_KEYS]
        return None if given == usual else tuple(given)

    def _takes(self, batch: Mapping[str, Any], key: str) -> bool:
        taken = self._parameters.get(key)
        if key not in LABEL_KEYS:
            return taken is not None or self._open
        if taken is None:
            return False
        return taken.default is Parameter.empty or self._conditions(batch, key)

    def _conditions(self, batch: Mapping[str, Any], key: str) -> bool:
        """Say whether a target that the forward may take is an input: with it, no loss is given."""
        # By the convention of transformers labels only add a loss.
        if hasattr(getattr(self._model, "config", None), "model_type"):
            return False
        if _is_elsewhere(self._model):
            return False
        given = [
            name for name in batch if name == key or (name not in LABEL_KEYS and self._takes(batch, name))
        ]
        example = shortened(Named(batch, given), device_of(self._model))
        try:
            found = outputs(shared_copy(self._model), example)
        except Exception:  # whatever a forward raises that is given no target of its own kind
            return False
        return bool(found) and all(item.ndim > 0 for item in found)

    def _check_left(self, batch: Mapping[str, Any], given: Sequence[str], left: Sequence[str]) -> None:
        """Refuse to leave out a mask where the forward takes one that it is not given."""
        unused = [name for name in self._parameters if "mask" in name and name not in given]
        lost = [key for key in left if "mask" in str(key) and isinstance(batch[key], Tensor)]
        if lost and unused:
            raise self._refused(
                batch, f"the forward does not take {lost[0]!r}, but {', '.join(unused)}",
                f"Rename {lost[0]!r}, or say inputs=({', '.join(map(repr, given))}{',' * (len(given) == 1)})",
            )  # fmt: skip


class Read:
    """Batches that are read one by one, by the signature of a model's forward.

    Attributes:
        source: the batches as they were given.
        reader: reads each of them.
    """

    def __init__(self, source: Iterable[Batch], reader: Reader) -> None:
        self.source, self.reader = source, reader

    def __iter__(self) -> Iterator[Batch]:
        return map(self.reader, self.source)

    def __len__(self) -> int:
        if not isinstance(self.source, Sized):
            raise TypeError(f"{type(self.source).__name__} has no length")
        return len(self.source)


def read(model: nn.Module, batches: Iterable[Batch], inputs: Inputs | None = None) -> Iterable[Batch]:
    """Return batches read by the signature of a model's forward; see `Reader`. What was read stays so."""
    if isinstance(batches, Read) and inputs is None:
        return batches
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        return batches  # no batches: who goes through them says so
    source = batches.source if isinstance(batches, Read) else batches
    return Read(source, Reader(model, inputs))


def read_one(model: nn.Module, batch: Any, inputs: Inputs | None = None) -> Any:
    """Return one batch read by the signature of a model's forward; see `Reader`."""
    return Reader(model, inputs)(batch)


def source_of(batches: Any) -> Any:
    """Return batches as they were given."""
    return batches.source if isinstance(batches, Read) else batches


def inputs_of(batches: Any) -> Inputs | None:
    """Return what `inputs=` said of batches; None where they are read by the signature alone."""
    return batches.reader.inputs if isinstance(batches, Read) else None


def notes_of(batches: Any) -> tuple[str, ...]:
    """Return what was said of the items of batches so far."""
    return tuple(batches.reader.notes) if isinstance(batches, Read) else ()


def _parameters(model: nn.Module) -> dict[str, Parameter] | None:
    """Return the arguments of a model's forward; None where it does not say them."""
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError, NameError):
        return None


def _is_elsewhere(model: nn.Module) -> bool:
    """Say whether some of a model's weights have no values here, so that its copy does not run."""
    return any(tensor.is_meta for tensor in named_tensors(model).values())


def _names(parameters: Iterable[Parameter]) -> str:
    return ", ".join(repr(item.name) for item in parameters)


def _is_label(name: str) -> bool:
    return "label" in name or "target" in name


def _takes_tensor(parameter: Parameter) -> bool:
    """Say whether an argument may be given a tensor."""
    if parameter.kind is Parameter.VAR_POSITIONAL:
        return True
    if parameter.annotation is not Parameter.empty:
        return "Tensor" in str(parameter.annotation)
    return parameter.default is None or parameter.default is Parameter.empty


def like_a_mask(item: Tensor) -> bool:
    """Say whether the values of a tensor are those of a mask: true or false, 0 or 1, or 0 and very low.

    Whole numbers of one dimension are classes.
    """
    if item.dtype is torch.bool:
        return True
    if item.ndim < 2 or item.is_complex():
        return False
    plain = (item == 0) | (item == 1)
    low = item <= HIDDEN if item.is_floating_point() else torch.zeros_like(plain)
    return bool((plain | low).all())
