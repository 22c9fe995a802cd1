from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result
from watching import counted, interrupted_at, never

from cria_prune.artifact.checkpoint import load
from cria_prune.artifact.scores import load_scores
from cria_prune.cli.main import app
from cria_prune.cli.settings import GROUPS, extra_of, flags_of
from cria_prune.config import (
    Choices,
    PlanConfig,
    PruneConfig,
    RecordConfig,
    RecoverConfig,
    ScoreConfig,
    StageConfig,
)
from cria_prune.recipes.registry import task
from cria_prune.recovery.tune import recover
from cria_prune.result import FIGURES
from cria_prune.tasks.images import ImageTask
from cria_prune.tasks.models import build

SMALL = ["--examples", "64", "--rounds", "2", "--criterion", "l1", "--device", "cpu"]
PRUNING = {
    "--reduction", "--reduce", "--units", "--policy",
    "--speedup", "--latency-batch", "--latency-table", "--to-parameters", "--to-macs",
    "--ignore", "--protect", "--share", "--keep", "--round-to", "--serve", "--tensor-parallel",
    "--of", "--criterion", "--preset", "--rounds", "--ranking", "--residual", "--no-residual",
    "--experts", "--no-experts", "--drop-unreached", "--no-drop-unreached",
    "--repair", "--batch-norm", "--no-batch-norm",
    "--floor", "--uniform", "--no-uniform", "--multiple", "--examples", "--positions", "--watch", "--config",
    "--neighbors", "--ridge", "--pairs", "--sketch", "--tokens",
}  # fmt: skip
TUNING = {"--epochs", "--lr", "--distill", "--lora", "--compile", "--no-compile", "--fsdp", "--no-fsdp"}
COMMON = {"--seed", "--device", "--quiet", "-q"}
SAVING = {"--output", "--overwrite"}
DATA = {
    "--calibration", "--dataset", "--text", "--task", "--text-column", "--pair-column", "--label-column",
    "--chat", "--max-length",
}  # fmt: skip
OWN = {"--factory", "--loader", "--inputs"}
TRAINED = OWN | {"--weights", "--loss"}
MEASURED = TRAINED | {"--evaluate", "--test-loader", "--better"}
SCORING = {
    "--criterion", "--preset", "--residual", "--no-residual", "--examples", "--positions", "--config",
    "--experts", "--no-experts", "--drop-unreached", "--no-drop-unreached",
    "--neighbors", "--ridge", "--pairs", "--sketch", "--tokens",
}  # fmt: skip
SURFACE = {
    "run": PRUNING | TUNING | COMMON | SAVING | {"--quick", "--base", "--resume"},
    "inspect": OWN | {"--example", "--meta", "--floor", "--tree", "--all", "--json", "--quiet", "-q"},
    "score": SCORING | COMMON | SAVING | DATA | TRAINED | {"--repair"},
    "ablate": SCORING
    | COMMON
    | SAVING
    | DATA
    | MEASURED
    | {"--shares", "--random-seeds", "--limit", "--repair"},
    "bench": COMMON | MEASURED | {"--criterion", "--reduction", "--reduce", "--repair", "--output"},
    "plan": (PRUNING - {"--watch"}) | COMMON | SAVING | DATA | TRAINED | {"--dry-run"},
    "prune": PRUNING | COMMON | SAVING | DATA | MEASURED | {"--export", "--resume", "--scores", "--offload"},
    "sweep": (PRUNING - {"--rounds", "--watch", "--speedup", "--to-parameters", "--to-macs"})
    | COMMON
    | SAVING
    | DATA
    | MEASURED
    | {"--scores", "--resume"},
    "recover": TUNING | COMMON | SAVING | DATA | MEASURED | {"--teacher", "--resume", "--examples"},
    "report": {"--layer", "--output", "--overwrite", "--quiet", "-q"},
    "eval": COMMON | DATA | MEASURED | {"--examples", "--tasks", "--task-folder", "--limit", "--against"},
    "export": DATA | {"--onnx", "--int8", "--factory", "--example", "--overwrite", "--quiet", "-q"},
    "latency": SAVING
    | {"--against", "--batch", "--runtime", "--threads", "--seconds", "--factory", "--example", "--device"}
    | {"--quiet", "-q"},
}


