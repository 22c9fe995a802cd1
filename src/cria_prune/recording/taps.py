"""Reads the signals of unit groups while the model runs, without touching the model.

Every call of a layer function (`linear`, `conv2d`, `batch_norm`, ...) is looked at, and told apart by its
weight: a parameter, a view of one, or what is computed from some. So functional calls, shared modules and
any class of module are read alike, and nothing is registered on the model that could stay behind. See
docs/decisions/0002. The weights that accelerate loads for each forward have no identity that lasts: they are
told by their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import cria_prune.base.experts  # noqa: F401  (it registers an operation that is read here)
from cria_prune.base.dispatched import Place, first_names, is_dispatched, places
from cria_prune.base.errors import CriterionError, StructureError
from cria_prune.base.modules import named_tensors
from cria_prune.recording.recurrent import is_recurrent, signals
from cria_prune.structure.groups import Site, end_of, site_of
from cria_prune.structure.weights import ViewNumbers, main_tensor


class Argument(NamedTuple):
    """An argument of a function: its place among the positional ones, and its name."""

    place: int
    name: str

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the argument's value in a call, or None where it is left out."""
        return args[self.place] if self.place < len(args) else kwargs.get(self.name)


class Signature(NamedTuple):
    """Where a layer function takes its data, and the tensors that may name the call."""

    data: Argument
    keys: tuple[Argument, ...]
    rows: bool = False  # an embedding: its result is the signal at the site `rows`
    product: bool = False  # either of data and key may be the weight
    summed: int = 1  # the dimension of the weight that is summed over


EINSUM = torch.functional.einsum
DATA, WEIGHT = Argument(0, "input"), Argument(1, "weight")
WEIGHTED = [getattr(functional, f"conv{n}d") for n in (1, 2, 3)]
TURNED = [getattr(functional, f"conv_transpose{n}d") for n in (1, 2, 3)]
PRODUCTS = [torch.matmul, Tensor.matmul, Tensor.__matmul__]
ROUTED = torch.ops.cria_prune.routed_mm.default
SIGNATURES: dict[Any, Signature] = {
    **dict.fromkeys([functional.linear, torch.convolution, *WEIGHTED], Signature(DATA, (WEIGHT,))),
    **dict.fromkeys(TURNED, Signature(DATA, (WEIGHT,), summed=0)),
    **dict.fromkeys(
        [torch.addmm, Tensor.addmm], Signature(Argument(1, "mat1"), (Argument(2, "mat2"),), summed=0)
    ),
    **dict.fromkeys([torch.bmm, Tensor.bmm], Signature(DATA, (Argument(1, "mat2"),), product=True)),
    ROUTED: Signature(DATA, (WEIGHT,)),
    **dict.fromkeys([torch.mm, Tensor.mm], Signature(DATA, (Argument(1, "mat2"),), product=True)),
    **dict.fromkeys(PRODUCTS, Signature(DATA, (Argument(1, "other"),), product=True)),
    EINSUM: Signature(Argument(1, "operands"), (Argument(2, "operands"),), product=True),
    functional.embedding: Signature(DATA, (WEIGHT,), rows=True),
    functional.batch_norm: Signature(DATA, (Argument(3, "weight"), Argument(1, "running_mean"))),
    torch.batch_norm: Signature(DATA, (WEIGHT, Argument(3, "running_mean"))),
}
"""The layer functions that are read, by the function objects that a mode sees."""
NORMS = {functional.batch_norm, torch.batch_norm}


