"""The command in processes that were launched together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cria_prune import discover, save
from cria_prune.artifact.checkpoint import load
from cria_prune.cli import launch
from cria_prune.cli.main import app
from cria_prune.cli.output import Output
from cria_prune.planning.plan import identity_plan
from cria_prune.recipes.registry import task
from cria_prune.tasks.models import build


def launched(rank: int, size: int) -> dict[str, str]:
    """What torchrun puts into the environment of a process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_the_command_in_two_processes_prunes_as_in_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, digits = build("digits").eval(), task("digits")
    plan = identity_plan(discover(model, digits.example))
    results = {"recipe": "digits", "options": {}, "seed": 0}
    save(tmp_path / "dense", model, plan, architecture="digits", results=results)
    command = ["prune", str(tmp_path / "dense"), "--rounds", "1", "--examples", "300", "--device", "cpu"]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, **launched(0, 2), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cria_prune", *command, "--output", str(tmp_path / "two")],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1] == ("", "")  # the first alone says anything
    assert json.loads(said[0][0].splitlines()[-1])["output"] == str(tmp_path / "two")
    alone = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.plan.kept == two.plan.kept and len(one.plan.kept) > 2
    assert (tmp_path / "two" / "report.html").is_file()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_command_of_one_process_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in launched(1, 2).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["bench", "digits"])
    assert result.exit_code == 2
    assert "error on rank 1: This command: 2 processes were launched for it. Start it alone" in result.output
    out = Output()
    out.say("said")
    out.answer({"said": 1})
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("MASTER_PORT")  # WORLD_SIZE alone is also set by other tools
    assert launch.size() == 1
    Output().answer({"said": 1})
    assert capsys.readouterr().out == '{"said": 1}\n'


def test_a_wrong_timeout_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**launched(0, 2), "CRIA_TIMEOUT": "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), launch.launched():
        pass
    assert "The environment's CRIA_TIMEOUT: found 'soon'. Give seconds" in capsys.readouterr().err
