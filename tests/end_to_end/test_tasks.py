"""A token classifier and a labelled file: pruned, measured, and what was used is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cria_prune.cli.main import app
from tiny import KINDS

transformers = pytest.importorskip("transformers")


def cria(*words: str) -> Any:
    result = CliRunner().invoke(app, list(words))
    return json.loads(result.stdout.splitlines()[-1]) if result.exit_code == 0 else result.stderr


@pytest.mark.usefixtures("in_this_process")
def test_a_token_classifier_by_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind = next(kind for kind in KINDS if kind.name == "bert, tags")
    Path("ner").mkdir()
    kind.make(Path("ner"))
    data = str(kind.data(tmp_path))
    words = [
        "--calibration",
        data,
        "--reduce",
        "0.25",
        "--of",
        "prunable",
        "--device",
        "cpu",
        "--examples",
        "24",
    ]
    said = cria("prune", "ner", *words, "--output", "small")
    used = said["calibration"]
    assert used["sources"] == ["tags.jsonl"] and used["examples"] == 24 and used["rows"] == 44
    assert used["widest"] == 64 and used["tokens"] >= used["samples"] > 24 * 4
    card = Path("small/README.md").read_text()
    assert (
        "Calibrated on 24 of 44 examples of tags.jsonl" in card and str(tmp_path) not in card.split("##")[1]
    )
    found = cria("eval", "small", "--calibration", data, "--against", "ner")
    assert found["f1"] == said["pruned"] and found["fidelity"]["outputs"][0]["name"] == "logits"
    whole = cria("eval", "small", "--text", data)
    assert {"f1", "precision", "recall", "accuracy"} <= set(whole)
    wrong = cria("eval", "small", "--calibration", data, "--label-column", "tag")
    assert "its columns are tokens, ner_tags. Name one of them with --label-column" in wrong
    model = transformers.AutoModelForTokenClassification.from_pretrained("small")
    assert model.config.intermediate_size < 64 and model.config.id2label[1] == "B-GOOD"
