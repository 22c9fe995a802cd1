"""Reads the signals of unit groups while the model runs, without touching the model.

Every call of a layer function (`linear`, `conv2d`, `batch_norm`, ...) is looked at, and told apart
by the identity of its weight. So functional calls, shared modules and any class of module are read
alike, and nothing is registered on the model that could stay behind. See docs/decisions/0002. The weights
that accelerate loads for each forward have no identity that lasts: they are told by their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import cria_prune.base.experts  # noqa: F401  (it registers an operation that is read here)
from cria_prune.base.dispatched import Place, first_names, is_dispatched, places
from cria_prune.base.errors import CriterionError, StructureError
from cria_prune.base.modules import named_tensors
from cria_prune.recording.recurrent import is_recurrent, signals
from cria_prune.structure.groups import Site


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


DATA, WEIGHT = Argument(0, "input"), Argument(1, "weight")
WEIGHTED = [getattr(functional, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)]
ROUTED = torch.ops.cria_prune.routed_mm.default
SIGNATURES: dict[Any, Signature] = {
    **dict.fromkeys([functional.linear, torch.convolution, *WEIGHTED], Signature(DATA, (WEIGHT,))),
    **dict.fromkeys([torch.addmm, Tensor.addmm], Signature(Argument(1, "mat1"), (Argument(2, "mat2"),))),
    **dict.fromkeys([torch.mm, Tensor.mm], Signature(DATA, (Argument(1, "mat2"),))),
    **dict.fromkeys(
        [torch.matmul, Tensor.matmul, Tensor.__matmul__], Signature(DATA, (Argument(1, "other"),))
    ),
    **dict.fromkeys([torch.bmm, Tensor.bmm], Signature(DATA, (Argument(1, "mat2"),))),
    ROUTED: Signature(DATA, (WEIGHT,)),
    functional.embedding: Signature(DATA, (WEIGHT,), rows=True),
    functional.batch_norm: Signature(DATA, (Argument(3, "weight"), Argument(1, "running_mean"))),
    torch.batch_norm: Signature(DATA, (WEIGHT, Argument(3, "running_mean"))),
}
"""The layer functions that are read, by the function objects that a mode sees."""


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
        self._sites: dict[int, list[tuple[str, Site]]] = {}
        self._alive: list[Tensor] = []  # an id means something only as long as its tensor lives
        self._places: list[tuple[Place, list[tuple[str, Site]]]] = []  # of weights without a lasting identity
        for name, site in dict.fromkeys(wanted):
            if name not in tensors:
                raise StructureError(
                    f"Reading the signal at {name!r}",
                    f"{type(model).__name__} has no parameter or buffer of that name",
                    "Discover the unit groups of this model again",
                )
            self._alive.append(tensors[name])
            self._sites.setdefault(id(tensors[name]), []).append((name, site))
        if is_dispatched(model):
            first = first_names(model)
            held = {first[name]: sites for sites in self._sites.values() for name, _ in sites}
            self._places = [
                (place, held[first[name]]) for name, place in places(model).items() if first[name] in held
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
        sites = self._wanted(signature, args, kwargs) if signature else ()
        if signature:
            # A tied embedding is called as a table and in a product: the site says which of the two is meant.
            sites = [item for item in sites if (item[1] == "rows") == signature.rows]
        if not signature or not sites:
            return func(*args, **kwargs)
        for name, site in sites:
            # Before the call, while the data is sure to be what the operation reads.
            if site == "input":
                self._receive(name, site, signature.data.of(args, kwargs).detach())
        if func is ROUTED:
            self._count([name for name, _ in sites], *args[1:3])
        result = func(*args, **kwargs)
        for name, site in sites:
            if site != "input":
                self._receive(name, site, result.detach())
                if self._watch is not None:
                    result = self._watch(name, site, result)
        return result

    def _count(self, names: Sequence[str], weight: Tensor, experts: Tensor) -> None:
        """Add to how many rows each expert of some weights got."""
        rows = torch.bincount(experts.reshape(-1), minlength=len(weight)).double().cpu()
        for name in dict.fromkeys(names):
            self.routed[name] = self.routed[name] + rows if name in self.routed else rows

    def _wanted(
        self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Sequence[tuple[str, Site]]:
        """Return the (name, site) pairs of the call's first key that is a wanted tensor, or its transpose."""
        for key in signature.keys:
            tensor = key.of(args, kwargs)
            if isinstance(tensor, Tensor):
                found = self._of(tensor)
                if found:
                    return found
        return ()

    def _of(self, tensor: Tensor) -> Sequence[tuple[str, Site]]:
        """Return the (name, site) pairs of a tensor, or of what it is a view of; none if it is not wanted."""
        # `x @ W.t()` names its weight through a view. A view of
        # all elements is the weight, a view of a part is not.
        base = tensor._base
        whole = tensor if base is None or base.numel() != tensor.numel() else base
        found = self._sites.get(id(tensor)) or self._sites.get(id(whole))
        # Weights that accelerate loads are a new tensor in
        # every forward, and are known by where they lie.
        for place, sites in self._places:
            if found:
                break
            found = sites if place.holds(tensor) or place.holds(whole) else None
        return found or ()

    def _read_recurrent(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """Hand over what is read and made inside a recurrent layer.

        Raises:
            CriterionError: the gradient of a signal is asked for, which the one operation does not give.
        """
        if not any(self._of(item) for item in tree_leaves(args) if isinstance(item, Tensor)):
            return
        # Layers are run once more to look into them: that is no part of the model's own forward.
        with torch.no_grad():
            for item in signals(func, args, result):
                for name, site in self._of(item.weight):
                    if site != item.site:
                        continue
                    if self._watch is not None and site == "output":
                        raise CriterionError(
                            f"Per-example gradients at {name!r}",
                            "the gates of a recurrent layer are inside one operation",
                            "Use 'taylor', which takes the gradient of its weights",
                        )
                    self._receive(name, site, item.read().detach())
