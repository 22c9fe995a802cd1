"""`package.module:function` -> the user's function: imported, looked at, and called with what it takes."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from inspect import Parameter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cria_prune.base.errors import ConfigError, CriaError, DataError, said, some
from cria_prune.base.modules import random_kept

WRAP = "Wrap it in one that takes none: def {name}(): return {function}({arguments})"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for a while: code of the user's may draw."""
    with random_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def is_function(text: str) -> bool:
    """Say whether a text may be a `package.module:function`.

    >>> [is_function(text) for text in ("nets:make", "mine.nets:Net.small", "digits", "runs/small", "a/b:c")]
    [True, True, False, False, False]
    """
    module, found, name = text.partition(":")
    words = [*module.split("."), *name.split(".")]
    return bool(found) and all(word.isidentifier() for word in words) and not Path(text).exists()


def imported(text: str, asked: str, wanted: str) -> Any:
    """Return what `package.module:function` names; modules in the current folder are found too.

    Args:
        text: as the user typed it.
        asked: what it is for, of the error.
        wanted: what it has to be, of the error.

    Raises:
        ConfigError: it is no such text, the module cannot be imported, or has nothing of that name.
    """
    module, colon, path = text.partition(":")
    if not (module and colon and path):
        raise ConfigError(asked, f"found {text!r}", f"Name {wanted}, as package.module:function")
    # What the user's code prints is no part of the answer, and what a module draws is the same every time.
    with importable(), redirect_stdout(sys.stderr), seeded(0):
        found = _module(module, asked)
        for name in path.split("."):
            if not hasattr(found, name):
                near = get_close_matches(name, [key for key in dir(found) if key[0] != "_"])
                hint = f"; near it are {', '.join(near)}" if near else ""
                raise ConfigError(asked, f"{module!r} has no {path!r}{hint}", f"Name {wanted}")
            found = getattr(found, name)
    return found


def _module(name: str, asked: str) -> Any:
    """Import a module of the user's."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # the user's code
        if not isinstance(error, ModuleNotFoundError):
            raise ConfigError(asked, f"importing {name!r} raised {said(error)}", "Mend the module") from error
        if not f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(asked, f"importing {name!r} raised {said(error)}", "Install it") from error
        here = sorted(path.stem for path in Path.cwd().glob("*.py"))
        here += sorted(path.parent.name for path in Path.cwd().glob("*/__init__.py"))
        looked = [str(Path(path)) for path in sys.path if path and "site-packages" not in path]
        raise ConfigError(
            asked,
            f"there is no module {error.name!r} in {some(looked, 4)} or among the installed packages; the "
            f"current folder has {some(here, 5) or 'no module'}",
            "Run from the folder that holds it, or install it",
        ) from error


@contextmanager
def importable() -> Iterator[None]:
    """Let modules in the current folder be imported meanwhile."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def needed(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of a function that have no default; none where it does not say them."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [item for item in found if item.default is Parameter.empty and item.kind not in kinds]


def check_alone(function: Callable[..., Any], text: str, asked: str) -> None:
    """Check that a function can be called without arguments.

    Raises:
        ConfigError: it needs some: which, and how to wrap it.
    """
    names = [item.name for item in needed(function)]
    if names:
        last = text.rpartition(":")[2].rpartition(".")[2]
        wrapped = WRAP.format(
            name=f"my_{last.lower()}", function=last, arguments=", ".join(f"{name}=..." for name in names)
        )
        words = "argument" if len(names) == 1 else "arguments"
        raise ConfigError(asked, f"the function needs the {words} {', '.join(names)}", wrapped)


@contextmanager
def users_code(asked: str, todo: str) -> Iterator[None]:
    """Run code of the user's: what it prints goes to standard error, and what it raises is named.

    Raises:
        DataError: it raised.
    """
    try:
        with importable(), redirect_stdout(sys.stderr):
            yield
    except CriaError:
        raise
    except Exception as error:  # the user's code
        raise DataError(asked, f"it raised {said(error)}", todo) from error


def said_arguments(names: Sequence[str]) -> str:
    """Return arguments as a call has them: `(model, loader)`."""
    return f"({', '.join(names)})"
