"""The house rules: who imports whom, the public surface, the tables, no pickle."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cria_prune
import tables

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cria_prune"
BASE = {"base", "config"}
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "config": {"base"},
    "structure": BASE,
    "graph": {"base"},
    "spectrum": {"base", "graph"},
    "recording": BASE | {"structure", "graph"},
    "criteria": BASE | {"structure", "graph", "spectrum", "recording"},
    "vanilla": BASE | {"structure"},
    "planning": BASE | {"structure", "vanilla"},
    "surgery": BASE | {"structure", "planning"},
    "repair": BASE | {"structure", "graph", "planning"},
    "recovery": BASE | {"resume"},  # its store alone, see below
    "result": BASE | {"structure", "graph", "planning", "surgery", "repair"},
    "resume": BASE | {"graph", "planning", "repair", "result", "spectrum", "structure", "surgery"},
    "memory": BASE | {"structure", "graph", "recording", "criteria", "repair"},
    "stages": BASE
    | {"result", "structure", "recording", "graph", "spectrum", "criteria", "planning", "surgery", "repair"},
    "scores": BASE | {"resume", "stages", "spectrum", "structure"},
    "latency": BASE | {"structure", "planning", "surgery"},
    "measured": BASE | {"latency", "planning", "repair", "stages", "structure"},
    "pipeline": BASE
    | {"criteria", "latency", "measured", "planning", "result", "resume", "scores", "stages"},
    "ablation": BASE | {"stages", "structure", "planning", "surgery"},
    "torch_pruning": BASE | {"stages", "criteria", "spectrum", "structure"},
    "deploy": BASE | {"latency", "repair"},
    "tasks": BASE | {"recovery"},
    "recipes": BASE | {"recovery", "tasks"},
    "artifact": BASE | {"planning", "repair", "resume", "scores", "structure", "surgery", "tasks", "vanilla"},
    "report": BASE | {"artifact", "graph", "planning", "recipes", "repair", "result", "resume", "spectrum"},
    "offload": BASE
    | {"artifact", "criteria", "planning", "recording", "repair", "result", "resume", "spectrum", "stages"}
    | {"structure", "surgery", "tasks"},
    "bench": BASE
    | {"artifact", "criteria", "measured", "pipeline", "planning", "recipes", "recovery", "repair", "result"}
    | {"resume", "scores", "stages", "structure", "tasks"},
    "cli": BASE
    | {
        "ablation",
        "artifact",
        "bench",
        "criteria",
        "deploy",
        "measured",
        "memory",
        "offload",
        "pipeline",
        "planning",
        "recipes",
    }
    | {"recording", "recovery", "repair", "report", "result", "scores", "stages", "structure", "tasks"},
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
    for path in (*modules("recovery"), *modules("scores")):
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
    *[
        "CRITERIA",
        "CriaError",
        "Fidelity",
        "LoadedCheckpoint",
        "Plan",
        "PlanConfig",
        "Prepared",
        "PruneConfig",
    ],
    *["PruneResult", "RecordConfig", "RecoverConfig", "ScoreConfig", "Scored", "UnitGroup", "UnitGroups"],
    *[
        "ablate",
        "apply",
        "discover",
        "export_onnx",
        "fidelity",
        "load",
        "load_scores",
        "make_batches",
        "plan",
        "predict_memory",
        "prepare",
        "preset",
    ],
    *["prune", "prune_offloaded", "record", "recover", "register_criterion"],
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


# Who reaches whom: by names where they are defined, through no other module, in no circle.

STAGE_FUNCTIONS = {
    "cria_prune.structure.discovery.discover": "discover",
    "cria_prune.surgery.trial.settle": "discover",
    "cria_prune.recording.collect.record": "record",
    "cria_prune.criteria.score.score": "score",
    "cria_prune.planning.plan.plan": "plan",
    "cria_prune.repair.consumers.compensate": "repair",
    "cria_prune.surgery.removal.apply": "cut",
    "cria_prune.surgery.verify.Reference": "verify",
    "cria_prune.surgery.verify.verify": "verify",
    "cria_prune.repair.norms.remeasure": "batch norms",
    "cria_prune.repair.fidelity.comparable": "fidelity",
}
"""Function -> its stage."""


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def defined(tree: ast.Module) -> set[str]:
    """Return the names that a module makes itself: functions, classes, values; nothing that it imports."""
    found, waiting = set[str](), list[ast.AST](tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting.extend(ast.iter_child_nodes(node))
    return found


DEFINED = {name: defined(tree) for name, tree in TREES.items()}


def imported(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Yield (module, name in it, name here) of what is imported from the package, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cria_prune":
            yield from ((str(node.module), item.name, item.asname or item.name) for item in node.names)
        elif isinstance(node, ast.Import):
            for item in node.names:
                if item.name.split(".")[0] == "cria_prune":
                    yield item.name, "", item.asname or item.name


def origin(module: str, name: str) -> str:
    """Return the full name of where a package's name is defined: `plan.Plan` is `plan.plan.Plan`."""
    for source, theirs, here in imported(TREES[module]) if module in PACKAGES else ():
        if here == name and source != module:
            return origin(source, theirs)
    return f"{module}.{name}"