@pytest.fixture(scope="module", autouse=True)
def dense() -> Iterator[None]:
    """One short training for all tests of this file."""
    digits = task("digits")
    model = build("digits")
    recover(model, digits.train_batches(0), RecoverConfig(epochs=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTask, "dense", lambda self, seed=0, progress=None: copy.deepcopy(model).eval())
        yield


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cria(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def answer(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def error(*words: str) -> str:
    result = cria(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_the_command_line_is_frozen() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {
            word for item in command.params for word in (*item.opts, *item.secondary_opts) if word[0] == "-"
        }
        for name, command in commands.items()
    }
    assert found == SURFACE


HEAVY = {"torch", "numpy", "scipy", "transformers", "matplotlib", "yaml", "rich"}
WITHOUT_INIT = """
import importlib.util, sys, types
package = types.ModuleType("cria_prune")
package.__path__ = importlib.util.find_spec("cria_prune").submodule_search_locations
sys.modules["cria_prune"] = package
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["prune", "--help"], ["bench", "--help"], ["prune", "x", "--reduct", "1"],
     ["recover", "x", "--lora", "many"], ["plan", "x", "--of", "size"], ["prune", "x", "--policy", "free"]],
    ids=" ".join,
)  # fmt: skip
def test_help_and_what_is_mistyped_import_nothing_heavy(words: list[str]) -> None:
    """`cria_prune/__init__.py` is left out: what it imports is its own affair."""
    code = WITHOUT_INIT + (
        "from cria_prune.cli.main import app\n"
        f"try: app({words!r}, prog_name='cria')\n"
        f"finally: print('imported', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("imported []\n"), done.stderr
    assert done.returncode == (0 if words[-1].startswith("--") else 2), done.stderr


def test_the_whole_command_answers_without_torch() -> None:
    code = (
        "import sys; from cria_prune.cli.main import app\n"
        "try: app(['prune', '--help'], prog_name='cria')\n"
        f"finally: print('imported', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("imported []\n"), done.stderr


def options_of(command: str) -> dict[str, typer.core.TyperOption]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {word: item for item in commands[command].params for word in item.opts if word[0] == "-"}


SECTIONS: dict[type[StageConfig], list[str]] = {
    PlanConfig: ["plan", "prune"], ScoreConfig: ["run", "score", "plan", "ablate", "prune", "sweep"],
    RecordConfig: ["run", "score", "plan", "ablate", "prune", "sweep"], RecoverConfig: ["run", "recover"],
    PruneConfig: ["run", "plan", "prune", "sweep"],
}  # fmt: skip


@pytest.mark.parametrize("config", SECTIONS)
def test_a_setting_with_a_flag_is_an_option_of_every_command_that_takes_its_section(
    config: type[StageConfig],
) -> None:
    flagged = {name: field for name, field in config.model_fields.items() if "option" in extra_of(field)}
    assert flagged
    for command in SECTIONS[config]:
        text = " ".join(cria(command, "--help").stdout.split())
        here = options_of(command)
        for name, field in flagged.items():
            flags = flags_of(name, field)
            option = here[flags[0]]
            assert set(flags) <= set(option.opts) and option.rich_help_panel == config.group
            assert option.default is None  # what was not given is left to recipe, preset and file
            words = {"True": "yes", "False": "no", "0.0": "0"}
            default = extra_of(field)["option"]["shown"] or words.get(str(field.default), field.default)
            assert option.help.startswith(field.description)
            assert option.help.endswith(f". [default: {default}]") and option.help in text
            for choices in (item for item in field.metadata if isinstance(item, Choices)):
                for value, meaning in choices.texts.items():
                    assert value in option.help and meaning in option.help


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", SURFACE)
def test_help_is_in_groups_and_fits(command: str, width: int) -> None:
    result = CliRunner(env={"COLUMNS": str(width), "TERMINAL_WIDTH": ""}).invoke(app, [command, "--help"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width and "\x1b" not in result.stdout
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and line[0] != " "]
    assert headings == [name for name in GROUPS if name in headings] and headings[0] == "Arguments"
    assert headings[-1] in ("Running", "Output") and "Options" not in headings
    if command == "prune":
        assert headings == [
            "Arguments", "What to remove", "How to score", "Calibration data", "A network of your own",
            "Repair without training",
            "Settings to start from", "Running", "Output",
        ]  # fmt: skip


def test_version_is_that_of_the_distribution() -> None:
    result = cria("--version")
    assert result.exit_code == 0 and result.stdout == f"cria-prune {version('cria-prune')}\n"


def test_settings_of_the_scoring_reach_the_configuration() -> None:
    words = ["--neighbors", "5", "--pairs", "0.25", "--tokens", "all", "--sketch", "8", "--examples", "64"]
    answer(cria("score", "digits", *words, "--ridge", "0.1", "--criterion", "distortion", "--output", "kept"))
    config = load_scores("kept").config
    assert config.score.model_dump(include={"neighbors", "pairs", "sketch", "ridge"}) == {
        "neighbors": 5, "pairs": 0.25, "sketch": 8, "ridge": 0.1,
    }  # fmt: skip
    assert config.record.tokens is None and config.record.examples == 64
    words = ["score", "digits", "--criterion", "distortion"]
    assert 'pairs: must be "all" or a number' in error(*words, "--pairs", "some")
    assert "tokens: Input should be greater than or equal to 1 (found '0')" in error(*words, "--tokens", "0")


def test_run_says_keeps_and_reports_everything() -> None:
    result = cria("run", "digits", *SMALL, "--epochs", "1", "--watch", "--seed", "3")
    said = answer(result)
    assert list(Path("runs").iterdir()) == [Path("runs/digits")]
    assert said.keys() >= {
        "dense", "pruned", "recovered", "parameters_dense", "parameters", "reduction", "macs_dense", "macs",
        "output", "asked", "of", "criterion", "seed", "seconds", "scoring_over_forward", "recipe",
        "milliseconds_before", "milliseconds",
    }  # fmt: skip
    stages = {"record", "score", "plan", "surgery", "verify", "recover", "forward"}
    assert said["seconds"].keys() >= stages
    assert said["output"] == "runs/digits" and said["seed"] == 3 and said["criterion"] == "l1"
    assert 0 <= said["pruned"] <= said["recovered"] <= 1
    assert said["asked"] == 0.5 <= said["reduction"] == 1 - said["parameters"] / said["parameters_dense"]
    assert result.stdout.startswith("dense accuracy")
    for words in ("validation accuracy", "equal bit for bit", "removed", "report runs/digits/report.html"):
        assert words in result.stdout
    saved = load("runs/digits")
    assert sum(item.numel() for item in saved.model.parameters()) == said["parameters"]
    assert saved.manifest["results"]["recovered"] == said["recovered"]
    assert saved.manifest["results"]["recipe"] == "digits"
    assert saved.manifest["config"]["recover"]["epochs"] == 1
    command = saved.manifest["provenance"]["command"]
    assert command[:3] == ["cria", "run", "digits"] and command[command.index("--seed") + 1] == "3"
    assert "--watch" in command and "--quiet" not in command
    assert saved.manifest["provenance"]["data"] == task("digits").fingerprint()
    assert "Provenance" in Path("runs/digits/report.html").read_text()


def test_stages_alone_and_a_second_cut() -> None:
    once = answer(cria("prune", "digits", *SMALL, "--reduction", "0.3", "--output", "a", "--quiet"))
    result = cria("prune", "a", *SMALL, "--reduction", "0.3", "--output", "b", "--quiet")
    twice = answer(result)
    assert len(result.stdout.splitlines()) == 1 and result.stderr == ""
    assert twice["parameters_dense"] == once["parameters_dense"] == 127082
    assert twice["parameters_before"] == once["parameters"] > twice["parameters"]
    assert "repaired" in once["changed"] and f"before this cut {once['changed']}" in twice["changed"]
    assert twice["dense"] == once["dense"] and twice["before"] == once["pruned"]
    assert load("b").plan.sizes["conv1"] == 32
    assert {item["tensor"] for item in twice["repairs"]} >= {"conv2.weight", "linear.weight"}
    assert all(item.keys() == {*FIGURES} for item in twice["repairs"])
    page = Path("b/report.html").read_text()
    assert "Repair of every layer" in page and "conv2.weight" in page.partition("Repair of")[2]
    tuned = answer(cria("recover", "b", "--epochs", "1", "--output", "c", "--distill", "0.5"))
    assert tuned["recovered"] >= tuned["pruned"] == twice["pruned"] and tuned["dense"] == once["dense"]
    assert next(iter(twice["fidelity"])) == "as cut" and tuned["fidelity"] == twice["fidelity"]
    result = cria("eval", "c", "--against", "digits")
    found = answer(result)
    assert found["against"] == "digits" and "from digits: KL" in result.stdout
    assert 0.8 < found["fidelity"]["outputs"][0]["agreement"] < 1
    assert found["accuracy"] == tuned["recovered"] and found["parameters"] == twice["parameters"]


def test_recovery_of_no_epochs_and_a_config_file() -> None:
    Path("c.yaml").write_text(
        "record: {examples: 64}\nscore: {criterion: l2}\nplan: {reduction: 0.4, rounds: 1, of: macs}\n"
    )
    said = answer(cria("run", "digits", "--config", "c.yaml", "--criterion", "random", "--epochs", "0", "-q"))
    assert (said["criterion"], said["asked"], said["of"], said["rounds"]) == ("random", 0.4, "macs", 1)
    assert said["recovered"] == said["pruned"]
    assert said["reduction"] == 1 - said["macs"] / said["macs_dense"] >= 0.4


def test_score_writes_scores_and_inspect_groups() -> None:
    result = cria("score", "digits", "--examples", "64", "--output", "kept")
    assert answer(result)["groups"] == 3 and "split-half" in result.stdout
    said, scored = json.loads(Path("kept/scores.json").read_text()), load_scores("kept")
    assert {name: len(item.scores) for name, item in scored.importances.items()} == {
        "conv1": 32, "conv3": 64, "hidden": 128,
    }  # fmt: skip
    assert said["diagnosis"]["conv1"]["status"] == "converged" and said["recipe"] == "digits"
    assert said["provenance"]["seed"] == 0
    assert "not empty" in error("score", "digits", "--output", "kept", "--quiet")
    assert (
        answer(cria("score", "digits", "--examples", "64", "--criterion", "l1", "--quiet"))["output"] is None
    )
    said = answer(cria("inspect", "digits", "--json"))
    rows = {item["name"]: item for item in said["groups"]}
    assert rows["conv1"]["parameters_per_unit"] == 9 + 2 + 64 * 9
    assert rows["conv1"]["consumers"] == ["conv2.weight"]
    assert (rows["conv2"]["status"], rows["conv2"]["frozen"]) == ("residual", None)
    assert rows["linear"]["parameters_per_unit"] is None
    assert 0.5 < said["removable"]["parameters"] < 1
    assert "is part of the model's output" in cria("inspect", "digits").stdout


def test_ablate_writes_a_table_a_file_and_a_picture() -> None:
    words = [
        "--criterion",
        "l2",
        "--shares",
        "0.5,0.25",
        "--random-seeds",
        "2",
        "--seed",
        "4",
        "--limit",
        "200",
    ]
    result = cria("ablate", "digits", *words)
    said, folder = answer(result), Path("runs/digits-ablation")
    assert said["output"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["ablation.json", "ablation.png"]
    values = json.loads((folder / "ablation.json").read_text())
    assert (values["metric"], values["criterion"], values["target"]) == ("accuracy", "l2", "digits")
    assert values["shares"] == [0.25, 0.5] and values["random_seeds"] == [4, 5]
    assert [[share, len(found)] for share, found in values["curves"]["random"]] == [[0.25, 2], [0.5, 2]]
    assert [[share, len(found)] for share, found in values["curves"]["lowest"]] == [[0.25, 1], [0.5, 1]]
    assert values["reached"] == said["reached"] and values["masked_equals_pruned"] < 1e-10
    assert values["limit"] == 200 and values["tested_on"] == "the first 200 test examples"
    assert values["provenance"]["command"][:3] == ["cria", "ablate", "digits"]
    assert values["provenance"]["data"] == task("digits").fingerprint() and values["provenance"]["seed"] == 4
    assert values["repair"] == said["repair"] == "walk"
    assert said["verdict"].startswith("repaired by the walk, the criterion holds")
    for text in ("the first 200 test examples", "lowest first", "the criterion holds", "ablation.png"):
        assert text in result.stdout
    assert "every network is measured repaired by the walk, without training" in result.stdout
    assert (folder / "ablation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    batches = task("digits").test_batches(200)
    assert values["dense"] == task("digits").evaluate(task("digits").dense(), batches)
    assert "it is not empty" in error("ablate", "digits", "--output", str(folder))


def test_prune_by_scores_is_one_round_of_prune() -> None:
    words = ["--examples", "64", "--device", "cpu", "--quiet"]
    answer(cria("score", "digits", *words, "--output", "kept"))
    cria("prune", "digits", *words, "--rounds", "1", "--reduce", "0.4", "--output", "whole")
    with never("record"):
        said = answer(cria("prune", "digits", "--scores", "kept", "--reduce", "0.4", "--output", "cut"))
    assert said["rounds"] == 1 and "scoring_over_forward" not in said
    one, two = load("whole"), load("cut")
    assert one.plan == two.plan
    states = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    by = ["prune", "digits", "--scores", "kept", "--output", "x", "--quiet"]
    assert "theirs is criterion 'innovation', asked is 'l1'" in error(*by, "--criterion", "l1")
    assert "theirs is examples 64, asked is 65" in error(*by, "--examples", "65")
    assert "Ask for one round" in error(*by, "--rounds", "3")
    assert "holds no scores.json" in error(*by[:3], "cut", *by[4:])
    assert "of a model with other weights" in error("prune", "cut", *by[2:])


def test_a_sweep_scores_once_and_goes_on_where_it_was() -> None:
    words = ["sweep", "digits", "--examples", "64", "--reduce", "0.2", "--reduce", "0.5", "--output", "out"]
    # Measured are the dense model, the first size, the second.
    with counted("record") as recorded, interrupted_at("evaluate", 3):
        assert cria(*words).exit_code == 130
    first = Path("out/reduced-20/manifest.json").stat().st_mtime_ns
    assert [item["asked"] for item in json.loads(Path("out/sweep.json").read_text())["family"]] == [0.2]
    with counted("record") as again:
        said = answer(cria(*words, "--resume"))
    assert len(recorded) == 1 and not again
    assert Path("out/reduced-20/manifest.json").stat().st_mtime_ns == first
    assert [item["asked"] for item in said["family"]] == [0.2, 0.5]
    assert all(item["rounds"] == 1 and item["criterion"] == "innovation" for item in said["family"])
    kept = json.loads(Path("out/sweep.json").read_text())
    assert kept["dense"] == said["dense"] and kept["provenance"]["commit"]
    assert Path("out/sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "reduced-20", "reduced-50", "scores", "sweep.json", "sweep.png",
    ]  # fmt: skip
    answer(cria(*words, "--resume", "--criterion", "l1"))  # other scores: nothing of the old family is taken
    assert json.loads(Path("out/reduced-20/manifest.json").read_text())["results"]["criterion"] == "l1"
    assert answer(cria("sweep", "digits", "--scores", "out/scores", "--reduce", "0.3", "--output", "more"))
    assert not Path("more/scores").exists()
    for share, match in (("0.99", "at most"), ("0.2", "Give each share once")):
        said = error(*words[:2], "--reduce", share, "--reduce", "0.2", "--output", "no", "--quiet")
        assert match in said


def test_the_usual_sizes_that_are_beyond_reach_are_left_out() -> None:
    words = ["sweep", "digits", "--examples", "64", "--criterion", "l1", "--repair", "none", "--floor", "0.6"]
    result = cria(*words, "--no-batch-norm", "--output", "out")
    assert [item["asked"] for item in answer(result)["family"]] == [0.1, 0.2, 0.3]
    assert "left out, beyond what can be removed: 40 %, 50 %, 60 %, 70 %" in result.stderr


def test_an_ablation_of_a_checkpoint_scores_what_is_there() -> None:
    answer(cria("prune", "digits", *SMALL, "--reduction", "0.3", "--output", "small", "-q"))
    words = ["--criterion", "innovation", "--examples", "64", "--shares", "0.5", "--random-seeds", "1"]
    said = answer(cria("ablate", "small", *words, "--output", "small", "--overwrite", "-q"))
    assert said["target"] == "small" and said["recipe"] == "digits" and load("small").plan
    found = answer(cria("eval", "small"))
    assert said["dense"] == found["accuracy"] and said["tested_on"] == "all test examples"


def test_an_ablation_refuses_what_it_cannot_do_and_leaves_no_folder() -> None:
    assert "repair: Input should be 'walk', 'once' or 'none'" in error("ablate", "digits", "--repair", "foo")
    assert "Give numbers between 0 and 1" in error("ablate", "digits", "--shares", "half")
    assert "it is not between 0 and 1" in error("ablate", "digits", "--shares", "0.5,1")
    assert "each once" in error("ablate", "digits", "--shares", "0.5,0.5")
    assert "at least one seed" in error("ablate", "digits", "--random-seeds", "0")
    assert "found 0" in error("ablate", "digits", "--limit", "0")
    assert "Known criteria" in error("ablate", "digits", "--criterion", "nope")
    with interrupted_at("score"):
        result = cria("ablate", "digits", "--criterion", "l1")
    assert result.exit_code == 130 and "nothing was saved" in result.stderr
    assert not Path("runs").exists()


def test_errors_say_what_is_known() -> None:
    recipes = "digits, cifar10-resnet20, cifar10-resnet56, sst2-minilm, llama-shakespeare"
    assert f"Known recipes: {recipes}" in error("run", "nope")
    assert "The recipe digits with --quick: it has no such option" in error("run", "digits", "--quick")
    assert "neither a recipe nor a folder" in error("eval", "nope")
    assert "Known criteria: random, l1," in error("run", "digits", "--criterion", "nope")
    assert "Known presets: paper" in error("run", "digits", "--preset", "nope")
    assert "'non-embedding', 'macs' or 'latency'" in error("run", "digits", "--of", "nope")
    assert "it is not between 0 and 1" in error("run", "digits", "--reduction", "1.5")
    assert "No such file" in error("run", "digits", "--config", "nope.yaml")
    assert "The device 'nope'" in error("run", "digits", "--device", "nope")
    assert not Path("runs").exists()


def test_a_target_beyond_reach_says_the_largest_and_leaves_no_folder() -> None:
    result = cria("run", "digits", *SMALL, "--reduction", "0.95", "--output", "out")
    assert result.exit_code == 2
    assert "at most 88.86% can be removed" in result.stderr
    assert not Path("out").exists()


def test_existing_results_stay() -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    assert "it is not empty (mine.txt)" in error("run", "digits", "--output", "full")
    Path("file").write_text("mine")
    assert "found a file of that name" in error("run", "digits", "--output", "file")
    assert "Not a directory" in error("run", "digits", "--output", "file/below")
    Path("runs/digits-pruned").mkdir(parents=True)
    assert answer(cria("prune", "digits", *SMALL, "-q"))["output"] == "runs/digits-pruned-2"
    answer(cria("prune", "digits", *SMALL, "-q", "--output", "full", "--overwrite"))
    assert Path("full/mine.txt").read_text() == "mine" and load("full").plan


def test_a_run_keeps_what_its_report_needs() -> None:
    small = ["--examples", "64", "--rounds", "2", "--reduction", "0.3", "--device", "cpu"]
    first = answer(cria("prune", "digits", *small, "--output", "a"))
    assert first["memory"]["process"] > 1e6
    page = Path("a/report.html").read_text()
    said = answer(cria("report", "a"))
    assert said == {"folder": "a", "kind": "run", "layer": said["layer"], "output": "a/report.html"}
    assert Path("a/report.html").read_text() == page  # the run's own page came from the same files
    answer(cria("report", "a", "--layer", "conv1", "--output", "one.html"))
    assert "One layer: conv1" in Path("one.html").read_text()
    assert "it exists" in error("report", "a", "--output", "one.html")
    answer(cria("report", "a", "--output", "one.html", "--overwrite", "-q"))
    Path("a/report.html").write_text("mine")
    assert "it exists" in error("report", "a")
    assert Path("a/report.html").read_text() == "mine"
    answer(cria("report", "a", "--overwrite"))
    answer(cria("recover", "a", "--epochs", "1", "--output", "b"))
    text = Path("b/report.html").read_text()
    assert "One layer" in text and "recovered" in text and "Of the run before" in text
    answer(
        cria(
            "prune", "digits", *small, "--criterion", "l2", "--repair", "none", "--output", "a", "--overwrite"
        )
    )
    text = Path("a/report.html").read_text()
    assert "The neuron graphs of" in text and "records no signals" in text


def test_a_damaged_checkpoint_is_refused() -> None:
    Path("empty").mkdir()
    assert "manifest.json" in error("eval", "empty")


def test_ctrl_c_in_round_two_keeps_round_one() -> None:
    with interrupted_at("score", 2):
        result = cria("run", "digits", *SMALL, "--output", "out", "--quiet")
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr == (
        "interrupted: round 1 of 2 is kept (go on with: the same command, --output out --resume)\n"
    )
    saved = load("out")
    assert saved.manifest["results"]["stage"] == "round 1 of 2"
    assert 0 < len(saved.plan.kept["conv1"]) < 32


def test_a_run_that_was_stopped_in_a_round_and_in_the_recovery_ends_with_the_same_bits() -> None:
    words = ["run", "digits", *SMALL, "--rounds", "3", "--epochs", "1", "--quiet"]
    assert cria(*words, "--output", "whole").exit_code == 0
    with interrupted_at("score", 3) as calls:
        assert cria(*words, "--output", "out").exit_code == 130
        with interrupted_at("step"):
            assert cria(*words, "--output", "out", "--resume").exit_code == 130
        assert len(calls) == 4
        again = answer(cria(*words, "--output", "out", "--resume"))
        assert len(calls) == 4
    whole, out = load("whole"), load("out")
    assert whole.plan == out.plan
    states = whole.model.state_dict(), out.model.state_dict()
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    assert not [path.name for path in Path().iterdir() if path.name.startswith(".")]
    assert answer(cria(*words, "--output", "out", "--resume"))["recovered"] == again["recovered"]
    said = error(*words[:-1], "--output", "out", "--resume", "--seed", "3")
    assert "it holds the recovered model of another command" in said


def test_a_new_command_does_not_go_on_from_an_old_state() -> None:
    words = ["prune", "digits", *SMALL, "--output", "out", "--quiet"]
    Path(".out.rounds").mkdir()
    Path(".out.rounds/rounds.safetensors").write_text("damaged")
    assert "Reading the state of a pruning" in error(*words, "--resume")
    assert answer(cria(*words))["parameters"] > 0
    assert not Path(".out.rounds").exists()


def test_ctrl_c_in_the_recovery_keeps_the_best_epoch() -> None:
    with interrupted_at("step"):
        result = cria("run", "digits", *SMALL, "--output", "out", "--quiet")
    assert result.exit_code == 130
    assert result.stderr.startswith(
        "interrupted: the best epoch so far of the interrupted recovery is kept in out"
    )
    assert load("out").manifest["results"]["pruned"] >= 0


def test_ctrl_c_before_anything_is_kept() -> None:
    with interrupted_at("score"):
        result = cria("prune", "digits", *SMALL, "--output", "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was saved"
    assert not Path("out").exists()


def test_a_training_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    done = cria("run", "digits", "--fsdp", "--output", str(tmp_path / "out"), *SMALL)
    assert done.exit_code == 2 and "A fine-tune by FSDP: this is one process" in done.stderr
    assert "dense accuracy" not in done.stdout and not list(tmp_path.iterdir())


def test_without_matplotlib_it_prunes_and_says_what_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    install = "matplotlib is not installed. Install it with pip install 'cria-prune[report]'"
    cut = cria("prune", "digits", "--rounds", "1", "--examples", "64", "--criterion", "l2", "--output", "a")
    assert answer(cut)["output"] == "a" and Path("a/model.safetensors").exists()
    assert f"no report now: The pictures of a report: {install}, then run cria report a" in cut.stdout
    assert not Path("a/report.html").exists()
    assert install in error("report", "a")
    words = (
        "--shares",
        "0.5",
        "--limit",
        "50",
        "--examples",
        "64",
        "--criterion",
        "l2",
        "--random-seeds",
        "2",
    )
    measured = cria("ablate", "digits", *words, "--output", "b")
    assert answer(measured)["output"] == "b" and sorted(os.listdir("b")) == ["ablation.json"]
    assert f"result b/ablation.json, left out: The picture b/ablation.png: {install}" in measured.stdout
    words = ("--reduce", "0.3", "--criterion", "l2", "--examples", "64", "--output", "c")
    assert install in cria("sweep", "digits", *words).stdout and Path("c/sweep.json").exists()
