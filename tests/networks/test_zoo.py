"""Real architectures, small: what discover calls prunable can go, at any share, and the rest still trains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coverage
import peer
import staged
import zoo
from coverage_cell import backward, moved, random_share, tied_layers
from cria_prune import UnitGroups, apply, discover, verify
from cria_prune.planning.plan import make_plan

NETWORKS = [
    *["torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x1_0"],
    *["timm/vit_tiny_patch16_224", "timm/convnext_atto", "timm/mobilevit_xxs", "transformers/bert"],
    *["transformers/vit", "transformers/gpt2", "transformers/llama", "transformers/phi3"],
    *["transformers/t5", "transformers/whisper"],
]


pytestmark = pytest.mark.usefixtures("no_vision_on_the_path")


def uneven(groups: UnitGroups) -> dict[str, np.ndarray]:
    """Keep of every group a number of units of its own, from one to all."""
    generator = np.random.default_rng(1)
    return {
        group.name: generator.permutation(group.size)[: generator.integers(group.least, group.size + 1)]
        for group in groups.prunable
    }


CUTS: list[Callable[[UnitGroups], dict[str, np.ndarray]]] = [
    lambda groups: random_share(groups, 0.5, 0),
    uneven,
]


def built(name: str) -> tuple[nn.Module, zoo.Example]:
    try:
        return zoo.build(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_prunable_group_can_be_cut(name: str) -> None:
    model, example = built(name)
    groups = discover(model, example)
    assert groups.prunable
    for cut in CUTS:
        plan = make_plan(groups, cut(groups))
        smaller = apply(model, plan)
        result = verify(model, plan, smaller, example)
        assert result.dtype == "float64" and result.difference <= 1e-10
        assert moved(model, smaller, example) > 1e-3
        backward(smaller, example)


def test_the_peer_ties_the_same_layers() -> None:
    model, example = built("torchvision/mobilenet_v3_small")
    other = peer.Peer("torchvision/mobilenet_v3_small")
    try:
        other.build()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    found = other.trace()
    assert found["ignored"] == ["classifier.3"]
    assert found["tied"] == tied_layers(model, discover(model, example))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.Conv2d(6, 4, 1, groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 1),
    ],
)
def test_the_peers_mask_is_zero_channels(layer: nn.Module) -> None:
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, 6, 1, 1)
    inputs, gone = torch.randn(shape), [1, 3]
    with torch.no_grad():
        zeros = inputs.clone()
        zeros[:, gone] = 0
        expected = layer(zeros)
        peer.deafen(layer, gone)
        assert torch.allclose(layer(inputs), expected)
        expected[:, gone] = 0
        peer.silence(layer, gone)
        assert torch.allclose(layer(inputs), expected)


def test_a_build_is_repeatable_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    (first, example), (second, other) = built("torchvision/squeezenet1_0"), built("torchvision/squeezenet1_0")
    assert torch.equal(state, torch.get_rng_state())
    assert (
        isinstance(example, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(example, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(module.training for module in first.modules())


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    zoo.load.cache_clear()
    monkeypatch.setattr(zoo, "import_module", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"timm is not installed. Install it: pip install --no-deps"
    ):
        zoo.build("timm/resnet18d")


def test_the_zoo_imports_no_library_before_it_builds() -> None:
    code = "import sys, zoo; sys.exit(bool({'torchvision', 'timm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(zoo.__file__).parent).returncode == 0


def test_an_unknown_network_is_refused() -> None:
    assert coverage.chosen(["timm", "transformers/bert"]) == [*zoo.names("timm"), "transformers/bert"]
    with pytest.raises(SystemExit, match="named nothing-like-it"):
        coverage.chosen(["nothing-like-it"])


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("time.sleep(10**6)", "no answer within {limit} s"),
        ("os._exit(7)", "the process ended with code 7"),
        ("raise ValueError('at 0x7f in /a/b/c.py')", "ValueError: at  in c.py"),
    ],
)
def test_a_measurement_keeps_what_it_had_when_it_ends_badly(tmp_path: Path, body: str, end: str) -> None:
    script = tmp_path / "child.py"
    place = str(Path(staged.__file__).parent)
    lines = ["import os, sys, time", f"sys.path.insert(0, {place!r})", "from staged import stages"]
    lines += ["def bad():", f"    {body}", "stages([('good', lambda: {'found': 1}), ('bad', bad)])"]
    script.write_text("\n".join(lines))
    for limit in (3, 30, 300):  # a busy machine may not come to the bad stage in time
        found = staged.collect(str(script), [], limit)
        expected = {"error": end.format(limit=limit)}
        if found.get("bad") == expected:
            break
    assert found["good"]["found"] == 1 and found["bad"] == expected
