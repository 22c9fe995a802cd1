"""`cria plan`: what it predicts, what it plans, and that it changes and trains nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result
from watching import never

from cria_prune import PruneConfig, apply, stages
from cria_prune.cli import plans
from cria_prune.cli.main import app
from cria_prune.planning.budget import count_parameters
from cria_prune.planning.plan import Plan
from cria_prune.tasks.images import ImageTask
from cria_prune.tasks.models import build

FAST = ["--examples", "64", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    torch.manual_seed(0)
    model = build("digits").eval()
    monkeypatch.setattr(ImageTask, "dense", lambda self, seed=0, progress=None: copy.deepcopy(model))
    yield model


def cria(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


def answer(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_a_dry_run_trains_and_scores_nothing() -> None:
    with never("dense", "train", "record", "score"):
        result = cria("digits", "--dry-run", *FAST, "--rounds", "3", "--output", "said.json")
    said = answer(result)
    assert said["dry_run"] is True and said["recipe"] == "digits" and said["asked"] == 0.5
    assert (said["passes"], said["recording_passes"], said["repair_passes"]) == (7, 3, 3)
    assert said["data"] == {"examples": 64, "batches": 1, "bytes": 64 * (64 * 4 + 8)}
    assert 1 - said["parameters_least"] / said["parameters_dense"] == pytest.approx(said["reachable"])
    memory = said["memory"]
    assert memory["peak"] == memory["model"] + max(
        memory[name]["peak"] for name in ("record", "score", "repair")
    )
    assert memory["record"]["peak"] == sum(memory["record"]["parts"].values())
    for words in ("at most", "passes over 64 examples", "record: at most", "the largest group is hidden"):
        assert words in result.stdout
    kept = json.loads(Path("said.json").read_text())
    assert kept["memory"] == memory and kept["command"][:3] == ["cria", "plan", "digits"]


def test_gradients_repair_and_what_does_not_fit_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "available_memory", lambda device: 1000)
    result = cria("digits", "--dry-run", *FAST, "--criterion", "fisher", "--rounds", "1", "--no-batch-norm")
    said = answer(result)
    assert (said["passes"], said["gradients"]) == (2, "example")
    assert "backward pass for the gradients of each example" in result.stdout
    assert "warning: " in result.stdout and "there are 1000 B" in result.stdout
    plain = answer(cria("digits", "--dry-run", *FAST, "--criterion", "l1", "--repair", "none", "--quiet"))
    assert "record" not in plain["memory"] and plain["recording_passes"] == 0


def test_beyond_reach_is_refused_before_the_data_are_read() -> None:
    for words in (["--dry-run"], []):
        with never("calibration"):
            result = cria("digits", *words, *FAST, "--reduction", "0.99")
        assert result.exit_code == 2 and "at most 88.86" in result.stderr


def test_a_plan_is_kept_and_cuts_the_model(untrained: torch.nn.Module) -> None:
    before = copy.deepcopy(untrained.state_dict())
    result = cria("digits", *FAST, "--reduction", "0.4", "--output", "plan.json")
    said = answer(result)
    assert said["dry_run"] is False and said["rounds"] == 1 and said["asked"] == 0.4 <= said["reached"]
    assert "removed 4" in result.stdout and "asked 40.00%" in result.stdout
    assert set(said["seconds"]) >= {"record", "score", "plan"}
    made = Plan.from_json(Path("plan.json").read_text())
    smaller = apply(untrained, made)
    assert sum(item.numel() for item in smaller.parameters()) == said["parameters"] < said["parameters_dense"]
    assert all(torch.equal(before[name], tensor) for name, tensor in untrained.state_dict().items())
    refused = cria("digits", *FAST, "--output", "plan.json")
    assert refused.exit_code == 2 and "it exists" in refused.stderr


def test_a_round_is_the_first_of_a_pruning_of_one_round(untrained: torch.nn.Module) -> None:
    from cria_prune import prune
    from cria_prune.recipes.registry import task

    digits = task("digits")
    batches = digits.calibration(64, 0)
    config = PruneConfig(plan={"rounds": 1}, repair="none", batch_norm=False)
    made = plans.one_round(stages.prepare(untrained, batches, config, example=digits.example), {})
    result = prune(untrained, batches, config)
    assert made == result.plan
    assert count_parameters(result.groups) == made.report["parameters"]
