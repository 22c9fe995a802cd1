"""`cria export` and `cria latency`, and the table of what was measured in card and report."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from cria_prune import apply, discover, save
from cria_prune.artifact.facts import EVAL, MEASURED, UNKNOWN, keep_facts, read_facts, side_by_side
from cria_prune.base.errors import ArtifactError
from cria_prune.cli import deploy
from cria_prune.cli.main import app
from cria_prune.cli.measure import keep_evaluation
from cria_prune.cli.output import Output
from cria_prune.cli.target import Source
from cria_prune.planning.plan import make_plan
from cria_prune.repair.fidelity import Distance, Fidelity

NETS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return net, torch.randn(4, 6)

def wider():
    return nn.Linear(7, 3), torch.randn(4, 7)
"""
RESULTS = {
    "parameters_dense": 163, "parameters": 83, "macs_dense": 144, "macs": 72, "dense": 0.9, "pruned": 0.8,
    "metric": "accuracy",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of a network, and a checkpoint of it with half of its units."""
    (tmp_path / "nets_of_deploy.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("nets_of_deploy", None)
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    model, example = namespace["make"]()
    groups = discover(model, example)
    plan = make_plan(groups, {item.name: range(item.size // 2) for item in groups.prunable})
    save("small", apply(model, plan), plan, results=RESULTS)
    yield tmp_path
    sys.modules.pop("nets_of_deploy", None)


def cria(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


OWN = ("--factory", "nets_of_deploy:make")


def test_what_is_measured_stands_in_the_folder_and_in_the_report(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = cria("export", "small", *OWN, "--onnx", "served", "--int8")
    assert done["onnx"]["error"] < 1e-5 and done["int8"]["layers"] == 2 and done["parameters"] == 83
    assert json.loads(Path("served/export.json").read_text())["onnx"] == done["onnx"]
    words = ["--against", "nets_of_deploy:make", "--batch", "1,3", "--seconds", "0", "--threads", "1"]
    timed = cria("latency", "small", *OWN, *words, "--output", "speed.json")
    assert [(row["runtime"], row["batch"]) for row in timed["rows"]] == [("eager", 1), ("eager", 3)]
    assert timed["threads"] == 1 and json.loads(Path("speed.json").read_text())["rows"] == timed["rows"]
    assert timed["models"]["dense"] == {"parameters": 163, "bytes": None}
    text = (here / "small" / MEASURED).read_text()
    assert str(here) not in text and set(read_facts(Path("small"))) == {"export", "latency"}
    dense, pruned, onnx, int8 = side_by_side(Path("small"))
    assert (dense["parameters"], pruned["parameters"], pruned["MACs"]) == ("163", "83", "72")
    assert dense["file"] == UNKNOWN and pruned["metric"] == "accuracy 80.00 %"
    assert dense["latency"].endswith("ms, batch 1") and onnx["latency"] == UNKNOWN
    assert "KL" in int8["fidelity"] and onnx["fidelity"].startswith("as pruned, to ")
    cria("report", "small")
    page = Path("small/report.html").read_text()
    assert "Dense beside pruned" in page and "pruned, ONNX in int8" in page and UNKNOWN in page
    # Other weights: what was measured is of those before.
    save_file({"x": torch.zeros(1)}, "small/model.safetensors")
    assert read_facts(Path("small")) == {}


def test_the_card_has_the_table_once_and_keeps_its_text(here: Path) -> None:
    card = Path("small/README.md")
    card.write_text("# small\n\n## Reload certificate\n\nbit-equal.\n")
    found: Any = SimpleNamespace(task=SimpleNamespace(metric="accuracy"), checkpoint=Path("small"))
    distance = Fidelity(8, (Distance("output", 8, 0.1, 0.9, 0.2, 0.5),)).to_dict()
    keep_evaluation(Output(), found, {"accuracy": 0.75, "perplexity-128": 3.0})  # by one command
    keep_evaluation(Output(), found, {"against": "dense", "fidelity": distance})  # and by another
    text = card.read_text()
    assert text.count("## Dense beside pruned") == 1 and text.endswith(
        "## Reload certificate\n\nbit-equal.\n"
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| pruned |")]
    assert "accuracy 75.00 %" in line and "KL 0.2, agrees on 50.00 % of 8 examples" in line
    Path("small", MEASURED).write_text("{}")
    with pytest.raises(ArtifactError, match=r"measured.json: it is damaged.*Remove it, and measure again"):
        read_facts(Path("small"))
    Path("empty").mkdir()
    assert not keep_facts(Path("empty"), EVAL, {}) and not list(Path("empty").iterdir())


def test_a_hugging_face_folder_has_its_tokenizer_beside_the_file(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    Path("vit/preprocessor_config.json").write_text("{}")
    done = cria("export", "vit", "--onnx", "out/served")
    assert done["onnx"]["dynamic"] == ["batch"] and done["onnx"]["outputs"] == ["logits"]
    names = {path.name for path in Path("out/served").iterdir()}
    assert names == {"model.onnx", "export.json", "config.json", "preprocessor_config.json"}
    assert not Path("vit", MEASURED).exists()  # it is no folder of Cria's


def test_an_example_has_the_segments_that_its_tokenizer_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pairs(nn.Module):
        config = SimpleNamespace(type_vocab_size=2)

        def forward(self, input_ids: Any, token_type_ids: Any = None) -> None:
            pass

    names: list[str] = ["input_ids"]
    monkeypatch.setattr(deploy, "read_by", lambda *_: SimpleNamespace(model_input_names=names))
    ids = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    found = Source(Pairs(), ids, "small", "hugging-face")
    assert deploy.with_segments(found) == ids  # there is no tokenizer
    Path("small/tokenizer.json").write_text("{}")
    assert deploy.with_segments(found) == ids  # it gives none
    names.append("token_type_ids")
    given: Any = deploy.with_segments(found)
    assert given["token_type_ids"].tolist() == [[0, 0, 1, 1]] * 2


MAKE = "nets_of_deploy:make"
BAD: list[tuple[list[str], str]] = [
    (["export", MAKE], "no format was asked for. Give --onnx FOLDER"),
    (["export", MAKE, "--onnx", "model.onnx"], "it is the name of a file. Name a folder"),
    (["export", MAKE, "--onnx", "small"], "it is not empty (manifest.json, model.safetensors)"),
    (["export", MAKE, "--onnx", "small", "--overwrite"], "so not all of it is an export of Cria"),
    (["export", MAKE, "--onnx", "out", "--calibration", "x.txt"], "only an int8 file is compared on them"),
    (["latency", MAKE], "Name the dense model with --against MODEL"),
    (["latency", MAKE, "--against", MAKE, "--threads", "0"], "Threads of a forward: found 0"),
    (["latency", MAKE, "--against", MAKE, "--device", "warp"], "The device 'warp'"),
    (["latency", MAKE, "--against", MAKE, "--batch", "1,x"], "Batch sizes: found '1,x'"),
    (["latency", MAKE, "--against", MAKE, "--runtime", "tpu"], "Known runtimes: eager, compiled"),
    (
        ["latency", MAKE, "--against", "nets_of_deploy:wider"],
        "their inputs differ: 'input' is float32 (4, 6)",
    ),
    (["latency", MAKE, "--against", MAKE, "--output", "nets_of_deploy.py"], "it exists"),
]


@pytest.mark.parametrize(("words", "text"), BAD, ids=[str(place) for place in range(len(BAD))])
def test_bad_input_is_told_in_one_line_and_leaves_nothing(here: Path, words: list[str], text: str) -> None:
    before = sorted(path for path in here.rglob("*") if "__pycache__" not in str(path))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert re.search(re.escape(text), result.stderr), result.stderr
    assert sorted(path for path in here.rglob("*") if "__pycache__" not in str(path)) == before
