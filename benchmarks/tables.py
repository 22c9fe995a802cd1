"""Turn the result files into the pages of docs and the blocks of the README that are made of them.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import coverage_table
import journeys_table
import roundtrip_table
import scale_table
from coverage_table import table
from cria_prune import CRITERIA
from cria_prune.base.metrics import metric
from cria_prune.config import REPAIRED, SETTINGS
from macs_table import macs_table
from result_cells import (
    LLAMA,
    NETWORKS,
    ORDER,
    PLAIN,
    RESULTS,
    ROOT,
    SHARE_OF,
    SST2,
    STARTS,
    WAYS,
    figures,
    metric_of,
    pick,
    plural,
    read,
    section,
    settings_text,
    tuned,
    way,
)
from summary import summary
from walk_table import walk_tables, without_training

MARKS = ("<!-- {}: written by benchmarks/tables.py -->", "<!-- end of {} -->")
DEMO = RESULTS / "digits" / "demo.txt"


def pruned_table(network: str, scope: str, how: tuple[Any, ...] = PLAIN) -> list[str]:
    cells = [item for item in pick(read(network), scope=scope, epochs=0) if way(item) == how]
    if not cells:
        return []
    columns = sorted({(item["cell"]["reduction"], item["cell"]["rounds"]) for item in cells})
    names = [name for name in ORDER if pick(cells, criterion=name)]
    rows = [
        [name]
        + [
            figures(network, found, "pruned")
            if (found := pick(cells, criterion=name, reduction=share, rounds=rounds))
            else ""
            for share, rounds in columns
        ]
        for name in names
    ]
    head = ["criterion", *(f"{100 * share:g}%, {plural(rounds, 'round')}" for share, rounds in columns)]
    inner = "neurons and heads" if network in SHARE_OF else "inner channels"
    width = inner if scope == "inner" else f"{inner} and residual width"
    said = metric_of(network)
    unit = "accuracy in %" if said == "accuracy" else f"{said} (ratio to dense)"
    title = f"### {network}, {width}: {unit} {WAYS[how]}"
    return section(network, title, cells, head, rows)


def compact_table(network: str) -> list[str]:
    """The criteria that docs/findings.md compares, with and without what the default does beside cutting."""
    cells = pick(read(network), scope="inner", epochs=0, rounds=4)
    repaired = ("once", network not in SHARE_OF, "uniform")
    most = len({item["cell"]["seed"] for item in cells})
    named = [(name, PLAIN) for name in ORDER if name.startswith("tp-")]
    named += [(name, how) for how in (PLAIN, repaired) for name in COMPARED]
    shares = sorted({item["cell"]["reduction"] for item in cells} & set(SHARES))
    rows = []
    for name, how in named:
        found = [
            [item for item in pick(cells, criterion=name, reduction=share) if way(item) == how]
            for share in shares
        ]
        if any(found):
            label = name + ("" if how == PLAIN else FOLLOWED[how])
            draws = (f", n = {len(group)}" if fixed(name, how) < len(group) < most else "" for group in found)
            figure = [figures(network, group, "pruned") if group else "" for group in found]
            rows.append([label, *(text + draw for text, draw in zip(figure, draws, strict=True))])
    if not rows:
        return []
    fewer = SHARE_OF.get(network, "parameters")
    title = f"### {network}: {metric_of(network)} with fewer {fewer}, no training"
    chosen = [item for item in cells if item["cell"]["reduction"] in shares]
    head = ["criterion", *(f"{100 * share:g}%" for share in shares)]
    return section(network, title, chosen, head, rows)


def fixed(name: str, how: tuple[Any, ...]) -> int:
    """How many draws are all there is: one where only weights are read."""
    weights = name.removeprefix("tp-") in ("l1", "l2", "magnitude", "bn-scale", "fpgm", "lamp")
    return 1 if weights and how == PLAIN else 0


FOLLOWED = {how: f" + {STARTS[how[:2]].replace('once', 'repaired at once')}" for how in WAYS}
"""What a criterion in a compact table is followed by, where more is done than to cut."""
COMPARED = ("random", "l2", "wanda-sp", "taylor", "distortion", "distortion-weighted",
            "consumed-distortion", "innovation")  # fmt: skip
SHARES = (0.2, 0.3, 0.4, 0.5)


def recovered_table(network: str, how: tuple[Any, ...] = PLAIN) -> list[str]:
    """One table for every recovery and set of dense models: cells of different ones are no comparison."""
    cells = [item for item in read(network) if item["cell"]["epochs"] and way(item) == how]
    lines: list[str] = []
    unit = metric_of(network) + " of the last epoch"
    unit += " in %" if metric_of(network) == "accuracy" else " (ratio to dense)"
    settings = sorted({(i["cell"]["epochs"], i["cell"]["rounds"], *tuned(i), fixed_dense(i)) for i in cells})
    for epochs, rounds, *like in settings:
        chosen = [
            item
            for item in pick(cells, epochs=epochs, rounds=rounds)
            if [*tuned(item), fixed_dense(item)] == like
        ]
        start = "" if how == PLAIN else f" {WAYS[how].removesuffix(', no training')}"
        title = f"### {network}: recovered{start}, {settings_text(chosen[0])}, {unit}"
        rows = [
            [name + (" (neurons alone)" if scope == "neurons" else ""), f"{100 * share:g}%", str(len(found)),
             figures(network, found, "pruned"), figures(network, found, "recovered"),
             f"{found[0]['report']['reached']:.1%}", f"{found[0]['report']['parameters']:,}"]
            for share in sorted({item["cell"]["reduction"] for item in chosen})
            for scope in ("inner", "all", "neurons")
            for name in ORDER
            if (found := pick(chosen, criterion=name, reduction=share, scope=scope))
        ]  # fmt: skip
        fewer = f"fewer {SHARE_OF.get(network, 'parameters')}"
        head = ["criterion", fewer, "draws", "pruned", "recovered", "reached", "parameters left"]
        lines += section(network, title, chosen, head, rows)
    return lines


def fixed_dense(item: dict[str, Any]) -> int:
    """The seed of the one dense model that cells of several seeds share; -1 where each has its own."""
    return int(item["cell"].get("dense_seed", -1))


def ablation_tables(network: str) -> list[str]:
    """What is left without the lowest-scored, the highest-scored and random units, per criterion."""
    lines: list[str] = []
    for path in sorted((RESULTS / network).glob("ablation-*.json")):
        item = json.loads(path.read_text())
        known = metric(item["metric"])
        curves = [[values for _, values in item["curves"][order]] for order in ORDERS]
        rows = [
            [f"{100 * share:g}%", f"{reached:.1%}", *map(known.text, (low[0], *spread(random), high[0]))]
            for share, reached, low, random, high in zip(
                item["shares"], item["reached"], *curves, strict=True
            )
        ]
        head = ["units gone", "prunable parameters gone", "lowest first", "random, mean", "random, lowest"]
        head += ["random, highest", "highest first"]
        title = f"### {network}: ablation of `{item['criterion']}`, {item['metric']}"
        if item.get("repair", "none") != "none":  # files of before do not say it
            title += f", {REPAIRED[item['repair']]}"
        dense = f"Dense: {known.text(item['dense'])}, {item['tested_on']}; {item['verdict']}."
        picture = f"pictures/ablation-{network}-{item['criterion']}.png"
        drawn = [f"![the curves]({picture})", ""] if (ROOT / "docs" / picture).exists() else []
        lines += [title, "", dense, "", *table(head, rows), "", *drawn]
    return lines


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest."""
    return statistics.mean(values), min(values), max(values)