class Weights:
    """Knows, while a model runs, which tensors come from its parameters and buffers alone, and from which.

    The same is found in the captured operations (`structure.weights`): what depends on an input is data.

    Args:
        model: the live model; it is only looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        named = named_tensors(model)
        self.first: dict[int, str] = {}
        for name, tensor in named.items():
            self.first.setdefault(id(tensor), name)
        self.tensors = {name: named[name] for name in self.first.values()}
        self._made: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()

    def origin(self, tensor: Tensor) -> frozenset[str] | None:
        """Return the first names of the parameters that a tensor comes from; None where it is data."""
        for item in (tensor, tensor._base):
            if item is not None and id(item) in self.first:
                return frozenset([self.first[id(item)]])
        return self._made.get(tensor)

    def follow(self, args: Iterable[Any], result: Any) -> None:
        """Note what a function made of weights alone."""
        made = [item for item in _flat([result]) if id(item) not in self.first]
        if not made:
            return
        names = frozenset[str]()
        for item in _flat(args):
            found = self.origin(item)
            if found is None:
                return
            names |= found
        for item in made:
            self._made[item] = names

    def main(self, names: frozenset[str]) -> str:
        """Name the parameter that a weight goes by."""
        return main_tensor({name: tuple(self.tensors[name].shape) for name in self.tensors if name in names})


def _summed(equation: str, first: bool) -> list[int]:
    """Return the dimensions of a weight that an einsum sums over; `first`: it is the first operand."""
    terms, _, result = equation.replace(" ", "").partition("->")
    weight, data = terms.split(",")[:: 1 if first else -1]
    return [place for place, letter in enumerate(weight) if letter in data and letter not in result]


def _flat(items: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors of some arguments, lists opened."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _flat(item)


class Taps(TorchFunctionMode):
    """Inside `with Taps(...):`, hands over the data that flows into and out of the wanted operations.

    An activation is handed over before any later operation can overwrite it in place; the receiver
    copies what it keeps at once. It may be a view of live memory and must not be written to.

    Args:
        model: the live model; it is only looked at.
        wanted: (name of a parameter or buffer, site) pairs, as `Tap` has them.
        receive: called with (name, site, activation), the activation detached.
        watch: called, after `receive`, with what an operation made, still in the graph of gradients; the
            model goes on with what it returns.

    Attributes:
        routed: weight of experts -> rows that each of them got.

    Raises:
        StructureError: the model has no tensor of a wanted name.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Iterable[tuple[str, Site]],
        receive: Callable[[str, Site, Tensor], None],
        watch: Callable[[str, Site, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._watch = watch
        self.routed: dict[str, Tensor] = {}
        tensors = named_tensors(model)
        self._receive = receive
        self._weights, self._views = Weights(model), ViewNumbers()
        self._sites: dict[str, list[tuple[str, Site]]] = {}
        self._places: list[tuple[Place, str]] = []  # of weights without a lasting identity
        first = first_names(model) if is_dispatched(model) else {}
        for name, site in dict.fromkeys(wanted):
            if name not in tensors:
                raise StructureError(
                    f"Reading the signal at {name!r}",
                    f"{type(model).__name__} has no parameter or buffer of that name",
                    "Discover the unit groups of this model again",
                )
            key = first.get(name) or self._weights.first[id(tensors[name])]
            self._sites.setdefault(key, []).append((name, site))
        if first:
            self._places = [
                (place, first[name]) for name, place in places(model).items() if first[name] in self._sites
            ]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` as it is; if a wanted tensor names the call, hand its data over."""
        kwargs = kwargs or {}
        if is_recurrent(func):
            # In evaluation mode cuDNN's recurrent layers have no gradient, which some criteria take.
            with torch.backends.cudnn.flags(enabled=False) if torch.is_grad_enabled() else nullcontext():
                result = func(*args, **kwargs)
            self._read_recurrent(func, args, result)
            return result
        signature = SIGNATURES.get(func)
        data, sites = self._reading(func, signature, args, kwargs) if signature else (None, ())
        for name, site in sites:
            # Before the call, while the data is sure to be what the operation reads.
            if end_of(site) == "input" and data is not None:
                self._receive(name, site, data.detach())
        if func is ROUTED:
            self._count([name for name, _ in sites], *args[1:3])
        result = func(*args, **kwargs)
        self._weights.follow((*args, *kwargs.values()), result)
        for name, site in sites:
            if end_of(site) != "input":
                self._receive(name, site, result.detach())
                if self._watch is not None:
                    result = self._watch(name, site, result)
        return result

    def _count(self, names: Sequence[str], weight: Tensor, experts: Tensor) -> None:
        """Add to how many rows each expert of some weights got."""
        rows = torch.bincount(experts.reshape(-1), minlength=len(weight)).double().cpu()
        for name in dict.fromkeys(names):
            self.routed[name] = self.routed[name] + rows if name in self.routed else rows

    def _read_recurrent(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """Hand over what is read and made inside a recurrent layer.

        Raises:
            CriterionError: the gradient of a signal is asked for, which the one operation does not give.
        """
        names = [self._name(item) or "" for item in tree_leaves(args) if isinstance(item, Tensor)]
        if not any(self._sites.get(name) for name in names):
            return
        # Layers are run once more to look into them: that is no part of the model's own forward.
        with torch.no_grad():
            for item in signals(func, args, result):
                key = self._name(item.weight)
                for name, site in () if key is None else self._sites.get(key, ()):
                    if site != site_of(item.site, self._views.of(key or "", item.weight, (1,))):
                        continue
                    if self._watch is not None and site == "output":
                        raise CriterionError(
                            f"Per-example gradients at {name!r}",
                            "the gates of a recurrent layer are inside one operation",
                            "Use 'taylor', which takes the gradient of its weights",
                        )
                    self._receive(name, site, item.read().detach())

    def _reading(
        self, func: Any, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor | None, Sequence[tuple[str, Site]]]:
        """Return the data that a call reads, and the wanted (name, site) pairs of what it reads it with."""
        if func is EINSUM and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        data, keys = signature.data.of(args, kwargs), [key.of(args, kwargs) for key in signature.keys]
        if not isinstance(data, Tensor) or (func is EINSUM and len(args) != 3):
            return None, ()
        summed: Sequence[int] = (signature.summed,)
        if signature.product and isinstance(keys[0], Tensor):
            swapped = self._name(keys[0]) is None
            if swapped:
                data, keys = keys[0], [data]
            summed = _summed(str(args[0]), swapped) if func is EINSUM else (int(swapped),)
            if self._name(data) is not None:  # a product of weights is a weight
                return None, ()
        for key in keys:
            name = self._name(key) if isinstance(key, Tensor) else None
            if name is None:
                continue
            view = 0 if func in NORMS else self._views.of(name, key, summed)
            # A tied embedding is called as a table and in a product: the site says which of the two is meant.
            ends = ("rows",) if signature.rows else ("input", "output")
            asked = {site_of(end, 0 if signature.rows else view) for end in ends}
            found = [item for item in self._sites.get(name, ()) if item[1] in asked]
            if found:
                return data, found
        return data, ()

    def _name(self, tensor: Tensor) -> str | None:
        """Return the parameter that a weight goes by; None for data, and for a weight that is not wanted."""
        names = self._weights.origin(tensor)
        if names:
            return self._weights.main(names)
        # Weights that accelerate loads are a new tensor in every forward, and are known by where they lie.
        for place, name in self._places:
            if place.holds(tensor) or (tensor._base is not None and place.holds(tensor._base)):
                return name
        return None
