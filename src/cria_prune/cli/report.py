"""What `cria report` and `cria bench` do: pages and pictures beside the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cria_prune.base.errors import ConfigError
from cria_prune.base.files import write_text
from cria_prune.base.metrics import metric as metric_of
from cria_prune.bench.run import run_grids
from cria_prune.bench.suite import Grid, cells, file_name, grid_of, read_suite
from cria_prune.cli.folder import REPORT, check_file
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Bench as BenchRequest
from cria_prune.cli.settings import Report
from cria_prune.cli.target import find, own_of
from cria_prune.report.bench_page import (
    Bench,
    Setting,
    read_bench,
    render_bench,
    setting_title,
    with_interval,
)
from cria_prune.report.folder import folder_page
from cria_prune.report.html import is_page
from cria_prune.tasks.base import Task
from cria_prune.tasks.functions import is_function


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


def written_by_cria(path: Path) -> bool:
    """Say whether a file begins as every report does: it may be replaced by a newer one."""
    try:
        with path.open(encoding="utf-8") as file:
            return is_page(file.read(4096))
    except (OSError, UnicodeDecodeError):
        return False


NARROWED = ("criteria", "reductions", "seeds", "repair")
"""Lists of a grid that can be narrowed: the fields of the request have the same names."""


def bench(request: BenchRequest, out: Output) -> None:
    """Measure what is missing; tables, a page with pictures and one line for programs."""
    device = request.torch_device
    grids, chosen = asked_grids(request)
    network = grids[0].network if chosen is None else chosen.name
    folder = request.output or Path("bench") / network
    wanted = {file_name(cell) for grid in grids for cell in cells(grid)}
    there = sum((folder / name).exists() for name in wanted)
    out.say(f"{network}: {len(wanted)} cells in {folder}, {there} of them measured before")
    out.kept = f"the cells measured so far are in {folder}; the same command goes on"

    def done(number: int, count: int, cell: dict[str, Any], values: dict[str, Any]) -> None:
        figures = [f"{key} {values[key]:.4f}" for key in ("pruned", "recovered") if key in values]
        out.note(f"cell {number} of {count}, {Path(file_name(cell)).stem}: {', '.join(figures)}")

    measured, failed = run_grids(
        grids, folder, command=request.command, device=device, progress=out.progress, on_cell=done,
        chosen=chosen,
    )  # fmt: skip
    found = read_bench(folder)
    for setting in found.settings():
        show_setting(out, found, setting)
    page = write_text(folder / REPORT, render_bench(found, network))
    out.say(f"report {page}")
    for name, error in failed.items():
        out.note(f"{name} could not be measured: {error}")
    out.answer(
        {"suite": request.suite, "network": network, "output": str(folder), "cells": len(wanted),
         "measured": measured, "failed": len(failed)}
    )  # fmt: skip
    if failed:
        raise next(iter(failed.values()))


def asked_grids(request: BenchRequest) -> tuple[list[Grid], Task | None]:
    """Return the grids to measure, and the task of a network of the user's own.

    Raises:
        ConfigError: nothing measures that network, or functions were given to what has its own.
    """
    if is_function(request.suite):
        lists = (request.criteria, request.reductions, request.seeds, request.repair)
        grids = [grid_of(request.suite, *lists)]
    else:
        grids = narrowed(read_suite(request.suite), request)
    network = grids[0].network
    if not is_function(network):
        if request.own():
            find(network, own=request.own())  # which says why not
        return grids, None
    chosen = find(network, own=own_of(request)).task
    if not chosen.measured:
        raise ConfigError(f"A bench of {network}", *chosen.lacking)
    return grids, chosen


def narrowed(grids: Sequence[Grid], request: BenchRequest) -> list[Grid]:
    """Return the grids with only those of their criteria, reductions, seeds and repairs that were asked for.

    Raises:
        ConfigError: no grid has a value of each.
    """
    left = []
    for grid in grids:
        values = grid.model_dump()
        for key in NARROWED:
            asked: Sequence[Any] = getattr(request, key) or values[key]
            values[key] = tuple(item for item in values[key] if item in asked)
        if all(values[key] for key in NARROWED):
            left.append(Grid(**values))
    if not left:
        has = {key: sorted({item for grid in grids for item in getattr(grid, key)}) for key in NARROWED}
        raise ConfigError(
            f"The suite {request.suite} with these options alone",
            "the suite has " + "; ".join(f"{key} {', '.join(map(str, items))}" for key, items in has.items()),
            "Ask for some of these",
        )
    return left


def show_setting(out: Output, found: Bench, setting: Setting) -> None:
    """Print one setting as a table: criteria in the rows, reductions in the columns."""
    metric = found.of(setting)[0].metric
    states = [key for key in ("pruned", "recovered") if found.values(setting, key)]
    points = {key: found.values(setting, key) for key in states}
    shares = sorted({share for key in states for rows in points[key].values() for share in rows})
    names = [name for name in found.criteria if any(name in points[key] for key in states)]
    rows = [
        [name]
        + [
            with_interval(list(seeds.values()), metric)
            if (seeds := points[key].get(name, {}).get(share))
            else ""
            for key in states
            for share in shares
        ]
        for name in names
    ]
    unit = " (%)" if metric_of(metric).share else ""
    dense = with_interval(list(found.dense.values()), metric) if found.dense else "unknown"
    out.heading(f"{setting_title(setting)}: {metric}{unit}, dense {dense}")
    out.table(["criterion", *(f"{key} at {100 * share:g} %" for key in states for share in shares)], rows)
