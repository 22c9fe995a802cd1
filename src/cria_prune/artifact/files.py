"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from cria_prune.errors import ArtifactError, CriaError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on leaving, what was written there becomes `path`.

    When the body raises, the temporary file is removed and an old `path` stays as it was.

    Raises:
        ArtifactError: the system refuses (read-only, full disk, ...); the text is the system's.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some file systems cannot flush a folder
            _flush(path.parent)
    except OSError as error:
        raise refused(f"Writing {path}", error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def reading(asked: str, todo: str) -> Iterator[None]:
    """Say what was asked and what to do where a file cannot be read, or holds something else than it should.

    Raises:
        ArtifactError: what is done inside fails for the system or for what the file holds.
    """
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(asked, f"the system refused, {error}", todo) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(asked, f"its {where!r} is damaged, {first['msg']}", todo) from error
    except (SafetensorError, CriaError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(asked, f"it is damaged, {error!r}", todo) from error


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all, and return its path.

    Raises:
        ArtifactError: the system refuses.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | Path, values: Mapping[str, Any], *, allow_nan: bool = True) -> Path:
    """Write a JSON file that people read too, whole or not at all, and return its path.

    Args:
        path: the file.
        values: what it holds.
        allow_nan: write NaN and infinity as Python does; otherwise they are a ValueError.

    Raises:
        ArtifactError: the system refuses.
    """
    return write_text(path, json.dumps(values, indent=1, allow_nan=allow_nan) + "\n")


def new_folder(path: str | Path, overwrite: bool = False) -> Path:
    """Make a folder, parents too, and return its path.

    Args:
        path: the folder; it may exist if it is empty.
        overwrite: accept a folder that holds files. None of them is removed here.

    Raises:
        ArtifactError: the folder holds files, the path is a file, or the system refuses.
    """
    path = Path(path)
    asked = f"Writing to the folder {path}"
    try:
        if path.exists() and not path.is_dir():
            raise ArtifactError(asked, "found a file of that name", "Choose another name")
        path.mkdir(parents=True, exist_ok=True)
        found = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise refused(asked, error) from error
    if found and not overwrite:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ArtifactError(
            asked, f"it is not empty ({names})", "Choose another folder, or pass overwrite=True"
        )
    return path


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of the weights and the configuration in a model's folder."""
    return {
        path.name: sha256(path) for path in sorted((*folder.glob("*.safetensors"), folder / "config.json"))
    }


def refused(asked: str, error: Exception) -> ArtifactError:
    """Return the error that says that the system refused, in the system's words."""
    return ArtifactError(
        asked,
        f"the system refused, {error}",
        "Check that the place exists, that you may use it and that the disk has room",
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
