"""The house rules: who imports whom, the public surface, the tables, no pickle."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import cria_prune
import tables

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cria_prune"
BASE = {"attention", "errors", "config", "batches", "dispatched", "progress", "modules", "loss", "metrics"}
BASE |= {"base", "ranks"}
MAY_IMPORT: dict[str, set[str]] = {
    "base": {"errors"},
    "structure": BASE,
    "graph": {"errors"},
    "spectrum": {"base", "errors", "graph"},
    "record": BASE | {"structure", "graph"},
    "criteria": BASE | {"structure", "graph", "spectrum", "record"},
    "plan": BASE | {"structure"},
    "surgery": BASE | {"structure", "plan", "graph"},
    "vanilla": BASE | {"structure"},
    "recover": BASE | {"resume"},  # its store alone, see below
    "artifact": BASE
    | {"scored", "plan", "surgery", "tasks", "structure", "vanilla", "graph", "spectrum"}
    | {"resume", "result"},
    "tasks": BASE | {"recover"},
    "bench": BASE
    | {"pipeline", "criteria", "recover", "tasks", "artifact", "structure", "plan"}
    | {"resume"},
    "result": BASE | {"structure", "plan", "surgery", "graph"},
    "memory": BASE | {"structure", "graph", "record", "criteria"},
    "scored": BASE | {"graph", "resume", "spectrum", "structure"},
    "resume": BASE | {"graph", "plan", "result", "spectrum", "structure", "surgery"},
    "one_round": BASE
    | {"criteria", "graph", "plan", "record", "result", "scored", "spectrum", "structure", "surgery"},
    "pipeline": BASE
    | {
        "criteria",
        "given",
        "one_round",
        "plan",
        "result",
        "resume",
        "scope",
        "scored",
        "structure",
        "surgery",
    },
    "scoring": BASE
    | {"pipeline", "one_round", "criteria", "scope", "scored", "record", "structure", "spectrum"},
    "offload": BASE
    | {
        "pipeline",
        "one_round",
        "criteria",
        "resume",
        "artifact",
        "graph",
        "plan",
        "record",
        "result",
        "scope",
        "spectrum",
        "structure",
        "surgery",
        "tasks",
    },
    "ablated": {"metrics"},
    "ablation": BASE | {"ablated", "structure", "plan", "surgery"},
    "torch_pruning": BASE | {"pipeline", "scoring", "spectrum", "torch_pruning_cuts"},
    "torch_pruning_cuts": BASE | {"structure"},
    "cli": BASE
    | {"memory"}
    | {"pipeline", "artifact", "tasks", "recover", "plan", "structure", "criteria", "record", "scope"}
    | {"bench", "scored", "scoring", "ablated", "ablation", "offload", "one_round"},
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


def test_of_what_is_resumed_a_fine_tune_knows_the_store_alone() -> None:
    for path in (*modules("recover"), *modules("scored")):
        found = {name for name in imports(path) if name.startswith("cria_prune.resume")}
        assert found <= {"cria_prune.resume.store"}, path


def test_the_number_side_knows_no_network() -> None:
    for path in (*modules("graph"), *modules("spectrum")):
        assert "torch.nn" not in path.read_text() and "import nn" not in path.read_text(), path


def test_nothing_pickles_or_asserts_for_users() -> None:
    for path in modules("."):
        names = imports(path)
        assert not names & {"pickle", "shelve", "marshal", "dill", "joblib"}, path
        assert not re.search(r"torch\.(save|load)\(|trust_remote_code\s*=\s*True", path.read_text()), path


def test_an_option_is_spelled_in_one_place() -> None:
    """Others name its field: the command line is made from that."""
    places: dict[str, list[str]] = {}
    for path in modules("."):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"--[a-z][a-z-]*", str(node.value)):
                places.setdefault(node.value, []).append(f"{path.name}:{node.lineno}")
    assert "--reduction" in places
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_a_choice_stands_in_one_place() -> None:
    """Its texts too: the reports, the tables and the bench take them from the configuration."""
    found = [path.name for path in modules(".") if "parameters without embeddings" in path.read_text()]
    assert found == ["config.py"]


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
    *["prune_offloaded", "record", "recover", "register_criterion"],
    *["save", "save_padded", "save_pretrained", "save_scores", "score", "score_once", "verify", "watch"],
]


def test_every_table_is_what_the_result_files_say() -> None:
    written = tables.pages()
    assert {
        "README.md",
        "docs/results.md",
        "docs/coverage.md",
        "docs/transformers.md",
        "docs/scale.md",
    } <= set(written)
    for page, text in written.items():
        assert (ROOT / page).read_text() == text, page


def test_result_files_name_their_origin() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        origin = json.loads(path.read_text())["provenance"]
        assert origin["commit"] and origin["dirty"] is False and origin["seed"] is not None, path
