"""The result files of benchmarks/roundtrip.py as docs/transformers.md, which benchmarks/tables.py writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from coverage_table import table
from roundtrip_families import FAMILIES

FOLDER = Path(__file__).parent / "results" / "roundtrip"
KINDS = {
    "neuron": "neurons",
    "gated": "gated neurons",
    "head": "heads",
    "kv group": "KV groups",
    "residual": "residual width",
}

HOW = """\
A vanilla configuration says one feed-forward width and one number of heads for all layers, so these plans
keep the same number of units in every layer; which numbers it can say is found by building its class. Each
model is tiny (two layers, width 160, eight heads of 20 or 24) and has random weights, no norm at one and no
bias at zero. Random units go until 40 % (with the residual width 50 %) of the parameters in the groups that
can be held are gone; steps of heads are large in so small a model, so more may go. *Masked = pruned* is the
proof of the cut in float64, *moved* how far it moves the output, relative to its largest value. The pruned
model is saved with `save_pretrained`; a fresh process that cannot import Cria loads the folder by the class
under *loaded by* and runs the same inputs in float32. *Outputs* says whether they are equal bit for bit, else
the largest difference, absolute / relative to the largest value; *tokens* how many of eight generated ones,
in greedy search with the cache, are the same."""

READING = """\
A head size that the configuration leaves open is written into it: `head_dim`, where it was none before. Where
the class computes the head size from width and heads, or another size by a rule, there is no such field, and
the units stay. A Llama is refused when its heads do not divide its width; `llama-as-mistral` keeps such a
number, and its folder says `mistral` with the sliding window off. Query heads leave with their KV group. What
only the configuration refuses can be cut all the same, and saved with `cria_prune.save`, which needs Cria to
load."""

REFUSED = """\
Units that stay: a vanilla configuration cannot say their number, or (T5's width) Cria does not cut them. The
reason is the one at the smallest number that was tried; at others it may be another, as the head size at a
width that the heads divide."""

Results = list[dict[str, Any]]


def read(folder: Path = FOLDER) -> Results:
    """Return the results in the order of the families."""
    order = list(FAMILIES)
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda item: order.index(item["family"]))


def cell_text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def cut_row(result: dict[str, Any], cut: dict[str, Any]) -> list[str]:
    certificate = cut["certificate"]
    removed = [f"{KINDS[item['kind']]} {item['before']} → {item['after']}" for item in cut["units"]]
    fields = [
        f"{name} {'none' if before is None else before} → {after}"
        for name, (before, after) in sorted(cut["config"].items())
    ]
    apart = f"{certificate['difference']:.0e} / {certificate['relative']:.0e}"
    tokens = certificate["tokens"]
    return [
        result["family"],
        ", ".join(removed),
        ", ".join(fields),
        f"{result['parameters']:,} → {cut['parameters']:,}",
        f"{cut['masked']:.0e}",
        f"{cut['moved']:.2g}",
        "equal bit for bit" if certificate["equal"] else apart,
        f"{certificate['same_tokens']} of {tokens}" if tokens else "",
        f"{certificate['loader']}, {certificate['architecture']}",
    ]


def cut_table(results: Results, scope: str) -> list[str]:
    rows = [cut_row(item, cut) for item in results if "units" in (cut := item["cuts"].get(scope, {}))]
    head = ["family", "units per layer", "configuration", "parameters", "masked = pruned", "moved"]
    return table([*head, "outputs", "tokens", "loaded by"], rows)


def refused_table(results: Results) -> list[str]:
    """Return what stays whole, or at fewer numbers than all, and why; each reason once per family."""
    rows: list[list[str]] = []
    for result in results:
        cuts = [cut for scope in ("inner", "all") if (cut := result["cuts"].get(scope))]
        for cut in cuts:
            for item in cut.get("refused", []):
                reason = re.sub(r"^a vanilla \w+ cannot hold fewer [\w ]+: ", "", item["reason"])
                row = [result["family"], KINDS[item["kind"]], cell_text(reason)]
                rows += [row] if row not in rows else []
        for item in (cuts[-1] if cuts else {}).get("units", []):
            if item["allowed"] and len(item["allowed"]) < item["before"]:
                few = f"only {', '.join(map(str, item['allowed']))} of {item['before']}"
                rows.append([result["family"], KINDS[item["kind"]], few])
    return table(["family", "cannot be cut", "why, or to what"], rows)


def untouched(results: Results) -> list[str]:
    """Return the families of which nothing can be cut, though nothing failed."""
    return [
        item["family"]
        for item in results
        if "error" not in item and not any({"units", "error"} & cut.keys() for cut in item["cuts"].values())
    ]


def failures(results: Results) -> list[str]:
    rows = []
    for result in results:
        stages = {"model": result, **{f"cut {scope}": cut for scope, cut in result["cuts"].items()}}
        rows += [
            [result["family"], where, cell_text(item["error"])]
            for where, item in stages.items()
            if "error" in item
        ]
    return ["None.", ""] if not rows else [*table(["family", "where", "error"], rows), ""]


def origin(results: Results) -> str:
    commits = sorted({str(item["provenance"]["commit"])[:9] for item in results})
    versions = sorted({f"{k} {v}" for item in results for k, v in item["versions"].items()})
    torch = sorted({f"torch {item['provenance']['torch']}" for item in results})
    cuts = [cut for item in results for cut in item["cuts"].values() if "certificate" in cut]
    equal = sum(cut["certificate"]["equal"] for cut in cuts)
    return (
        f"{len(results)} families, {len(cuts)} folders loaded, {equal} with outputs equal bit for bit; "
        f"{', '.join([*torch, *versions])}; code of commit {', '.join(commits)}."
    )


def render(folder: Path = FOLDER) -> str:
    results = read(folder)
    lines = ["# What plain transformers loads", ""]
    lines += ["`python benchmarks/tables.py` writes it, `python benchmarks/roundtrip.py` measures.", ""]
    lines += [HOW, "", origin(results), "", READING, ""]
    lines += ["## Without the residual width", "", *cut_table(results, "inner"), ""]
    lines += ["## With the residual width", "", *cut_table(results, "all"), ""]
    lines += ["## What a vanilla configuration cannot hold", "", REFUSED, "", *refused_table(results), ""]
    lines += (
        [f"No cut of these can be held: {', '.join(names)}.", ""] if (names := untouched(results)) else []
    )
    lines += ["## What failed", "", *failures(results)]
    return "\n".join(lines).rstrip() + "\n"
