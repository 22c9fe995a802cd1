"""A model on a GPU: the same scores, plans, cuts and fine-tunes as on the CPU, and results that stay there.

Each test runs on a device that is not there (`elsewhere.py`: which tensors meet, not what a GPU computes)
and, where there is one, on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from elsewhere import Elsewhere
from torch import nn
from watching import counted

from cria_prune import (
    CRITERIA,
    PruneConfig,
    PruneResult,
    RecoverConfig,
    ablate,
    discover,
    load,
    prune,
    recover,
    save,
)
from cria_prune import score as score_groups
from cria_prune.base.errors import SignalError
from cria_prune.base.metrics import cross_entropy
from cria_prune.base.modules import device_of
from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.graph.moments import Moments
from cria_prune.recipes.registry import task
from cria_prune.scores import score_once
from cria_prune.spectrum.distortions import distortion, grounded_distortion
from cria_prune.spectrum.importance import Importance
from cria_prune.stages import record_for
from cria_prune.structure.groups import freeze
from networks import OptionA, Plain, randomize

pytestmark = pytest.mark.usefixtures("no_vision_on_the_path")

CLASSES, EXAMPLES = 4, 64


def tolerance(device: str) -> float:
    """Return how far a score may be from that on the CPU: nothing at all on the device that is not there."""
    return 1e-4 if device == "cuda" else 0.0


def vision(examples: int = EXAMPLES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(16, 3, 12, 12, generator=generator),
            torch.randint(0, CLASSES, (16,), generator=generator),
        )
        for _ in range(examples // 16)
    ]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(Plain())


def build(name: str) -> tuple[nn.Module, object]:
    zoo = pytest.importorskip("zoo")
    return zoo.build(name)


def text_batches(example: dict[str, torch.Tensor], count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Return batches of random tokens under the names of an example."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 50, (8, 24), generator=generator) for _ in range(count)]
    return [
        {name: ids if name.endswith("input_ids") else torch.ones_like(ids) for name in example}
        for ids in tokens
    ]


@pytest.mark.parametrize(
    ("criterion", "exact"),
    [*((name, 2048) for name in CRITERIA), ("innovation", 4), ("distortion", 4), ("grounded-distortion", 4)],
)
def test_scores_are_those_of_the_cpu(device: str, criterion: str, exact: int) -> None:
    model, config = (
        network(),
        PruneConfig(
            score=ScoreConfig(criterion=criterion), record=RecordConfig(exact_units=exact, sketch_columns=64)
        ),
    )
    groups = discover(model, vision()[0])
    if criterion == "bn-scale":
        groups = freeze(groups, lambda group: None if group.name == "conv1" else "it has no batch norm")
    found = {}
    for place in ("cpu", device):
        model.to(place)
        states = record_for(CRITERIA[criterion].needs, model, groups, vision(), config)
        found[place] = score_groups(model, groups, states, config.score)
    for name, item in found["cpu"].items():
        other = found[device][name].scores
        assert other.device.type == "cpu"
        apart = float((item.scores - other).abs().max() / item.scores.abs().max())
        assert apart <= tolerance(device), name


@pytest.mark.parametrize("scored", [distortion, grounded_distortion])
def test_all_pairs_of_a_middling_group_are_factored_there(
    device: str, scored: Callable[..., Importance]
) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(100, 300, generator=generator)
    sides = {place: [Moments.from_signals(item.to(place)) for item in (before, before.relu())]
             for place in ("cpu", device)}  # fmt: skip
    with counted("factored") as factored:
        one, other = (scored(*sides[place]) for place in ("cpu", device))
    assert [item.facts["device"].type for item in factored] == ["cpu", torch.device(device).type]
    assert other.scores.device.type == "cpu"
    assert one.diagnosis.solver == other.diagnosis.solver == "cholesky"
    assert float((one.scores - other.scores).abs().max() / one.scores.max()) <= tolerance(device)


def same_as_on_the_cpu(
    model: nn.Module, batches: list[object], config: PruneConfig, device: str
) -> PruneResult:
    """Prune a model on the CPU and on a device; both cut the same, and prove it in the same arithmetic."""
    one = prune(model, batches, config)
    model.to(device)
    other = prune(model, batches, config)
    assert device_of(other.model).type == torch.device(device).type == device_of(model).type
    frozen = [{group.name: group.frozen for group in item.dense} for item in (one, other)]
    assert frozen[0] == frozen[1]
    assert one.report == other.report
    for first, second in zip(one.rounds, other.rounds, strict=True):
        assert (first.verification.dtype, first.verification.twin) == (
            second.verification.dtype,
            second.verification.twin,
        )
        assert second.verification.difference <= second.verification.tolerance
        assert [item.tensor for item in first.repairs] == [item.tensor for item in second.repairs]
        for name, values in first.scores.items():
            assert second.scores[name] == pytest.approx(values, rel=1e-2, abs=tolerance(device) * max(values))
    if tolerance(device) == 0:
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name].cpu()), name
    return other


@pytest.mark.parametrize(
    ("criterion", "residual", "exact"),
    [("innovation", True, 2048), ("innovation", False, 4), ("distortion", True, 4), ("taylor", False, 2048)],
)
def test_prune_gives_what_it_does_on_the_cpu(device: str, criterion: str, residual: bool, exact: int) -> None:
    config = PruneConfig(
        plan={"reduction": 0.4, "rounds": 2, "residual": residual},
        score={"criterion": criterion},
        record={"exact_units": exact, "sketch_columns": 64},
    )
    torch.manual_seed(0)
    model = randomize(nn.Sequential(OptionA(), nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, CLASSES)))
    same_as_on_the_cpu(model, vision(), config, device)


@pytest.mark.parametrize(("name", "residual"), [("llama", True), ("bert", True), ("gpt2", False)])
def test_transformers_are_cut_and_proven_there(device: str, name: str, residual: bool) -> None:
    model, example = build(f"transformers/{name}")
    config = PruneConfig(
        plan={"reduction": 0.2, "rounds": 1, "residual": residual}, score={"criterion": "consumed-distortion"}
    )
    result = same_as_on_the_cpu(model, text_batches(example), config, device)
    assert result.report["reached"] >= 0.2
    twin = "operations" if residual else "weights"
    assert result.rounds[-1].verification.twin == twin


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "auto"}, {"optimizer": "adamw", "lr": 1e-3}, {"distill": 0.5}, {"clip": 1.0}],
    ids=str,
)
def test_recover_trains_there_and_again_the_same(device: str, settings: dict[str, object]) -> None:
    config = RecoverConfig(**{"epochs": 2, "lr": 0.01, **settings})
    teacher = network(1).to(device) if settings.get("distill") else None
    ends = []
    for _ in range(2):
        model = network().to(device)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = recover(model, vision(), config, evaluate=accuracy, teacher=teacher, device=device)
        assert device_of(model).type == torch.device(device).type
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert len(found.history) == 3
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


class Told(torch.Tensor):
    """A loss that says when it is read."""

    events: ClassVar[list[str]] = []

    def __float__(self) -> float:
        Told.events.append("read")
        return super().__float__()


def told(model: nn.Module, batch: Any) -> torch.Tensor:
    Told.events.append("step")
    return cross_entropy(model, batch).as_subclass(Told)


def test_a_loss_is_read_there_when_the_next_step_is_on_its_way_and_each_before_the_epoch_ends(
    device: str,
) -> None:
    Told.events.clear()
    config = RecoverConfig(epochs=2, lr=0.01)

    def look(_model: nn.Module) -> float:
        Told.events.append("end")
        return 0.5

    recover(network().to(device), vision(48), config, loss=told, evaluate=look, device=device)
    epoch = ["step", "step", "read", "step", "read", "read", "end"]
    assert Told.events == ["end", *epoch, *epoch]
    Told.events.clear()
    recover(network(), vision(48), config, loss=told)  # on the CPU there is nothing to wait for
    assert Told.events == ["step", "read"] * 6


def test_a_loss_there_that_is_not_finite_is_told_where_the_next_forward_fails(device: str) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("not a probability")
        return cross_entropy(model, batch) * (torch.inf if len(calls) == 2 else 1.0)

    calls: list[int] = []
    model = network().to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SignalError, match="the loss is inf at step 2 of 4"):
        recover(model, vision(), RecoverConfig(epochs=1, lr=0.01), loss=loss, device=device)
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs of kernels are CUDA's")
@pytest.mark.parametrize("settings", [{}, {"precision": "auto"}], ids=str)
def test_a_compiled_distilled_recovery_is_level_with_the_plain_one_on_cuda(
    settings: dict[str, object],
) -> None:
    histories = []
    for compile in (False, True):
        config = RecoverConfig(epochs=3, lr=0.01, distill=0.5, compile=compile, **settings)
        teacher, model = network(1).to("cuda"), network().to("cuda")
        batches = [*vision(), tuple(part[:7] for part in vision()[0])]  # the last one is shorter
        found = recover(model, batches, config, evaluate=accuracy, teacher=teacher, device="cuda")
        histories.append([row.loss for row in found.history[1:]])
    assert histories[1] == pytest.approx(histories[0], rel=0.05 if settings else 1e-3)


def accuracy(model: nn.Module) -> float:
    device = device_of(model)
    with torch.no_grad():
        return float(
            torch.stack(
                [(model(x.to(device)).argmax(1) == y.to(device)).float().mean() for x, y in vision()]
            ).mean()
        )


def test_a_killed_recovery_goes_on_there_to_the_same_bits(device: str, tmp_path) -> None:
    config = RecoverConfig(epochs=3, lr=0.01)
    whole = network().to(device)
    recover(whole, vision(), config, evaluate=accuracy, device=device)
    looks = iter(range(10))

    def dies(model: nn.Module) -> float:
        if next(looks) == 2:
            raise InterruptedError
        return accuracy(model)

    part = network().to(device)
    with pytest.raises(InterruptedError):
        recover(part, vision(), config, evaluate=dies, device=device, state=tmp_path / "state")
    part = network().to(device)
    recover(part, vision(), config, evaluate=accuracy, device=device, state=tmp_path / "state")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[name]), name


def test_a_checkpoint_from_there_loads_on_the_cpu(device: str, tmp_path) -> None:
    model = network().to(device)
    result = prune(model, vision(), PruneConfig(plan={"reduction": 0.3, "rounds": 1}))
    save(tmp_path / "out", result.model, result.plan)
    again = load(tmp_path / "out", network(3)).model
    assert device_of(again).type == "cpu"
    for name, value in result.model.state_dict().items():
        assert torch.equal(value.cpu(), again.state_dict()[name]), name


def test_scores_once_and_the_ablation_there(device: str) -> None:
    model = network().to(device)
    scored = score_once(model, vision(), PruneConfig())
    result = prune(model, vision(), PruneConfig(plan={"reduction": 0.3, "rounds": 1}), scores=scored)
    assert result.report["reached"] >= 0.3
    groups = discover(model, vision()[0])
    values = {name: item.scores for name, item in scored.importances.items()}
    curves = ablate(model, groups, values, accuracy, (0.2, 0.5), measure="accuracy")
    assert curves is not None


def test_the_device_that_is_not_there_tells_what_a_real_one_would() -> None:
    with Elsewhere():
        here, there = torch.arange(4.0), torch.arange(4.0, device="mps")
        index = torch.tensor([0, 2])
        for wrong in (
            lambda: here + there,
            lambda: here[index.to("mps")],
            lambda: here[there > 1],
            lambda: here.index_select(0, index.to("mps")),
            lambda: there.index_select(0, index),
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        for wrong in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="another device"):
                wrong()
        assert {item.device.type for item in (there[index], there + 1.0, here.type_as(there), there[:2])} == {
            "mps"
        }
        assert there.cpu().device.type == (here + there.sum().cpu()).device.type == "cpu"
        assert there.float().double().device.type == torch.zeros_like(there).device.type == "mps"


def test_images_are_moved_and_mirrored_there_to_the_same_values(device: str) -> None:
    digits = task("digits")
    one, other = (digits.train_batches(3, 200, device=place)(1) for place in ("cpu", device))
    for (x, y), (there, target) in zip(one, other, strict=True):
        assert there.device.type == target.device.type == torch.device(device).type
        assert torch.equal(x, there.cpu()) and torch.equal(y, target.cpu())


def test_global_state_is_as_it_was(device: str, tmp_path: Path) -> None:
    model = network().to(device)
    before = torch.get_rng_state()
    flags = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    there = torch.cuda.get_rng_state() if device == "cuda" else None
    seen = []

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic))
        return cross_entropy(model, batch)

    recover(model, vision(), RecoverConfig(epochs=1, lr=0.01), loss=loss, device=device)
    result = prune(model, vision(), PruneConfig(plan={"reduction": 0.3, "rounds": 1}))
    save(tmp_path / "out", result.model, result.plan)
    assert torch.equal(before, torch.get_rng_state())
    now = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    assert flags == now
    assert set(seen) == {(flags[0], True)}  # cuDNN is used while it trains, deterministically
    assert there is None or torch.equal(there, torch.cuda.get_rng_state())
