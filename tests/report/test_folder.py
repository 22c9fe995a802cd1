"""`cria report`: a page of a run or a bench, from the files in its folder alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.end_to_end.test_commands import error
from tests.report.test_run_page import NASTY, check
from torch import nn

from cria_prune import PruneConfig, prune, save
from cria_prune.base.errors import ArtifactError, ConfigError
from cria_prune.graph.graph import Graph, NeuronGraphs
from cria_prune.report.bench_page import read_bench
from cria_prune.report.folder import RUN, TENSORS, folder_page, read_run, write_run
from cria_prune.result import Round


def words(page: str) -> str:
    return " ".join(" ".join(check(page).words).replace("\xa0", " ").split())


def ring(units: int, ridge: float = 0.1) -> Graph:
    rows, cols = torch.arange(units - 1), torch.arange(1, units)
    rows, cols = torch.cat([rows, torch.tensor([0])]), torch.cat([cols, torch.tensor([units - 1])])
    return Graph(units, rows, cols, torch.ones(units, dtype=torch.float64), ridge)


def a_round(number: int, name: str, units: int, kept: tuple[int, ...], diagnosis: dict) -> Round:
    scores = tuple(map(float, range(units)))
    return Round(
        number, {"parameters": 10.0}, {"score": 0.5}, {name: scores}, {name: kept}, {name: diagnosis}, None,
        math.nan,
    )  # fmt: skip


def a_run(folder: Path, name: str = "hidden", diagnosis: tuple[dict, dict] | None = None, **page) -> dict:
    """Two rounds: 8 units, of which 7 and then 5 are left; unit 1 is dead."""
    solved, unsolved = diagnosis or ({"values": [4.0, 2.0], "status": "converged"}, {"values": []})
    rounds = [
        a_round(1, name, 8, (1, 2, 3, 4, 5, 6, 7), solved),
        a_round(2, name, 7, (0, 3, 4, 5, 6), unsolved),
    ]
    live = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    said = {
        "title": "A run",
        "metric": "accuracy",
        "rounds": [{"round": 1, "parameters": 10, "metric": math.nan}],
        "widths": {name: [8, 5]},
        "provenance": {"commit": "abc"},
        **page,
    }
    write_run(folder, said, rounds, {name: NeuronGraphs(live, ring(7), ring(7, 0.5))})
    return said


def ablation(**changed) -> dict:
    curve = [[0.0, [0.9, 0.9]], [0.5, [0.5, 0.7]]]
    return {
        "metric": "accuracy",
        "dense": 0.9,
        "criterion": "innovation",
        "curves": {"lowest": curve, "highest": curve, "random": [[0.0, [0.9]]]},
        "provenance": {"commit": "fed"},
        **changed,
    }


# What a run keeps


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [RUN, TENSORS]
    found = read_run(tmp_path)
    page, rounds, graphs = found.page, found.rounds, found.graphs
    assert page["widths"] == {"hidden": (8, 5)} and page["title"] == "A run"
    assert page["rounds"][0]["metric"] is None  # JSON has no NaN
    assert [item.scores["hidden"] for item in rounds] == [(*range(8),), (*range(7),)]
    assert rounds[1].kept["hidden"] == (0, 3, 4, 5, 6)
    both = graphs["hidden"]
    assert both.units.tolist() == [0, 2, 3, 4, 5, 6, 7] and both.output.ridge == 0.5
    assert torch.equal(both.input.dense_laplacian(), ring(7).dense_laplacian())


def test_no_run_is_none(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    a_run(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in (RUN, TENSORS)]
    a_run(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in (RUN, TENSORS)] == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: "[]", "it is not what a run of Cria keeps"),
        (lambda run: "{", "it is damaged"),
        (lambda run: json.dumps(run | {"version": 9}), "found format version 9"),
        (lambda run: json.dumps(run | {"sha256": "0"}), "run.tensors beside it is missing or another"),
        (lambda run: json.dumps(run | {"ridges": {"other": [1, 1]}}), "it is damaged"),
        (lambda run: json.dumps(run | {"groups": []}), "it is damaged"),
        (
            lambda run: json.dumps(run | {"page": run["page"] | {"widths": {"a": "b"}}}),
            "'widths.a' is damaged",
        ),
        (lambda run: json.dumps(run | {"page": {"title": [1]}}), "'title' is damaged"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, change, said: str) -> None:
    a_run(tmp_path)
    (tmp_path / RUN).write_text(change(json.loads((tmp_path / RUN).read_text())))
    with pytest.raises(ArtifactError, match=said):
        folder_page(tmp_path)


def test_edges_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    bad = Graph(7, torch.tensor([0]), torch.tensor([7]), torch.ones(1, dtype=torch.float64), 0.1)
    write_run(tmp_path, {}, [], {"hidden": NeuronGraphs(torch.arange(7), bad, bad)})
    with pytest.raises(ArtifactError, match="no graph of 7 units"):
        read_run(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    a_run(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / RUN).symlink_to(tmp_path / "there" / RUN)
    with pytest.raises(ArtifactError, match="neither a run"):
        folder_page(tmp_path / "here")


# The page of a run


def test_the_page_of_a_run(tmp_path: Path) -> None:
    a_run(tmp_path)
    found = folder_page(tmp_path)
    assert (found.kind, found.layer) == ("run", "hidden")
    text = words(found.html)
    for piece in (
        "Scores of the last round Units by score",
        "hidden 5 of 7 stay",
        "largest z 4 One layer: hidden",
        "before the activation 7 neurons, 7 edges",
        "In no graph: 1 dead unit (constant after the activation)",
        "round 1 7 of 8 stay",
        "round 2 5 of 7 stay",
        "No ablation.json lies in this folder",
    ):
        assert piece in text, piece


def test_the_removed_neurons_are_those_that_left_in_any_round(tmp_path: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        "cria_prune.report.run_page.plot_neuron_graph", lambda graph, gone, ax: seen.append(gone)
    )
    a_run(tmp_path)
    folder_page(tmp_path)
    # Units 0, then 2 and 3 (places 1 and 2 of those left) went; they are nodes 0, 1 and 2: 1 is dead.
    assert seen == [[0, 1, 2]] * 2


def test_a_spectrum_that_was_not_solved_comes_from_the_kept_graphs(tmp_path: Path) -> None:
    a_run(tmp_path, diagnosis=({"values": []}, {"values": []}))
    # The graphs are alike but for the ridge: the largest z has the eigenvector of the largest eigenvalue.
    top = float(torch.linalg.eigvalsh(ring(7, 0.0).dense_laplacian()).max())
    assert f"largest z {(top + 0.1) / (top + 0.5):.4g}" in words(folder_page(tmp_path).html)


def test_ablation_curves(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "ablation.json").write_text(json.dumps(ablation()))
    text = words(folder_page(tmp_path).html)
    assert "criterion innovation" in text and "lowest 2, highest 2, random 1" in text and "fed" in text
    assert "(criterion innovation), without repair, no training after it" in text  # a file of before
    assert "No ablation.json" not in text
    (tmp_path / "ablation.json").write_text(json.dumps(ablation(repair="once")))
    assert "(criterion innovation), repaired at once, no training" in words(folder_page(tmp_path).html)
    (tmp_path / "ablation.json").write_text(json.dumps(ablation(curves={"lowest": [[0.5, ["x"]]]})))
    with pytest.raises(ArtifactError, match=r"'curves\.lowest\.0\.1\.0' is damaged"):
        folder_page(tmp_path)


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    a_run(tmp_path)
    with pytest.raises(ConfigError, match=r"there is none of that name.*Known layers: hidden"):
        folder_page(tmp_path, "none")


def test_names_are_escaped(tmp_path: Path) -> None:
    a_run(tmp_path, name=NASTY, title=NASTY)
    (tmp_path / "ablation.json").write_text(json.dumps(ablation(criterion=NASTY, metric=NASTY)))
    assert "<script" not in folder_page(tmp_path).html


def test_a_checkpoint_without_a_record_says_what_it_lacks(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    result = prune(net, [torch.randn(32, 4)], PruneConfig(plan={"reduction": 0.5, "rounds": 1}))
    save(tmp_path / "small", result.model, result.plan, results={"dense": 0.9})
    text = words(folder_page(tmp_path / "small").html)
    assert "No run.json lies in this folder" in text and "16 → " in text and "One layer" not in text


def test_graphs_are_kept_on_request() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    config = PruneConfig(plan={"reduction": 0.5, "rounds": 2})
    batches = [torch.randn(32, 4)]
    found = prune(net, batches, config, graphs=True)
    assert found.graphs["0"].input.units == len(found.graphs["0"].units) <= 16
    assert "graphs" in found.rounds[0].seconds and "graphs" not in found.rounds[1].seconds
    assert prune(net, batches, config).graphs is None
    blind = PruneConfig(plan={"reduction": 0.5, "rounds": 1}, score={"criterion": "l2"}, repair="none")
    assert prune(net, batches, blind, graphs=True).graphs == {}


# Benches


def a_cell(folder: Path, criterion="l2", reduction=0.5, seed=0, pruned=0.5, **more) -> None:
    extra = more.pop("extra", {"scope": "inner", "rounds": 4, "epochs": 0})
    cell = {"network": "net", "criterion": criterion, "reduction": reduction, "seed": seed, **extra}
    origin = {"commit": "c1", "time": f"2026-01-0{seed + 1}", "platform": "Linux", "cpus": 2, "dirty": False}
    content = {"cell": cell, "pruned": pruned, "report": {"reached": 0.51}, "provenance": origin, **more}
    number = len(list(folder.iterdir()))
    (folder / f"{number}.json").write_text(json.dumps(content))


def test_a_bench_of_one_seed(tmp_path: Path) -> None:
    a_cell(tmp_path, pruned=0.25)
    a_cell(tmp_path, criterion="random", pruned=0.125)
    (tmp_path / "dense.json").write_text(json.dumps({"dense": 0.9, "provenance": {"seed": 0}}))
    found = folder_page(tmp_path)
    text = words(found.html)
    assert found.kind == "bench"
    for piece in (
        "Bench: net",
        "2 cells: 2 criteria, asked to remove 50 %",
        "One seed per point (0): there are no intervals",
        "scope inner, 4 rounds, no recovery Dense: 90.00 %. Reached 51.00 %.",
        "Best first at 50 %. criterion 50 % l2 25.00 random 12.50",
    ):
        assert piece in text, piece
    assert "±" not in text and "After recovery" not in text


def test_a_bench_of_several_seeds_has_intervals(tmp_path: Path) -> None:
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        a_cell(tmp_path, seed=seed, pruned=value, recovered=0.9, seconds={"record": 1.0, "score": 2.0})
    a_cell(tmp_path, criterion="random", pruned=0.1, recovered=0.95)
    text = words(folder_page(tmp_path).html)
    # Student's t for 2 degrees of freedom at 97.5 %: 4.3027; times 0.1 / sqrt(3).
    assert "l2 60.00 ± 24.84" in text
    assert "1 to 3 seeds per point (0, 1, 2)" in text
    assert "random 10.00 (1) l2" in text  # best first after the recovery
    assert "2026-01-01 to 2026-01-03" in text and "commits c1" in text and "3.00" in text


def test_the_dense_figure_is_that_of_the_models_the_cells_start_from(tmp_path: Path) -> None:
    for seed, value in enumerate((0.9, 0.8, 0.9)):
        (tmp_path / f"dense{seed}.json").write_text(
            json.dumps({"dense": value, "provenance": {"seed": seed}})
        )
    for seed in (0, 2):
        a_cell(tmp_path, seed=seed)
        a_cell(tmp_path, seed=seed, extra={"dense_seed": 1, "tune": {"lr": 0.1, "distill": 0.5}})
    text = words(folder_page(tmp_path).html)
    assert "no recovery Dense: 90.00 %. Reached" in text  # of two models, as good as each other
    assert "dense model 1, tuned by distill 0.5, lr 0.1 Dense: 80.00 %. Reached" in text
    a_cell(tmp_path, extra={"dense_seed": "one"})
    assert "its 'cell.dense_seed' is damaged" in words(folder_page(tmp_path).html)


def test_settings_are_apart_and_those_with_recovery_come_first(tmp_path: Path) -> None:
    a_cell(tmp_path, extra={"epochs": 0, "rounds": 8, "odd": "x"})
    a_cell(tmp_path, extra={"epochs": 1, "rounds": 4, "quick": True}, recovered=0.5)
    text = words(folder_page(tmp_path).html)
    assert text.index("4 rounds, 1 epoch of recovery, quick training data") < text.index(
        "8 rounds, no recovery, odd x"
    )


def test_perplexities_are_no_per_cent_and_low_is_best(tmp_path: Path) -> None:
    a_cell(tmp_path, pruned=70.0, metric="perplexity-128")
    a_cell(tmp_path, criterion="better", pruned=60.0, metric="perplexity-128")
    assert "criterion 50 % better 60 l2 70" in words(folder_page(tmp_path).html)


def test_files_that_are_no_cells_are_named(tmp_path: Path) -> None:
    a_cell(tmp_path)
    a_cell(tmp_path, criterion="random", pruned=math.nan)
    (tmp_path / "timing.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"cell": {"criterion": 1}}')
    bench = read_bench(tmp_path)
    assert len(bench.cells) == 2
    assert bench.left == [
        "broken.json: it cannot be read",
        "odd.json: its 'cell.criterion' is damaged",
        "timing.json: no cell of a bench",
    ]
    assert "timing.json: no cell of a bench" in words(folder_page(tmp_path).html)


def test_names_in_a_bench_are_escaped(tmp_path: Path) -> None:
    a_cell(tmp_path, criterion=NASTY, metric=NASTY, extra={NASTY: NASTY}, provenance={"commit": NASTY})
    (tmp_path / "x.json").write_text("{}")
    page = folder_page(tmp_path).html
    check(page)
    assert "<script" not in page


def test_every_bench_of_the_project_has_a_page() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    check(folder_page(results / "llama-shakespeare").html)


# The command


def test_folders_that_are_neither(tmp_path: Path) -> None:
    assert "it does not exist. Give the folder that cria run" in error("report", str(tmp_path / "none"))
    (tmp_path / "file").write_text("x")
    assert "it is no folder" in error("report", str(tmp_path / "file"))
    (tmp_path / "family" / "reduced-20").mkdir(parents=True)
    assert "it holds neither a run" in error("report", str(tmp_path / "family"))
    a_run(tmp_path / "family" / "reduced-20")
    assert "Give one of the runs in it: reduced-20" in error("report", str(tmp_path / "family"))
    (tmp_path / "bench").mkdir()
    a_cell(tmp_path / "bench")
    assert "it is a bench. Leave out --layer" in error("report", str(tmp_path / "bench"), "--layer", "x")
