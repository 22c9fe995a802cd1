"""Pruned models of many families, saved and loaded by plain transformers: one result file each, resumable.

    python benchmarks/roundtrip.py
    python benchmarks/roundtrip.py mistral bert --again

A tiny model with random weights loses 40 % of the parameters in the groups that its vanilla configuration
can hold, or the next larger share that it can, by random scores; where the residual width can be held, once
more with it, 50 %. The folder is loaded by its Auto class in a fresh process without Cria. What fails is
written down as a failure. Files are in benchmarks/results/roundtrip; a family that has one is not run again.
`python benchmarks/tables.py` turns the files into docs/transformers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from coverage_cell import moved
from cria_prune import UnitGroups, apply, discover, plan, save_pretrained, verify
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.progress import quiet
from cria_prune.config import PlanConfig
from cria_prune.planning.selection import reachable
from cria_prune.structure.groups import counted_together, without_residual
from cria_prune.tasks.loading import example_inputs, find_library
from cria_prune.vanilla import Holdable, holdable
from result_files import RESULTS, write
from roundtrip_families import FAMILIES, SEED, UNEVEN, build
from staged import said

SHARES = {"inner": 0.4, "all": 0.5}
"""Of the prunable parameters; the second so that the head size is not width by heads afterwards as well."""

Values = dict[str, Any]


def measure(library: Any, name: str) -> Values:
    """Cut, save and load one family; an error is kept as text where it happened."""
    start = time.perf_counter()
    values: Values = {"family": name, "model": FAMILIES[name][0], "cuts": {}}
    try:
        model = build(library, name)
        values["parameters"] = sum(item.numel() for item in model.parameters())
        groups = discover(model, example_inputs(model))
    except Exception as error:  # whatever it is, the table has to show it
        return {**values, "error": said(error)}
    values["cuts"]["inner"] = cut(model, without_residual(groups), name, SHARES["inner"])
    if name != UNEVEN:
        whole = cut(model, groups, name, SHARES["all"]) if streams(groups) else {"refused": fixed(groups)}
        values["cuts"]["all"] = whole
    return {**values, "seconds": round(time.perf_counter() - start, 1)}


def cut(model: nn.Module, groups: UnitGroups, name: str, share: float) -> Values:
    """Remove what can be held, prove it and send it through a folder; see `measure`."""
    values: Values = {}
    try:
        found = holdable(model, groups)
        values["refused"] = refused(groups, found)
        # Where the residual width cannot be held, the cut without it is all that there is.
        if found.groups.prunable and (streams(found.groups) or not streams(groups)):
            values |= saved(model, found, name, share)
    except Exception as error:  # whatever it is, the table has to show it
        values["error"] = said(error)
    return values


def saved(model: nn.Module, found: Holdable, name: str, share: float) -> Values:
    """Return what was cut, how far the pruned model is from the masked one, and its certificate."""
    allowed = uneven(found) if name == UNEVEN else found.allowed
    groups, example = found.groups, example_inputs(model)
    settings = PlanConfig(uniform=True, of="prunable", reduction=share)
    most = reachable(groups, settings, allowed=allowed)
    generator = np.random.default_rng(SEED)
    scores = {group.name: generator.random(group.size) for group in groups.prunable}
    made = plan(groups, scores, settings, target=min(share, most), allowed=allowed)
    smaller = apply(model, made)
    masked = verify(model, made, smaller, example)
    with TemporaryDirectory() as scratch:
        certificate = save_pretrained(Path(scratch) / name, smaller, made, example=example)
        written = json.loads((Path(scratch) / name / "config.json").read_text())
    if name != UNEVEN:
        check_config(found.config(made.kept).to_dict(), written)
    return {
        "units": units(groups, {key: len(stays) for key, stays in made.kept.items()}, found.allowed),
        "asked": share,
        "reachable": most,
        "reached": made.report["reached"],
        "parameters": sum(item.numel() for item in smaller.parameters()),
        "config": changed(model.config.to_dict(), written),
        "masked": masked.difference,
        "moved": moved(model, smaller, example),
        "certificate": asdict(certificate),
    }


def uneven(found: Holdable) -> dict[str, tuple[int, ...]]:
    """Return the numbers of heads that the model's own configuration refuses, and no others."""
    sizes = {group.name: group.size for group in found.groups}
    return {
        name: tuple(count for count in range(1, sizes[name]) if count not in counts)
        for name, counts in found.allowed.items()
    }


def check_config(expected: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """The saved configuration says what `Holdable.config` says.

    Raises:
        AssertionError: a number differs.
    """
    apart = {key for key, value in written.items() if isinstance(value, int) and expected.get(key) != value}
    assert not apart, f"config.json and Holdable.config differ in {', '.join(sorted(apart))}"


def streams(groups: UnitGroups) -> list[str]:
    """Return the names of the residual streams that can be cut."""
    return [group.name for group in groups.prunable if group.kind == "residual"]


def fixed(groups: UnitGroups) -> list[Values]:
    """Return the residual streams that cannot be cut whatever the configuration holds."""
    return [
        {"kind": group.kind, "groups": 1, "before": group.size, "reason": group.frozen}
        for group in groups
        if group.kind == "residual"
    ]


def units(groups: UnitGroups, kept: Mapping[str, int], allowed: Mapping[str, Iterable[int]]) -> list[Values]:
    """Return one entry per class of groups that keep the same number: units before and after."""
    return [
        {
            "kind": groups[names[0]].kind,
            "groups": len(names),
            "before": groups[names[0]].size,
            "after": kept[names[0]],
            "allowed": list(allowed[names[0]]) if names[0] in allowed else None,
        }
        for names in counted_together(groups.prunable)
    ]


def refused(groups: UnitGroups, found: Holdable) -> list[Values]:
    """Return the classes that could be pruned but not be held, each with the reason."""
    gone = [group for group in groups.prunable if found.groups[group.name].frozen is not None]
    return [
        {
            "kind": groups[names[0]].kind,
            "groups": len(names),
            "before": groups[names[0]].size,
            "reason": found.groups[names[0]].frozen,
        }
        for names in counted_together(gone)
    ]


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the fields of the configuration whose numbers or type are others now."""
    return {
        key: [before.get(key), value]
        for key, value in after.items()
        if (key == "model_type" or isinstance(value, int)) and before.get(key) != value
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all by default")
    parser.add_argument("--again", action="store_true", help="measure again where there is a result")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in FAMILIES]
    if unknown:
        raise SystemExit(f"No family is named {', '.join(unknown)}. Known: {', '.join(FAMILIES)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library = find_library("The benchmark")
    for name in options.names or FAMILIES:
        path = RESULTS / "roundtrip" / f"{name}.json"
        if path.exists() and not options.again:
            continue
        with quiet():
            values = measure(library, name)
        values["versions"] = {item: version(item) for item in ("transformers", "safetensors", "tokenizers")}
        values["provenance"] = provenance(SEED, ["benchmarks/roundtrip.py", *sys.argv[1:]], device="cpu")
        write(path, values)
        errors = [item["error"] for item in (values, *values["cuts"].values()) if "error" in item]
        print(f"{name}: {'; '.join(errors) or 'done'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
