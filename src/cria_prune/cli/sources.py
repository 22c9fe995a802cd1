"""Where a model comes from: a recipe, a checkpoint, a Hugging Face folder, or a function in Python."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cria_prune.batches import Batch
from cria_prune.cli import target
from cria_prune.errors import ConfigError
from cria_prune.tasks.examples import example_inputs
from cria_prune.tasks.pretrained import CONFIG, load_pretrained

if TYPE_CHECKING:
    from cria_prune.cli.target import Target

Kind = Literal["recipe", "checkpoint", "hugging-face", "factory"]
FACTORY = "a function without arguments that returns a module, or (module, example)"


@dataclass(frozen=True)
class Source:
    """A model and what its forward takes.

    Attributes:
        model: in eval mode, on the CPU, the meta device or where the function put it; a recipe's is
            untrained.
        example: one batch, on the CPU or where the function made it.
        name: as the user typed it.
        kind: `recipe`, `checkpoint`, `hugging-face` or `factory`.
        target: task and plan of a recipe or checkpoint; None for the others.
    """

    model: nn.Module = field(repr=False)
    example: Batch = field(repr=False)
    name: str
    kind: Kind
    target: Target | None = field(default=None, repr=False)


def load_source(text: str, example: Sequence[int] | None = None, meta: bool = False) -> Source:
    """Return the model that a text names, with an example of its inputs.

    Args:
        text: a recipe (`digits`), a folder (of a Cria checkpoint, or with the config.json of a Hugging
            Face model), or `package.module:function`, which is imported and called without arguments;
            modules in the current folder are found too.
        example: shape of the model's (main) input, in place of the one that comes with the model.
        meta: leave the weights; every tensor is on the meta device and takes no memory.

    Raises:
        ConfigError: the text names nothing of these, or the function does not give a model and example.
        ArtifactError: a folder holds no model that can be read.
        DataError: the example's shape does not suit the model.
    """
    from cria_prune.tasks import TASKS

    folder = Path(text)
    if text not in TASKS and folder.is_dir() and (folder / CONFIG).is_file():
        model = load_pretrained(folder, meta)
        return Source(model, example_inputs(model, example), text, "hugging-face")
    if text not in TASKS and not folder.is_dir() and ":" in text:
        model, given = _from_factory(text, meta)
        return Source(model, _example(text, given, example), text, "factory")
    if text not in TASKS and not folder.is_dir():
        raise ConfigError(
            "A model",
            f"found {text!r}, which is no recipe and no folder",
            f"Give a recipe ({', '.join(TASKS)}), the folder of a checkpoint or of a Hugging Face model, "
            "or package.module:function",
        )
    found = target.find(text)
    model = found.untrained()
    return Source(
        model.to("meta") if meta else model,
        _example(text, found.task.example, example),
        text,
        "recipe" if found.checkpoint is None else "checkpoint",
        found,
    )


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Return the sizes of `1,3,32,32`; None stays None.

    Raises:
        ConfigError: it is no list of positive whole numbers.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError("The shape of an example", f"found {text!r}", "Give sizes like 1,3,32,32")
    return tuple(int(word) for word in words)


def _example(text: str, given: Batch | None, shape: Sequence[int] | None) -> Batch:
    if shape is not None:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    if given is None:
        raise ConfigError(
            f"An example of the inputs of {text}",
            "the function gave none",
            "Pass its shape, as in --example 1,3,32,32, or return (model, example) from the function",
        )
    return given


def _from_factory(text: str, meta: bool) -> tuple[nn.Module, Batch | None]:
    """Import and call `package.module:function`; the error says which of the steps failed."""
    asked = f"The model {text}"
    with _current_folder_importable():
        factory = _imported(text, asked)
        try:
            with torch.device("meta") if meta else nullcontext():
                made = factory if isinstance(factory, nn.Module) else factory()
        except Exception as error:  # the user's code
            raise ConfigError(asked, f"the function raised {_named(error)}", f"Give {FACTORY}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(asked, f"the function returned {type(made).__name__}", f"Give {FACTORY}")
    return (model.to("meta") if meta else model).eval(), example


def _imported(text: str, asked: str) -> Any:
    module, _, path = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(asked, f"importing {module!r} raised {_named(error)}", "Install it") from error
        raise ConfigError(
            asked, f"there is no module {error.name!r}", "Run from the folder that holds it, or install it"
        ) from error
    except Exception as error:  # the user's code
        raise ConfigError(asked, f"importing {module!r} raised {_named(error)}", "Mend the module") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigError(asked, f"{module!r} has no {path!r}", f"Name {FACTORY}")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(asked, f"{path!r} is {type(found).__name__}", f"Name {FACTORY}")
    return found


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _named(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return f"{type(error).__name__}: {text}"
