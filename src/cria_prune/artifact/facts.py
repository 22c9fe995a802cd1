"""What was measured of a pruned model after it was saved, in its folder; and one table of all that is known.

`cria eval`, `cria latency` and `cria export` each leave a section in `measured.json`, with the hash of the
weights that it is of: after these have changed, a section says nothing any more. No place on a machine is
in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cria_prune.artifact.checkpoint import MANIFEST as CHECKPOINT
from cria_prune.artifact.checkpoint import read_checkpoint_manifest
from cria_prune.artifact.rebuild import read_manifest
from cria_prune.base.files import (
    CARD,
    MANIFEST,
    MEASURED,
    is_plain_file,
    readable,
    sha256,
    write_json,
    write_text,
)
from cria_prune.base.metrics import metric
from cria_prune.planning.plan import Plan
from cria_prune.repair.fidelity import Fidelity

FORMAT, VERSION = "cria-measured", 1
EVAL, LATENCY, EXPORT = SECTIONS = ("eval", "latency", "export")
UNKNOWN = "not measured"
DENSE, PRUNED, ONNX, INT8 = "dense", "pruned", "pruned, ONNX", "pruned, ONNX in int8"
COLUMNS = ("model", "parameters", "file", "MACs", "latency", "fidelity", "metric")
BEGIN, END = "<!-- cria: dense beside pruned -->", "<!-- cria: end -->"
BEFORE = "## Reload certificate"
TODO = "Remove it, and measure again"


def is_ours(folder: Path) -> bool:
    """Say whether a folder holds a pruned model that Cria saved."""
    return any(is_plain_file(folder / name) for name in (MANIFEST, CHECKPOINT))


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the sections that are of the weights in a folder.

    Raises:
        ArtifactError: the file is damaged or foreign.
    """
    path = folder / MEASURED
    if not is_plain_file(path):
        return {}
    with readable(f"Reading {path}", TODO):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["format"] != FORMAT or known["version"] != VERSION:
            raise ValueError(f"its format is {known['format']!r}, version {known['version']!r}")
        weights = hash_of(folder)
        return {name: known[name] for name in SECTIONS if name in known and known[name]["weights"] == weights}


def keep_facts(folder: Path, section: str, values: Mapping[str, Any]) -> bool:
    """Keep what a command measured of the model in a folder, and renew the table in its card.

    Returns:
        Whether it was kept: nothing is written into a folder that Cria did not save.

    Raises:
        ArtifactError: the system refuses, or a file is damaged.
    """
    if not is_ours(folder):
        return False
    known = read_facts(folder)
    before = known.get(section, {}) if section == EVAL else {}  # a metric and a distance come by two commands
    known[section] = {**before, **values, "weights": hash_of(folder)}
    write_json(folder / MEASURED, {"format": FORMAT, "version": VERSION, **known})
    renew_card(folder)
    return True


def hash_of(folder: Path) -> str:
    """Return the SHA-256 of the weights in a folder, of several files joined by spaces."""
    return " ".join(sha256(path) for path in sorted(folder.glob("*.safetensors")))


