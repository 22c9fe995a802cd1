"""The proof on one random network: whatever discovery offers, masked equals pruned."""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from generator import Program, network
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import model_inputs
from cria_prune.base.modules import named_tensors
from cria_prune.planning.plan import compose, make_plan
from cria_prune.stages import discover
from cria_prune.structure.groups import UnitGroups, shrink, without_residual
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import Reference


@dataclass
class Outcome:
    """What happened to one network.

    Attributes:
        groups: (kind, blocks that produce it, units, why it is frozen or None) for every group.
        difference: the largest of its plans; moved: how far pruning moved the output of the dense model.
        failure: stage and error, None where all held.
        seconds: CPU time.
    """

    seed: int
    kind: str
    blocks: tuple[str, ...]
    groups: list[tuple[str, tuple[str, ...], int, str | None]] = field(default_factory=list)
    difference: float = 0.0
    moved: float = 0.0
    failure: str | None = None
    seconds: float = 0.0


def random_plan(groups: UnitGroups, random: np.random.Generator, share: float = 1.0) -> dict[str, np.ndarray]:
    """Keep a random number of random units of a share of the prunable groups."""
    return {
        group.name: np.sort(
            random.permutation(group.size)[: int(random.integers(group.least, group.size + 1))]
        )
        for group in groups.prunable
        if random.random() < share
    }


def prove(model: torch.nn.Module, groups: UnitGroups, example: Any, seed: int, outcome: Outcome) -> None:
    """Cut at random with and without residual width, then once more; raise where a cut is wrong."""
    reference = Reference(model, example)
    random = np.random.default_rng(seed)
    for offered, share in ((groups, 1.0), (without_residual(groups), 0.6)):
        kept = random_plan(offered, random, share)
        plan = make_plan(offered, kept)
        smaller = apply(model, plan)
        outcome.difference = max(outcome.difference, reference.compare(plan, smaller).difference)
        outcome.moved = max(outcome.moved, _moved(model, smaller, example))
        left = shrink(offered, kept)
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(smaller).items()}
        wrong = {name: shape for name, shape in left.shapes.items() if shapes[name] != shape}
        assert not wrong, f"shrink says {wrong}, the smaller model has {shapes}"
        again = make_plan(left, random_plan(left, random))
        total = compose(plan, again)
        last = reference.compare(total, apply(smaller, again)).difference
        outcome.difference = max(outcome.difference, last)


def _moved(model: torch.nn.Module, smaller: torch.nn.Module, example: Any) -> float:
    args, kwargs = model_inputs(example)
    with torch.no_grad():
        pairs = zip(tree_leaves(model(*args, **kwargs)), tree_leaves(smaller(*args, **kwargs)), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def check(program: Program) -> Outcome:
    """Build a program, discover its groups and prove random plans on it."""
    outcome = Outcome(program.seed, program.kind, tuple(program.blocks[1:]))
    start, stage = time.process_time(), "build"
    try:
        model, example = program.build()
        stage = "discover"
        groups = discover(model, example)
        outcome.groups = [
            (group.kind, _blocks(group.producers), group.size, group.frozen) for group in groups
        ]
        stage = "prove"
        prove(model, groups, example, program.seed, outcome)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if stage == "build" else f" ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
        text = " ".join(str(error).split())[:300]
        outcome.failure = f"{stage}: {type(error).__name__}{where}: {text}"
    outcome.seconds = time.process_time() - start
    return outcome


def check_seed(seed: int) -> Outcome:
    """Check the network of a seed."""
    return check(network(seed))


def same_failure(first: str | None, second: str | None) -> bool:
    """Tell whether two failures come from the same stage, error and line."""
    return bool(first and second) and _heading(str(first)) == _heading(str(second))


def _heading(failure: str) -> str:
    """Stage, error type and line; for a wrong result, whether the smaller model ran at all."""
    crash = "relative difference" not in failure
    return f"{failure.split(': ')[0]}{failure.split(': ')[1]}{crash}"


def _blocks(producers: Iterable[Any]) -> tuple[str, ...]:
    """Return the kinds of block that a group's producers belong to: `attention7.q.weight` is `attention`."""
    return tuple(dict.fromkeys(re.split(r"[\d.]", item.tensor)[0].rstrip("_") for item in producers))


def coverage(outcomes: Iterable[Outcome]) -> tuple[Counter[str], Counter[str]]:
    """Return kind of network or block -> groups, and -> prunable groups."""
    everything, prunable = Counter[str](), Counter[str]()
    for outcome in outcomes:
        for _, blocks, size, frozen in outcome.groups:
            for name in (f"{outcome.kind} networks", *blocks):
                everything[name] += 1
                prunable[name] += frozen is None and size > 1
    return everything, prunable


def plain_reason(reason: str) -> str:
    """Return the reason without the names of one network."""
    reason = re.sub(r"\bin (the model|[\w.]+\d[\w.]*)", "in ...", reason)
    reason = re.sub(r"'[\w.]+'", "'...'", reason)
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", reason)[:110]
