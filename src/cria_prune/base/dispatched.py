"""Models whose weights accelerate keeps on disk or in memory and loads layer by layer, while they run.

The hooks of accelerate put a new tensor in a module's place for every forward, and one on the meta device
after it. So a weight of such a model has a place (a module and a name in it), and no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cria_prune.base.errors import StructureError
from cria_prune.base.modules import attributes_kept, copy_of, named_tensors, offloading_hooks, on_meta


@dataclass(frozen=True, eq=False)
class Place:
    """Where a weight is while the model runs, and the hook that loads it.

    Attributes:
        module: that holds it; local: its name in it.
        hook: of accelerate, on the module or one around it; key: its name in the hook's `weights_map`.
    """

    module: nn.Module
    local: str
    hook: Any
    key: str

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor is what lies there now."""
        held = self.module._parameters.get(self.local)
        return tensor is (self.module._buffers.get(self.local) if held is None else held)


def is_dispatched(model: nn.Module) -> bool:
    """Say whether some weights of a model are loaded only while their layer runs."""
    return any(tensor.is_meta for tensor in model.parameters()) and any(
        True for module in model.modules() for _ in offloading_hooks(module)
    )


def places(model: nn.Module) -> dict[str, Place]:
    """Return the place of every weight that is loaded while its layer runs, under each of its names."""
    found: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in offloading_hooks(module):
            parts = module.named_modules(remove_duplicate=False) if hook.place_submodules else [("", module)]
            for below, owner in parts:
                for local, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                    key = f"{below}.{local}".strip(".")
                    if tensor is not None and tensor.is_meta and key in hook.weights_map:
                        found.setdefault(f"{path}.{key}".strip("."), Place(owner, local, hook, key))
    return found


def first_names(model: nn.Module) -> dict[str, str]:
    """Return every name of a parameter or buffer with the first of the names of that tensor.

    A forward of a dispatched model parts tied weights. What transformers says of them holds all the same.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model).items()}
    tied = getattr(model, "all_tied_weights_keys", None)
    for target, source in tied.items() if isinstance(tied, Mapping) else ():
        if target in names and source in names:
            one, other = names[target], names[source]
            order = list(names)
            kept, gone = sorted((one, other), key=order.index)
            names = {name: kept if held == gone else held for name, held in names.items()}
    return names


class Loaded(Mapping[str, Tensor]):
    """Tensors under the names of another map, which says them alike unless a subclass does otherwise."""

    def __init__(self, inner: Mapping[str, Tensor]) -> None:
        self._inner = inner

    def __getitem__(self, name: str) -> Tensor:
        return self._inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


class Weights(Loaded):
    """The weights of a dispatched model by name, each loaded when it is asked for.

    The last one that was loaded is held, since it is often asked for again, until `forget`.

    Args:
        model: the model; it is only read.

    Raises:
        StructureError: a tensor has no values and no hook that loads them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(named_tensors(model))
        self._places = places(model)
        self._last: tuple[str, Tensor] | None = None
        lost = [name for name, item in self._inner.items() if item.is_meta and name not in self._places]
        if lost:
            raise StructureError(
                f"The weights of {type(model).__name__}",
                f"{lost[0]!r} has no values, and no hook of accelerate loads them",
                "Load the model with its weights: from_pretrained(..., device_map=..., offload_folder=...)",
            )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            return self._inner[name]
        if self._last is None or self._last[0] != name:
            self._last = None  # not two at a time
            place = self._places[name]
            self._last = name, place.hook.weights_map[place.key].detach()
        return self._last[1]

    def forget(self) -> None:
        """Let go of the last one that was loaded."""
        self._last = None


def values_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the tensors of a model by every name; those of a dispatched one are loaded when asked for.

    Raises:
        StructureError: see `Weights`.
    """
    return Weights(model) if is_dispatched(model) else named_tensors(model)


def structure_of(model: nn.Module) -> nn.Module:
    """Return a copy of a dispatched model on the meta device, without hooks, its tied weights tied.

    Raises:
        StructureError: the model cannot be copied.
    """
    names, tensors = first_names(model), named_tensors(model)
    empty = {name: on_meta(tensors[name]) for name in dict.fromkeys(names.values())}
    replaced: dict[int, Any] = {id(tensors[name]): empty[first] for name, first in names.items()}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            replaced[id(hook)] = hook  # it may hold all weights
    copied = copy_of(model, replaced)
    for module in copied.modules():
        found = vars(module)
        if found.pop("_hf_hook", None) is not None:
            before = found.pop("_old_forward", None)
            found.pop("forward", None)  # the class has it
            if before is not None and getattr(before, "__func__", None) is not type(module).forward:
                found["forward"] = before
    return copied


class _Changed(Loaded):
    """A map of weights, some of them changed when they are loaded."""

    def __init__(
        self, inner: Mapping[str, Tensor], names: Mapping[str, str], change: Callable[[str, Tensor], Tensor]
    ) -> None:
        super().__init__(inner)
        self._names, self._change = names, change

    def __getitem__(self, key: str) -> Tensor:
        value = self._inner[key]
        return self._change(self._names[key], value) if key in self._names else value


@contextmanager
def changed(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Inside, a dispatched model runs with other weights; nothing of it is kept.

    Args:
        model: all of its parameters are loaded while their layer runs.
        change: (first name of a weight, its value) to the value to run with; it must not write into it.
    """
    names = first_names(model)
    by_hook: dict[int, tuple[Any, dict[str, str]]] = {}
    for name, place in places(model).items():
        by_hook.setdefault(id(place.hook), (place.hook, {}))[1][place.key] = names[name]
    with attributes_kept((hook for hook, _ in by_hook.values()), "weights_map"):
        for hook, keys in by_hook.values():
            hook.weights_map = _Changed(hook.weights_map, keys, change)
        yield
