"""A device that is not there: finds tensors of two devices in one operation, on a machine that has one.

Inside `with Elsewhere():` the device `mps` can be used. Its tensors are on the CPU in truth, and marked; an
operation on a marked and an unmarked one ends as it would on a GPU, and so does reading a marked one with
numpy. What the numbers are, and how fast, only a real device can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

HERE, AWAY = torch.device("cpu"), torch.device("mps", 0)
WRITES = {"aten::copy_", "aten::set_"}
"""Operations into a tensor of either device."""
ACROSS = {*WRITES, "aten::_to_copy"}
CHOOSE = {"aten::index", "aten::index_put", "aten::index_put_"}
"""Operations whose indices may be on the CPU whatever the rest is on."""


class Marks:
    """Which memory counts as the other device's."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def has(self, tensor: Tensor) -> bool:
        """Say whether a tensor is away."""
        storage = self._storage(tensor)
        found = None if storage is None else self._known.get(storage._cdata)
        return found is not None and not found.expired()

    def set(self, tensor: Tensor, away: bool) -> None:
        """Count a tensor, and all views of it, to one device."""
        storage = self._storage(tensor)
        if storage is None:
            return
        if away:
            self._known[storage._cdata] = StorageWeakRef(storage)
        else:
            self._known.pop(storage._cdata, None)

    @staticmethod
    def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
        """Return a tensor's memory; None where it has none, as on the device `meta`."""
        if isinstance(tensor, FakeTensor):
            return None
        storage = tensor.untyped_storage()
        return storage if storage.device == HERE else None


class Mixing(TorchDispatchMode):
    """Ends where an operation takes tensors of both devices; results are where the operands were."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        indices = [item for item in tree_leaves(args[1:2]) if isinstance(item, Tensor) and name in CHOOSE]
        if any(map(self.marks.has, indices)) and not self.marks.has(args[0]):
            raise RuntimeError(f"{name}: tensors on two devices: the indices away, the tensor here")
        operands = args[:1] + args[2:] if name in CHOOSE else args
        given = [item for item in tree_leaves((operands, kwargs)) if isinstance(item, Tensor)]
        away = [self.marks.has(item) for item in given]
        here = [not there and item.ndim > 0 for there, item in zip(away, given, strict=True)]
        if any(away) and any(here) and name not in ACROSS and not any(map(_pretended, given)):
            shapes = [
                f"{tuple(item.shape)} {'away' if there else 'here'}"
                for item, there in zip(given, away, strict=True)
            ]
            raise RuntimeError(f"{name}: tensors on two devices: {', '.join(shapes)}")
        asked = kwargs.get("device")
        asked = asked is not None and asked.type == AWAY.type  # by an operation that was captured
        out = func(*args, **({**kwargs, "device": HERE} if asked else kwargs))
        if (asked or any(away)) and name not in WRITES:
            tree_map_only(Tensor, lambda item: self.marks.set(item, True), out)
        return out


def _pretended(item: Tensor) -> bool:
    return isinstance(item, FakeTensor) or item.device.type == "meta"


class Elsewhere(TorchFunctionMode):
    """Makes torch take the device `mps` for real."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = Marks()
        self.mixing = Mixing(self.marks)

    def __enter__(self) -> Elsewhere:
        self.export, torch.export.export = torch.export.export, self._exported
        self.mixing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.mixing.__exit__(*error)
        torch.export.export = self.export

    def _exported(self, *args: Any, **kwargs: Any) -> Any:
        """Capture on the CPU, for there is no kernel of the other device, and say it was there."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            program = self.export(*args, **kwargs)
        if not any(map(self.marks.has, args[0].parameters())):
            return program
        for module in program.graph_module.modules():
            for node in getattr(module, "graph", torch.fx.Graph()).nodes:
                if node.kwargs.get("device") == HERE:
                    node.update_kwarg("device", AWAY)
                node.args = tuple(
                    AWAY if isinstance(item, torch.device) and item == HERE else item for item in node.args
                )
        for value in program.constants.values():
            if isinstance(value, Tensor):
                self.marks.set(value, True)
        return program

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func == Tensor.device.__get__:
            return AWAY if self.marks.has(args[0]) else func(*args)
        if name in ("numpy", "__array__") and first is not None and self.marks.has(first):
            raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu()")
        if name == "cpu" and first is not None:
            return self._moved(first, HERE, lambda tensor: tensor)
        if name.partition(".")[0] in ("to", "type_as") and first is not None:  # a captured one is `to.device`
            return self._to(first, args[1:], {key: item for key, item in kwargs.items() if key != "layout"})
        if name == "register_hook":  # it is called while a function of autograd runs, hence without the mode
            return func(args[0], lambda gradient: self._within(args[1], gradient))
        if name == "__deepcopy__":
            out = func(*args, **kwargs)
            self.marks.set(out, self.marks.has(args[0]))
            return out
        return self._made(func, args, kwargs)

    def _within(self, hook: Callable[[Tensor], Any], gradient: Tensor) -> Any:
        super().__enter__()
        try:
            return hook(gradient)
        finally:
            super().__exit__(None, None, None)

    def _to(self, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return what `Tensor.to` does, on whichever device is asked for."""
        rest, where = list(args), None
        given = kwargs.get("device")
        if given is not None:
            where = torch.device(given)
            kwargs["device"] = HERE if where.type == AWAY.type else where
        for index, item in enumerate(rest):
            if isinstance(item, Tensor):
                where, rest[index] = AWAY if self.marks.has(item) else item.device, item.dtype
            elif isinstance(item, (str, torch.device)):
                where = torch.device(item)
                rest[index] = HERE if where.type == AWAY.type else where
        if where is not None and where.type not in (AWAY.type, HERE.type):
            return tensor.to(*rest, **kwargs)
        return self._moved(tensor, where, lambda item: item.to(*rest, **kwargs))

    def _moved(
        self, tensor: Tensor, device: torch.device | None, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        away = self.marks.has(tensor)
        wanted = away if device is None else device.type == AWAY.type
        out = change(tensor)
        if wanted != away and out.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            out = out.clone()
        self.marks.set(out, wanted)
        return out

    def _made(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return what any other function makes; of a tensor that it makes anew, where it was asked for."""
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in (AWAY.type, HERE.type):
            return func(*args, **kwargs)
        wanted = torch.device(device).type == AWAY.type
        if wanted and kwargs.get("generator") is not None:
            raise RuntimeError("expected a generator of the other device")
        out = func(*args, **{**kwargs, "device": HERE})
        tree_map_only(Tensor, lambda item: self.marks.set(item, wanted), out)
        return out
