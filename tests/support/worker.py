"""What the processes of the tests do: `python worker.py FOLDER RANK SIZE PART ...` writes JSON per part."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.recording.test_collect_networks import conv_net, images, mlp

from cria_prune import PruneConfig, prune, record, recover, register_criterion, score
from cria_prune.base import ranks
from cria_prune.base.ranks import World, world
from cria_prune.config import RecordConfig, RecoverConfig, ScoreConfig
from cria_prune.criteria.table import unregister_criterion
from cria_prune.recovery.loop import RecoverResult
from cria_prune.result import said_of

Values = dict[str, Any]
PATIENCE = 600  # seconds that one process waits for another; a busy machine may start the second late


def numbers(states: Any) -> Values:
    """Everything that was recorded, as lists; sketches by what they say of the covariance."""
    found: Values = {}
    for name, group in states.groups.items():
        moments = {"input": group.input, "output": group.output, "even": group.inputs[0]}
        moments |= {"odd": group.outputs[1], **{f"read {key}": item for key, item in group.consumed.items()}}
        for side, item in moments.items():
            second = item.covariance if item.sketch is None else item.sketch @ item.sketch.T / item.samples
            parts = {
                "mean": item.mean,
                "variance": item.variance,
                "second": second,
                "positive": item.positive,
            }
            found |= {f"{name} {side} {part}": value for part, value in parts.items() if value is not None}
            found[f"{name} {side} samples"] = torch.tensor([item.samples])
        for key, features in group.features.items():
            found |= {f"{name} {key} mean": features.mean, f"{name} {key} variance": features.variance}
        for part in ("taylor", "fisher"):
            if getattr(group, part) is not None:
                found[f"{name} {part}"] = getattr(group, part)
    return {name: value.double().tolist() for name, value in found.items()}


def scored(model: nn.Module, groups: Any, states: Any, criterion: str) -> Values:
    found = score(model, groups, states, ScoreConfig(criterion=criterion))
    return {
        name: {"scores": item.scores.tolist(), "diagnosis": item.diagnosis.to_dict()}
        for name, item in found.items()
    }


def exact() -> Values:
    """Spatial positions, a flatten, both kinds of gradients, five batches of unequal size."""
    model, groups = conv_net()
    config = RecordConfig(examples=27, positions=4, seed=3)
    states = record(model, groups, images(30, batch=6), config, per_example=True, consumed=True)
    register_criterion("spread", lambda evidence, config: evidence.output_side().variance, needs={"states"})
    criteria = ("innovation", "distortion", "taylor", "fisher", "spread")
    found = {name: scored(model, groups, states, name) for name in criteria}
    unregister_criterion("spread")
    return {"states": numbers(states), "scores": found, "examples": [states.examples, states.batches]}


def sketched() -> Values:
    """The same with sketches, of many samples for each column; the layers with two calls too."""
    config = RecordConfig(exact_units=2, sketch_columns=24, positions=16, seed=5)
    model, groups = conv_net()
    states = record(model, groups, images(30, batch=6), config, consumed=True)
    found = {"conv": numbers(states)}
    shared, its_groups = mlp()
    X = torch.randn(21, 3, 7, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(21, 3)
    mask[::2, 1:] = 0
    forward = shared.forward
    shared.forward = lambda x, attention_mask: forward(x)  # type: ignore[method-assign]
    batches = [{"x": X[at : at + 5], "attention_mask": mask[at : at + 5]} for at in range(0, 21, 5)]
    found["mlp"] = numbers(record(shared, its_groups, batches, config))
    return {"states": found, "scores": scored(model, groups, states, "distortion")}


def pruned() -> Values:
    """Two rounds with repair and batch norms; one process is without a batch in the first pass of all."""
    model, groups = conv_net(units=16)
    lone = record(model, groups, images(12, batch=12))
    config = PruneConfig(plan={"reduction": 0.4, "rounds": 2})
    result = prune(model, images(90, batch=32), config, evaluate=lambda small: float(world().size))
    return {
        "kept": {name: list(kept) for name, kept in result.plan.kept.items()},
        "metric": [item.metric for item in result.rounds],
        "weights": {name: value.tolist() for name, value in result.model.state_dict().items()},
        "lone": numbers(lone),
        "fidelity": [said_of(item) for item in result.rounds],
    }


def raises() -> Values:
    """A batch that raises on the process that has it; then batches that differ, then sums that are fine."""
    model, groups = conv_net()
    batches = images(30, batch=6)
    batches[1] = (torch.zeros(6, 2, 8, 8), batches[1][1])  # a channel too few: of rank 1
    found = {"shape": error_of(lambda: record(model, groups, batches))}
    other = images(24 if world().rank else 30, batch=6)
    found["fewer"] = error_of(lambda: record(model, groups, other))
    for value in model.parameters():
        value.data += world().rank
    found["weights"] = error_of(lambda: record(model, groups, images(30, batch=6)))
    found["lead"] = error_of(lambda: world().lead("A look", lambda: 1 / (world().size - 1)))
    found["place"] = error_of(lambda: world().meet("There" if world().rank else "Here"))
    return found | {"after": world().total(torch.ones(1)).item()}


def leads() -> Values:
    """One process works for longer than the others would wait for one that is silent."""
    impatient = dist.new_group(backend="gloo", timeout=timedelta(seconds=5))
    here, ranks.BEAT = World(world().rank, world().size, impatient), 0.25
    return {"value": here.lead("A long look", lambda: time.sleep(6) or [world().size, {"found": [1, 2]}])}


def net(*further: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *further, nn.ReLU(), nn.Linear(16, 4))


def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(21, 6, generator=generator), torch.randint(4, (21,), generator=generator)
    return [(X[at : at + 5], y[at : at + 5]) for at in range(0, 21, 5)]  # the last one is of one example


def outcome(model: nn.Module, result: RecoverResult) -> Values:
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    losses = [item.loss for item in result.history[1:]]
    return {"weights": weights, "best": result.best_epoch, "losses": losses, "text": str(result)}


def recovered() -> Values:
    """SGD on a network without batch norm: the gradients are those of one process."""
    model, scores = net(), iter([0.1, 0.3, 0.9, 0.5])
    result = recover(model, rows(), RecoverConfig(epochs=3, lr=0.1), evaluate=lambda _: next(scores))
    return outcome(model, result)


class Tied(nn.Module):
    """Blocks in a list, one of them twice, a weight that two blocks share, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3)]
        blocks[2][0].weight = blocks[0][0].weight
        self.first, self.blocks = nn.Linear(6, 7), nn.ModuleList([*blocks, blocks[1]])
        self.norm, self.last = nn.BatchNorm1d(7), nn.Linear(7, 4, bias=False)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x) * self.scale)


