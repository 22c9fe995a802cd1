"""What the first second goes to: names are imported when they are asked for, and help needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import cria_prune
from cria_prune.cli.main import app

HEAVY = ("torch", "numpy", "scipy", "transformers", "matplotlib", "sklearn", "pyarrow", "yaml")
AFTER = f"""
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.__stdout__)
"""
COMMANDS = [item.name or item.callback.__name__ for item in app.registered_commands if item.callback]


def loaded(code: str) -> list[str]:
    """Return which heavy packages a fresh process has imported after some code."""
    words = [sys.executable, "-c", f"import json, sys\n{code}\n{AFTER}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_package_and_its_configurations_import_nothing_heavy() -> None:
    assert loaded("import cria_prune; assert cria_prune.__version__ and 'prune' in dir(cria_prune)") == []
    assert loaded("from cria_prune import CriaError, PruneConfig; PruneConfig.from_text('{}')") == []
    assert "torch" in loaded("import cria_prune; cria_prune.prune")  # it is seen where it is there


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([["--help"], *([name, "--help"] for name in COMMANDS)], 0),
        (
            [["--nope"], ["nope"], ["run"], ["prune", "x", "--redction", "1"], ["prune", "x", "--seed", "x"]],
            2,
        ),
        ([["--version"]], 0),
    ],
    ids=["help", "mistyped", "version"],
)
def test_the_command_answers_without_anything_heavy(asked: list[list[str]], expected: int) -> None:
    code = f"""
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from cria_prune.cli.main import main
for words in {asked!r}:
    sys.argv = ["cria", *words]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code
    assert code == {expected} and out.getvalue() + err.getvalue(), (words, code)
"""
    assert loaded(code) == []


def test_every_public_name_is_imported_lazily_and_no_module_takes_its_place() -> None:
    submodules = ("planning.budget", "recording.collect", "recovery.loop")
    code = f"""
import types
import {", ".join(f"cria_prune.{name}" for name in submodules)}
from cria_prune import pipeline
import cria_prune
for name in cria_prune.__all__:
    assert not isinstance(getattr(cria_prune, name), types.ModuleType), name
assert isinstance(pipeline, types.ModuleType) and cria_prune.pipeline is pipeline
names = {{}}
exec("from cria_prune import *", names)
assert set(cria_prune.__all__) <= set(names)
"""
    assert "torch" in loaded(code)
    assert set(cria_prune._HOMES) == set(cria_prune.__all__) <= set(dir(cria_prune))
    with pytest.raises(AttributeError, match="module 'cria_prune' has no attribute 'nothing'"):
        cria_prune.nothing  # noqa: B018