def file_size(folder: Path) -> int | None:
    """Return the bytes of the weights in a folder; None where there are none."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    return sum(sizes) or None


def side_by_side(folder: Path) -> list[dict[str, str]]:
    """Return the dense model and what was made of it, a row each; `not measured` where nothing is known.

    Raises:
        ArtifactError: a file in the folder is damaged.
    """
    facts, results = read_facts(folder), _results(folder)
    evaluated, exported = facts.get(EVAL, {}), facts.get(EXPORT, {})
    shown = metric(str(evaluated.get("metric") or results.get("metric") or "metric"))
    sizes = {**exported.get("models", {}), **facts.get(LATENCY, {}).get("models", {})}
    timed = _latencies(facts.get(LATENCY, {}))
    known = Fidelity.from_dict(evaluated["fidelity"]) if "fidelity" in evaluated else _last(results)
    value = evaluated.get("value", results.get("recovered", results.get("pruned")))

    def row(name: str, parameters: Any, size: Any, macs: Any, fidelity: str, measured: str) -> dict[str, str]:
        cells = (
            name, _count(parameters), _bytes(size), _count(macs), timed.get(name, UNKNOWN), fidelity,
            measured,
        )  # fmt: skip
        return dict(zip(COLUMNS, cells, strict=True))

    def named(value: Any) -> str:
        return UNKNOWN if value is None else f"{shown.name} {shown.text(value)}"

    dense = sizes.get(DENSE, {})
    now = results.get("parameters", sizes.get(PRUNED, {}).get("parameters"))
    rows = [
        row(
            DENSE, results.get("parameters_dense", dense.get("parameters")), dense.get("bytes"),
            results.get("macs_dense"), "the measure", named(results.get("dense")),
        ),
        row(
            PRUNED, now, file_size(folder), results.get("macs"), UNKNOWN if known is None else str(known),
            named(value),
        ),
    ]  # fmt: skip
    if "onnx" in exported:
        apart = f"as pruned, to {exported['onnx']['error']:.0e} of the largest value"
        rows.append(row(ONNX, now, exported["onnx"]["bytes"], results.get("macs"), apart, UNKNOWN))
    if "int8" in exported:
        apart = f"to the pruned one: {Fidelity.from_dict(exported['int8']['fidelity'])}"
        rows.append(row(INT8, now, exported["int8"]["bytes"], results.get("macs"), apart, UNKNOWN))
    return rows


def renew_card(folder: Path) -> None:
    """Put the table of what is known now into the card of a folder, in place of the one there.

    Raises:
        ArtifactError: the system refuses, or a file is damaged.
    """
    path = folder / CARD
    if not is_plain_file(path):
        return
    with readable(f"Reading {path}", TODO):
        text = path.read_text(encoding="utf-8")
    table = f"{BEGIN}\n\n## Dense beside pruned\n\n{_markdown(side_by_side(folder))}\n\n{END}"
    before, found, rest = text.partition(BEGIN)
    if found and END in rest:
        write_text(path, before + table + rest.partition(END)[2])
        return
    before, found, rest = text.partition(BEFORE)
    write_text(path, f"{before}{table}\n\n{found}{rest}" if found else f"{text.rstrip()}\n\n{table}\n")


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _results(folder: Path) -> dict[str, Any]:
    """Return what the manifest in a folder says of its run, and the counts of its plan."""
    ours = is_plain_file(folder / CHECKPOINT)
    manifest = read_checkpoint_manifest(folder) if ours else read_manifest(folder)
    results = manifest.get("results")
    counts = ("parameters", "parameters_dense", "macs", "macs_dense")
    report = Plan.from_dict(manifest["plan"]).report
    found = {name: report[name] for name in counts if name in report}
    return {**found, **(results if isinstance(results, dict) else {})}


def _last(results: Mapping[str, Any]) -> Fidelity | None:
    """Return the fidelity after the last stage of a pruning; None once it was trained: it is another then."""
    stages = list((results.get("fidelity") or {}).values())
    return Fidelity.from_dict(stages[-1]) if stages and results.get("recovered") is None else None


def _latencies(section: Mapping[str, Any]) -> dict[str, str]:
    """Return the seconds of a batch, of the smallest that was measured, by model."""
    found = dict[str, str]()
    names = {"onnxruntime": ONNX, "int8": INT8, "eager": PRUNED}
    for item in section.get("rows", ()):
        where = f"ms, batch {item['batch']}"
        found.setdefault(names.get(item["runtime"], ""), f"{1e3 * item['pruned']:.3g} {where}")
        if item["runtime"] == "eager":
            found.setdefault(DENSE, f"{1e3 * item['dense']:.3g} {where}")
    return found


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) else UNKNOWN


def _bytes(value: Any) -> str:
    return f"{value / 1e6:,.3g} MB" if isinstance(value, (int, float)) else UNKNOWN
