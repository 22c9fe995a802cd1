"""The result files of benchmarks/coverage.py as docs/coverage.md; `python benchmarks/tables.py` writes it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results" / "coverage"
LIBRARIES = ("own", "torchvision", "timm", "transformers")
PEER_LIMIT = 120.0
PARTICULARS = re.compile(r"'?\b[a-zA-Z_]\w*(\.\w+)+\b'?|\[[\d, ]+\]|\d{2,}")
Results = dict[str, dict[str, Any]]


def result_path(folder: Path, script: str, network: str) -> Path:
    """Return where the result of one network is; `network` is library/name."""
    folders = {"coverage_cell": "cria", "peer": "torch-pruning", "removable_cell": "before"}
    return folder / folders[script] / f"{network}.json"


def read(folder: Path, who: str) -> Results:
    """Return network -> result, in the order of the libraries and names."""
    found = [json.loads(path.read_text()) for path in sorted((folder / who).glob("*/*.json"))]
    found.sort(key=lambda item: LIBRARIES.index(item["network"].split("/")[0]))
    return {item["network"]: item for item in found}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def error_of(stages: dict[str, Any]) -> str:
    """Name the first stage that did not end well, and why; empty where all did."""
    for stage, values in stages.items():
        if "error" in values:
            return f"{stage}: {cell_text(values['error'])}"
    return ""


def cell_text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:160]


def seconds(stages: dict[str, Any], stage: str) -> str:
    value = stages.get(stage, {}).get("seconds")
    return "" if value is None else f"{value:.1f}"


OURS = """\
Each network has random weights and a batch of two examples. Capture is `torch.export`, the first time in
its process, its imports included; discover is all of it: capture, rules and trial cuts. Groups are counted
prunable + frozen, then by kind. *Removable* is the largest share of all parameters that can go with the
default floor (a tenth of every group stays), without and with residual width. Then a random half of the
units of every prunable group is removed at once, and *masked = pruned* is the largest difference in float64
between the dense network with these units masked and the pruned one, relative to the largest output; without
and with residual width. *Moved* is how far pruning moves the output, relative to its largest value: equality
says something only where that is large. After that the pruned network ran forward and back in float32 with
finite gradients of the right shapes."""

PEER = f"""\
Torch-Pruning on the same networks, without help for the architecture: it gets the example and the layers
that make the output as ignored layers; its trace sees the first output only, and decoders run without
their cache. One process per network, {PEER_LIMIT:g} s for everything. *Left* is the share of the parameters
after `BasePruner` with magnitude importance and a ratio of 0.5, and *runs* whether the forward then runs,
right or wrong. *Groups* are up to eight of the groups that it prunes, spread over the network, each removed
alone from a fresh copy: equal / compared, where equal is a relative difference below 1e-10 in float64
between the pruned network and the dense one with the removed channels set to zero (in the outputs of the
convolutions and linears of the group, and in the weights that read them). Not compared, but counted: groups
that crash in the forward, and groups whose width a layer norm or another norm takes its statistics over, or
that cut an `nn.MultiheadAttention` whole: there the masked network is another function by its nature. *Ties*
says whether the sets of convolutions and linears whose outputs leave together are those that Cria finds."""


def our_row(network: str, result: dict[str, Any]) -> list[str]:
    stages = result["stages"]
    found, inner, everything = (stages.get(key, {}) for key in ("discover", "cut inner", "cut all"))
    kinds = ", ".join(
        f"{kind} {item['prunable']}+{item['frozen']}" for kind, item in found.get("kinds", {}).items()
    )
    return [
        network,
        f"{stages.get('build', {}).get('parameters', 0):,}",
        seconds(stages, "capture"),
        seconds(stages, "discover"),
        f"{found['prunable']} + {found['frozen']}" if "prunable" in found else "",
        kinds,
        pair(inner, everything, "reachable", "{:.0%}"),
        pair(inner, everything, "difference", "{:.0e}"),
        pair(inner, everything, "moved", "{:.2g}"),
        error_of(stages),
    ]


def pair(first: dict[str, Any], second: dict[str, Any], key: str, form: str) -> str:
    return " / ".join(form.format(item[key]) if key in item else "-" for item in (first, second))


def peer_row(network: str, result: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    stages = result["stages"]
    groups = stages.get("groups", {})
    compared = "compared" in groups
    return [
        network,
        seconds(stages, "trace"),
        *half_cells(stages),
        f"{groups['equal']} / {groups['compared']}" if compared else "",
        f"{groups['difference']:.0e}" if compared and groups["compared"] else "",
        f"{len(groups['crashes'])}" if compared else "",
        f"{groups['through norm']}" if compared else "",
        same_ties(stages, ours),
        error_of(stages),
    ]


def half_cells(stages: dict[str, Any]) -> list[str]:
    """Return the share of the parameters left after pruning everything by half, and whether it runs."""
    half = stages.get("half", {})
    if "parameters" not in half:
        return ["no" if half else "", ""]
    share = half["parameters"] / stages["build"]["parameters"]
    return [f"{share:.0%}", "yes" if half["runs"] else f"no: {cell_text(half['crash'])}"]


def same_ties(theirs: dict[str, Any], ours: dict[str, Any] | None) -> str:
    both = [item.get("tied") for item in (theirs.get("trace", {}), (ours or {}).get("discover", {}))]
    if None in both:
        return ""
    peer, own = ({tuple(item) for item in sets} for sets in both)
    if not peer and not own:
        return "none in either"
    return "same" if peer == own else f"{len(own - peer)} only Cria, {len(peer - own)} only the peer"


def reasons(results: Results) -> list[str]:
    """Count why groups are frozen over all networks; names of modules and sizes are left out."""
    groups: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for result in results.values():
        here: Counter[str] = Counter()
        for reason, count in result["stages"].get("discover", {}).get("reasons", {}).items():
            here[cell_text(re.sub(PARTICULARS, "…", reason))] += count
        groups.update(here)
        networks.update(here.keys())
    rows = [[reason, f"{count}", f"{networks[reason]}"] for reason, count in groups.most_common()]
    return table(["why groups stay", "groups", "networks"], rows)


def origin(results: Results) -> str:
    commits = sorted({str(item["provenance"]["commit"])[:9] for item in results.values()})
    versions = sorted({f"{k} {v}" for item in results.values() for k, v in item["versions"].items()})
    torch = sorted({f"torch {item['provenance']['torch']}" for item in results.values()})
    return f"{len(results)} networks; {', '.join([*torch, *versions])}; code of commit {', '.join(commits)}."


def render(folder: Path = FOLDER) -> str:
    ours, peers = read(folder, "cria"), read(folder, "torch-pruning")
    lines = ["# Coverage", ""]
    lines += [
        "Written by `python benchmarks/tables.py` from the files that `python benchmarks/coverage.py` makes.",
        "",
    ]
    if ours:
        head = ["network", "parameters", "capture s", "discover s", "groups", "prunable + frozen by kind"]
        head += ["removable", "masked = pruned", "moved", "failed"]
        rows = [our_row(network, result) for network, result in ours.items()]
        lines += ["## Cria", "", OURS, "", origin(ours), "", *table(head, rows), "", *reasons(ours), ""]
    if peers:
        head = ["network", "trace s", "left", "runs", "groups", "largest difference", "crash"]
        head += ["through a norm", "ties", "failed"]
        own = {network: result["stages"] for network, result in ours.items()}
        rows = [peer_row(network, result, own.get(network)) for network, result in peers.items()]
        made = sorted({item["stages"].get("build", {}).get("torch-pruning", "?") for item in peers.values()})
        lines += [
            f"## Torch-Pruning {', '.join(made)}",
            "",
            PEER,
            "",
            origin(peers),
            "",
            *table(head, rows),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"
