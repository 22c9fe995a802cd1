"""One page for whatever folder of Cria's is given: a run or a bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cria_prune.artifact.cells import read_bench
from cria_prune.artifact.report import render
from cria_prune.artifact.report_bench import render_bench
from cria_prune.artifact.run_folder import is_run, run_result
from cria_prune.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class FolderPage:
    """A page and what it is of.

    Attributes:
        kind: "run" or "bench".
        html: the page.
        layer: whose neuron graphs it shows; None for a bench, or where none is known.
    """

    kind: str
    html: str
    layer: str | None = None


def folder_page(folder: str | Path, layer: str | None = None) -> FolderPage:
    """Return the page of a run or of a bench, made from the files in its folder alone.

    Args:
        folder: what `cria run` or `cria prune` wrote, or a folder of a bench's result files.
        layer: of a run: whose neuron graphs are drawn; None chooses.

    Raises:
        ArtifactError: the folder is neither, or a file in it is damaged.
        ConfigError: there is no such layer.
    """
    folder = Path(folder)
    asked = f"A report of {folder}"
    todo = "Give the folder that cria run or cria prune wrote, or one of a bench's result files"
    if not folder.is_dir():
        raise ArtifactError(asked, "it is no folder" if folder.exists() else "it does not exist", todo)
    if is_run(folder):
        result = run_result(folder, layer)
        return FolderPage("run", render(result), (result.get("layer") or {}).get("name"))
    bench = read_bench(folder)
    if not bench.cells:
        runs = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_run(entry))
        if runs:
            todo = f"Give one of the runs in it: {', '.join(runs[:8])}{', ...' if len(runs) > 8 else ''}"
        found = "it holds neither a run (run.json, manifest.json or cria.json) nor cells of a bench"
        raise ArtifactError(asked, found, todo)
    if layer is not None:
        raise ConfigError(f"The layer {layer!r} of {folder}", "it is a bench", "Leave out --layer")
    return FolderPage("bench", render_bench(bench, folder.resolve().name))
