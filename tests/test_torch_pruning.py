"""Cria's importance under the pruners of the installed Torch-Pruning."""

from __future__ import annotations

import copy
import re
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from watching import counted

import networks
from cria_prune.base.errors import CriterionError, PackageError, StructureError
from cria_prune.config import PruneConfig
from cria_prune.planning.plan import make_plan
from cria_prune.stages import prepare, rank
from cria_prune.surgery.removal import apply
from cria_prune.tasks.models import build
from cria_prune.torch_pruning import SpectralImportance

tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (pip install torch-pruning)")

RESIDUAL = PruneConfig(plan={"residual": True})


def pruner(net: nn.Module, example: Tensor, importance: Any, kind: Any = None, **options: Any) -> Any:
    """Return a pruner; its default arguments are dictionaries that one run leaves full for the next."""
    fresh: dict[str, Any] = {
        key: {} for key in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")
    }
    return (kind or tp.pruner.BasePruner)(net, example, importance=importance, **{**fresh, **options})


def removed(made: Any) -> dict[str, list[int]]:
    """Do one step and return layer -> root channels that left."""
    names = {module: name for name, module in made.model.named_modules()}
    found = {}
    for group in made.step(interactive=True):
        found[names[group[0].dep.target.module]] = sorted(group[0].idxs)
        group.prune()
    return found


def mlp() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5))
    return net.eval(), [torch.randn(64, 12) for _ in range(3)]


def resnet() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(4)
    net = build("cifar10-resnet20")
    networks.randomize(net)
    return net.eval(), [torch.randn(8, 3, 16, 16) for _ in range(2)]


