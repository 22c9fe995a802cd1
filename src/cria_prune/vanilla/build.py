"""What a model's own class builds from a changed configuration, on the meta device: names, shapes, numbers.

Nothing is known about families here: a configuration is written as a dictionary, changed, read again
by its class (whose validators may refuse it), and the model's class is called with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cria_prune.errors import StructureError
from cria_prune.modules import named_tensors
from cria_prune.structure.attributes import held_numbers
from cria_prune.structure.groups import UnitGroups, removed_positions, said_values, shrunk_shapes

Path = tuple[str, ...]
Fields = Mapping[Path, int]
Kept = Mapping[str, Sequence[int]]


class Vanilla:
    """A model, and its class called with other configurations.

    Attributes:
        model: the model; it is only looked at.
        config: its configuration.

    Raises:
        StructureError: the model has no configuration of transformers, or is not what it describes.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        asked = f"A vanilla configuration for {type(model).__name__}"
        if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
            raise StructureError(
                asked, f"its config is {type(config).__name__}", "Pass a model of transformers itself"
            )
        self.model, self.config = model, config
        tensors = named_tensors(model)
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}
        self._canonical = {name: first[id(tensors[name])] for name in model.state_dict() if name in tensors}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._paths = {id(part): path for path, part in config_parts(config)}
        self._floats = _floats(model)
        built = self._built(self.changed({}))
        found = None if isinstance(built, str) else self._difference(built, self._shapes)
        if isinstance(built, str) or found:
            raise StructureError(
                asked,
                f"the configuration builds another model: {built if isinstance(built, str) else found}",
                "Pass the model as from_pretrained or its class gave it, with its own configuration",
            )
        same = _floats(built)
        self._floats = {key: value for key, value in self._floats.items() if same.get(key) == value}

    def edits(self, groups: UnitGroups, kept: Kept) -> dict[Path, int]:
        """Return the fields of the configuration that count units, and what they say with `kept` units."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        fields = {}
        for (module, name), (now, after) in said_values(groups.groups, kept).items():
            path = self._paths.get(id(getattr(modules[module], "config", None)))
            if name.startswith("config.") and now != after and path is not None:
                fields[*path, name.removeprefix("config.")] = after
        return fields

    def changed(self, fields: Fields) -> Any:
        """Return the configuration with other values in some fields, or the text of its refusal."""
        values = self.config.to_dict()
        for path, value in fields.items():
            place = values
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        try:
            with _quiet():
                return type(self.config).from_dict(values)
        except Exception as error:  # whatever a validator raises
            return f"it refuses {_said(fields)}: {_last_line(error)}"

    def mismatch(self, groups: UnitGroups, kept: Kept, fields: Fields) -> str | None:
        """Say how the model that a changed configuration builds differs from the one with `kept` units.

        Compared are the names and shapes of the state dict, the floats that modules hold (scales), and
        the attributes that count units. None if there is no difference.
        """
        config = self.changed(fields)
        built = config if isinstance(config, str) else self._built(config)
        if isinstance(built, str):
            return built
        shapes = shrunk_shapes(groups.shapes, removed_positions(groups.groups, kept))
        found = self._difference(built, shapes)
        if found is not None:
            return found
        floats = _floats(built)
        for (path, name), value in self._floats.items():
            if floats.get((path, name)) != value:
                return f"{name} would be {floats.get((path, name))}, not {value}"
        modules = dict(built.named_modules(remove_duplicate=False))
        for (path, name), (_, after) in said_values(groups.groups, kept).items():
            said = held_numbers(modules[path]).get(name) if path in modules else None
            if not name.startswith("config.") and said != after:
                return f"{name} would be {said}, not {after}"
        return None

    def asked(self) -> dict[Path, Any]:
        """Return the fields that the model's code reads while it is built, with their values.

        A field that is asked for and not there has the value None, like one that is there and None.
        """
        config = self.changed({})
        found: dict[Path, Any] = {}
        for path, part in list(config_parts(config)):
            _listen(part, path, found)
        self._built(config)
        return found

    def _built(self, config: Any) -> nn.Module | str:
        try:
            with _quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
                model: nn.Module = type(self.model)(config)
                return model
        except Exception as error:  # whatever the model's code raises
            return f"it cannot be built, {_last_line(error)}"

    def _difference(self, built: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Compare the state dict of a built model with the shapes of the plan."""
        found = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        for name in sorted(found.keys() ^ self._canonical.keys()):
            return f"{_short(name)} would be {'new' if name in found else 'missing'}"
        for name, first in self._canonical.items():
            if found[name] != shapes[first]:
                return f"{_short(name)} would be {_sizes(found[name])}, not {_sizes(shapes[first])}"
        return None


def config_parts(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield a configuration and those in it, each with the names of the fields that lead to it."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from config_parts(value, (*path, name))


def _listen(config: Any, path: Path, found: dict[Path, Any]) -> None:
    """Make a configuration write down which of its fields are read."""
    kind = type(config)

    class Listening(kind):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                try:
                    value = super().__getattribute__(name)
                except AttributeError:
                    found.setdefault((*path, name), None)
                    raise
                if value is None or (isinstance(value, int) and not isinstance(value, bool)):
                    own = super().__getattribute__("attribute_map").get(name, name)
                    found.setdefault((*path, own), value)
                return value
            return super().__getattribute__(name)

    config.__class__ = Listening


def _floats(model: nn.Module) -> dict[tuple[str, str], float]:
    """Return (module, attribute) -> value of every float that a module holds."""
    return {
        (path, name): value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, float)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of transformers about a configuration away; the level is put back."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _short(name: str) -> str:
    """Return a tensor's name within its block."""
    return re.split(r"\.\d+\.", name)[-1]


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _said(fields: Fields) -> str:
    return ", ".join(f"{'.'.join(path)} = {value}" for path, value in fields.items()) or "its own values"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[-1][:200].rstrip('.')}"
