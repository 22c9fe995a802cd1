"""The output folder: claimed before the long work, filled without a moment in which it is broken."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn

from cria_prune.artifact.checkpoint import MANIFEST, WEIGHTS, save
from cria_prune.base.errors import ArtifactError, PackageError
from cria_prune.base.files import MANIFEST as PRETRAINED
from cria_prune.base.files import MEASURED, new_folder, refused
from cria_prune.base.ranks import world
from cria_prune.planning.plan import Plan
from cria_prune.report.folder import FILES
from cria_prune.report.pictures import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.html"


@contextmanager
def claimed(output: Path | None, name: str, overwrite: bool) -> Iterator[Path]:
    """Give a folder that may be written to; one that stays empty is removed on leaving.

    Of several processes the first claims it, and tells the others its name.

    Args:
        output: the folder asked for; None takes the first free of runs/NAME, runs/NAME-2, ...
        name: NAME.
        overwrite: accept a folder that holds files.

    Raises:
        ArtifactError: the folder holds files and may not be overwritten, or the system refuses.
    """
    here = world()
    if not here.first:
        yield Path(here.lead("The output folder", str))
        return
    folder = _first_free(name) if output is None else _asked_for(output, overwrite)
    _check_takes_files(folder)
    try:
        here.lead("The output folder", lambda: str(folder))
        yield folder
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()
            if output is None:
                folder.parent.rmdir()


def check_file(path: Path | None, overwrite: bool) -> None:
    """Check that a file may be written, before the work for it begins.

    Raises:
        ArtifactError: it exists and may not be overwritten, or its folder does not take files.
    """
    if path is None:
        return
    if path.exists() and not (overwrite and path.is_file()):
        raise ArtifactError(f"Writing {path}", "it exists", "Choose another name, or pass --overwrite")
    _check_takes_files(path.parent)


def _check_takes_files(folder: Path) -> None:
    """Make a folder if it is not there, and write a file into it that is gone at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise refused(f"Writing to the folder {folder}", error) from error


def keep(folder: Path, model: nn.Module, plan: Plan, **described: Any) -> None:
    """Save a checkpoint into the folder in place of the one there; `described` goes to `checkpoint.save`.

    Both files are written aside first and then renamed while Ctrl-C waits, so that an
    interrupted run leaves a whole checkpoint. What is kept of an earlier run, and its report, is removed.

    Raises:
        ArtifactError: the system refuses, or something is no JSON.
    """
    try:
        with (
            interrupts_wait(),
            tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside,
        ):
            save(aside, model, plan, **described)
            for name in (REPORT, "ablation.json", "ablation.png", MEASURED, *FILES):
                (folder / name).unlink(missing_ok=True)
            for name in (WEIGHTS, MANIFEST):
                os.replace(Path(aside) / name, folder / name)
    except OSError as error:
        raise refused(f"Writing to the folder {folder}", error) from error


def picture(path: Path, title: str, size: tuple[float, float], draw: Callable[[Axes], Any]) -> str:
    """Write a picture and return words that name it, or that say what it is left out for."""
    try:
        write_picture(path, title, size, draw)
    except PackageError as error:
        return f"left out: {error}"
    return f"picture {path}"


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C take effect only when the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if arrived:
        raise KeyboardInterrupt


def _first_free(name: str) -> Path:
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise refused(f"Writing to the folder {folder}", error) from error
    raise AssertionError("count() does not end")


def _asked_for(folder: Path, overwrite: bool) -> Path:
    asked = f"Writing to the folder {folder}"
    if folder.resolve() == Path.cwd():
        raise ArtifactError(asked, "it is the current folder", "Name a folder below it, or beside it")
    ours = any((folder / name).exists() for name in (MANIFEST, PRETRAINED))
    if overwrite and (folder / WEIGHTS).exists() and not ours:
        raise ArtifactError(
            asked, f"its {WEIGHTS} was not written by Cria", "Choose another folder, or remove it yourself"
        )
    return new_folder(folder, overwrite, "--overwrite")
