"""Folders that are whole or absent, and the few files of a model's source folder that go with its weights."""

from __future__ import annotations

import os
import secrets
import shutil
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
    *(MANIFEST, CERTIFICATE, CARD, "report.html", "run.json", "run.tensors"),
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
        check_free(target, overwrite)
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        check_free(target, overwrite)  # somebody may have come first
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


def check_free(target: Path, overwrite: bool) -> None:
    """Raise an ArtifactError unless a folder may be written here; see `whole_folder`."""
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

    Only the names in `COPIED` are looked at, and only what `is_plain_file` says is one is copied.

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
            if is_plain_file(found):
                shutil.copyfile(found, folder / name)
            elif found.is_symlink() or found.exists():
                left.append(f"{name} ({'a link' if found.is_symlink() else 'no regular file'})")
        except OSError as error:
            raise refused(f"Copying {found}", error) from error
    return tuple(left)


def is_plain_file(path: Path) -> bool:
    """Say whether a path is a regular file and no link that leads out of its folder.

    In a snapshot of the Hugging Face cache the files are links to the `blobs` of the same repository: they
    count as its own.
    """
    if not path.is_symlink():
        return path.is_file()
    snapshots, found = path.parent.resolve().parent, path.resolve()
    return snapshots.name == "snapshots" and found.parent == snapshots.parent / "blobs" and found.is_file()
