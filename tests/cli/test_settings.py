"""What the options that control a cut come to, beside what a recipe, a preset and a file say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cria_prune import PlanConfig
from cria_prune.base.errors import ConfigError
from cria_prune.cli.main import app
from cria_prune.cli.settings import Prune, prune_config

RECIPE = {"plan": {"reduction": 0.6, "of": "non-embedding", "rounds": 2}}


def settled(file: Path | None = None, **plan: Any) -> dict[str, Any]:
    """The settings of a plan that options give, after those of a recipe."""
    request = Prune(target="x", plan=PlanConfig.model_construct(**plan), config=file)
    return prune_config(request, RECIPE).plan.model_dump(exclude_defaults=True)


def test_one_target_takes_the_place_of_another(tmp_path: Path) -> None:
    assert settled() == {"reduction": 0.6, "of": "non-embedding", "rounds": 2}
    assert settled(to_parameters=5e6) == {"to_parameters": 5e6, "rounds": 2}
    assert settled(to_macs=1e9) == {"to_macs": 1e9, "of": "macs", "rounds": 2}
    assert settled(speedup=2.0) == {"of": "latency", "rounds": 2}
    keep = {"layers.*": 64}
    assert settled(keep=keep) == {"keep": keep, "reduction": 0.0, "of": "non-embedding", "rounds": 2}
    assert settled(keep=keep, reduction=0.3)["reduction"] == 0.3
    assert settled(keep=keep, speedup=2.0) == {"keep": keep, "of": "latency", "rounds": 2}
    (tmp_path / "c.yaml").write_text("plan: {reduction: 0.2, share: {stem: 0.5}, ignore: [head]}\n")
    found = settled(tmp_path / "c.yaml", keep=keep)
    assert found["reduction"] == 0.2 and found["share"] == {"stem": 0.5} and found["ignore"] == ("head",)
    assert "reduction" not in settled(tmp_path / "c.yaml", to_parameters=5e6)
    (tmp_path / "c.yaml").write_text("plan: {to_macs: 1.5G}\n")
    assert settled(tmp_path / "c.yaml", reduction=0.2)["reduction"] == 0.2
    with pytest.raises(ConfigError, match="a speed-up and parameters to be left were given"):
        settled(speedup=2.0, to_parameters=5e6)


NET = """
import torch
from torch import nn

def make():
    sizes = [6, 32, 64, 128]
    layers = [item for one, two in zip(sizes, sizes[1:]) for item in (nn.Linear(one, two), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 3))
def loader():
    return [torch.randn(64, 6)]
"""


def plan(*words: str) -> Result:
    return CliRunner().invoke(
        app, ["plan", "my_layers:make", "--loader", "my_layers:loader", "--dry-run", *words]
    )


def test_options_are_read_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_layers.py").write_text(NET)
    result = plan("--keep", "0=16", "--share", "4=0.5", "--share", "2=0.3", "--round-to", "8")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["asked"] == said["reachable"] and said["groups"] == 3
    # By hand: 16 of 32 units, 48 of 64 (the multiple nearest to 44.8), 64 of 128.
    assert said["parameters_least"] == 16 * 7 + 48 * 17 + 64 * 49 + 3 * 65
    said = json.loads(plan("--to-parameters", "8k", "--protect", "ends").stdout.splitlines()[-1])
    assert said["asked"] == 1 - 8000 / said["parameters_dense"] and said["groups"] == 1
    for words, text in (
        (["--keep", "conv1"], "must be PATTERN=NUMBER, like 'layers.*.mlp=0.3', and not 'conv1'"),
        (["--to-macs", "few"], "to_macs: must be a number, like 5M, 1.2G or 300k"),
        (
            ["--reduction", "0.5", "--to-macs", "1M"],
            "MACs to be left and a share were given. Give one of the",
        ),
        (["--protect", "edges"], "protect: Input should be 'none', 'ends', 'first' or 'last'"),
        (["--ignore", "9"], "there is none; there are 0, 2, 4, 6"),
    ):
        result = plan(*words)
        assert result.exit_code == 2 and text in result.stderr, result.output
