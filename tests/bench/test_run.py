"""A bench measures what is missing, once, and says clearly what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from watching import counted, interrupted_at

from cria_prune.base.errors import ArtifactError, ConfigError
from cria_prune.bench.run import run_grids
from cria_prune.bench.suite import Grid, cells, file_name, packaged, read_suite, task_of
from cria_prune.cli.main import app
from cria_prune.cli.report import narrowed
from cria_prune.cli.settings import Bench
from cria_prune.recipes.registry import TASKS
from cria_prune.recovery import tune
from cria_prune.tasks.images import ImageTask
from cria_prune.tasks.models import build

GRID = Grid(
    network="digits", criteria=["random", "innovation"], reductions=[0.5, 0.75], rounds=[1], examples=64,
    repair=["none", "once"], seeds=[0],
)  # fmt: skip


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model needs no training here: what is tested is the bench."""

    def dense(self: Any, seed: int = 0, progress: Any = None) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(self.architecture).eval()

    monkeypatch.setattr(ImageTask, "dense", dense)


def measured(grid: Grid, folder: Path, **options: Any) -> int:
    """Run one grid of which every cell can be measured."""
    count, failed = run_grids([grid], folder, **options)
    assert not failed
    return count


def values(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> what it says, without what differs between two runs."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {
        name: {k: v for k, v in said.items() if k not in ("provenance", "seconds")}
        for name, said in found.items()
    }


def test_suites_that_come_along_are_whole_and_name_every_cell_once() -> None:
    assert packaged() == [
        "digits",
        "llama-shakespeare",
        "llama-shakespeare-again",
        "llama-shakespeare-walk",
        "resnet20",
        "resnet20-walk",
        "resnet56",
        "resnet56-macs",
        "resnet56-walk",
        "sst2-minilm",
        "sst2-minilm-again",
        "sst2-minilm-walk",
    ]
    for suite in packaged():
        grids = read_suite(suite)
        names = [file_name(cell) for grid in grids for cell in cells(grid)]
        assert grids[0].network in TASKS and len(set(names)) == len(names), suite


def test_only_what_is_missing_is_measured_and_comes_out_the_same(tmp_path: Path) -> None:
    seen: list[str] = []
    count = measured(GRID, tmp_path, on_cell=lambda *args: seen.append(file_name(args[2])))
    assert count == 8 == len(seen) and seen == [file_name(cell) for cell in cells(GRID)]
    first = values(tmp_path)
    assert set(first) == {*seen, "dense-seed0.json"}
    repaired, plain = (
        first[f"inner-innovation-0.5-rounds1-seed0-epochs0{end}.json"] for end in ("-repair", "")
    )
    assert repaired["kept"] == plain["kept"] and repaired["pruned"] != plain["pruned"]
    assert plain["report"]["reached"] >= 0.5 and plain["difference"] < 1e-10
    assert measured(GRID, tmp_path) == 0
    gone = tmp_path / seen[3]
    before = gone.read_text()
    gone.unlink()
    assert measured(GRID, tmp_path) == 1
    assert gone.read_text() != before and values(tmp_path) == first


def test_recovery_is_measured_too(tmp_path: Path) -> None:
    grid = Grid(network="digits", criteria=["l2"], reductions=[0.5], rounds=[1], epochs=1)
    measured(grid, tmp_path)
    said = values(tmp_path)["inner-l2-0.5-rounds1-seed0-epochs1.json"]
    assert said["recovered"] > said["pruned"]


def test_an_interrupted_bench_keeps_what_it_has(tmp_path: Path) -> None:
    with interrupted_at("cell", 3), pytest.raises(KeyboardInterrupt):
        measured(GRID, tmp_path)
    assert len(list(tmp_path.glob("inner*.json"))) == 2
    assert len(list(tmp_path.iterdir())) == 3 and measured(GRID, tmp_path) == 6


