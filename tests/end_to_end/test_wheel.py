"""The wheel alone: built, installed beside the packages that it requires and no other, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
VERSION = metadata.version("cria-prune")
SUITES = ROOT / "src" / "cria_prune" / "bench" / "suites"


def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, away from the clone."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of what the clone holds."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--no-index")
    done = run(clone, *pip, "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    assert done.returncode == 0, done.stderr
    (found,) = (clone / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, what it requires, and nothing else."""
    home = tmp_path_factory.mktemp("installed")
    assert run(home, sys.executable, "-m", "venv", "--without-pip", home).returncode == 0
    bin = home / "bin"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", bin / "python", "install")
    done = run(home, *pip, "--no-index", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (own,) = metadata.distributions(name="cria-prune", path=[str(site)])
    for name in required(own):
        link(metadata.distribution(name), site)
    return bin


def required(own: metadata.Distribution) -> set[str]:
    """Return the names of the packages that one requires without extras, and that these require."""
    names: set[str] = set()
    waiting = [own]
    while waiting:
        for text in waiting.pop().requires or []:
            wanted = Requirement(text)
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            if name not in names and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                names.add(name)
                waiting.append(metadata.distribution(name))
    return names


def link(package: metadata.Distribution, site: Path) -> None:
    """Put a package of this environment into another one."""
    for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(package.locate_file(top))))


def test_the_wheel_holds_types_and_suites(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        names = set(file.namelist())
    suites = {f"cria_prune/bench/suites/{path.relative_to(SUITES)}" for path in SUITES.glob("*/*.yaml")}
    assert suites and suites | {"cria_prune/py.typed", "cria_prune/report/page.html"} <= names
    assert {name.split("/")[0] for name in names} == {"cria_prune", f"cria_prune-{VERSION}.dist-info"}


SCRIPT = """
import json
from importlib.util import find_spec
import torch
from torch import nn
from cria_prune import CriaError, PruneConfig, __file__, discover, load, prune, recover, RecoverConfig, save

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
batches = [torch.randn(64, 8) for _ in range(4)]
result = prune(net, batches, PruneConfig(plan={"reduction": 0.5}))
save("small", result.model, result.plan, config=result.config)
again = load("small", model=net).model
same = torch.equal(again(batches[0]), result.model(batches[0]))
config = PruneConfig.from_text(result.config.to_json())

def said(call):
    try:
        call()
    except CriaError as error:
        return [isinstance(error, ImportError), str(error)]

from cria_prune.report.pictures import plot_widths
from cria_prune.bench.suite import read_suite
from cria_prune.cli.target import find
from cria_prune.recipes.registry import task

answer = {
    "file": __file__, "same": same, "reached": result.report["reached"], "config": config == result.config,
    "to yaml": said(result.config.to_yaml), "yaml": said(lambda: PruneConfig.from_text("verify: true")),
    "digits": said(lambda: list(task("digits").test_batches())), "suite": said(lambda: read_suite("digits")),
    "sst2": said(lambda: task("sst2-minilm").dense()),
    "plot": said(lambda: plot_widths({"0": (32, 16)})),
    "lora": said(lambda: recover(net, [(batches[0], torch.zeros(64).long())], RecoverConfig(lora=2))),
    "there": [name for name in ("matplotlib", "sklearn", "pyarrow", "PIL", "yaml", "transformers", "peft")
              if find_spec(name)],
}
print(json.dumps(answer))
"""
MISSING = {
    "to yaml": ("pyyaml", "recipes"),
    "yaml": ("pyyaml", "recipes"),
    "digits": ("scikit-learn", "recipes"),
    "suite": ("pyyaml", "recipes"),
    "sst2": ("transformers", "hf"),
    "plot": ("matplotlib", "report"),
    "lora": ("peft", "lora"),
}


def test_it_prunes_saves_and_loads_and_names_the_extra_of_what_is_missing(
    installed: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, installed / "python", "-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["file"]).is_relative_to(installed.parent) and answer["there"] == []
    assert answer["same"] and answer["config"] and abs(answer["reached"] - 0.5) < 0.05
    assert (tmp_path / "small" / "model.safetensors").is_file()
    for name, (package, extra) in MISSING.items():
        is_import_error, text = answer[name]
        assert is_import_error, name
        assert f"{package} is not installed. Install it with pip install 'cria-prune[{extra}]'" in text, text


def test_the_command_names_the_extra(installed: Path, tmp_path: Path) -> None:
    done = run(tmp_path, installed / "cria", "run", "digits", "--output", "out", "--quiet")
    assert done.returncode == 2 and "pip install 'cria-prune[recipes]'" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    done = run(tmp_path, installed / "cria", "--version")
    assert (done.returncode, done.stderr) == (0, "") and VERSION in done.stdout
