"""Packages that come with an extra: imported where they are needed, named where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cria_prune.errors import PackageError

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
    cria_prune.errors.PackageError: A picture: matplotlib-of-nowhere is not installed. Install it with pip \
install 'cria-prune[report]'
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