def sharded(fsdp: bool = True) -> Values:
    """FSDP: momentum; AdamW with clipped gradients and a teacher; LoRA; no metric; a look at every epoch."""
    found: Values = {}
    configs = {
        "sgd": RecoverConfig(epochs=3, lr=0.1, fsdp=fsdp),
        "adamw": RecoverConfig(epochs=2, lr=0.01, optimizer="adamw", clip=0.5, distill=0.5, fsdp=fsdp),
        "lora": RecoverConfig(epochs=2, lr=0.1, lora=2, fsdp=fsdp),
    }
    for name, config in configs.items():
        model, scores, seen = Tied().double(), iter([0.1, 0.9, 0.5, 0.3]), list[list[float]]()
        before = {id(item) for item in model.parameters()}

        def look(network: nn.Module, scores: Any = scores, seen: Any = seen) -> float:
            here = [item.to_local() if fsdp else item for item in network.parameters()]
            with torch.inference_mode():
                seen.append([network(rows()[0][0].double()).sum().item(), sum(item.numel() for item in here)])
            return next(scores)

        teacher = Tied().double() if config.distill else None
        if teacher is not None:
            teacher.last.weight.data.neg_()
        data = [(x.double(), y) for x, y in rows() if len(x) > 1]
        evaluate = None if name == "lora" else look
        result = recover(model, data, config, evaluate=evaluate, teacher=teacher)
        found[name] = outcome(model, result) | {"seen": seen}
        assert before == {id(item) for item in model.parameters()}
        assert all(type(item) is nn.Parameter for item in model.parameters()) and type(model) is Tied
    return found


def replicated() -> Values:
    """The same as `sharded` by DistributedDataParallel."""
    return sharded(fsdp=False)


