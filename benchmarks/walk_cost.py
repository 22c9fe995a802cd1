"""What the walk costs: in plain forwards over the same examples, in memory, and with width and depth.

    python benchmarks/walk_cost.py
    python benchmarks/walk_cost.py --only cifar10-resnet56 sst2-minilm --repetitions 5

Weights are random, for none of it depends on them, and the inputs are too: 1,024 images, 512 sentences of 32
tokens, and for synthetic networks as many as are said below. Half of the parameters is cut, uniformly, in one
round. A plain forward of the dense network over all examples and the walk take turns in one process; of
every turn the quotient is kept, and their median is what counts. `capture` is the part of the walk that finds
the operations of both networks: it does not grow with the examples. `measured` is the measuring of the
losses of all groups at all levels, `prune` a whole default pruning: every round of it, as the configuration
says without being asked; `prune 1` in one round. `MB` is the peak of the resident memory above the level
before, of a walk alone (Linux). Each network is measured in a process of its own. Writes
benchmarks/results/walk-cost/cost.json, row by row: the same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import PruneConfig, prune
from cria_prune.base.batches import Batch, batch_size, forward
from cria_prune.measured import measure_losses
from cria_prune.recipes.registry import TASKS, task
from cria_prune.repair.program import programs_for
from cria_prune.repair.walk import walk
from cria_prune.stages import plan_cut, prepare, rank, remove
from memory import MB, apart, begin
from resident import resident
from result_files import RESULTS, Rows

REDUCTION = 0.5
SIZES = {"cifar10-resnet20": 1024, "cifar10-resnet56": 1024, "sst2-minilm": 512, "llama-shakespeare": 128}
TOKENS, AT_ONCE = 32, 64


class Mlp(nn.Module):
    """Blocks of two linear layers with a shortcut."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*pair) for _ in range(depth))
            for pair in ((width, 2 * width), (2 * width, width))
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return self.head(x)


class Convolutions(nn.Module):
    """Blocks of two 3x3 convolutions with a shortcut."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first, self.second = (
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(F.relu(first(x)))
        return self.head(x.mean((2, 3)))


def decoder(width: int, depth: int) -> nn.Module:
    """Return a Llama of a vocabulary of 256."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# name -> (constructor, width and depth to begin with, inputs of a number of examples, examples)
SYNTHETIC: dict[str, tuple[Callable[[int, int], nn.Module], int, int, Callable[[int], Batch], int]] = {
    "mlp": (Mlp, 64, 2, lambda count: torch.randn(count, 64), 65536),
    "convolutions": (Convolutions, 16, 2, lambda count: torch.randn(count, 3, 16, 16), 2048),
    "decoder": (decoder, 64, 2, lambda count: {"input_ids": torch.randint(256, (count, 64))}, 512),
}


def cases() -> list[str]:
    grown = [
        f"{name}-{what}-x{times}" for name in SYNTHETIC for what in ("width", "depth") for times in (2, 4)
    ]
    return [*SIZES, *(f"{name}-x1" for name in SYNTHETIC), *grown]


def inputs(name: str, examples: int) -> list[Batch]:
    most = AT_ONCE if name != "mlp" else 32 * AT_ONCE
    sizes = [min(most, examples - first) for first in range(0, examples, most)]
    if name.startswith("cifar10"):
        return [torch.randn(size, 3, 32, 32) for size in sizes]
    if name in SIZES:
        tokens = TOKENS if name == "sst2-minilm" else 4 * TOKENS
        found = list[Batch]()
        for size in sizes:
            ids = torch.randint(1, 1000, (size, tokens))
            mask = {"attention_mask": torch.ones_like(ids)} if name == "sst2-minilm" else {}
            found.append({"input_ids": ids, **mask})
        return found
    return [SYNTHETIC[name][3](size) for size in sizes]


def build(case: str, share: float) -> tuple[nn.Module, list[Batch], PruneConfig]:
    torch.manual_seed(0)
    name, *grown = case.split("-")
    if case in SIZES:
        chosen, examples = task(case), round(share * SIZES[case])
        values = {key: dict(part) for key, part in chosen.prune_defaults.items()}
        values["record"] = {**values.get("record", {}), "examples": examples}
        return chosen.untrained(), inputs(case, examples), PruneConfig(**values)
    make, width, depth, _, examples = SYNTHETIC[name]
    times = int(grown[-1].removeprefix("x"))
    width, depth = width * (times if "width" in grown else 1), depth * (times if "depth" in grown else 1)
    examples = round(share * examples)
    batches = inputs(name, examples)
    if name == "mlp" and "width" in grown:
        batches = [torch.randn(batch_size(batch), width) for batch in batches]
    config = PruneConfig(record={"examples": examples})
    return make(width, depth).eval(), batches, config


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def with_plan(config: PruneConfig, **values: Any) -> PruneConfig:
    return config.model_copy(update={"plan": config.plan.model_copy(update=values)})


