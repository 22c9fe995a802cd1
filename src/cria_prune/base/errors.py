"""Errors for users: what was asked, what was found, what to do; and packages that come with an extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class CriaError(Exception):
    """Base class of every error that Cria raises for a user to read.

    Args:
        asked: what the caller wanted.
        found: what Cria met instead.
        todo: what to do about it.
    """

    def __init__(self, asked: str, found: str, todo: str) -> None:
        self.asked, self.found, self.todo = asked, found, todo
        super().__init__(f"{asked}: {found}. {todo}")


class CaptureError(CriaError):
    """The model's operations could not be captured."""


class DataError(CriaError, ValueError):
    """Batches, examples or data files are not what the model needs."""


class SignalError(CriaError, ValueError):
    """A recorded signal or a weight holds NaN or infinity, or too little to score."""


class CriterionError(CriaError, ValueError):
    """A criterion is unknown, or lacks what it needs."""


class ResourceError(CriaError):
    """The device or the machine has not enough memory for what was asked."""


class TargetError(CriaError, ValueError):
    """A reduction is out of range or cannot be reached."""


class StructureError(CriaError):
    """Groups, plan and model do not fit together, or nothing can be pruned."""


class VerificationError(CriaError):
    """The pruned model and the masked model differ."""


class ArtifactError(CriaError):
    """A file or folder cannot be read or written as a Cria checkpoint."""


class ConfigError(CriaError, ValueError):
    """A configuration holds an unknown key or a value out of range."""


class CertificateError(CriaError):
    """A saved model cannot be loaded by its library alone, or computes something else there."""


class PackageError(CriaError, ImportError):
    """A package that comes with an extra of cria-prune is missing."""


class RankError(CriaError):
    """Of several processes one has failed, is gone, or does something else than the others."""


def first_line(error: BaseException, named: bool = False) -> str:
    """Return the first line of an error's text, shortened; `named` puts its kind before it."""
    text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if named else text


def some(items: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """Return the first of some texts, and how many more there are.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    return between.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Imported name -> name on PyPI, where they differ by more than `_` and `-`."""


@contextmanager
def needed(extra: str, asked: str) -> Iterator[None]:
    """Say in place of an ImportError which package is missing and which extra brings it.

    Args:
        extra: of the distribution cria-prune, such as "report".
        asked: what the package is needed for.

    Raises:
        PackageError: an import inside the block fails.

    >>> with needed("report", "A picture"):
    ...     import matplotlib_of_nowhere
    Traceback (most recent call last):
    cria_prune.base.errors.PackageError: A picture: matplotlib-of-nowhere is not installed. Install it with \
pip install 'cria-prune[report]'
    """
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        package = DISTRIBUTIONS.get(name, name.replace("_", "-"))
        # A package that is there and cannot be imported, too old for another one, says itself what it misses.
        missing = isinstance(error, ModuleNotFoundError) and name
        found = f"{package} is not installed" if missing else f"{package or 'a package'} fails, {error}"
        raise PackageError(
            asked, found.rstrip("."), f"Install it with pip install 'cria-prune[{extra}]'"
        ) from error
