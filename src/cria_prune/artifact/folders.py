"""Folders that are whole or absent, and the few files of a model's source folder that go with its weights."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from cria_prune.artifact.files import refused
from cria_prune.errors import ArtifactError

MANIFEST, CERTIFICATE, CARD = "cria.json", "certificate.json", "README.md"
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
    *(MANIFEST, CERTIFICATE, CARD, "report.html"),
)
"""What a folder may hold to be replaced."""


@contextmanager
def whole_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on leaving, it becomes `path`.

    When the body raises, nothing is left of it, and an old `path` stays as it was.

    Args:
        path: the folder; it may exist if it is empty. Of a link, the folder that it leads to.
        overwrite: replace a folder that Cria wrote: one with `cria.json` and no files of others.

    Raises:
        ArtifactError: the place is taken, or the system refuses.
    """
    target = Path(path).resolve()
    token = secrets.token_hex(4)
    temporary, old = (target.with_name(f".{target.name}.{token}.{end}") for end in ("tmp", "old"))
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        _check_free(target, overwrite)
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        _check_free(target, overwrite)  # somebody may have come first
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


def _check_free(target: Path, overwrite: bool) -> None:
    asked = f"Writing the folder {target}"
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(asked, "found a file of that name", "Choose another name")
    found = sorted(entry.name for entry in target.iterdir())
    if found and not overwrite:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ArtifactError(
            asked, f"it is not empty ({names})", "Choose another folder, or pass overwrite=True"
        )
    strange = [
        name
        for name in found
        if (target / name).is_dir() or not any(fnmatch(name, pattern) for pattern in OURS)
    ]
    if strange or (found and MANIFEST not in found):
        reason = f"it holds {', '.join(strange[:3])}" if strange else f"it has no {MANIFEST}"
        raise ArtifactError(
            f"Replacing the folder {target}",
            f"{reason}, so not all of it was written by Cria",
            "Choose another folder, or remove this one yourself",
        )


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
    with suppress(OSError):  # some file systems cannot flush a folder
        _flush_one(target.parent)


def _flush(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        _flush_one(entry)
    with suppress(OSError):
        _flush_one(folder)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_known(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy the tokenizer's and processor's files and the generation settings of a model's folder.

    Only the names in `COPIED` are looked at, and only regular files are copied. A link is left out, unless
    the folder is a snapshot in the Hugging Face cache and the link leads to the blobs beside it.

    Returns:
        What was left out, each with the reason.

    Raises:
        ArtifactError: `source` is no folder, or the system refuses.
    """
    if not source.is_dir():
        raise ArtifactError(
            f"Copying the tokenizer from {source}", "it is no folder", "Give the folder of the dense model"
        )
    left = []
    for name in COPIED:
        found = source / name
        try:
            mode = found.lstat().st_mode
            if stat.S_ISLNK(mode) and _is_blob(source.resolve(), found.resolve()):
                mode = found.stat().st_mode
            if stat.S_ISREG(mode):
                shutil.copyfile(found, folder / name)
            else:
                left.append(f"{name} ({'a link' if stat.S_ISLNK(mode) else 'no regular file'})")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise refused(f"Copying {found}", error) from error
    return tuple(left)


def _is_blob(source: Path, found: Path) -> bool:
    repository = source.parent.parent
    return source.parent.name == "snapshots" and found.parent == repository / "blobs" and found.is_file()
