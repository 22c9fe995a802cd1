"""Ablation of the walk's parts: one cut per network, criterion and draw, and variants of the repair on it.

    python benchmarks/walk_parts.py
    python benchmarks/walk_parts.py --network llama-shakespeare --criteria group-l2 --draws 1

Half of the parameters is removed (of the Llama those that are no embeddings), uniformly, in one round, with
1,024 calibration examples. On this very cut the walk then runs as it is and without one of its parts, with
fewer samples, and with fewer and more calibration examples. `once` is the repair of all consumers at once,
from moments of the network before the cut, towards what that network gives. `greedy` is another choice of as
many units: one after another leaves, the one whose loss the best refit of its consumers leaves smallest, by
the second moments of all that they read. `rounds 4` chooses, cuts and walks in four rounds. A row has the
metric on the test split, and the fidelity on validation examples that no variant was fitted on. Writes
benchmarks/results/walk-parts/<network>-<criterion>-seed<draw>.json, row by row: the same command goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cria_prune import Plan, PruneConfig, fidelity, prune
from cria_prune.base.batches import Batch
from cria_prune.base.modules import named_tensors
from cria_prune.graph.moments import Moments
from cria_prune.planning.plan import make_plan
from cria_prune.recipes.registry import task
from cria_prune.repair.norms import batch_norms, remeasure
from cria_prune.repair.walk import Parts, walk
from cria_prune.stages import Prepared, Ranking, cut, plan_cut, prepare, rank, remove
from cria_prune.structure.groups import ParameterSlice, UnitGroup
from cria_prune.tasks.base import Task
from result_files import RESULTS, Rows

NETWORKS, CRITERIA = ("cifar10-resnet20", "llama-shakespeare"), ("group-l2", "innovation")
EXAMPLES, FIDELITY = 1024, 1024
SHARE = 0.5
PARTS = {
    "walk": Parts(),
    "without order": Parts(order=False),
    "without shortcut": Parts(shortcut=False),
    "without drifted": Parts(drifted=False),
    "without patches": Parts(patches=False),
    "without all four": Parts(order=False, shortcut=False, drifted=False, patches=False),
    **{f"samples {count}": Parts(samples=count) for count in (4, 16, 256)},
}
COUNTS = (256, 4096, 8192)
RIDGE = 1e-4  # of the greedy choice, in mean second moments


@dataclass(eq=False)
class Case:
    """A network, a criterion and a draw; the cut that all variants share is made when it is first needed."""

    chosen: Task
    model: nn.Module
    criterion: str
    seed: int
    examples: int

    def config(self, **more: Any) -> PruneConfig:
        values: dict[str, Any] = {name: dict(part) for name, part in self.chosen.prune_defaults.items()}
        values["plan"] = {**values.get("plan", {}), "reduction": SHARE, "ranking": "uniform", "rounds": 1}
        values["score"] = {"criterion": self.criterion}
        values["record"] = {**values.get("record", {}), "examples": self.examples, "seed": self.seed}
        values["plan"].update(more.pop("plan", {}))
        return PruneConfig(**{**values, "repair": "none", "batch_norm": False, "verify": False, **more})

    @cached_property
    def batches(self) -> list[Batch]:
        return list(self.chosen.calibration(self.examples, self.seed))

    @cached_property
    def ready(self) -> Prepared:
        return prepare(self.model, self.batches, self.config(repair="once"))

    @cached_property
    def ranking(self) -> Ranking:
        return rank(self.ready)

    @cached_property
    def plan(self) -> Plan:
        return plan_cut(self.ready, self.ranking.scores)

    @cached_property
    def smaller(self) -> nn.Module:
        return remove(self.model, self.plan)

    def walked(self, parts: Parts, examples: int | None = None, plan: Plan | None = None) -> nn.Module:
        batches = self.batches if examples is None else self.chosen.calibration(examples, self.seed)
        smaller = self.smaller if plan is None else remove(self.model, plan)
        return walk(
            self.model, smaller, plan or self.plan, batches, examples=examples or self.examples,
            seed=self.seed, parts=parts,
        ).model  # fmt: skip

    def once(self) -> nn.Module:
        return cut(self.ready, self.ranking).model

    def norms(self) -> nn.Module:
        return remeasure(self.walked(Parts()), self.ready.held.fit()).model

    def rounds(self, count: int) -> nn.Module:
        config = self.config(plan={"rounds": count}, repair="walk")
        return prune(self.model, self.batches, config).model

    def greedy(self) -> nn.Module:
        assert self.ranking.consumed is not None
        kept = dict[str, np.ndarray]()
        for group in self.ready.groups.prunable:
            count, moments = len(self.plan.kept[group.name]), self.ranking.consumed.get(group.name, {})
            sides = [(item, moments[item.tensor]) for item in group.consumers if item.tensor in moments]
            kept[group.name] = chosen_greedily(self.model, group, count, sides)
        return self.walked(Parts(), plan=make_plan(self.ready.groups, kept))

    def variants(self) -> dict[str, Callable[[], nn.Module]]:
        there = self.chosen.count(self.chosen.split("train"))
        counts = [count for count in COUNTS if count <= there]
        rows: dict[str, Callable[[], nn.Module]] = {
            "dense": lambda: self.model,
            "as cut": lambda: self.smaller,
            "once": self.once,
        }
        rows |= {name: lambda parts=parts: self.walked(parts) for name, parts in PARTS.items()}
        if batch_norms(self.model):
            rows["walk, norms measured again"] = self.norms
        rows |= {"greedy": self.greedy, "rounds 4": lambda: self.rounds(4)}
        return rows | {
            f"examples {count}": lambda count=count: self.walked(Parts(), examples=count) for count in counts
        }


def chosen_greedily(
    model: nn.Module, group: UnitGroup, count: int, sides: Sequence[tuple[ParameterSlice, Moments]]
) -> np.ndarray:
    """Return the units that stay when one after another leaves, by what its consumers lose then.

    With P = S⁻¹ of the features that are still there and W the consumers' weights refitted to them, a unit
    with features u costs tr(W_u (P_uu)⁻¹ W_uᵀ); once it has left, W −= W_u (P_uu)⁻¹ P_u: and
    P −= P_:u (P_uu)⁻¹ P_u: (optimal brain surgeon, with the outputs in place of the loss).
    """
    tensors, width = named_tensors(model), sides[0][0].positions.shape[1]
    systems = [inverse(tensors[item.tensor], item, moments) for item, moments in sides]
    stays, features = list(range(group.size)), torch.arange(group.size * width).reshape(-1, width)
    while len(stays) > count:
        cost = torch.zeros(len(stays), dtype=torch.float64)
        for P, W in systems:
            blocks = P[features[stays][:, :, None], features[stays][:, None, :]]  # (units, width, width)
            parts = W[:, features[stays]].permute(1, 2, 0)  # (units, width, outputs)
            cost += (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
        u = features[stays.pop(int(cost.argmin()))]
        for P, W in systems:
            step = torch.linalg.solve(P[u][:, u], P[u])
            W -= W[:, u] @ step
            P -= P[:, u] @ step
            P[u, :] = P[:, u] = 0
    return np.array(stays)


def inverse(weight: Tensor, item: ParameterSlice, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return S⁻¹ (n, n) of the features that a consumer reads of a group, and its weights (outputs, n)."""
    positions = torch.from_numpy(item.positions.ravel())
    W = weight.detach().double().movedim(item.dim, -1).flatten(0, -2)[:, positions].clone()
    assert moments.covariance is not None, "the greedy choice takes dense moments"
    S = moments.covariance.double()
    S = S + RIDGE * S.diagonal().mean().clamp(min=1e-12) * torch.eye(len(S), dtype=torch.float64)
    return torch.linalg.inv(S), W


