"""A network of the user's own on the command line: each command takes it, and its checkpoint again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from cria_prune import RecoverConfig, load, recover
from cria_prune.artifact.checkpoint import read_checkpoint_manifest
from cria_prune.cli.main import app

CODE = """
import itertools, torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 24), nn.Linear(4, 24), nn.Linear(24, 3)
    def forward(self, left, right=None):
        return self.head(torch.relu(self.one(left) + self.two(right)))

def make(): return Pair()
def batch(seed):
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(32, 6, generator=draw), torch.randn(32, 4, generator=draw)
    return left, right, (left[:, 0] + right[:, 0] > 0).long() + (left[:, 1] > 0).long()
def loader(): return (batch(seed) for seed in itertools.count())
def held(): return [batch(1000 + seed) for seed in range(4)]
def accuracy(model, loader):
    right = [(model(a, b).argmax(1) == y).float() for a, b, y in loader]
    return torch.cat(right).mean().item()
def test_loss(model, loader):
    return sum(nn.functional.cross_entropy(model(a, b), y).item() for a, b, y in loader) / len(loader)
def loss(outputs, targets): return nn.functional.cross_entropy(outputs, targets)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's module and trained weights."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_pair.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import my_pair

        torch.manual_seed(0)
        model = my_pair.make()
        rows = [{"left": a, "right": b, "labels": y} for a, b, y in map(my_pair.batch, range(32))]
        recover(model, rows, RecoverConfig(epochs=2, lr=0.1))
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def cria(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def answer(*words: str) -> dict:
    result = cria(*words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def error(*words: str) -> str:
    result = cria(*words)
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


DENSE = ["--weights", "model.safetensors"]
LOADER = ["--loader", "my_pair:loader", "--inputs", "left,right", "--examples", "256"]
HELD = ["--test-loader", "my_pair:held"]
MEASURED = ["--evaluate", "my_pair:accuracy", *HELD]
AGAIN = ["--factory", "my_pair:make"]
PLAIN = ["--repair", "none"]


def test_prune_recover_eval_and_prune_again(folder: Path) -> None:
    result = cria("prune", "my_pair:make", *DENSE, *LOADER, *MEASURED, "--output", "small")
    assert result.exit_code == 0, result.output
    small = json.loads(result.stdout.splitlines()[-1])
    assert (
        "my_pair:accuracy on my_pair:held" in result.stdout and "calibration: 256 examples" in result.stderr
    )
    assert small["dense"] > 0.7 and small["reloaded"] == "bit-equal" and small["reduction"] >= 0.5
    assert small["masked_equals_pruned"] < 1e-10 and small["fidelity"]["repaired"]["examples"] == 32
    command = next(line for line in result.stdout.splitlines() if line.startswith("go on with: cria"))
    words = shlex.split(command.partition("cria ")[2])
    assert words == [
        "recover",
        "small",
        *AGAIN,
        "--loader",
        "my_pair:loader",
        "--evaluate",
        "my_pair:accuracy",
    ]

    tuned = answer(*words, *LOADER[2:], *HELD, "--loss", "my_pair:loss", "--epochs", "2", "--output", "tuned",
                   "--distill", "0.5", *DENSE)  # fmt: skip
    assert tuned["recovered"] >= tuned["pruned"] == small["pruned"] and tuned["dense"] == small["dense"]
    assert "--weights" in error(*words, *LOADER[2:], *HELD, "--distill", "0.5", "--output", "other")

    found = answer("eval", "tuned", *AGAIN, *LOADER, *MEASURED, *DENSE, "--against", "my_pair:make")
    assert found["accuracy"] == tuned["recovered"] and found["fidelity"]["examples"] == 128

    words = [*AGAIN, *LOADER, *MEASURED, *PLAIN, "--reduction", "0.3", "--output", "smaller"]
    again = answer("prune", "tuned", *words)
    assert (
        again["parameters"] < small["parameters"] and again["parameters_dense"] == small["parameters_dense"]
    )
    import my_pair

    saved = load("smaller", my_pair.make())
    assert sum(item.numel() for item in saved.model.parameters()) == again["parameters"]
    done = cria("prune", "tuned", *words, "--resume")
    assert "already in smaller" in done.stdout
    assert str(folder) not in json.dumps(read_checkpoint_manifest(Path("small")))


def test_the_other_commands_take_it() -> None:
    criterion = ["--criterion", "taylor", "--loss", "my_pair:loss"]
    assert answer("score", "my_pair:make", *DENSE, *LOADER, *criterion)["units"] == 24
    assert answer("plan", "my_pair:make", *LOADER, "--dry-run")["reachable"] > 0.5
    sizes = answer(
        "sweep", "my_pair:make", *DENSE, *LOADER, *MEASURED, "--reduction", "0.3", "--output", "sizes"
    )
    assert sizes["family"][0]["pruned"] > 0.5 and Path("sizes/reduced-30/model.safetensors").is_file()
    measure = ["--evaluate", "my_pair:test_loss", *HELD]
    words = ["ablate", "my_pair:make", *DENSE, *LOADER, *measure, "--shares", "0.5", "--random-seeds", "1"]
    shown = answer(*words, "--output", "shares")
    assert shown["metric"] == "test_loss (lower is better)" and shown["higher_is_better"] is False
    cells = answer("bench", "my_pair:make", *DENSE, *LOADER[:4], *MEASURED, "--criterion", "l2", "-q",
                   "--reduction", "0.5", "--repair", "none", "--output", "cells")  # fmt: skip
    assert cells["cells"] == cells["measured"] == 1
    without = ["recover", "shares-none", *AGAIN, *LOADER]
    assert "error: " in error(*without)


def test_inspect_ends_with_the_command_that_prunes_it() -> None:
    result = cria("inspect", "my_pair:make", *LOADER[:4])
    assert result.exit_code == 0 and "left (32, 6), right (32, 4)" in result.stdout
    line = result.stdout.splitlines()[-2]
    assert line.startswith(
        "prune it with: cria prune my_pair:make --weights FILE.safetensors --loader my_pair:loader"
    )
    given = {"FILE.safetensors": "model.safetensors", "my_pair:METRIC": "my_pair:accuracy"}
    words = [given.get(word, word) for word in shlex.split(line.partition("cria ")[2])]
    assert answer(*words, *LOADER[2:], "--output", "as-told", *PLAIN)["pruned"] > 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "digits", "--loader", "my_pair:loader"], "it is no network of your own. Leave them out"),
        (["prune", "my_pair:make", "--calibration", "x.txt"], "Give its batches with --loader"),
        (["prune", "my_pair:make"], "there is no loader. Give --loader package.module:function"),
        (["prune", "my_pair:make", "--loader", "my_pair:loader"], "say inputs=2"),
        (["eval", "my_pair:make", "--loader", "my_pair:loader"], "no --evaluate was given. Give --evaluate"),
        (["bench", "my_pair:make", "--loader", "my_pair:loader"], "no --evaluate was given. Give --evaluate"),
        (["bench", "digits", "--loader", "my_pair:loader"], "it is no network of your own"),
        (["prune", "my_pair:make", "--factory", "my_pair:make"], "Give a checkpoint and its factory"),
        (["prune", "my_pair:make", "--weights", "model.pt"], "it is a pickle"),
        (["prune", "my_pair:make", "--better", "more"], "Known directions: higher, lower"),
        (["prune", "my_pairs:make"], "there is no module 'my_pairs'"),
        (["prune", "my_pair:make", "--offload", "--loader", "my_pair:loader"], "Leave out --loader"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)  # fmt: skip
def test_what_does_not_fit_is_one_line(words: list[str], said: str) -> None:
    assert said in error(*words)


def test_a_checkpoint_runs_no_code_that_it_names() -> None:
    words = [*DENSE, *LOADER, *PLAIN, "--output", "unmeasured", "--reduction", "0.3"]
    result = cria("prune", "my_pair:make", *words)
    assert (
        result.exit_code == 0 and "the pruned model is not measured: no --evaluate was given" in result.stderr
    )
    said = error("eval", "unmeasured")
    assert said.endswith(
        "a file names no code to run. Name what makes the dense network with --factory my_pair:make"
    )
    tuned = answer("recover", "unmeasured", *AGAIN, *LOADER, "--epochs", "1", "--output", "last")
    assert tuned["best_epoch"] == 1 and "recovered" not in tuned
