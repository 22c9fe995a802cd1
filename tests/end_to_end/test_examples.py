"""The scripts in examples/ run, and end with what they promise."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import own_commands
import own_network
import pytest
from typer.testing import CliRunner

import zoo
from cria_prune.cli.main import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def share(text: str, line: str) -> float:
    """Return the number that follows a word at the beginning of a line."""
    found = re.search(rf"^{line} +([\d.]+)", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_own_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_network.main(str(here / "checkpoint"))
    said = capsys.readouterr().out
    assert "reloaded: equal" in said
    assert share(said, "recovered") > 70, "chance is 25 %"


def test_own_network_takes_a_network_from_elsewhere(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "mine.py").write_text(
        "import own_network\n\n\ndef small():\n"
        "    batches = own_network.make_batches(2, 0)\n"
        "    return own_network.Net(), batches, batches, batches\n"
    )
    monkeypatch.syspath_prepend(here)
    own_network.main("checkpoint", "mine:small", 0.3)
    said = capsys.readouterr().out
    assert "asked 30.0%" in said and "reloaded: equal" in said


def test_own_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of its docstring, as they stand there."""
    own_commands.main()
    assert "accuracy" in capsys.readouterr().out
    text = str(own_commands.__doc__).replace("\\\n", " ")
    commands = [
        shlex.split(line)[1:] for line in map(str.strip, text.splitlines()) if line.startswith("cria ")
    ]
    assert [words[0] for words in commands] == ["inspect", "prune", "recover", "eval"]
    said = [CliRunner().invoke(app, words) for words in commands]
    assert [item.exit_code for item in said] == [0] * 4, said[-1].output
    assert "prune it with: cria prune own_commands:make" in said[0].stdout
    found = json.loads(said[3].stdout.splitlines()[-1])
    assert found["accuracy"] > 0.7 and found["parameters"] < 0.5 * 14_340, "chance is 25 %"


def test_timm_vit(here: Path, capsys: pytest.CaptureFixture[str], no_vision_on_the_path: None) -> None:
    zoo.load("timm")
    import timm_vit

    timm_vit.main(output="vit")
    said = capsys.readouterr().out
    assert re.search(r"^blocks\.0\.attn\.qkv +head +3", said, re.MULTILINE), said
    assert "reloaded: equal" in said and (here / "vit" / "model.safetensors").exists()


def test_hugging_face_classifier(
    here: Path, capsys: pytest.CaptureFixture[str], in_this_process: None
) -> None:
    import hugging_face_classifier
    import made_up

    hugging_face_classifier.main(output="small")
    said = capsys.readouterr().out
    assert share(said, "dense") > 95 and share(said, "recovered") > 90
    assert share(said, "reloaded") == share(said, "recovered")
    rows = here / "rows.tsv"
    rows.write_text("".join(f"{text}\t{label}\n" for text, label in made_up.rows(96)))
    hugging_face_classifier.main("small", "rows.tsv", 0.1, "smaller")
    assert "asked 10.0% of non-embedding" in capsys.readouterr().out, "its own result is a folder, too"


def test_small_llama(here: Path, capsys: pytest.CaptureFixture[str], in_this_process: None) -> None:
    import small_llama

    small_llama.main(output="small")
    said = capsys.readouterr().out
    assert share(said, "dense") < 8, "of 64 tokens, one in five at random"
    assert share(said, "recovered") < 8
    assert share(said, "reloaded") == share(said, "recovered")
    assert len(re.findall(r"\d+", said.rsplit("writes", 1)[1])) == 8


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    for path in (Path(__file__).parents[2] / "examples").glob("*.py"):
        if path.stem == "made_up":  # what the others share
            continue
        assert f"{path.stem}.main(" in text, f"no test runs {path.name}"
        assert (path.read_text().split('"""')[1]).count(f"python examples/{path.name}") == 2