def test_a_recovery_that_was_killed_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    grid = Grid(network="digits", criteria=["l2"], reductions=[0.5], rounds=[1], epochs=3)
    name = "inner-l2-0.5-rounds1-seed0-epochs3.json"
    measured(grid, tmp_path / "whole")
    with interrupted_at("epoch", 3) as epochs, pytest.raises(KeyboardInterrupt):
        measured(grid, tmp_path / "part")
    assert [item.facts["epoch"] for item in epochs] == [0, 1, 2]
    assert not (tmp_path / "part" / name).exists()
    with counted("epoch") as epochs:
        assert measured(grid, tmp_path / "part") == 1
    assert {item.facts["epoch"] for item in epochs} == {0, 2}  # the first is asked for its length
    one, other = (json.loads((tmp_path / part / name).read_text()) for part in ("whole", "part"))
    assert one["recovered"] == other["recovered"] and other["resumed"] and "resumed" not in one
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["dense-seed0.json", name]
    state = tmp_path / "part" / f".{name.removesuffix('.json')}.recovery"
    state.mkdir()  # as a kill between the file and the end of its state leaves it
    assert measured(grid, tmp_path / "part") == 0 and not state.exists()


def test_a_recovery_of_another_code_is_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(network="digits", criteria=["l2"], reductions=[0.5], rounds=[1], epochs=2)
    with interrupted_at("epoch", 2), pytest.raises(KeyboardInterrupt):
        measured(grid, tmp_path)
    (state,) = tmp_path.glob(".*.recovery")
    with monkeypatch.context() as patch:
        patch.setattr(tune, "code_version", lambda: "another")
        count, failed = run_grids([grid], tmp_path)
    assert count == 0 and "code: there" in str(*failed.values()) and str(state) in str(*failed.values())
    assert state.exists() and measured(grid, tmp_path) == 1 and not state.exists()


def test_a_file_of_another_configuration_is_refused_before_any_work(tmp_path: Path) -> None:
    measured(GRID, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    state = tmp_path / f".{file_name(cells(GRID)[0]).removesuffix('.json')}.recovery"
    state.mkdir()
    other = Grid(**{**GRID.model_dump(), "examples": 128})
    with pytest.raises(ArtifactError, match=r"was measured with config\.record\.examples 64, asked is 128"):
        run_grids([GRID, other], tmp_path)
    assert state.exists()  # nothing is removed either
    for path in tmp_path.glob("inner-*.json"):  # files from before there was a choice, or repair at all
        said = json.loads(path.read_text())
        del said["config"]["record"]["tokens"], said["config"]["batch_norm"]
        repaired = said["config"].pop("repair") == "once"
        if repaired:
            said["config"]["compensate"] = said["cell"]["compensate"] = True
            del said["cell"]["repair"]
        path.write_text(json.dumps(said))
    assert measured(GRID, tmp_path) == 0
    with pytest.raises(ArtifactError, match=r"config\.record\.tokens None, asked is 16"):
        measured(Grid(**{**GRID.model_dump(), "tokens": 16}), tmp_path)
    for path, kept in before.items():
        path.write_bytes(kept)
    one = next(tmp_path.glob("inner*.json"))
    one.write_text(before[one][:50].decode())
    with pytest.raises(ArtifactError, match="Remove it to measure again"):
        measured(GRID, tmp_path)
    one.write_bytes(before[one])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_another_network_or_of_other_data_are_not_taken_for_these(tmp_path: Path) -> None:
    measured(GRID, tmp_path)
    one = next(tmp_path.glob("inner*.json"))
    whole = one.read_text()
    for key, value, found in (("cell", {"network": "cifar10-resnet20"}, "cell.network 'cifar10"),
                              ("provenance", {"data": "0" * 64}, "other data")):  # fmt: skip
        said = json.loads(whole)
        said[key] |= value
        one.write_text(json.dumps(said))
        with pytest.raises(ArtifactError, match=found):
            measured(GRID, tmp_path)


def test_another_recovery_is_another_measurement(tmp_path: Path) -> None:
    grid = Grid(network="digits", criteria=["l2"], reductions=[0.5], rounds=[1], epochs=1)
    measured(grid, tmp_path)
    path = tmp_path / "inner-l2-0.5-rounds1-seed0-epochs1.json"
    said = json.loads(path.read_text())
    del said["recover"]["compile"]  # as in a file from before there was a choice
    path.write_text(json.dumps(said))
    assert measured(grid, tmp_path) == 0
    path.write_text(json.dumps({**said, "recover": {"lr": "fast"}}))
    with pytest.raises(ArtifactError, match=f"The result file .*{path.name}"):
        measured(grid, tmp_path)
    said["recover"]["lr"] = 1.0
    path.write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=r"recover\.lr 1\.0, asked is 0\.02"):
        measured(grid, tmp_path)


