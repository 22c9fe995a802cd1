"""What Cria does with one network of the zoo; `python benchmarks/coverage.py` runs it.

python benchmarks/coverage_cell.py torchvision/resnet18 --residual
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zoo
from cria_prune import Plan, UnitGroups, apply, discover, verify
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import count_parameters, largest_reachable
from cria_prune.planning.plan import make_plan
from cria_prune.structure.groups import without_experts, without_residual
from cria_prune.structure.trace import capture
from staged import Stage, Values, merged, stages

SHARE = 0.5


class Cell:
    """One network and what its stages leave for the next ones."""

    def __init__(self, name: str, residual: bool) -> None:
        self.name, self.residual = name, residual
        self.model: nn.Module
        self.example: Any
        self.groups: UnitGroups

    def steps(self) -> list[Stage]:
        """The stages in their order: build, capture, discover, and one cut per scope."""
        scopes = ["inner", "all"] if self.residual else ["inner"]
        cuts: list[Stage] = [(f"cut {scope}", lambda scope=scope: self.cut(scope)) for scope in scopes]
        return [("build", self.build), ("capture", self.capture), ("discover", self.discover), *cuts]

    def build(self) -> Values:
        self.model, self.example = zoo.build(self.name)
        return {"parameters": sum(item.numel() for item in self.model.parameters())}

    def capture(self) -> Values:
        return {"operations": len(capture(self.model, self.example).graph.nodes)}

    def discover(self) -> Values:
        self.groups = discover(self.model, self.example)
        prunable = {group.name for group in self.groups.prunable}
        kinds: dict[str, dict[str, int]] = {}
        for group in self.groups:
            count = kinds.setdefault(group.kind, {"prunable": 0, "frozen": 0})
            count["prunable" if group.name in prunable else "frozen"] += 1
        reasons = Counter(
            group.frozen or "it has one unit" for group in self.groups if group.name not in prunable
        )
        return {
            "prunable": len(prunable),
            "frozen": len(self.groups) - len(prunable),
            "kinds": kinds,
            "reasons": dict(reasons.most_common()),
            "tied": tied_layers(self.model, self.groups),
            "accounted": accounted(self.groups),
        }

    def cut(self, scope: str) -> Values:
        """Remove a random half of the units of every prunable group, verify, and go forward and back."""
        groups = self.groups if scope == "all" else without_experts(without_residual(self.groups))
        found = {
            "groups": len(groups.prunable),
            "reachable": largest_reachable(groups, PlanConfig().floor, "parameters"),
        }
        if not groups.prunable:
            return found
        plan = make_plan(groups, random_share(groups, SHARE, zoo.SEED))
        smaller = apply(self.model, plan)
        result = verify(self.model, plan, smaller, self.example)
        found["moved"] = moved(self.model, smaller, self.example)
        if scope == "inner":
            found |= noisy(self.model, smaller, plan, self.example)
        backward(smaller, self.example)
        parameters = sum(item.numel() for item in smaller.parameters())
        kept = {
            name: len(stays) for name, stays in plan.kept.items() if name in {g.name for g in groups.prunable}
        }
        if parameters != count_parameters(groups, kept):
            raise AssertionError(
                f"{parameters} parameters are left, the plan says {count_parameters(groups, kept)}"
            )
        return {**found, "difference": result.difference, "dtype": result.dtype, "parameters": parameters}


def accounted(groups: UnitGroups) -> Values:
    """Return fate -> share of the parameters, and the reasons that keep the most."""
    account = groups.account()
    shares = Counter[str]()
    for entry in account:
        shares[entry.fate] += entry.share
    kept = [f"{100 * entry.share:.0f} % {entry.reason}"[:160] for entry in account.largest(2)]
    return {**{fate: round(share, 4) for fate, share in shares.items()}, "largest": kept}


def noisy(model: nn.Module, smaller: nn.Module, plan: Plan, example: zoo.Example) -> Values:
    """Put noise into every weight entry that was removed; the masked network must not notice.

    The entries that stay are told by their numbers: the same plan cuts a copy whose weights count from 0.
    Compared on the example and on a second batch of three, in evaluation and in training mode.
    """
    counted, dense = copy.deepcopy(model).double(), copy.deepcopy(model)
    with torch.no_grad():
        for item in counted.parameters():
            item.copy_(torch.arange(item.numel(), dtype=item.dtype).view(item.shape))
        left = dict(apply(counted, plan).named_parameters())
        generator, changed = torch.Generator().manual_seed(zoo.SEED), 0
        for name, item in dense.named_parameters():
            if name not in left or left[name].shape == item.shape:
                continue
            gone = torch.ones(item.numel(), dtype=torch.bool)
            gone[left[name].ravel().long()] = False
            values = item.ravel().clone()
            others = values[gone]
            values[gone] = 1.3 * others[torch.randperm(len(others), generator=generator)]
            item.copy_(values.view(item.shape))
            changed += len(others)
    result = verify(dense, plan, smaller, example, examples=[zoo.another(example)])
    return {"noise": {"entries": changed, "difference": result.difference}}


def random_share(groups: UnitGroups, share: float, seed: int) -> dict[str, np.ndarray]:
    """Return group name -> random units that stay: `share` of them, rounded up, of every prunable group."""
    generator = np.random.default_rng(seed)
    return {
        group.name: generator.permutation(group.size)[: max(group.least, int(np.ceil(share * group.size)))]
        for group in groups.prunable
    }


def backward(model: nn.Module, example: zoo.Example) -> None:
    """Run the model forward and back; every gradient that comes has the shape of its parameter and is finite.

    Raises:
        AssertionError: a gradient is not, or none comes.
    """
    outputs = tree_leaves(zoo.forward(model, example))
    loss = sum(item.square().mean() for item in outputs if isinstance(item, Tensor) and item.requires_grad)
    assert isinstance(loss, Tensor), "no output has a gradient"
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape and bool(parameter.grad.isfinite().all()), name


def moved(model: nn.Module, smaller: nn.Module, example: zoo.Example) -> float:
    """Return how far pruning moved the first output, relative to its largest value."""
    with torch.no_grad():
        # Copies: some networks keep a part of a forward in evaluation mode; what is cut next must not.
        copies = (copy.deepcopy(item) for item in (model, smaller))
        before, after = (tree_leaves(zoo.forward(item, example))[0] for item in copies)
    return float((before - after).abs().max() / before.abs().max())


def tied_layers(model: nn.Module, groups: UnitGroups) -> list[list[str]]:
    """Return the sets of two and more convolutions and linears whose outputs leave together, by name.

    Layers are tied if some group holds outputs of both, directly or through others; depthwise
    convolutions, which follow their input, are left out.
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layers = {f"{name}.weight": name for name, item in model.named_modules() if isinstance(item, kinds)}
    sets = [{layers[item.tensor] for item in group.producers if item.tensor in layers} for group in groups]
    return merged(sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=zoo.names())
    parser.add_argument("--residual", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages(Cell(options.network, options.residual).steps(), alone={"cut inner"})


if __name__ == "__main__":
    main()
