"""What `cria report` does, and what a run keeps for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cria_prune.base.errors import ArtifactError, PackageError
from cria_prune.base.files import write_text
from cria_prune.cli import show
from cria_prune.cli.folder import REPORT, check_file
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Report
from cria_prune.report.folder import History, folder_page, read_run, write_run
from cria_prune.report.html import is_page
from cria_prune.report.pictures import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cria_prune.cli.job import Job
    from cria_prune.result import PruneResult


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


def keep_run(job: Job, result: PruneResult) -> None:
    """Write what the report needs into the output folder, of a run that pruned."""
    page = show.report(result, job.results, job.target.task.metric, job.origin)
    write_run(job.output, page, result.rounds, result.graphs or {})


def earlier_run(job: Job) -> History | None:
    """Return what the checkpoint that a job goes on from keeps of its run; None if nothing whole."""
    try:
        return None if job.target.checkpoint is None else read_run(Path(job.target.checkpoint))
    except ArtifactError as error:
        job.out.note(f"the run before is not carried on in the report: {error}")
        return None


def keep_recovered(job: Job, before: History) -> None:
    """Write the run that was pruned before, now recovered, into the output folder."""
    page = before.page
    earlier: list[Mapping[str, Any]] = [*page.get("earlier", []), page["provenance"]]
    seconds = dict(page.get("seconds", {}))
    for stage, spent in job.results["seconds"].items():
        seconds[stage] = round(seconds.get(stage, 0.0) + spent, 3)
    page = {**page, **job.results, "seconds": seconds, "rounds": page["rounds"]}
    page = {**page, "provenance": job.origin, "earlier": earlier}
    write_run(job.output, page, before.rounds, before.graphs)
