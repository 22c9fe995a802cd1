"""One width of benchmarks/scale.py, measured in a process of its own; prints what each stage found.

Legend: d = units of a gated layer down(silu(gate(x)) * up(x)), h = its inputs, M = samples (tokens).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cria_prune import discover, record
from cria_prune.config import RecordConfig
from cria_prune.graph.graph import Graph, edge_distances, learn_graph, nearest_neighbors
from cria_prune.graph.moments import Moments, dead_units
from cria_prune.recording.states import States
from cria_prune.repair.consumers import compensate
from cria_prune.spectrum.distortions import _mean_over_neighbors as mean_over_neighbors
from cria_prune.spectrum.distortions import innovation
from cria_prune.spectrum.importance import rank_correlation
from cria_prune.spectrum.pcg import distortion_embedding
from cria_prune.spectrum.pencil import solve_pencil
from cria_prune.structure.groups import UnitGroups
from result_files import finished
from staged import Values, stages

THREADS, SEED = 2, 0
BATCH, BATCHES, HELD_OUT = 1024, 8, 2
INPUTS = (
    2048  # of the layer at most: where a real one has more, its forward costs more and recording the same
)
DENSE = 4096  # up to here the exact moments and the dense eigensolver are the reference
REMOVED = 0.4


class Gated(nn.Module):
    """A gated feed-forward layer whose units come in families: eight share most of their weights."""

    def __init__(self, units: int) -> None:
        super().__init__()
        inputs = min(INPUTS, 3 * units // 8)
        self.gate, self.up = (nn.Linear(inputs, units, bias=False) for _ in range(2))
        self.down = nn.Linear(units, inputs, bias=False)
        generator = torch.Generator().manual_seed(SEED)
        self.scales = torch.logspace(0, -1.5, inputs)
        with torch.no_grad():
            for layer, gain in ((self.gate, 4.0), (self.up, 2.0)):
                common = torch.randn(units // 8, inputs, generator=generator).repeat_interleave(8, dim=0)
                own = torch.randn(units, inputs, generator=generator)
                layer.weight.copy_((common + 0.5 * own) * gain / self.scales.norm())
            self.down.weight.copy_(torch.randn(inputs, units, generator=generator) / units**0.5)

    def middle(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(x))

    def tokens(self, count: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(BATCH, len(self.scales), generator=generator) * self.scales for _ in range(count)]


class Meter:
    """Wall and processor time of a call, and the most memory that it took beyond what was there."""

    def __init__(self, device: str) -> None:
        self.status, self.device = Path("/proc/self/status"), device

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Values]:
        if self.device != "cpu":
            return self._there(function)
        before = self._memory("VmRSS", reset=True)
        wall, processor = time.perf_counter(), time.process_time()
        value = function()
        spent = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        peak = self._memory("VmHWM")
        if before is not None and peak is not None:
            spent["bytes"] = max(0, peak - before)
        return value, spent

    def _there(self, function: Callable[[], Any]) -> tuple[Any, Values]:
        """Time a call on a GPU, to its end, and take the most memory of the GPU."""
        finished(self.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wall, processor = time.perf_counter(), time.process_time()
        value = function()
        finished(self.device)
        spent = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        return value, {**spent, "bytes": torch.cuda.max_memory_allocated() - before}

    def _memory(self, name: str, reset: bool = False) -> int | None:
        """Return a line of the process's status in bytes; None where the system does not tell."""
        try:
            if reset:
                Path("/proc/self/clear_refs").write_text("5")
            lines = self.status.read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
        except OSError:
            return None


