"""The result file of benchmarks/journeys.py as docs/tasks.md, which benchmarks/tables.py writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coverage_table import table
from cria_prune.base.metrics import metric
from tiny import KINDS

PATH = Path(__file__).parent / "results" / "journeys" / "kinds.json"

HEAD = """\
# Tasks

Every kind of task of Hugging Face models, walked from the dense folder to a recovered one by the commands
alone (`python benchmarks/journeys.py`; the networks are tiny and drawn at random, so the figures say that a
step works, not how good a result is). *Prune* says how much of the prunable parameters left, and by which
policy; *certificate* what a fresh process found that loaded the folder by its Auto class; *pipeline* what
`pipeline(...)` of transformers made of it in another one, to which Cria does not exist; *eval* the metric of
the task; *against* the distance from the dense folder, without labels; *recover* the metric before and after
one epoch. A dash: there is nothing to do, for the task has no labels, or only Cria loads the folder. How to
walk it yourself: [Hugging Face models](guides/hugging-face.md)."""

COLUMNS = (
    "network",
    "task",
    "prune",
    "certificate",
    "pipeline",
    "eval",
    "against",
    "recover",
    "export",
    "int8",
)
WIDEST = 160


def text_of(step: str, found: Mapping[str, Any] | None) -> str:
    """Return what came of a step, as short as a cell."""
    if found is None:  # the last two steps are walked by another benchmark
        return "" if step in COLUMNS[-2:] else "–"
    if "error" in found:
        return f"no: {' '.join(str(found['error']).split())[:WIDEST]}".replace("|", "\\|")
    if step == "prune":
        return f"{found['reduction']:.0%}, {found['policy']}"
    if step == "certificate":
        same = "equal" if found["equal"] else f"within {found['relative']:.0e}"
        return f"`{found['loader']}`: {same}"
    if step == "pipeline":
        return str(found["by"])
    if step == "against":
        return str(found["loss"])
    if step == "recover":
        return f"{found.get('pruned', 0):.3g} → {found.get('recovered', 0):.3g}"
    return (
        ", ".join(f"{name} {metric(name).text(value)}" for name, value in list(found.items())[:2]) or "done"
    )


def render(path: Path = PATH) -> str:
    """Return the page."""
    values = json.loads(path.read_text())
    found, rows = values["rows"], []
    for kind in KINDS:
        row = found.get(kind.name)
        cells = [""] * (len(COLUMNS) - 2) if row is None else [text_of(s, row.get(s)) for s in COLUMNS[2:]]
        rows += [] if row is None else [[kind.name, row["task"], *cells]]
    origin = values["provenance"]
    commits = sorted({str(row["commit"])[:9] for row in found.values()})
    asked = " ".join(values["asked"])
    text = f"{len(rows)} networks, `{asked}`; torch {origin['torch']}; code of commit {', '.join(commits)}."
    return "\n".join([HEAD, "", *table(list(COLUMNS), rows), "", text, ""])
