"""Files and folders that are whole or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cria_prune.base.errors import ArtifactError, CriaError
from cria_prune.base.sentences import (
    HELD,
    MODULES,
    SETTINGS,
    at_the_top,
    check_modules,
    encoder_folder,
    module_files,
    modules_of,
)


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
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise refused(f"Writing {path}", error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def readable(asked: str, todo: str) -> Iterator[None]:
    """Say what was asked and what to do where a file cannot be read, or holds something else than it should.

    Raises:
        ArtifactError: what is done inside fails for the system or for what the file holds.
    """
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(asked, f"it cannot be read, the system refused, {error}", todo) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(asked, f"its {where!r} is damaged, {first['msg']}", todo) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(asked, f"it is damaged: it is no JSON, {error}", todo) from error
    except SafetensorError as error:
        raise ArtifactError(asked, f"it is damaged: it is no safetensors file, {error}", todo) from error
    except (CriaError, LookupError, TypeError, ValueError, RuntimeError) as error:
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


def strict_json(values: Mapping[str, Any], asked: str, indent: int | None = None) -> str:
    """Return values as JSON that any program reads.

    Raises:
        ArtifactError: something in them is no JSON, as NaN and infinity.
    """
    try:
        return json.dumps(values, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        found = f"something in it is no JSON, {error}"
        raise ArtifactError(asked, found, "Pass plain finite values") from error


PLACE = re.compile(
    r"""(?<![\w.:/\\~-])           # no part of a word, a relative path or an address
    (?:~?/|[A-Za-z]:[\\/])      # from the root, the home or a drive
    (?:[^/\\\s,;:'"()]+[/\\])+  # through one folder at least
    """,
    re.VERBOSE,
)


def without_places(value: Any) -> Any:
    """Return plain JSON in which of every absolute path only the last name is left.

    What is published is not to say where on a machine it was made. Relative paths stay.

    >>> without_places({"command": ["cria", "prune", "/home/me/models/llama", "--output", "runs/a"]})
    {'command': ['cria', 'prune', 'llama', '--output', 'runs/a']}
    >>> without_places("see https://example.org/a/b, ~/data/x.txt, and/or /tmp/job 7/")
    'see https://example.org/a/b, x.txt, and/or job 7/'
    """
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = Path(value)
    if whole.is_absolute() and whole.name:  # names may hold spaces
        return whole.name
    return PLACE.sub("", value)


@dataclass(frozen=True)
class Layout:
    """What a folder's JSON file says that it is, and the tensors of which it has the hash.

    Attributes:
        name, version: its `format` and `version`.
        facts, tensors: names of the two files.
        what: it is, for errors.
        todo: what to do about a file that cannot be read.
        earlier: versions of before, which are read too.
        weights: the tensors are those of a model: other programs read them too, and they may be a link.
    """

    name: str
    version: int
    facts: str
    what: str
    todo: str
    tensors: str = ""
    earlier: tuple[int, ...] = ()
    weights: bool = False

    def said(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return facts with what says the layout before them."""
        return {"format": self.name, "version": self.version, **facts}

    def write(
        self, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], indent: int | None = None
    ) -> None:
        """Write both files into a folder in place of those there, the JSON with the hash last.

        Args:
            folder: where.
            facts: plain JSON, with a place for `sha256`.
            tensors: contiguous, no two of one storage.
            indent: of the JSON.

        Raises:
            ArtifactError: the system refuses, or something is no JSON.
        """
        path, asked = folder / self.tensors, f"Writing {folder / self.facts}"
        strict_json(facts, asked)  # before anything is replaced
        try:
            (folder / self.facts).unlink(missing_ok=True)  # what is interrupted is not to look whole
            with atomic(path) as temporary:
                save_file(dict(tensors), temporary, metadata={"format": "pt"} if self.weights else None)
            text = strict_json({**facts, "sha256": sha256(path)}, asked, indent)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise refused(f"Writing {path}", error) from error
        write_text(folder / self.facts, text if indent is None else f"{text}\n")

    def read(self, folder: Path) -> dict[str, Any]:
        """Return what the JSON file says, of which the layout alone is checked.

        Raises:
            ArtifactError: it cannot be read, is foreign, or of a newer version.
        """
        asked = f"Reading {folder / self.facts}"
        with readable(asked, self.todo):
            known = json.loads((folder / self.facts).read_text(encoding="utf-8"))
        if not isinstance(known, dict) or known.get("format") != self.name:
            raise ArtifactError(asked, f"it is not {self.what}", self.todo)
        if known.get("version") not in (self.version, *self.earlier):
            found = f"found format version {known.get('version')!r}, this Cria reads {self.version}"
            raise ArtifactError(asked, found, "Use the cria-prune that wrote it, or a newer one")
        return known

    def read_tensors(self, folder: Path, hashed: str) -> dict[str, Tensor]:
        """Return the tensors, which have to have the hash that was written with them.

        Raises:
            ArtifactError: the file cannot be read, or is another one.
        """
        path, asked = folder / self.tensors, f"Reading {folder / self.facts}"
        with readable(asked, self.todo):
            found = sha256(path) if self.weights or is_plain_file(path) else "none of a file"
            if found != hashed:
                apart = f"its SHA-256 is {found[:12]}..., the manifest says {hashed[:12]}..."
                raise ArtifactError(asked, f"{path.name} beside it is missing or another: {apart}", self.todo)
            return load_file(path)


def check_empty(folder: Path, asked: str, option: str = "overwrite=True") -> None:
    """Raise an ArtifactError that names some of what a folder holds, and the option that accepts it."""
    found = sorted(entry.name for entry in folder.iterdir())
    if found:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ArtifactError(asked, f"it is not empty ({names})", f"Choose another folder, or pass {option}")


def new_folder(path: str | Path, overwrite: bool = False, option: str = "overwrite=True") -> Path:
    """Make a folder, parents too, and return its path.

    Args:
        path: the folder; it may exist if it is empty.
        overwrite: accept a folder that holds files. None of them is removed here.
        option: how a caller says so, for the error.

    Raises:
        ArtifactError: the folder holds files, the path is a file, or the system refuses.
    """
    path = Path(path)
    asked = f"Writing to the folder {path}"
    try:
        if path.exists() and not path.is_dir():
            raise ArtifactError(asked, "found a file of that name", "Choose another name")
        path.mkdir(parents=True, exist_ok=True)
        if not overwrite:
            check_empty(path, asked, option)
    except OSError as error:
        raise refused(asked, error) from error
    return path


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of the weights and the configuration in a model's folder.

    In one of sentence-transformers also of what makes the embeddings of its states.
    """
    paths = {
        *folder.glob("*.safetensors"),
        folder / "config.json",
        *map(folder.joinpath, module_files(folder)),
    }
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(paths)}


def refused(asked: str, error: Exception) -> ArtifactError:
    """Return the error that says that the system refused, in the system's words."""
    return ArtifactError(
        asked,
        f"the system refused, {error}",
        "Check that the place exists, that you may use it and that the disk has room",
    )


def flush(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk; some cannot do so with a folder."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


MANIFEST, CERTIFICATE, CARD = "cria.json", "certificate.json", "README.md"
MEASURED = "measured.json"
"""What was measured of a pruned model after it was saved."""
GENERATION = "generation_config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "normalizer.json", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
COPIED = (*TOKENIZER, *PROCESSOR, GENERATION)
"""What is taken from a source folder: no code, no weights, no pickles."""

OURS = (
    *COPIED,
    *("config.json", "*.safetensors", "model.safetensors.index.json"),
    *(MANIFEST, CERTIFICATE, CARD, MEASURED, "report.html", "run.json", "run.tensors"),
    *(MODULES, *SETTINGS),
)
"""What a folder may hold to be replaced."""


@contextmanager
def whole_folder(
    path: str | Path, overwrite: bool = False, check: Callable[[Path, bool], None] | None = None
) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on leaving, it becomes `path`.

    When the body raises, nothing is left of it, and an old `path` stays as it was.

    Args:
        path: the folder; it may exist if it is empty. Of a link, the folder that it leads to.
        overwrite: replace a folder that Cria wrote: one with `cria.json` and no files of others.
        check: what says whether the place is free; `check_free` if None.

    Raises:
        ArtifactError: the place is taken, or the system refuses.
    """
    target = Path(path).resolve()
    token = secrets.token_hex(4)
    temporary, old = (target.with_name(f".{target.name}.{token}.{end}") for end in ("tmp", "old"))
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        (check or check_free)(target, overwrite)
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*sorted(temporary.rglob("*")), temporary):
            flush(written)
        (check or check_free)(target, overwrite)  # somebody may have come first
        _put(temporary, target, old)
    except OSError as error:
        raise refused(f"Writing the folder {path}", error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: it is used
                parent.rmdir()


def check_free(
    target: Path,
    overwrite: bool,
    mark: str = MANIFEST,
    ours: Callable[[Path], bool] | None = None,
    told: str = "was written by Cria",
) -> None:
    """Raise an ArtifactError unless a folder may be written here: it is new, empty, or all of it is ours.

    Args:
        target: the folder; overwrite: accept one that holds files.
        mark: the file that a folder of this kind always has.
        ours: whether an entry may be replaced; None: by the names that Cria gives to models.
        told: what the whole folder would have to be, for the error.
    """
    ours = ours or _is_ours
    asked = f"Writing the folder {target}"
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(asked, "found a file of that name", "Choose another name")
    if not overwrite:
        check_empty(target, asked)
    found = sorted(entry.name for entry in target.iterdir())
    strange = [name for name in found if not ours(target / name)]
    if strange or (found and mark not in found):
        reason = f"it holds {', '.join(strange[:3])}" if strange else f"it has no {mark}"
        raise ArtifactError(
            f"Replacing the folder {target}",
            f"{reason}, so not all of it {told}",
            "Choose another folder, or remove this one yourself",
        )


def _is_ours(path: Path) -> bool:
    """Say whether Cria may have written it: by its name, and of a folder, that modules.json names it."""
    if not path.is_dir():
        return any(fnmatch(path.name, pattern) for pattern in OURS)
    try:
        named = any(item.path == path.name for item in modules_of(path.parent))
    except ArtifactError:
        return False
    return named and all(item.is_file() and item.name in HELD for item in path.iterdir())


def _put(temporary: Path, target: Path, old: Path) -> None:
    """Rename the new folder to its place; where that fails the old one is back."""
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    flush(target.parent)


def copy_known(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy the tokenizer's and processor's files and the generation settings of a model's folder.

    Only the names in `COPIED` are looked at, and only what `is_plain_file` says is one is copied. Of a folder
    of sentence-transformers all goes along that makes its embeddings; see `base.sentences`.

    Returns:
        What was left out, each with the reason.

    Raises:
        ArtifactError: `source` is no folder, a module of it cannot be kept, or the system refuses.
    """
    if not source.is_dir():
        raise ArtifactError(
            f"Copying the tokenizer from {source}", "it is no folder", "Give the folder of the dense model"
        )
    left, encoder = [], encoder_folder(source)
    for name in COPIED:
        found = encoder / name
        try:
            if is_plain_file(found):
                shutil.copyfile(found, folder / name)
            elif found.is_symlink() or found.exists():
                left.append(f"{name} ({'a link' if found.is_symlink() else 'no regular file'})")
        except OSError as error:
            raise refused(f"Copying {found}", error) from error
    _copy_modules(source, encoder, folder)
    return tuple(left)


def _copy_modules(source: Path, encoder: Path, folder: Path) -> None:
    """Copy the modules of sentence-transformers; the encoder, wherever it lay, is at the top of the copy."""
    check_modules(source)
    names = {name: source / name for name in module_files(source)}
    if names:
        names |= {name: encoder / name for name in SETTINGS if (encoder / name).exists()}
    for name, found in names.items():
        if not is_plain_file(found):  # without it the embeddings would be others
            raise ArtifactError(
                f"Copying {found}", "it is a link, or no regular file", "Put the file itself in its place"
            )
        try:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(found, folder / name)
        except OSError as error:
            raise refused(f"Copying {found}", error) from error
    if names:
        at_the_top(folder)


def is_plain_file(path: Path) -> bool:
    """Say whether a path is a regular file and no link that leads out of its folder.

    In a snapshot of the Hugging Face cache the files are links to the `blobs` of the same repository: they
    count as its own.
    """
    if not path.is_symlink():
        return path.is_file()
    found = path.resolve()
    snapshots = next((item for item in path.parent.resolve().parents[:2] if item.name == "snapshots"), None)
    return snapshots is not None and found.parent == snapshots.parent / "blobs" and found.is_file()