def sharded_went_on() -> Values:
    """FSDP, a tied weight, dropout: ended by an error of the first process alone and gone on with."""
    config, state = RecoverConfig(epochs=3, lr=0.01, optimizer="adamw", fsdp=True), Path(sys.argv[1], "share")
    data = [item for item in rows() if len(item[0]) > 1]
    found: Values = {}
    for name, looks in {"whole": 9, "ended": 2, "on": 9, "again": 9}.items():
        left, model = iter(range(looks)), Tied()
        weights = {key: value.clone() for key, value in model.state_dict().items()}

        def look(network: nn.Module, left: Any = left) -> float:  # the first one's word counts
            found = -network(rows()[0][0]).square().sum().item()
            return -1.0 if dist.get_rank() else found + 0 * next(left)

        def run(model: nn.Module = model, look: Any = look, name: str = name) -> None:
            kept = None if name == "whole" else state
            result = recover(model, data, config, evaluate=look, state=kept, save_every=0)
            found[name] = outcome(model, result)

        found[f"{name} error"] = error_of(run)
        if name == "ended":
            found["as it was"] = all(map(torch.equal, weights.values(), model.state_dict().values()))
    wrong = [(X[:, : 6 - world().rank], y) for X, y in data]
    found["other"] = error_of(lambda: recover(Tied(), wrong, config))

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        if world().rank:
            raise ArithmeticError("in the middle")
        return model(batch[0]).sum()

    # What waits for a share waits half as long as processes wait for each other.
    usual = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    before = usual.options._timeout
    usual.options._timeout = timedelta(seconds=10)
    began = time.monotonic()
    found["loss"] = error_of(lambda: recover(Tied(), data, config, loss=forward))
    found["waited"] = time.monotonic() - began
    usual.options._timeout = before
    began = time.monotonic()
    kept = None if dist.get_rank() else Path(sys.argv[1], "alone")
    found["a state on one"] = error_of(lambda: recover(Tied(), data, config, state=kept))
    scalar, boxes = Tied(), Tied()
    scalar.factor = nn.Parameter(torch.ones(()))
    found["scalar"] = error_of(lambda: recover(scalar, data, config))
    boxes.blocks = nn.ModuleList(nn.ModuleDict({"in": item}) for item in boxes.blocks)
    boxes.forward = lambda x: boxes.last(boxes.blocks[0]["in"](boxes.first(x)))  # type: ignore[method-assign]
    found["boxes"] = error_of(lambda: recover(boxes.to(memory_format=torch.channels_last), data, config))
    broken, weights = Tied(), Tied().state_dict()
    spread, left = (
        World.spread,
        iter([1, 1, 1, 0]),
    )  # once after each epoch, then with the weights of the best

    def failing(here: World, tensors: Any) -> None:
        spread(here, tensors)
        1 / next(left)

    World.spread = failing  # type: ignore[method-assign]
    found["late"] = error_of(lambda: recover(broken, data, config))
    World.spread = spread  # type: ignore[method-assign]
    found["late, as it was"] = all(map(torch.equal, weights.values(), broken.state_dict().values()))
    found["not waited"] = time.monotonic() - began
    return found | {"after": world().total(torch.ones(1)).item()}


def went_on() -> Values:
    """Batch norm, dropout, a shuffling loader, a look that draws; ended by an error, and gone on with."""
    data = [(x, y) for X, Y in rows() for x, y in zip(X, Y, strict=True)]
    config, state = RecoverConfig(epochs=3, lr=0.1), Path(sys.argv[1], "state")
    found: Values = {}
    for name, looks in {"whole": 9, "ended": 2, "on": 9}.items():
        left = iter(range(looks))
        model = net(nn.BatchNorm1d(16), nn.Dropout(0.3))
        loader = DataLoader(data, batch_size=6, shuffle=True)  # type: ignore[arg-type]

        def look(_: nn.Module, left: Any = left) -> float:
            next(left)
            return float(torch.rand(1))

        def run(model: nn.Module = model, loader: Any = loader, look: Any = look, name: str = name) -> None:
            kept = None if name == "whole" else state
            found[name] = outcome(
                model,
                recover(model, loader, config, evaluate=look, lower_is_better=True, state=kept, save_every=0),
            )

        found[f"{name} error"] = error_of(run)
    other = rows()[: 4 + world().rank]
    found["batches"] = error_of(lambda: recover(net(), other, config))
    return found


def killed() -> Values:
    """Rank 1 is killed in the middle of its share."""
    model, groups = conv_net()

    def batches() -> Any:
        for index, batch in enumerate(images(30, batch=6)):
            if index == 3 and world().rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    return {"error": error_of(lambda: record(model, groups, batches()))}


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    folder, rank, size, *parts = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=PATIENCE), int(size), int(rank)
    )
    for part in parts:
        Path(folder, f"{part}-{rank}.json").write_text(json.dumps(globals()[part]()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
