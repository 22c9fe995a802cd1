"""Tables and the report: results as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cria_prune.base.metrics import Metric, metric, percent
from cria_prune.cli.output import Output
from cria_prune.config import OF
from cria_prune.repair.fidelity import Fidelity
from cria_prune.result import Round, column, speed_said, stages_said
from cria_prune.scores import Scored

if TYPE_CHECKING:
    from cria_prune.structure.groups import UnitGroups


def rounds(out: Output, done: Sequence[Round], metric: Metric) -> None:
    """Print one row per round."""
    watched = any(item.metric is not None for item in done)
    columns = ["round", "parameters", "MACs", "removed", "masked = pruned", column(done), "seconds"]
    rows = []
    for item in done:
        report, check = item.report, item.verification
        row = [
            str(item.number),
            f"{report['parameters']:,.0f}",
            f"{report['macs']:,.0f}",
            percent(float(report["reached"])),
            "not checked" if check is None else f"{check.difference:.0e}",
            "" if item.nearness is None else item.nearness.brief,
            f"{sum(item.seconds.values()):.1f}",
        ]
        rows.append([*row, metric.text(item.metric)] if watched else row)
    out.table([*columns, f"validation {metric.name}"] if watched else columns, rows)


def outcome(out: Output, results: Mapping[str, Any], metric: Metric) -> None:
    """Print dense, pruned and recovered side by side, and what was asked and reached."""
    dense = [f"{results['parameters_dense']:,.0f}", f"{results['macs_dense']:,.0f}"]
    now = [f"{results['parameters']:,.0f}", f"{results['macs']:,.0f}"]
    rows = [
        [name, metric.text(results.get(name)) or "-", *counts]
        for name, counts in (("dense", dense), ("pruned", now), ("recovered", now))
        if results.get(name) is not None or name == "dense"
    ]
    change = metric.change(results.get("dense"), results.get("recovered", results.get("pruned")))
    shares = (results[key] / results[f"{key}_dense"] for key in ("parameters", "macs"))
    rows.append(["left", change, *(percent(share) for share in shares)])
    out.table(["model", metric.name, "parameters", "MACs per example"], rows)
    if "asked" in results:
        cost = results.get("scoring_over_forward")
        out.say(
            f"asked {percent(results['asked'])} of the {OF.texts[results['of']]}, "
            f"removed {percent(results['reduction'])}; criterion {results['criterion']}, "
            + ("scored before" if cost is None else f"scoring took {cost:g} times a forward pass")
        )
    for line in speed_said(results):
        out.say(line)
    untrained(out, results)
    if "milliseconds" in results:
        before, now = results["milliseconds_before"], results["milliseconds"]
        out.say(
            f"a forward pass took {before:.3g} ms per calibration example before the pruning, {now:.3g} ms "
            f"after it ({before / max(now, 1e-9):.2f} times as fast)"
        )


def untrained(out: Output, results: Mapping[str, Any]) -> None:
    """Print what was done without training, what is to be known of it, and how far the dense one is."""
    if "changed" in results:
        out.say(f"without training: {results['changed']}")
    for line in results.get("remarks", []):
        out.say(line)
    fidelity(out, known_fidelity(results))


def known_fidelity(results: Mapping[str, Any]) -> dict[str, Fidelity]:
    """Return the fidelity that results hold, by stage; empty where none was measured."""
    return {stage: Fidelity.from_dict(item) for stage, item in results.get("fidelity", {}).items()}


def fidelity(out: Output, found: Mapping[str, Fidelity]) -> None:
    """Print a line for each stage of the last round: how far the model was from the dense one."""
    for line in stages_said(found):
        out.say(line)


def measured(results: Mapping[str, Any], metric: Metric) -> list[dict[str, Any]]:
    """Return the rows of a model card: one per model that was measured, all with the same columns."""
    rows = []
    for name in ("dense", "pruned", "recovered"):
        if results.get(name) is None:
            continue
        now, before = ("_dense", "_before") if name == "dense" else ("", "")
        further = results.get("further", {}).get(name, {})
        row: dict[str, Any] = {"model": name, metric.name: metric.text(results[name])}
        row |= {key: value for key, value in further.items() if isinstance(value, float)}
        row |= {"parameters": int(results[f"parameters{now}"]), "MACs": int(results[f"macs{now}"])}
        again = name == "dense" and "checkpoint" in results  # then what was timed before is no dense model
        if f"milliseconds{before}" in results and not again:
            row["ms per example (this machine)"] = float(f"{results[f'milliseconds{before}']:.3g}")
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "") for key in columns} for row in rows]


def family(out: Output, members: Sequence[Mapping[str, Any]], metric: Metric) -> None:
    """Print one row per size of a family, the dense model first."""
    first, tuned = members[0], any("recovered" in item for item in members)
    last = "recovered" if tuned else "pruned"
    columns = ["model", f"{metric.name}, pruned", *(["recovered"] if tuned else []), f"{last} / dense"]
    blank = [""] * (len(columns) - 2)
    rows = [["dense", metric.text(first.get("dense")), *blank, f"{first['parameters_dense']:,.0f}"]]
    for item in members:
        found = [metric.text(item.get(name)) for name in ("pruned", "recovered")[: 1 + tuned]]
        rows.append(
            [
                f"{percent(item['reduction'])} fewer",
                *found,
                metric.change(item.get("dense"), item.get(last)),
                f"{item['parameters']:,.0f}",
            ]
        )
    out.table([*columns, "parameters"], rows)


def left_alone(out: Output, groups: UnitGroups) -> None:
    """Say which kinds of units a vanilla configuration cannot hold, and how to cut them all the same."""
    found = {group.kind: group.frozen for group in groups if "vanilla" in (group.frozen or "")}
    for kind, reason in found.items():
        out.say(f"{kind} units stay: {reason} (--policy per-layer cuts them)")


def further(out: Output, name: str, found: Mapping[str, float | str]) -> None:
    """Print what else there is to say of a model: one line per figure, a sample of text as it is."""
    for key, value in found.items():
        if isinstance(value, str):
            out.say(f"{name} {key}:".strip())
            out.say("\n".join(f"    {line}" for line in value.splitlines()))
        else:
            length = re.fullmatch(r"perplexity-(\d+)", key)
            said = f"  ({int(length[1]):,} tokens per sequence)" if length else ""
            out.say(f"{(name + ' ' + key).strip():<20} {metric(key).text(value):>9}{said}")


def diagnosis(out: Output, scored: Scored) -> None:
    """Print one row per group: how its units were scored and how far the scores can be trusted."""
    rows = []
    for name, item in scored.importances.items():
        said, scores = item.diagnosis, sorted(item.scores.tolist())
        counts = [str(len(scores)), str(len(said.dead))]
        half = "-" if said.split_half is None else f"{said.split_half:.3f}"
        spread = (f"{value:.3g}" for value in (scores[0], scores[len(scores) // 2], scores[-1]))
        rows.append([name, said.solver, said.status, *counts, half, *spread])
    columns = ["group", "solver", "status", "units", "dead", "split-half", "min", "median", "max"]
    out.table(columns, rows, left=3)
