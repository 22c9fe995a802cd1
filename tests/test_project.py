"""The house rules: who imports whom, the public surface, the README's code, no pickle."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import coverage_table
import cria_prune
import roundtrip_table
import scale_table
import tables

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cria_prune"
BASE = {"attention", "errors", "config", "batches", "dispatched", "progress", "modules", "loss", "metrics"}
BASE |= {"ranks", "store"}
MAY_IMPORT = {
    "structure": BASE,
    "graph": {"errors"},
    "spectrum": {"errors", "graph"},
    "record": BASE | {"structure", "graph"},
    "criteria": BASE | {"structure", "graph", "spectrum", "record"},
    "plan": BASE | {"structure"},
    "surgery": BASE | {"structure", "plan", "graph"},
    "vanilla": BASE | {"structure"},
    "recover": BASE,
    "artifact": BASE | {"scores", "plan", "surgery", "tasks", "structure", "vanilla", "graph", "spectrum"},
    "tasks": BASE | {"recover"},
    "bench": BASE
    | {"pipeline", "result", "stages", "criteria", "recover", "tasks", "artifact", "structure", "plan"},
    "result": BASE | {"structure", "plan", "surgery", "graph"},
    "memory": BASE | {"structure", "graph", "record", "criteria"},
    "scores": BASE | {"stages", "spectrum", "structure"},
    "scope": BASE | {"plan", "structure", "vanilla"},
    "rounds": BASE | {"graph", "plan", "result", "structure", "surgery"},
    "stages": BASE | {"criteria", "graph", "plan", "record", "scope", "spectrum", "structure", "surgery"},
    "pipeline": BASE | {"criteria", "plan", "result", "rounds", "scores", "stages"},
    "offload": BASE
    | {
        "stages",
        "criteria",
        "rounds",
        "artifact",
        "graph",
        "plan",
        "record",
        "result",
        "spectrum",
        "structure",
        "surgery",
        "tasks",
    },
    "ablated": {"metrics"},
    "ablation": BASE | {"ablated", "stages", "structure", "plan", "surgery"},
    "torch_pruning": BASE | {"stages", "criteria", "spectrum", "torch_pruning_cuts"},
    "torch_pruning_cuts": BASE | {"structure"},
    "cli": BASE
    | {"memory"}
    | {"pipeline", "artifact", "tasks", "recover", "plan", "structure", "criteria", "record"}
    | {"bench", "result", "scores", "stages", "ablated", "ablation", "offload"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def modules(folder: str) -> list[Path]:
    """Return the files of a folder, or the one module of that name beside `pipeline.py`."""
    alone = SOURCE / f"{folder}.py"
    return [alone] if alone.is_file() else sorted((SOURCE / folder).rglob("*.py"))


@pytest.mark.parametrize("stage", MAY_IMPORT)
def test_a_stage_imports_only_what_it_may(stage: str) -> None:
    assert modules(stage)
    for path in modules(stage):
        stages = {name.split(".")[1] for name in imports(path) if name.startswith("cria_prune.")}
        assert stages <= MAY_IMPORT[stage] | {stage}, path


def test_the_number_side_knows_no_network() -> None:
    for path in (*modules("graph"), *modules("spectrum")):
        assert "torch.nn" not in path.read_text() and "import nn" not in path.read_text(), path


def test_nothing_pickles_or_asserts_for_users() -> None:
    for path in modules("."):
        names = imports(path)
        assert not names & {"pickle", "shelve", "marshal", "dill", "joblib"}, path
        assert not re.search(r"torch\.(save|load)\(|trust_remote_code\s*=\s*True", path.read_text()), path


def test_public_names_are_frozen_and_documented() -> None:
    assert cria_prune.__all__ == sorted(cria_prune.__all__) == PUBLIC
    for name in cria_prune.__all__:
        item = getattr(cria_prune, name)
        assert not inspect.ismodule(item), f"{name} is a module"
        assert name == "CRITERIA" or inspect.getdoc(item), f"{name} has no docstring"


PUBLIC = [
    *["CRITERIA", "CriaError", "LoadedCheckpoint", "Plan", "PlanConfig", "PruneConfig"],
    *["PruneResult", "RecordConfig", "RecoverConfig", "ScoreConfig", "Scored", "UnitGroup", "UnitGroups"],
    *["ablate", "apply", "discover", "load", "load_scores", "plan", "predict_memory", "preset", "prune"],
    *["prune_offloaded", "record", "recover"],
    *["save", "save_padded", "save_pretrained", "save_scores", "score", "score_once", "verify"],
]


def test_the_first_python_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks and len(blocks[0].strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "small" / "model.safetensors").exists()


def test_every_table_is_what_the_result_files_say() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == tables.render()
    assert (ROOT / "docs" / "coverage.md").read_text() == coverage_table.render()
    assert (ROOT / "docs" / "transformers.md").read_text() == roundtrip_table.render()
    assert (ROOT / "docs" / "scale.md").read_text() == scale_table.render()
    text = (ROOT / "README.md").read_text()
    assert text == tables.readme(text)


def test_result_files_name_their_origin() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        origin = json.loads(path.read_text())["provenance"]
        assert origin["commit"] and origin["dirty"] is False and origin["seed"] is not None, path
