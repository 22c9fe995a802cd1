"""The result files of benchmarks/coverage.py as docs/coverage.md; `python benchmarks/tables.py` writes it."""

from __future__ import annotations

import json
import re
import statistics
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
its process, its imports included; discover is all of it: capture, rules and trial cuts. Both are seconds of
one CPU. Groups are counted
prunable + frozen, then by kind. *Removable* is the largest share of all parameters that can go with the
default floor (a tenth of every group stays), without and with residual width. Then a random half of the
units of every prunable group is removed at once, and *masked = pruned* is the largest difference in float64
between the dense network with these units masked and the pruned one, relative to the largest output; without
and with residual width. *Noise* is the same difference, without residual width, after noise was put into
every weight entry that was removed, on this batch and on a second one of three examples, in evaluation and in
training mode. *Moved* is how far pruning moves the output, relative to its largest value: equality
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
        cpu(stages, "capture"),
        cpu(stages, "discover"),
        f"{found['prunable']} + {found['frozen']}" if "prunable" in found else "",
        kinds,
        pair(inner, everything, "reachable", "{:.0%}"),
        pair(inner, everything, "difference", "{:.0e}"),
        f"{inner['noise']['difference']:.0e}" if "noise" in inner else "",
        pair(inner, everything, "moved", "{:.2g}"),
        error_of(stages),
    ]


def cpu(stages: dict[str, Any], stage: str) -> str:
    """CPU seconds, or seconds where a file of before says no others."""
    values = stages.get(stage, {})
    value = values.get("cpu", values.get("seconds"))
    return "" if value is None else f"{value:.1f}"


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


BEFORE = """\
The share of all parameters that can go without residual width, by the commit before any of these kinds was
followed, and now. The aim is more than half of each."""


def before_table(folder: Path, ours: Results) -> list[str]:
    """What an older version could remove of the networks that it was asked about, beside today's."""
    before = read(folder, "before")
    if not before:
        return []
    rows = []
    for network, result in before.items():
        old, now = result["stages"].get("removable", {}), ours.get(network, {}).get("stages", {})
        share = now.get("cut inner", {}).get("reachable")
        then = (
            f"{old['reachable']:.0%}"
            if "reachable" in old
            else f"refused: {cell_text(old.get('error', '?'))}"
        )
        missed = share is not None and share <= 0.5
        row = [network, then, "" if share is None else f"{share:.0%}", "missed" if missed else ""]
        rows.append([*row[:3], error_of(now) if share is None else row[3]])
    head = ["network", "before", "now", "aim"]
    return ["## Before and now", "", BEFORE, "", origin(before), "", *table(head, rows), ""]


def summary(ours: Results) -> str:
    """Count networks and failures, and say how long discovery takes."""
    stages = {network: result["stages"] for network, result in ours.items()}
    spent = {
        network: item["discover"].get("cpu", item["discover"].get("seconds"))
        for network, item in stages.items()
        if "seconds" in item.get("discover", {})
    }
    if not spent:
        return ""
    worst = sorted(spent, key=lambda network: -spent[network])[:3]
    proven = [
        item["cut inner"]["noise"]["difference"]
        for item in stages.values()
        if "noise" in item.get("cut inner", {})
    ]
    failed = [network for network, item in stages.items() if error_of(item)]
    slow = sum(value > 10 for value in spent.values())
    return (
        f"Discovery takes {statistics.median(spent.values()):.1f} s in the median; the longest are "
        f"{', '.join(f'{network} ({spent[network]:.1f} s)' for network in worst)}; {slow} above 10 s. "
        f"{len(proven)} networks were proven with noise in what was removed"
        f"{f', by {max(proven):.0e} at most' if proven else ''}; {len(failed)} were refused or failed."
    )


DEPLOYED = """\
One network of each kind; half of the units of every inner group were removed at random. *Export* is
`torch.export`; *ONNX* has a dynamic batch: two examples made the file, three ran it in onnxruntime;
*generate* compares greedy tokens with the cache and without; *save* is a checkpoint that is loaded into the
dense architecture; *again* a second discovery and pruning of the result, proven."""


def deployed_table(folder: Path) -> list[str]:
    """What the pruned networks went through after surgery: done, or why not."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    if not found:
        return []
    kinds = ("export", "onnx", "generate", "save", "again")
    rows = [
        [item["kind"], item["network"], *(went(item["stages"], stage) for stage in kinds)] for item in found
    ]
    return ["## After surgery", "", DEPLOYED, "", *table(["kind", "network", *kinds], rows), ""]


def went(stages: dict[str, Any], stage: str) -> str:
    values = stages.get(stage, {})
    if not values:
        return f"no: {error_of(stages)}" if error_of(stages) else ""
    return (
        f"no: {cell_text(values['error'])}"
        if "error" in values
        else "-"
        if "not applicable" in values
        else "done"
    )


RANDOM = """\
Small random programs with these blocks beside the usual ones: experts in one weight, recurrent layers and
cells, computed weights, widths that follow from the input, branches without a skip, other orders of channels.
Every network is cut at random with and without residual width and then once more; *failed* are those whose
pruned network was wrong or did not run, or whose discovery ended with an error. *Prunable* is of the
groups."""


def random_table(folder: Path) -> list[str]:
    """The random networks of benchmarks/fuzz.py, before and now."""
    rows, failures = [], []
    for version in ("before", "after"):
        chunks = [json.loads(path.read_text()) for path in sorted((folder / version).glob("*.json"))]
        if chunks:
            count, groups, good = (
                sum(item[key] for item in chunks) for key in ("networks", "groups", "prunable")
            )
            failed = [text for item in chunks for text in item["failures"].values()]
            commits = sorted({str(item["provenance"]["commit"])[:9] for item in chunks})
            worst = f"{max(item['difference'] for item in chunks):.0e}"
            rows.append(
                [version, ", ".join(commits), f"{count:,}", f"{groups:,}", f"{good / max(groups, 1):.0%}"]
            )
            rows[-1] += [worst, f"{len(failed)}"]
            if version == "after":
                seen = Counter(cell_text(re.sub(PARTICULARS, "…", text)) for text in failed)
                failures = [[text, f"{times}"] for text, times in seen.most_common()]
    if not rows:
        return []
    head = ["", "commit", "networks", "groups", "prunable", "largest difference", "failed"]
    more = [*table(["failed now", "networks"], failures), ""] if failures else []
    return ["## Random networks", "", RANDOM, "", *table(head, rows), "", *more]


def render(folder: Path = FOLDER) -> str:
    ours, peers = read(folder, "cria"), read(folder, "torch-pruning")
    lines = ["# Coverage", ""]
    lines += [
        "Written by `python benchmarks/tables.py` from the files that `python benchmarks/coverage.py` makes.",
        "",
    ]
    if ours:
        head = ["network", "parameters", "capture CPU s", "discover CPU s", "groups"]
        head += ["prunable + frozen by kind"]
        head += ["removable", "masked = pruned", "noise", "moved", "failed"]
        rows = [our_row(network, result) for network, result in ours.items()]
        lines += ["## Cria", "", OURS, "", origin(ours), "", summary(ours), "", *table(head, rows), ""]
        lines += [
            *reasons(ours),
            "",
            *before_table(folder, ours),
            *deployed_table(folder.parent / "deployed"),
        ]
        lines += random_table(folder.parent / "fuzz")
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
