"""Torch-Pruning's own pruner and importances on the same network, layers and budget.

Its code prunes; ours only chooses the layers (those whose units Cria may cut), finds the ratio that frees
about the same share, and takes the gradients that an importance asks for. Tested with release 1.6.1.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cria_prune.base.batches import Batch, batch_size, map_tensors, move
from cria_prune.base.errors import ConfigError, needed
from cria_prune.base.metrics import cross_entropy
from cria_prune.base.modules import device_of, devices_in_use, modes_kept
from cria_prune.config import PruneConfig
from cria_prune.planning.budget import count_macs
from cria_prune.stages import Prepared
from cria_prune.structure.discovery import discover as structure
from cria_prune.structure.groups import UnitGroups

IMPORTANCES = {
    "tp-magnitude": "GroupMagnitudeImportance",
    "tp-bn-scale": "BNScaleImportance",
    "tp-fpgm": "FPGMImportance",
    "tp-lamp": "LAMPImportance",
    "tp-taylor": "GroupTaylorImportance",
    "tp-hessian": "GroupHessianImportance",
}
"""Name in a suite -> class in torch_pruning.importance, with its own defaults."""

HALVINGS, FAR = 12, 0.05
RANKINGS = ("uniform", "global")
"""Of its pruner: the same share of every layer, or one threshold for all."""


@dataclass(frozen=True)
class PeerResult:
    """What the peer left: `report` as in a plan, units `kept` per group, `seconds` of search and pruning."""

    model: nn.Module
    report: dict[str, Any]
    kept: dict[str, int]
    seconds: dict[str, float]


def prune_by_peer(name: str, prepared: Prepared, config: PruneConfig) -> PeerResult:
    """Prune a copy of a network by an importance of Torch-Pruning, by default the same share of every layer.

    Its ratio is bisected, and of all ratios tried that one is taken which frees the share most nearly, more
    or less. Under the ranking `global` (its `global_pruning`) what a ratio frees depends on the importance,
    so every try prunes in all steps, and no layer has a floor, where Cria leaves a tenth (`plan.floor`).
    Gradients are those of the cross-entropy over the calibration batches in evaluation mode, taken anew
    before every step; for the Hessian example by example, as its documentation shows.

    Args:
        name: key of IMPORTANCES.
        prepared: the dense network, which is left as it was, with the calibration.
        config: reduction, of, rounds, ranking and what may be cut, as for Cria.

    Raises:
        ConfigError: Torch-Pruning is not installed, its pruner frees no share near that one, or the share or
            the ranking is one that we do not have for it.
    """
    library, model = _library(name, config), prepared.model
    start = time.perf_counter()
    peer = _Peer(library, name, prepared, config)
    found = _nearest(peer.attempt, config.plan.reduction)
    taken = found if found.model is not None else peer.pruned(found.ratio)
    assert taken.model is not None
    report = _report(model, taken.model, peer, config)
    if report["reached"] <= 0 or abs(report["reached"] - config.plan.reduction) > FAR:
        raise ConfigError(
            f"{name}: {config.plan.reduction:.1%} of the {config.plan.of}",
            f"the nearest that Torch-Pruning frees is {report['reached']:.1%}",
            "Leave it out, or ask for another share",
        )
    search = time.perf_counter() - start - taken.seconds
    seconds = {"search": round(search, 4), "prune": round(taken.seconds, 4)}
    return PeerResult(taken.model, report, _kept(model, taken.model, peer.groups), seconds)


def _library(name: str, config: PruneConfig) -> Any:
    """Return Torch-Pruning, if it is there and can do what the configuration asks."""
    with needed("torch-pruning", f"The criterion {name}"):
        import torch_pruning as library
    if config.plan.of not in ("parameters", "macs"):
        raise ConfigError(
            f"{name} on a share of the {config.plan.of}",
            "we count parameters or MACs for it",
            "Leave it out",
        )
    if config.plan.shared_by not in RANKINGS:
        raise ConfigError(
            f"{name} under the ranking {config.plan.shared_by}",
            f"its pruner has {' and '.join(RANKINGS)}",
            "Leave it out",
        )
    return library


@dataclass(frozen=True)
class _Try:
    """What a ratio frees, as a share; network and seconds where it took the whole pruning to find out."""

    ratio: float
    freed: float
    model: nn.Module | None = None
    seconds: float = 0.0


def _nearest(attempt: Callable[[float], _Try], goal: float) -> _Try:
    """Bisect for the ratio that frees a share, and return the nearest of all tries.

    The last need not be that: the share jumps, and under one threshold it can even fall while the ratio
    rises, for a layer that lies below the threshold as a whole is left as it is.
    """
    low, high, nearest = 0.0, 1.0, _Try(0.0, 0.0)
    for _ in range(HALVINGS):
        found = attempt((low + high) / 2)
        low, high = (low, found.ratio) if found.freed >= goal else (found.ratio, high)
        if abs(found.freed - goal) < abs(nearest.freed - goal):
            nearest = found
    return nearest


class _Peer:
    """Its pruner over one network, one importance and one calibration."""

    def __init__(self, library: Any, name: str, prepared: Prepared, config: PruneConfig) -> None:
        prepared.check_reach()
        self.library, self.name, self.model, self.config = library, name, prepared.model, config
        self.batches = [move(batch, device_of(self.model)) for batch in prepared.batches]
        self.example, self.groups = prepared.example, prepared.groups
        self.macs = count_macs(prepared.found)
        self.dense = self.macs if config.plan.of == "macs" else _cost(self.model, self.example, config)

    def attempt(self, ratio: float) -> _Try:
        """Find out what a ratio frees: the same share of every layer costs no importance."""
        if self.config.plan.shared_by == "global":
            return self.pruned(ratio)
        # With one share for every layer the sizes do not depend on the scores, so the search needs none.
        sized = self._cut(ratio, self.library.importance.RandomImportance(), 1, lambda _model: None)
        return _Try(ratio, self._freed(sized))

    def pruned(self, ratio: float) -> _Try:
        """Prune by the importance, in all steps."""
        start = time.perf_counter()
        importance = getattr(self.library.importance, IMPORTANCES[self.name])()
        before = _gradients(importance, self.batches)
        smaller = self._cut(ratio, importance, self.config.plan.rounds, before)
        seconds = time.perf_counter() - start
        return _Try(ratio, self._freed(smaller), smaller, seconds)

    def _freed(self, smaller: nn.Module) -> float:
        return 1 - _cost(smaller, self.example, self.config) / self.dense

    def _cut(
        self, ratio: float, importance: Any, steps: int, before: Callable[[nn.Module], None]
    ) -> nn.Module:
        smaller, example = copy.deepcopy(self.model), self.example
        inputs = example[0] if isinstance(example, (tuple, list)) else example
        with warnings.catch_warnings(), modes_kept(smaller), torch.random.fork_rng(devices=devices_in_use()):
            warnings.simplefilter("ignore")
            pruner = self.library.pruner.BasePruner(
                smaller, inputs, importance=importance, pruning_ratio=ratio, iterative_steps=steps,
                ignored_layers=_others(smaller, self.groups),
                global_pruning=self.config.plan.shared_by == "global",
                # its defaults are shared between calls, and filled
                in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
            )  # fmt: skip
            for _ in range(steps):
                before(smaller)
                pruner.step()
        smaller.zero_grad()
        return smaller


def _others(model: nn.Module, groups: UnitGroups) -> list[nn.Module]:
    """Return the layers whose outputs Cria would not cut: it is not to cut them either."""
    cut = {item.tensor.rpartition(".")[0] for group in groups.prunable for item in group.producers}
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [layer for name, layer in model.named_modules() if isinstance(layer, kinds) and name not in cut]


def _kept(dense: nn.Module, smaller: nn.Module, groups: UnitGroups) -> dict[str, int]:
    """Return how many units of each group are left, by the size of its first producer."""
    kept = {}
    for group in groups.prunable:
        first = group.producers[0]
        before, after = (model.get_parameter(first.tensor).shape[first.dim] for model in (dense, smaller))
        kept[group.name] = group.size * after // before
    return kept


def _cost(model: nn.Module, example: Batch, config: PruneConfig) -> float:
    """Return what the share is of: MACs, or parameters."""
    if config.plan.of == "macs":
        return count_macs(structure(model, example))
    return float(sum(item.numel() for item in model.parameters()))


def _report(dense: nn.Module, smaller: nn.Module, peer: _Peer, config: PruneConfig) -> dict[str, Any]:
    """Return asked, reached and counts; the MACs of both networks are counted by our own structure."""
    parameters = [sum(item.numel() for item in model.parameters()) for model in (dense, smaller)]
    macs = [peer.macs, count_macs(structure(smaller, peer.example))]
    one, other = macs if config.plan.of == "macs" else parameters
    return {
        "asked": config.plan.reduction, "reached": 1 - other / one, "of": config.plan.of,
        "parameters_dense": parameters[0], "parameters": parameters[1],
        "macs_dense": macs[0], "macs": macs[1],
    }  # fmt: skip


def _one(place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda item: item[place : place + 1]


def _gradients(importance: Any, batches: Iterable[Batch]) -> Callable[[nn.Module], None]:
    """Return what is to be done before a step: nothing, one gradient, or one per example."""
    kind = type(importance).__name__

    def before(model: nn.Module) -> None:
        model.eval()
        model.zero_grad()
        if kind == "GroupTaylorImportance":
            for batch in batches:
                cross_entropy(model, batch).backward()
        elif kind == "GroupHessianImportance":
            importance.zero_grad()
            for batch in batches:
                for place in range(batch_size(batch)):
                    model.zero_grad()
                    cross_entropy(model, map_tensors(batch, _one(place))).backward()
                    importance.accumulate_grad(model)

    return before
