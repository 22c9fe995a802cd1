"""What `cria report` does, and pictures beside a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.base.errors import PackageError
from cria_prune.base.files import write_text
from cria_prune.cli.folder import REPORT, check_file
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Report
from cria_prune.report.folder import folder_page
from cria_prune.report.html import is_page
from cria_prune.report.pictures import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def report(request: Report, out: Output) -> None:
    """Make the page of a run or a bench from the files in its folder."""
    folder = request.folder
    found = folder_page(folder, request.layer)
    output = request.output or folder / REPORT
    ours = request.output is None and written_by_cria(output)
    check_file(output, request.overwrite or ours)
    write_text(output, found.html)
    out.say(f"report {output}")
    out.answer({"folder": str(folder), "kind": found.kind, "layer": found.layer, "output": str(output)})


def picture(path: Path, title: str, size: tuple[float, float], draw: Callable[[Axes], Any]) -> str:
    """Write a picture and return words that name it, or that say what it is left out for."""
    try:
        write_picture(path, title, size, draw)
    except PackageError as error:
        return f"left out: {error}"
    return f"picture {path}"


def written_by_cria(path: Path) -> bool:
    """Say whether a file begins as every report does: it may be replaced by a newer one."""
    try:
        with path.open(encoding="utf-8") as file:
            return is_page(file.read(4096))
    except (OSError, UnicodeDecodeError):
        return False