def test_a_recovery_can_be_tuned_and_the_cell_says_so(tmp_path: Path) -> None:
    values = {"network": "digits", "criteria": ["l2"], "reductions": [0.5], "rounds": [1], "epochs": 1}
    grid = Grid(**values, tune={"distill": 0.5, "lr": 0.01})
    assert measured(grid, tmp_path)
    said = json.loads((tmp_path / "inner-l2-0.5-rounds1-seed0-epochs1-distill_0.5-lr_0.01.json").read_text())
    assert said["recover"]["distill"] == 0.5 and said["cell"]["tune"] == {"distill": 0.5, "lr": 0.01}
    for wrong, text in (
        ({"epochs": 3}, "tune has 'epochs'"),
        ({"fsdp": True}, "tune has 'fsdp'"),
        ({"distil": 0.5}, "tune, distil: Extra inputs"),
    ):
        with pytest.raises(ConfigError, match=text):
            Grid(**values, tune=wrong)


def test_a_cell_that_cannot_be_measured_does_not_stop_the_others(tmp_path: Path) -> None:
    grid = Grid(network="digits", criteria=["random"], reductions=[0.98, 0.5], rounds=[1], examples=64)
    count, failed = run_grids([grid], tmp_path)
    assert count == 1 and list(failed) == ["inner-random-0.98-rounds1-seed0-epochs0.json"]
    assert "can be removed" in str(*failed.values()) and len(list(tmp_path.glob("inner*"))) == 1
    (tmp_path / "grid.yaml").write_text(grid.to_yaml())
    words = ["bench", str(tmp_path / "grid.yaml"), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "can be removed" in done.stderr and '"failed": 1' in done.stdout


def test_a_suite_of_several_grids_is_narrowed_to_those_that_have_the_value(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GRID.to_yaml())
    (tmp_path / "b.yaml").write_text(Grid(**{**GRID.model_dump(), "criteria": ["l2"]}).to_yaml())
    only = ["--criterion", "l2", "--reduction", "0.5"]
    done = CliRunner().invoke(app, ["bench", str(tmp_path), "--output", str(tmp_path / "out"), *only])
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["cells"] == 2
    suite, grids = str(tmp_path), read_suite(str(tmp_path))
    assert {grid.repair for grid in narrowed(grids, Bench(suite=suite, repair=("once",)))} == {("once",)}
    with pytest.raises(ConfigError, match="repair none, once"):
        narrowed(grids, Bench(suite=suite, repair=("walk",)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("network: nope\ncriteria: [l2]\nreductions: [0.5]", "no recipe 'nope'"),
        ("network: digits\ncriteria: [l3]\nreductions: [0.5]", "no criterion 'l3'"),
        ("network: digits\ncriteria: []\nreductions: [0.5]", "criteria"),
        ("network: digits\ncriteria: [l2]\nreductions: [1.5]", "reductions.0"),
        ("network: digits\ncriteria: [l2]\nreductions: [0.5]\nround: [1]", "round"),
        ("- l2", "found list"),
    ],
)
def test_a_wrong_grid_names_its_file(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"grid\.yaml") as caught:
        read_suite(str(tmp_path))
    assert found in str(caught.value)


def test_a_suite_is_a_folder_of_one_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        read_suite(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="holds no YAML"):
        read_suite(str(tmp_path))
    for network in ("digits", "cifar10-resnet20"):
        (tmp_path / f"{network}.yaml").write_text(f"network: {network}\ncriteria: [l2]\nreductions: [0.5]")
    with pytest.raises(ConfigError, match="its grids are of cifar10-resnet20, digits"):
        read_suite(str(tmp_path))
    assert len(read_suite(str(tmp_path / "digits.yaml"))) == 1


def test_the_command_shows_tables_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID.to_yaml())
    words = ["bench", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out")]
    narrow = CliRunner().invoke(app, [*words, "--criterion", "random", "--reduction", "0.5"])
    assert narrow.exit_code == 0 and json.loads(narrow.stdout.splitlines()[-1])["measured"] == 2
    whole = CliRunner().invoke(app, words)
    assert json.loads(whole.stdout.splitlines()[-1]) == {
        "suite": str(tmp_path / "grid.yaml"), "network": "digits", "output": str(tmp_path / "out"),
        "cells": 8, "measured": 6, "failed": 0,
    }  # fmt: skip
    assert "pruned at 75 %" in whole.stdout and "innovation" in whole.stdout
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    bad = CliRunner().invoke(app, [*words, "--criterion", "l2"])
    assert bad.exit_code == 2 and "criteria innovation, random" in bad.stderr


def test_cells_of_another_dense_model_are_not_joined_with_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(GRID, tmp_path)
    dense, gone = tmp_path / "dense-seed0.json", next(tmp_path.glob("inner*.json"))
    said = json.loads(dense.read_text())
    gone.unlink()
    dense.write_text(json.dumps({key: value for key, value in said.items() if key != "weights"}))
    assert measured(GRID, tmp_path) == 1  # a file of the first benches: the figure is the same
    assert json.loads(dense.read_text()) == said
    gone.unlink()
    for damaged in ("{bad", "[]", '{"weights": "x"}'):
        dense.write_text(damaged)
        with pytest.raises(ArtifactError, match="Remove it to measure again"):
            measured(GRID, tmp_path)
    dense.write_text(json.dumps({**said, "dense": said["dense"] + 0.01, "weights": None}))
    with pytest.raises(ArtifactError, match="another one: accuracy"):
        measured(GRID, tmp_path)
    dense.write_text(json.dumps(said))
    one = TASKS["digits"]().dense(0)
    with torch.no_grad():
        next(one.parameters()).add_(1)
    monkeypatch.setattr(ImageTask, "dense", lambda *args: one)
    with pytest.raises(ArtifactError, match="another one: accuracy"):
        measured(GRID, tmp_path)
    assert not gone.exists() and json.loads(dense.read_text()) == said


def test_one_dense_model_for_several_seeds_and_shares_of_the_macs(tmp_path: Path) -> None:
    grid = Grid(
        network="digits", criteria=["random"], reductions=[0.4], rounds=[1], examples=64, seeds=[1, 2],
        dense_seed=3, of="macs", batch_norm=[False, True],
    )  # fmt: skip
    assert measured(grid, tmp_path) == 4
    found = values(tmp_path)
    names = [
        f"inner-random-0.4-rounds1-seed{seed}-epochs0{norms}-macs-dense3.json"
        for seed in (1, 2)
        for norms in ("", "-norms")
    ]
    assert set(found) == {*names, "dense-seed3.json"}
    assert all(found[name]["report"]["of"] == "macs" for name in names)
    configs = [found[name]["config"] for name in names]
    assert [(item["score"]["seed"], item["batch_norm"]) for item in configs] == [
        (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    # Batch norms measured again may be left as they were, and then the two of a seed are level.
    assert len({found[name]["pruned"] for name in names}) > 1


def test_what_cells_have_in_common_is_found_once_and_changes_none(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "network": "digits", "criteria": ["l2"], "rounds": [1], "examples": 64, "repair": ["walk"],
        "ranking": ["measured"],
    }  # fmt: skip
    grid = Grid(**shared, reductions=[0.4], of=["parameters", "macs"])
    with counted("losses") as losses:
        assert measured(grid, tmp_path / "both") == 2
    assert len(losses) == 1
    alone = Grid(**shared, reductions=[0.4], of="macs")
    measured(alone, tmp_path / "alone")
    both, one = values(tmp_path / "both"), values(tmp_path / "alone")
    name = "inner-l2-0.4-rounds1-seed0-epochs0-measured-walk-macs.json"
    said = both[name]
    assert said == one[name] and said["dense"] == both["dense-seed0.json"]["dense"]
    assert said["gone"]["macs"] == said["report"]["reached"] and said["fidelity"].keys() >= {"as cut"}
    spent = json.loads((tmp_path / "both" / name).read_text())["seconds"]
    assert spent.keys() >= {"discover", "score", "losses", "repair"} and spent["losses"] > 0


def test_a_quick_dense_model_is_another_one(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"criteria": ["l2"], "reductions": [0.5]}
    grids = [Grid(network="sst2-minilm", **shared, quick_dense=quick) for quick in (False, True)]
    one, other = (cells(grid)[0] for grid in grids)
    assert other == {**one, "quick_dense": True} and file_name(one) != file_name(other)
    assert task_of(grids[1]).options == {"quick": True} and not task_of(grids[0]).options
    for number, grid in enumerate(grids):
        (tmp_path / f"{number}.yaml").write_text(grid.to_yaml())
    with pytest.raises(ConfigError, match="of sst2-minilm, sst2-minilm --quick"):
        read_suite(str(tmp_path))