class Cell:
    """The stages of one width, each from what the one before left."""

    def __init__(self, units: int, device: str = "cpu") -> None:
        self.units, self.device, self.meter = units, device, Meter(device)

    @cached_property
    def model(self) -> Gated:
        return Gated(self.units).eval().to(self.device)

    def tokens(self, count: int, seed: int) -> list[Tensor]:
        return [batch.to(self.device) for batch in self.model.tokens(count, seed)]

    def record(self) -> Values:
        """Recording against a plain forward over the same tokens."""
        batches = self.tokens(BATCHES, 1)
        groups, _ = self.meter(lambda: discover(self.model, batches[0][:2]))
        self.groups: UnitGroups = groups
        (self.name,) = (group.name for group in groups.prunable if group.size == self.units)
        only = self.recorder(batches, RecordConfig(examples=BATCH * BATCHES, seed=SEED))

        def forward() -> None:
            with torch.no_grad():
                for batch in batches:
                    self.model(batch)

        forward()
        _, plain = self.meter(forward)
        self.states, spent = self.meter(only)
        found: Values = {"inputs": len(self.model.scales), "samples": BATCH * BATCHES, "forward": plain}
        clock = "processor" if self.device == "cpu" else "wall"
        return {**found, "record": spent, "ratio": spent[clock] / plain[clock]}

    def recorder(self, batches: list[Tensor], config: RecordConfig) -> Callable[[], States]:
        return lambda: record(self.model, self.groups, batches, config, consumed=True, device=self.device)

    def sides(self, states: States) -> tuple[Moments, Moments]:
        live = (~dead_units(states[self.name].output)).nonzero()[:, 0].cpu()
        return states[self.name].input.select(live), states[self.name].output.select(live)

    def graph(self) -> Values:
        """Both graphs: neighbours, distances of their edges, weights."""
        found: Values = {"kept": "exact" if self.states[self.name].output.sketch is None else "sketch"}
        before, after = self.sides(self.states)
        edges, found["neighbours"] = self.meter(lambda: nearest_neighbors(after, 32))
        _, found["distances"] = self.meter(lambda: edge_distances(after, *edges))
        self.graphs: tuple[Graph, ...]
        self.graphs, found["both"] = self.meter(lambda: (learn_graph(before), learn_graph(after)))
        return {**found, "edges": [len(graph.rows) for graph in self.graphs]}

    def solve(self) -> Values:
        """Block PCG over all pairs, and the score from it."""
        before, after = self.graphs
        (F, residual, iterations), spent = self.meter(lambda: distortion_embedding(before, after, seed=SEED))
        self.scores, mean = self.meter(lambda: mean_over_neighbors(before, F))
        return {"solve": spent, "mean": mean, "residual": residual, "iterations": iterations}

    def innovation(self) -> Values:
        self.norms = self.model.down.weight.detach().double().square().sum(dim=0).cpu()
        output = self.states[self.name].output
        found, spent = self.meter(lambda: innovation(output, self.norms))
        self.innovations = found.scores
        return {"innovation": spent}

    def repair(self) -> Values:
        """Remove the lowest by innovation; error of the layer on tokens that were not recorded."""
        self.kept = {
            self.name: self.innovations.argsort()[int(REMOVED * self.units) :].sort().values.tolist()
        }
        repaired, found = self.repaired(self.states)
        none = self.error(self.model)
        return {
            "none": none,
            "repaired": self.error(repaired),
            "relative": self.error(repaired) / none,
            **found,
        }

    def repaired(self, states: States) -> tuple[Any, Values]:
        consumed = {self.name: states[self.name].consumed}
        found, spent = self.meter(lambda: compensate(self.model, self.groups, self.kept, consumed))
        (repair,) = (item for item in found[1] if item.tensor == "down.weight")
        return found[0], {"repair": spent, "expected": 1 - repair.recovered}

    def error(self, model: Any) -> float:
        """Mean squared error of the output, over that of the output itself."""
        kept = torch.tensor(self.kept[self.name])
        wrong = total = 0.0
        with torch.no_grad():
            for batch in self.tokens(HELD_OUT, 2):
                middle = self.model.middle(batch)
                full = self.model.down(middle)
                cut = middle[:, kept] @ model.down.weight[:, kept].T
                wrong, total = wrong + float((full - cut).square().sum()), total + float(full.square().sum())
        return wrong / total

    def dense(self) -> Values:
        """The same from exact moments and by the dense solver, and how far the ranks agree."""
        before, after = self.graphs
        exact_pairs, spent = self.meter(lambda: solve_pencil(before, after, dense_units=self.units))
        found: Values = {"solve": spent}
        solved = mean_over_neighbors(before, exact_pairs.embedding())
        found["ranks: solver"] = rank_correlation(self.scores, solved)
        settings = RecordConfig(examples=BATCH * BATCHES, seed=SEED, exact_units=self.units)
        states, found["record"] = self.meter(self.recorder(self.tokens(BATCHES, 1), settings))
        exact, found["innovation"] = self.meter(lambda: innovation(states[self.name].output, self.norms))
        found["ranks: innovation"] = rank_correlation(self.innovations, exact.scores)
        sides = [learn_graph(side) for side in self.sides(states)]
        pairs = solve_pencil(*sides, dense_units=self.units)
        whole = mean_over_neighbors(sides[0], pairs.embedding())
        found["ranks: sketch and solver"] = rank_correlation(self.scores, whole)
        repaired, values = self.repaired(states)
        return {**found, **values, "repaired": self.error(repaired)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("units", type=int)
    parser.add_argument("device")
    torch.set_num_threads(THREADS)
    options = parser.parse_args()
    cell = Cell(options.units, options.device)
    steps = [("load", lambda: {"average": os.getloadavg()[0]})] if hasattr(os, "getloadavg") else []
    steps += [("record", cell.record), ("graph", cell.graph), ("solve", cell.solve)]
    steps += [("innovation", cell.innovation), ("repair", cell.repair)]
    stages(steps + ([("dense", cell.dense)] if cell.units <= DENSE else []))


if __name__ == "__main__":
    main()
