"""Accuracy or perplexity after pruning (and recovery) per criterion: one result file per cell, resumable.

    python benchmarks/criteria.py --network cifar10-resnet20 --scope inner --rounds 1 4 8
    python benchmarks/criteria.py --network llama-shakespeare --rounds 4 --reductions 0.2 0.3 0.5 --epochs 2

A cell is (network, scope, criterion, reduction, rounds, seed, epochs); its file in
benchmarks/results/<network>/ holds the figures and the provenance. Cells that have a file are not
run again. `python benchmarks/tables.py` turns the files into docs/results.md.

A recipe's own defaults hold for all criteria (the share's denominator, equal layers, multiples of 8). Scopes:
inner (without residual width), all (with it), neurons (feed-forward neurons alone).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from cria_prune.artifact.files import write_text
from cria_prune.artifact.provenance import provenance
from cria_prune.config import PruneConfig
from cria_prune.criteria import CRITERIA
from cria_prune.pipeline import PruneResult, prune
from cria_prune.progress import Progress
from cria_prune.recover import recover
from cria_prune.tasks import TASKS, Task, task

RESULTS = Path(__file__).parent / "results"


def cell_path(cell: dict[str, Any]) -> Path:
    name = "{scope}-{criterion}-{reduction:g}-rounds{rounds}-seed{seed}-epochs{epochs}".format(**cell)
    return RESULTS / cell["network"] / (name + ("-quick" if cell.get("quick") else "") + ".json")


def config_of(chosen: Task, cell: dict[str, Any], examples: int) -> PruneConfig:
    plan = {
        **chosen.prune_defaults.get("plan", {}),
        "reduction": cell["reduction"],
        "rounds": cell["rounds"],
        "residual": cell["scope"] == "all",
        "units": "neurons" if cell["scope"] == "neurons" else "all",
    }
    return PruneConfig(
        record={"examples": examples, "seed": cell["seed"]},
        score={"criterion": cell["criterion"], "seed": cell["seed"]},
        plan=plan,
    )


def stage_seconds(result: PruneResult) -> dict[str, float]:
    total: dict[str, float] = {"discover": result.seconds}
    for item in result.rounds:
        for stage, seconds in item.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: round(seconds, 4) for stage, seconds in total.items()}


def run_cell(chosen: Task, model: Any, cell: dict[str, Any], examples: int) -> dict[str, Any]:
    config = config_of(chosen, cell, examples)
    result = prune(model, chosen.calibration(examples, cell["seed"]), config)
    figures: dict[str, Any] = {
        "metric": chosen.metric,
        "pruned": chosen.evaluate(result.model, chosen.test_batches()),
    }
    seconds = stage_seconds(result)
    if cell["epochs"]:
        start = time.perf_counter()
        settings = chosen.recover_defaults.model_copy(update={"epochs": cell["epochs"], "seed": cell["seed"]})
        # No metric while training: the published weights have seen the validation images, so the
        # last epoch is what is reported.
        source = task(cell["network"], quick=True) if cell.get("quick") else chosen
        recover(result.model, source.train_batches(cell["seed"]), settings, progress=Progress(quiet=False))
        seconds["recover"] = round(time.perf_counter() - start, 1)
        figures["recovered"] = chosen.evaluate(result.model, chosen.test_batches())
    correlations = [
        item["split_half"] for item in result.rounds[0].diagnosis.values() if item["split_half"] is not None
    ]
    return {
        "cell": cell,
        **figures,
        "report": dict(result.report),
        "difference": result.rounds[-1].verification.difference,  # type: ignore[union-attr]
        "split_half": sum(correlations) / len(correlations) if correlations else None,
        "seconds": seconds,
        "config": config.model_dump(mode="json"),
    }


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    grid = itertools.product(options.seeds, options.reductions, options.rounds, options.criteria)
    return [
        {
            "network": options.network,
            "scope": options.scope,
            "criterion": criterion,
            "reduction": reduction,
            "rounds": rounds,
            "seed": seed,
            "epochs": options.epochs,
            **({"quick": True} if options.quick else {}),
        }
        for seed, reduction, rounds, criterion in grid
    ]


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=sorted(TASKS), default="cifar10-resnet20")
    parser.add_argument("--scope", choices=["inner", "all", "neurons"], default="inner")
    parser.add_argument("--criteria", nargs="+", choices=sorted(CRITERIA), default=list(CRITERIA))
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=0, help="epochs of recovery")
    parser.add_argument("--quick", action="store_true", help="recover on the recipe's --quick training data")
    parser.add_argument("--examples", type=int, help="for the calibration; the recipe's, else 1,024")
    options = parser.parse_args()
    chosen = task(options.network)
    examples = options.examples or chosen.prune_defaults.get("record", {}).get("examples", 1024)
    missing = [cell for cell in cells(options) if not cell_path(cell).exists()]
    models: dict[int, Any] = {}
    for number, cell in enumerate(missing, 1):
        seed = cell["seed"]
        if seed not in models:
            models[seed] = chosen.dense(seed)
        model = models[seed]
        dense_path = RESULTS / options.network / f"dense-seed{seed}.json"
        data = chosen.fingerprint("test")
        if not dense_path.exists():
            figures = {"metric": chosen.metric, "dense": chosen.evaluate(model, chosen.test_batches())}
            write(dense_path, {**figures, "provenance": provenance(seed=seed, data_fingerprint=data)})
        values = run_cell(chosen, model, cell, examples)
        write(
            cell_path(cell),
            {**values, "provenance": provenance(seed=seed, command=sys.argv, data_fingerprint=data)},
        )
        print(f"{number}/{len(missing)} {cell_path(cell).stem}: {values['pruned']:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