def measure(case: str, share: float, repetitions: int, whole: bool) -> dict[str, Any]:
    model, batches, config = build(case, share)
    examples = sum(batch_size(batch) for batch in batches)
    ready = prepare(model, batches, with_plan(config, reduction=REDUCTION, ranking="uniform", rounds=1))
    ranking = rank(ready)
    step = plan_cut(ready, ranking.scores)
    smaller = remove(model, step)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)

    def walked() -> Any:
        return walk(model, smaller, step, batches, examples=examples)

    plain()
    level = begin()
    plain()
    peaks = {"forward": resident("VmHWM") - level}
    level = begin()
    refitted = walked()
    peaks["walk"] = resident("VmHWM") - level
    rows = list[dict[str, float]]()
    for _ in range(repetitions):
        seconds = {"forward": timed(plain)[0], "walk": timed(walked)[0]}
        seconds["capture"] = timed(lambda: [programs_for(item, batches) for item in (model, smaller)])[0]
        rows.append(seconds)
    found: dict[str, Any] = {
        "parameters": sum(item.numel() for item in model.parameters()), "examples": examples,
        "layers": len(refitted.repairs), "peaks": peaks,
        "seconds": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "forwards": {
            name: statistics.median(row[name] / row["forward"] for row in rows) for name in rows[0]
        },
        "each": [row["walk"] / row["forward"] for row in rows],
    }  # fmt: skip
    return found | {"whole": in_whole(model, batches, config, plain) if whole else {}}


def in_whole(
    model: nn.Module, batches: list[Batch], config: PruneConfig, plain: Callable[[], None]
) -> dict[str, float]:
    """Return prunings and the measured losses in forwards, of the mean of one before and one after."""

    def beside(function: Callable[[], Any]) -> tuple[float, Any]:
        before, (spent, value), after = timed(plain)[0], timed(function), timed(plain)[0]
        return 2 * spent / (before + after), value

    found = dict[str, float]()
    found["prune"], result = beside(lambda: prune(model, batches, config))
    found["rounds"] = len(result.rounds)
    found["prune 1"], _ = beside(lambda: prune(model, batches, with_plan(config, rounds=1)))
    by_macs = with_plan(config, rounds=1, of="macs", ranking="measured")
    ready = prepare(model, batches, by_macs)
    ranking = rank(ready)
    found["measured"], losses = beside(lambda: measure_losses(ready, ranking))
    found["levels"] = sum(map(len, losses.values()))
    return found


def show(case: str, row: dict[str, Any]) -> None:
    """Print a row; where the capture takes several forwards, there are too few examples to say much."""
    seconds, forwards, whole = row["seconds"], row["forwards"], row["whole"]
    each = f"({min(row['each']):.2f} to {max(row['each']):.2f})"
    peaks = " and ".join(f"{size / MB:.0f}" for size in row["peaks"].values())
    said = ", ".join(f"{name} {value:.4g}" for name, value in whole.items())
    print(
        f"{case:22} {row['parameters']:>11,} parameters, {row['layers']:3} layers, forward "
        f"{seconds['forward']:7.3f} s, walk {forwards['walk']:6.2f} {each}, of it capture "
        f"{forwards['capture']:.2f}; MB {peaks}"
        f"{'; ' if said else ''}{said}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="cases that begin with one of these")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the examples; smaller for a try")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    assert set(SIZES) <= set(TASKS)
    torch.set_num_threads(options.threads)
    kept = Rows(
        RESULTS / "walk-cost" / "cost.json",
        {"reduction": REDUCTION, "threads": options.threads, "share": options.share},
    )
    for case in cases():
        if case in kept or (options.only and not case.startswith(tuple(options.only))):
            continue
        row = apart(measure, case, options.share, options.repetitions, case in SIZES)
        kept.add(case, {**row, "repetitions": options.repetitions})
        show(case, row)
    print(f"{len(kept.rows)} of {len(cases())} cases are measured", file=sys.stderr)


if __name__ == "__main__":
    main()
