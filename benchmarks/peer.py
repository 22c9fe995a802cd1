"""What Torch-Pruning does with one network of the zoo, without help; `python benchmarks/coverage.py` runs it.

    python benchmarks/peer.py torchvision/resnet18

It is given the example, the layers that make the output as ignored layers, and nothing about the
architecture. Two things are done for it: its trace sees the first output only, and the decoders run
without their cache, with which it does not end.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zoo
from staged import Values, merged, said, stages

SHARE, COMPARED = 0.5, 8
CONVOLUTION = nn.modules.conv._ConvNd
WHOLE = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)


class Peer:
    """One network under Torch-Pruning; what changes a model works on a copy."""

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self) -> Values:
        self.library = import_module("torch_pruning")
        self.model, self.example = zoo.in_double(*zoo.build(self.name))
        if hasattr(self.model, "config"):
            self.model.config.use_cache = False
        parameters = sum(item.numel() for item in self.model.parameters())
        return {"torch-pruning": version("torch-pruning"), "parameters": parameters}

    def trace(self) -> Values:
        """Build the dependency graph, and read which layers it ties."""
        model = copy.deepcopy(self.model)
        names = {module: name for name, module in model.named_modules()}
        start = time.perf_counter()
        graph = self.graph(model)
        seconds = round(time.perf_counter() - start, 3)
        self.ignored = [names[layer] for layer in output_layers(graph)]
        tied = [
            {maker(names, dep.target.module) for dep, _ in group if makes_output(graph, dep)}
            for group in graph.get_all_groups()
        ]
        return {"seconds": seconds, "ignored": self.ignored, "groups": len(tied), "tied": merged(tied)}

    def graph(self, model: nn.Module) -> Any:
        graph = self.library.DependencyGraph()
        return graph.build_dependency(model, self.example, output_transform=first_output, verbose=False)

    def pruner(self, model: nn.Module) -> Any:
        modules = dict(model.named_modules())
        return self.library.pruner.BasePruner(
            model,
            self.example,
            importance=self.library.importance.MagnitudeImportance(p=2),
            pruning_ratio=SHARE,
            ignored_layers=[modules[name] for name in self.ignored],
            output_transform=first_output,
            # Its default arguments are dictionaries that one run leaves full for the next.
            **{key: {} for key in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")},
        )

    def groups(self, model: nn.Module) -> Iterator[Any]:
        return self.pruner(model).step(interactive=True)

    def alone(self) -> Values:
        """Compare masked and pruned, group by group, for a number of groups spread over the network."""
        count = sum(1 for _ in self.groups(copy.deepcopy(self.model)))
        chosen = sorted({round(index) for index in np.linspace(0, count - 1, min(count, COMPARED))})
        found: Values = {"of": count, "chosen": len(chosen), "compared": 0, "equal": 0, "through norm": 0}
        found |= {"difference": 0.0, "crashes": []}
        for index in chosen:
            self.compare(index, found)
        return found

    def compare(self, index: int, found: Values) -> None:
        model = copy.deepcopy(self.model)
        group = next(islice(self.groups(model), index, None))
        masked = None if through_norm(model, group) else mask(self.model, model, group)
        try:
            group.prune()
            with torch.no_grad():
                output = first_output(zoo.forward(model, self.example))
        except Exception as error:
            found["crashes"].append(said(error))
            return
        if masked is None:
            found["through norm"] += 1
            return
        with torch.no_grad():
            expected = first_output(zoo.forward(masked, self.example))
        difference = float((expected - output).abs().max() / expected.abs().max())
        found["compared"] += 1
        found["equal"] += difference < 1e-10
        found["difference"] = max(found["difference"], difference)

    def half(self) -> Values:
        """Remove half of everything and run what is left; that it runs does not say that it is right."""
        smaller = copy.deepcopy(self.model)
        self.pruner(smaller).step()
        found: Values = {"parameters": sum(item.numel() for item in smaller.parameters()), "runs": True}
        try:
            with torch.no_grad():
                zoo.forward(smaller, self.example)
        except Exception as error:
            found |= {"runs": False, "crash": said(error)}
        return found


def first_output(output: Any) -> Tensor:
    """Return the first tensor of a model's output: the logits."""
    return next(item for item in tree_leaves(output) if isinstance(item, Tensor))


def makes_output(graph: Any, dep: Any) -> bool:
    """Tell whether a step of a group cuts outputs of a convolution or linear that is not depthwise."""
    layer = dep.target.module
    depthwise = isinstance(layer, CONVOLUTION) and 1 < layer.groups == layer.in_channels
    return (
        isinstance(layer, (CONVOLUTION, nn.Linear, nn.MultiheadAttention))
        and graph.is_out_channel_pruning_fn(dep.handler)
        and not depthwise
    )


def maker(names: dict[nn.Module, str], layer: nn.Module) -> str:
    """Name the layer that makes the output; of an attention module that is its projection."""
    return names[layer] + (".out_proj" if isinstance(layer, nn.MultiheadAttention) else "")


def output_layers(graph: Any) -> list[nn.Module]:
    """Return the convolutions and linears that the output is made of with no other such layer between."""
    waiting = [node for node in graph.module2node.values() if not node.outputs]
    seen, found = set(waiting), []
    while waiting:
        node = waiting.pop()
        if isinstance(node.module, (CONVOLUTION, nn.Linear)):
            found.append(node.module)
            continue
        fresh = [item for item in node.inputs if item not in seen]
        seen.update(fresh)
        waiting += fresh
    return found


def through_norm(model: nn.Module, group: Any) -> bool:
    """Tell whether a norm takes its statistics over the removed width, or an attention module is cut whole.

    Then the pruned network is another function than the masked one by its nature.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    targets = [dep.target.module for dep, _ in group]
    return any(isinstance(item, WHOLE) or id(item) in norms for item in targets)


def mask(dense: nn.Module, model: nn.Module, group: Any) -> nn.Module:
    """Return a copy of the dense model in which what the group removes is zero.

    The convolutions and linears of the group write zeros there, and read none of it: where a product
    of two signals (a gate, attention) reads it, that is zero too.
    """
    names = {module: name for name, module in model.named_modules()}
    masked = copy.deepcopy(dense)
    layers = dict(masked.named_modules())
    with torch.no_grad():
        for dep, indices in group:
            if isinstance(dep.target.module, (CONVOLUTION, nn.Linear)):
                layer = layers[names[dep.target.module]]
                (deafen if dep.handler.__name__ == "prune_in_channels" else silence)(layer, sorted(indices))
    return masked


def silence(layer: nn.Module, indices: list[int]) -> None:
    """Make these outputs of a convolution or linear zero."""
    layer.weight.index_fill_(int(getattr(layer, "transposed", False)), torch.tensor(indices), 0)
    if layer.bias is not None:
        layer.bias[indices] = 0


def deafen(layer: nn.Module, indices: list[int]) -> None:
    """Set the weights to zero that read these inputs of a convolution or linear."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        weight[:, indices] = 0
    elif layer.transposed:
        weight[indices] = 0
    else:
        width, rows = weight.shape[1], weight.shape[0] // layer.groups
        for index in indices:
            block = index // width
            weight[block * rows : (block + 1) * rows, index % width] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=zoo.names())
    peer = Peer(parser.parse_args().network)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    steps = [("build", peer.build), ("trace", peer.trace), ("half", peer.half), ("groups", peer.alone)]
    stages(steps, alone={"half"})


if __name__ == "__main__":
    main()