def run(case: Case, only: Sequence[str], limit: int | None) -> None:
    network, criterion, seed = case.chosen.name, case.criterion, case.seed
    path = RESULTS / "walk-parts" / f"{network}-{criterion}-seed{seed}.json"
    facts = {
        "network": network, "criterion": criterion, "seed": seed, "reduction": SHARE,
        "of": case.config().plan.of, "examples": case.examples, "metric": case.chosen.metric, "limit": limit,
    }  # fmt: skip
    kept, held = (
        Rows(path, facts, seed),
        list(case.chosen.validation_batches(min(limit or FIDELITY, FIDELITY))),
    )
    for name, make in case.variants().items():
        if name in kept or (only and not name.startswith(tuple(only))):
            continue
        if name != "dense":
            _ = case.smaller  # the seconds are those of the repair
        start = time.perf_counter()
        smaller = make()
        seconds = time.perf_counter() - start
        value = case.chosen.evaluate(smaller, case.chosen.test_batches(limit))
        far = fidelity(case.model, smaller, held)
        kept.add(name, {"metric": value, "fidelity": far.to_dict(), "seconds": round(seconds, 2)})
        show(name, kept.rows[name], far)


def show(name: str, row: dict[str, Any], far: Any) -> None:
    print(f"  {name:28} {row['metric']:9.4f}   {far.brief:>24}   {row['seconds']:7.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="rows that begin with one of these")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="calibration examples")
    parser.add_argument("--limit", type=int, help="test examples; all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for network in options.network:
        chosen = task(network)
        model = chosen.dense(0)
        for seed in range(options.draws):
            for criterion in options.criteria:
                print(
                    f"{network}, {criterion}, draw {seed}: {chosen.metric}, fidelity, seconds of the repair"
                )
                run(Case(chosen, model, criterion, seed, options.examples), options.only, options.limit)


if __name__ == "__main__":
    main()