ORDERS = ("lowest", "random", "highest")


def render() -> str:
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/tables.py` from the files in benchmarks/results.",
        "",
        *walk_tables(),
    ]
    for network in NETWORKS:
        for scope in ("inner", "all"):
            lines += [line for how in WAYS for line in pruned_table(network, scope, how)]
        lines += [line for how in WAYS for line in recovered_table(network, how)]
        lines += [*macs_table(network), *ablation_tables(network)]
    lines += encoder_table()
    return "\n".join(lines).rstrip() + "\n"


def encoder_table() -> list[str]:
    """The sentence encoder of benchmarks/others.py: embeddings beside the dense one's, row by row."""
    found = json.loads((RESULTS / "others" / "minilm-encoder-seed0.json").read_text())
    rows = []
    for name, row in sorted(found["rows"].items()):
        share, _, stage = name.partition(", ")
        both = [
            text
            for kind in ("sst2", "wikitext")
            for text in (f"{row[kind]['cosine']:.3f}", f"{row[kind]['neighbours']:.1%}")
        ]
        rows.append([f"{100 * float(share):g} %", stage, *both, f"{row['seconds']:.0f}"])
    head = ["prunable parameters gone", "after", "cosine, SST-2", "neighbours kept, SST-2"]
    head += ["cosine, WikiText-2", "neighbours kept, WikiText-2", "seconds"]
    text = (
        f"`benchmarks/others.py encoder`: {found['calibration']:,} sentences of calibration, "
        f"{found['test']:,} of each kind to measure on, one draw. A neighbour is kept where the nearest "
        "other sentence is the same as the dense encoder's. `distilled N` is the network of the walk after "
        "one pass over N sentences without labels."
    )
    return [
        "### MiniLM sentence encoder: embeddings beside the dense one's",
        "",
        text,
        "",
        *table(head, rows),
        "",
    ]


def demo() -> list[str]:
    """What `cria run digits` printed, without its last line (the JSON object)."""
    return ["```", *DEMO.read_text().strip().splitlines()[:-1], "```"]


def criteria() -> list[str]:
    """Every criterion with what it scores, what it needs, which settings it reads and where it comes from."""
    rows = [
        [
            f"`{item.name}`",
            item.summary,
            ", ".join(sorted(item.needs)) or "weights alone",
            ", ".join(name for name in SETTINGS if name in item.reads) or "none",
            item.source,
        ]
        for item in CRITERIA.values()
    ]
    return table(["name", "what it scores", "needs", "reads", "source"], rows)


def blocks() -> dict[str, dict[str, list[str]]]:
    """Page -> name of a block in it -> the lines between its marks."""
    compact = [line for network in (*NETWORKS[1:3], SST2[0], LLAMA[0]) for line in compact_table(network)]
    return {
        "README.md": {"walk": without_training(), "results": summary()},
        "docs/start.md": {"demo": demo()},
        "docs/findings.md": {"results": compact},
        "docs/criteria.md": {"criteria": criteria()},
    }


def filled(text: str, written: dict[str, list[str]]) -> str:
    """Return a page with its blocks written again."""
    for name, lines in written.items():
        start, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(start)
        text = "\n".join([before + start, "", *lines, "", end + rest.split(end)[1]])
    return text


WHOLE = {
    "docs/results.md": render,
    "docs/coverage.md": coverage_table.render,
    "docs/tasks.md": journeys_table.render,
    "docs/transformers.md": roundtrip_table.render,
    "docs/scale.md": scale_table.render,
}
"""The pages that are nothing but tables and what they mean."""


def pages() -> dict[str, str]:
    """Every page that is made from result files -> its text as it should be."""
    found = {page: written() for page, written in WHOLE.items()}
    return found | {page: filled((ROOT / page).read_text(), written) for page, written in blocks().items()}


def main() -> None:
    for page, text in pages().items():
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