class Shortcut(nn.Module):
    """A residual block with a projection, a flatten and a linear layer: Torch-Pruning follows all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1)
        self.short = nn.Conv2d(8, 12, 1)
        self.fc, self.out = nn.Linear(12 * 4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        x = functional.relu(self.b(functional.relu(self.a(x))) + self.short(x))
        return self.out(functional.relu(self.fc(functional.adaptive_avg_pool2d(x, 2).flatten(1))))


def lowest(net: nn.Module, batches: list[Tensor], config: PruneConfig, ratio: float) -> dict[str, list[int]]:
    """Return what a uniform cut has to remove, from scores computed apart from the importance."""
    prepared = prepare(net, batches, config)
    groups, scores = prepared.groups, rank(prepared).importances
    found = {}
    for group in groups.prunable:
        gone = group.size - int(group.size * (1 - ratio))
        ranked = sorted(range(group.size), key=lambda unit: float(scores[group.name].scores[unit]))
        found[group.name] = sorted(ranked[:gone])
    return found


@pytest.mark.parametrize("kind", ["BasePruner", "MagnitudePruner"])
@pytest.mark.parametrize(("make", "criterion"), [(mlp, "distortion-weighted"), (resnet, "innovation")])
def test_the_lowest_units_leave_and_the_network_is_that_of_our_surgery(make, criterion, kind) -> None:
    net, batches = make()
    config = PruneConfig(score={"criterion": criterion})
    expected = lowest(net, batches, config, 0.5)
    groups = prepare(net, batches, config).groups
    kept = {name: sorted(set(range(groups[name].size)) - set(gone)) for name, gone in expected.items()}
    smaller = apply(net, make_plan(groups, kept))
    importance = SpectralImportance(net, batches, criterion)
    found = removed(pruner(net, batches[0][:2], importance, getattr(tp.pruner, kind), pruning_ratio=0.5))
    assert found == expected and found
    assert {name: item.shape for name, item in net.state_dict().items()} == {
        name: item.shape for name, item in smaller.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(net.eval()(batches[0]), smaller(batches[0]))
    assert isinstance(importance, tp.importance.Importance)


def test_residual_widths_and_flattened_channels_match_where_torch_pruning_follows_them() -> None:
    torch.manual_seed(5)
    net, batches = networks.randomize(Shortcut()), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    expected = lowest(net, batches, RESIDUAL, 0.25)
    importance = SpectralImportance(net, batches, config=RESIDUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = removed(pruner(net, batches[0][:2], importance, pruning_ratio=0.25))
    assert sorted(found.values()) == sorted(expected.values()) and len(found) == 4
    assert importance.left_alone == {"out": "is part of the model's output"}
    assert net(batches[0]).shape == (8, 4)


def test_two_steps_score_twice_and_the_network_runs() -> None:
    net, batches = resnet()
    made = pruner(net, batches[0][:2], SpectralImportance(net, batches), pruning_ratio=0.5, iterative_steps=2)
    for step, left in ((1, 0.75), (2, 0.5)):
        with counted("scored") as seen:
            found = removed(made)
        assert len(seen) == 1 and len(found) == 9, step
        for name, gone in found.items():
            scores = seen[0].facts["scores"][name].scores.tolist()
            stays = set(range(len(scores))) - set(gone)  # dead units are level, and any of them may go first
            assert max(scores[unit] for unit in gone) <= min(scores[unit] for unit in stays)
            assert net.get_submodule(name).weight.shape[0] == len(scores) - len(gone)
        assert net.get_submodule("layer3.0.conv1").weight.shape[0] == 64 * left
    assert net(batches[0]).shape == (8, 10) and net(batches[0]).isfinite().all()


def test_a_training_step_between_is_a_new_network() -> None:
    net, batches = mlp()
    importance = SpectralImportance(net, batches, "l2")
    graph = tp.DependencyGraph().build_dependency(net, batches[0][:2])
    group = graph.get_pruning_group(net[0], tp.prune_linear_out_channels, list(range(40)))
    before = importance(group)
    assert importance.scores is importance.scores and torch.equal(importance(group), before)
    with torch.no_grad():
        net[0].weight[7] *= 100
    after = importance(group)
    assert int(after.argmax()) == 7 and not torch.equal(before, after)
    norms = net[0].weight.detach().double().norm(dim=1)
    assert torch.allclose(after, norms / norms.mean())


def test_global_pruning_ranks_all_groups_on_one_scale() -> None:
    net, batches = mlp()
    criterion = "distortion-weighted"  # by the default one the groups happen to lose the same share here
    scores = rank(prepare(net, batches, PruneConfig(score={"criterion": criterion}))).importances
    relative = {name: item.scores / item.scores.mean() for name, item in scores.items()}
    ranked = sorted(
        (float(value), name, n) for name, item in relative.items() for n, value in enumerate(item)
    )
    importance = SpectralImportance(net, batches, criterion)
    found = removed(pruner(net, batches[0][:2], importance, pruning_ratio=0.5, global_pruning=True))
    gone = {(name, channel) for name, channels in found.items() for channel in channels}
    assert gone == {(name, number) for _, name, number in ranked[:32]}
    assert {len(channels) for channels in found.values()} != {20, 12}
    assert net(batches[0]).shape == (64, 5)


def test_channels_of_a_grouped_convolution_leave_alike() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).eval()
    batches = [torch.randn(16, 3, 4, 4) for _ in range(2)]
    expected = lowest(net, batches, PruneConfig(), 0.5)
    importance = SpectralImportance(net, batches)
    graph = tp.DependencyGraph().build_dependency(net, batches[0][:2])
    whole, part = (
        importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, channels))
        for channels in (list(range(8)), [5])
    )
    assert torch.equal(whole[:4], whole[4:]) and torch.equal(part, whole[5:6])  # 1 and 5 are one unit
    found = removed(pruner(net, batches[0][:2], importance, pruning_ratio=0.5))
    assert found == {name: sorted([*gone, *(unit + 4 for unit in gone)]) for name, gone in expected.items()}
    assert len(found) == 2 and net(batches[0]).shape == (16, 3)


def test_what_cria_does_not_prune_is_left_alone_with_its_reason() -> None:
    net, batches = resnet()
    importance = SpectralImportance(net, batches)
    pruner(net, batches[0][:2], importance, pruning_ratio=0.5).step()
    assert importance.left_alone == {
        "conv1": "residual width is pruned only when asked for (residual=True)",
        "linear": "is part of the model's output",
    }
    assert net.conv1.out_channels == 16 and net.linear.in_features == 64
    net, batches = resnet()
    strict = SpectralImportance(net, batches, strict=True)
    with pytest.raises(StructureError, match=r"group of 'linear': is part of .* ignored_layers"):
        pruner(net, batches[0][:2], strict, pruning_ratio=0.5).step()
    assert net.layer1[0].conv1.out_channels == 16


def test_a_cut_that_is_not_ours_is_left_alone_with_a_warning() -> None:
    """Torch-Pruning overlooks that the padded shortcut shifts the channels."""
    net, batches = resnet()
    importance = SpectralImportance(net, batches, "l2", config=RESIDUAL)
    made = pruner(net, batches[0][:2], importance, pruning_ratio=0.5)
    with pytest.warns(
        UserWarning, match="'conv1' is left alone: Torch-Pruning cuts something else than unit 0"
    ):
        made.step()
    assert "they differ in layer2.0.conv2.weight" in importance.left_alone["conv1"]
    assert net(batches[0]).shape == (8, 10)


def test_a_group_of_some_channels_gets_their_scores() -> None:
    net, batches = mlp()
    importance = SpectralImportance(net, batches, "innovation")
    graph = tp.DependencyGraph().build_dependency(net, batches[0][:2])
    whole = importance(graph.get_pruning_group(net[0], tp.prune_linear_out_channels, list(range(40))))
    some = importance(graph.get_pruning_group(net[0], tp.prune_linear_out_channels, [9, 2]))
    assert some.shape == (2,) and torch.equal(some, whole[[9, 2]])
    read = importance(graph.get_pruning_group(net[2], tp.prune_linear_in_channels, list(range(40))))
    assert torch.equal(read, whole)


def test_bad_input_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = mlp()
    with pytest.raises(CriterionError, match="Known criteria: random"):
        SpectralImportance(net, batches, "nope")
    other = copy.deepcopy(net)
    with pytest.raises(StructureError, match="the same model"):
        pruner(other, batches[0][:2], SpectralImportance(net, batches, "l2"), pruning_ratio=0.5).step()
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(PackageError, match=r"not installed.*pip install 'cria-prune\[torch-pruning\]'"):
        SpectralImportance(net, batches)


def test_the_model_is_left_as_it_was() -> None:
    net, batches = mlp()
    net.train()
    before = copy.deepcopy(net.state_dict())
    graph = tp.DependencyGraph().build_dependency(net, batches[0][:2])
    net.train()
    SpectralImportance(net, iter(batches), "taylor", loss=lambda model, batch: model(batch).square().mean())(
        graph.get_pruning_group(net[0], tp.prune_linear_out_channels, list(range(40)))
    )
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(module.training for module in net.modules())
    assert not net[0]._forward_hooks and net[0].weight.grad is None


def test_the_examples_run() -> None:
    text = SpectralImportance.__doc__ or ""
    guide = (Path(__file__).parents[1] / "docs/guides/torch-pruning.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "tp." in block]
    assert len(blocks) == 1
    for code in (textwrap.dedent(text.split("Example::\n")[1]), blocks[0]):
        exec(compile(code, "example", "exec"), {})