def reached(tree: ast.AST) -> set[str]:
    """Return the modules that a module imports, wherever in it."""
    found = set()
    for module, name, _ in imported(tree):
        whole = f"{module}.{name}"
        found.add(whole if whole in TREES else module)
    return found


def taken_from_elsewhere(module: str, tree: ast.AST) -> list[str]:
    """Return what a module imports from another one that only imports it itself."""
    return [
        f"{module} takes {name} from {source}, which only imports it"
        for source, name, _ in imported(tree)
        if name and source not in PACKAGES
        if name not in DEFINED[source] and f"{source}.{name}" not in TREES
    ]


def reached_through_others(module: str, tree: ast.AST) -> list[str]:
    """Return what a module reads off another one that does not define it: `pipeline.again`."""
    modules: dict[str, set[str]] = {}
    for source, name, here in imported(tree):
        modules.setdefault(here, set()).add(f"{source}.{name}".rstrip("."))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owners = modules.get(node.value.id, set()) & TREES.keys() - PACKAGES
            known = {f"{owner}.{node.attr}" for owner in owners} & TREES.keys()
            own = any(node.attr in DEFINED[owner] for owner in owners) or node.attr.startswith("__")
            if owners and not known and not own:
                found.append(f"{module} reaches {node.attr} through {', '.join(owners)}")
    return found


def test_every_name_is_imported_from_where_it_is_defined() -> None:
    wrong = ast.parse("from cria_prune.pipeline import rank")
    assert taken_from_elsewhere("x", wrong) == [
        "x takes rank from cria_prune.pipeline, which only imports it"
    ]
    assert not [text for module, tree in TREES.items() for text in taken_from_elsewhere(module, tree)]


def test_no_module_is_reached_through_another_one() -> None:
    wrong = ast.parse("from cria_prune import pipeline\npipeline.prune\npipeline.rank")
    assert reached_through_others("x", wrong) == ["x reaches rank through cria_prune.pipeline"]
    assert not [text for module, tree in TREES.items() for text in reached_through_others(module, tree)]


STAGES = {
    "cria_prune.stages": "it is the order",
    "cria_prune.offload.write": "repairs and cuts a folder layer by layer, where the stages do it in memory",
    "cria_prune.artifact.layers": "replays a plan on shapes and looks at what they then are: nothing is cut",
}
"""Who may know several stages, and why."""


def stages_known(module: str, tree: ast.AST) -> set[str]:
    """Return the stages whose functions a module imports, but for those of its own folder."""
    names = [origin(source, name) for source, name, _ in imported(tree)]
    room = f"{module.rpartition('.')[0]}."
    return {STAGE_FUNCTIONS[name] for name in names if name in STAGE_FUNCTIONS and not name.startswith(room)}


def test_only_the_stages_know_the_order() -> None:
    wrong = ast.parse(
        "from cria_prune.recording.collect import record\nfrom cria_prune.criteria.score import score"
    )
    assert stages_known("cria_prune.cli.x", wrong) == {"record", "score"}
    for module in TREES.keys() - PACKAGES - STAGES.keys():
        assert len(stages_known(module, TREES[module])) < 2, module


def circles(arrows: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the sets of modules that reach each other (Tarjan's strongly connected components)."""
    number, low, stack, found = dict[str, int](), dict[str, int](), list[str](), set[frozenset[str]]()

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1 or node in arrows.get(node, ()):
                found.add(frozenset(part))

    for node in sorted(arrows):
        if node not in number:
            visit(node)
    return found


def test_no_module_imports_itself_through_others() -> None:
    arrows = {module: reached(tree) for module, tree in TREES.items()}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == {frozenset("bc"), frozenset("d")}
    assert not circles(arrows)


def test_every_room_has_its_row() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES.values()}
    assert rooms - {"__init__", "__main__"} == MAY_IMPORT.keys()


BESIDE = {"end_to_end", "networks", "benchmarks", "support", "data"}
"""Folders of tests that are of no folder of the package: of all of it, of networks, of the benchmarks."""


def test_the_tests_stand_as_the_package_does() -> None:
    """`recording/test_collect_networks.py` is of `recording/collect.py`."""
    names = {
        str(path.relative_to(SOURCE).with_suffix("")): path for path in FILES.values() if path.name[0] != "_"
    }
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        inside = path.relative_to(ROOT / "tests")
        if inside.parts[0] in BESIDE or inside.name == "test_project.py":
            continue
        asked = str(inside.with_name(inside.stem.removeprefix("test_")))
        assert any(asked == name or asked.startswith(f"{name}_") for name in names), (
            f"{inside} is of no module"
        )


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_scripts_import_what_is_there(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        for module, name, _ in imported(ast.parse(path.read_text())):
            public = module == "cria_prune" and (name in PUBLIC or name == "__version__")
            there = name in DEFINED.get(module, ()) or f"{module}.{name}" in TREES or not name
            assert public or (module in TREES and there), f"{path.name}: {module}.{name}"
