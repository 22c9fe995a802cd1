"""Checkpoints: the same numbers come back, and every damaged file is told by what was found."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cria_prune.artifact import checkpoint, rebuild
from cria_prune.artifact.checkpoint import load, save
from cria_prune.artifact.rebuild import provenance
from cria_prune.base.errors import ArtifactError, StructureError
from cria_prune.base.files import atomic, new_folder, sha256, write_text
from cria_prune.config import PlanConfig
from cria_prune.planning.plan import Plan, compose, identity_plan, make_plan
from cria_prune.structure.groups import ParameterSlice, UnitGroup, UnitGroups, shrink


class Net(nn.Module):
    """Two layers, a batch norm with an integer buffer, and a tied weight with two names."""

    def __init__(self, inputs: int = 5, hidden: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.last = nn.Linear(hidden, 3)
        self.tied = nn.Linear(hidden, 3, bias=False)
        self.tied.weight = self.last.weight

    def forward(self, x):
        hidden = torch.relu(self.norm(self.first(x)))
        return self.last(hidden) + self.tied(hidden)


def groups_of(model: Net) -> UnitGroups:
    units = np.arange(model.first.out_features)[:, None]
    slices = [ParameterSlice("first.weight", 0, units, "produces")]
    names = ("first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    slices += [ParameterSlice(name, 0, units, "follows") for name in names]
    slices.append(ParameterSlice("last.weight", 1, units, "consumes"))
    group = UnitGroup("first", "neuron", len(units), len(units), tuple(slices))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return UnitGroups((group,), shapes, tuple(dict(model.named_parameters())), {})


def cut(model: nn.Module, plan: Plan) -> Net:
    """A small surgery for Net: build it narrow, copy the kept slices."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for item in plan.cuts:
        if item.dim >= state[item.tensor].ndim or state[item.tensor].shape[item.dim] != item.size:
            raise StructureError("Cutting", f"{item.tensor!r} is {tuple(state[item.tensor].shape)}", "Stop")
        state[item.tensor] = state[item.tensor].index_select(item.dim, torch.tensor(item.kept))
    state["tied.weight"] = state["last.weight"]
    smaller = Net(state["first.weight"].shape[1], len(plan.kept["first"]))
    smaller.load_state_dict(state)
    return smaller


@pytest.fixture(autouse=True)
def small_surgery(monkeypatch):
    monkeypatch.setattr(rebuild, "apply", cut)
    models = types.ModuleType("cria_prune.tasks.models")
    models.ARCHITECTURES = {"net": Net}
    monkeypatch.setitem(sys.modules, "cria_prune.tasks.models", models)


def pruned(seed: int = 0) -> tuple[Net, Plan]:
    torch.manual_seed(seed)
    dense = Net()
    dense(torch.randn(16, 5))
    plan = make_plan(groups_of(dense), {"first": [0, 2, 5]}, {"asked": 0.5})
    return cut(dense, plan), plan


@pytest.fixture
def folder(tmp_path) -> Path:
    model, plan = pruned()
    return save(tmp_path / "saved", model, plan, architecture="net")


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(tmp_path):
    model, plan = pruned()
    results = {"accuracy": 0.5}
    where = save(
        tmp_path / "a" / "b",
        model,
        plan,
        architecture="net",
        config=PlanConfig(reduction=0.25),
        provenance=provenance(3),
        results=results,
    )
    assert sorted(entry.name for entry in where.iterdir()) == ["manifest.json", "model.safetensors"]
    again = load(where)
    assert again.plan == plan and same_state(again.model, model)
    assert again.manifest["results"] == results and again.manifest["provenance"]["seed"] == 3
    assert PlanConfig(**again.manifest["config"]) == PlanConfig(reduction=0.25)
    x = torch.randn(4, 5)
    assert not again.model.training and torch.equal(again.model(x), model.eval()(x))
    assert again.model.tied.weight is again.model.last.weight
    assert again.manifest["aliases"] == {"tied.weight": "last.weight"}
    assert "tied.weight" not in load_file(where / "model.safetensors")


def test_the_callers_dense_model_is_not_touched(folder):
    dense = Net()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    loaded = load(folder, dense)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert dense.training and loaded.model is not dense
    assert loaded.model.first.weight.data_ptr() != dense.first.weight.data_ptr()


def test_a_surgery_that_returns_its_argument_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(rebuild, "apply", lambda model, plan: model)
    dense, other = Net(), Net()
    where = save(tmp_path / "x", other, identity_plan(groups_of(dense)), architecture=None)
    before = dense.first.weight.clone()
    assert same_state(load(where, dense).model, other)
    assert torch.equal(dense.first.weight, before)


def test_two_rounds_load_by_the_composed_plan(tmp_path):
    torch.manual_seed(1)
    dense = Net()
    groups = groups_of(dense)
    first = make_plan(groups, {"first": [1, 2, 3, 6]})
    second = make_plan(shrink(groups, first.kept), {"first": [0, 3]})
    smaller = cut(cut(dense, first), second)
    loaded = load(save(tmp_path / "x", smaller, compose(first, second), architecture="net"))
    assert same_state(loaded.model, smaller) and loaded.plan.kept["first"] == (1, 6)


def test_views_of_one_storage_are_written(tmp_path):
    model, plan = pruned()
    storage = torch.randn(2 * 3 * 5)
    model.first.weight = nn.Parameter(storage[:15].view(5, 3).t())
    model.first.bias = nn.Parameter(storage[3:6])
    assert same_state(load(save(tmp_path / "x", model, plan, architecture="net")).model, model)


def test_nothing_is_pickled(folder, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(torch, "save", never)
    load(folder)


def test_only_the_two_files_are_opened(folder, monkeypatch):
    """A manifest that names paths everywhere leads nowhere else."""
    edit(folder, lambda m: m.update(config={"path": "/etc/passwd"}, weights="../../other.safetensors"))
    opened, real = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(file) or real(file, *a, **k))
    load(folder)
    assert {Path(file).name for file in opened if not isinstance(file, int)} <= {
        "model.safetensors",
        "manifest.json",
    }


# What is refused when saving


def test_a_folder_with_files_is_not_overwritten(folder):
    model, plan = pruned(seed=1)
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    with pytest.raises(
        ArtifactError, match=r"not empty \(manifest.json, model.safetensors\).*overwrite=True"
    ):
        save(folder, model, plan, architecture="net")
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
    (folder / "notes.txt").write_text("mine")
    save(folder, model, plan, architecture="net", overwrite=True)
    assert same_state(load(folder).model, model)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ArtifactError, match="found a file of that name"):
        new_folder(tmp_path / "x", overwrite=True)
    with pytest.raises(ArtifactError, match="the system refused"):
        new_folder(tmp_path / "x" / "y")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.zeros(1)])
def test_results_that_are_no_json_leave_nothing_behind(tmp_path, value):
    model, plan = pruned()
    with pytest.raises(ArtifactError, match="is no JSON"):
        save(tmp_path / "x", model, plan, architecture="net", results={"accuracy": value})
    assert not (tmp_path / "x").exists()


def test_tensors_without_values(tmp_path):
    with pytest.raises(ArtifactError, match=r"'first.weight'.*without plain values"):
        save(tmp_path / "x", Net().to("meta"), pruned()[1], architecture="net")


def test_a_full_disk_for_real(tmp_path):
    """The system refuses to let any file grow beyond 64 kB, as a full disk would."""
    big = nn.Linear(200, 200)
    plan = Plan({}, {}, (), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(ArtifactError, match="the system refused"):
            save(tmp_path / "x", big, plan, architecture=None)
        with pytest.raises(ArtifactError, match="the system refused"):
            write_text(tmp_path / "long.txt", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any((tmp_path / "x").iterdir())
    assert not (tmp_path / "long.txt").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refused_write_keeps_the_old_file(tmp_path, monkeypatch, call):
    write_text(tmp_path / "a.txt", "old")

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ArtifactError, match="Read-only file system"):
        write_text(tmp_path / "a.txt", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_an_interrupted_write_leaves_no_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


# What is refused when loading


def edit(folder: Path, change) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def rewrite(folder: Path, change, keep_hash: bool = False) -> None:
    """Write other weights, and unless told otherwise the hash that belongs to them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if not keep_hash:
        edit(folder, lambda m: m.update(sha256=sha256(folder / "model.safetensors")))


def to_both(folder: Path, name: str, value: torch.Tensor) -> None:
    """A consistent pair of files whose tensor is not the architecture's."""
    rewrite(folder, lambda t: t.update({name: value}))
    edit(folder, lambda m: m["tensors"].update({name: checkpoint.describe(value)}))


def weights(folder):
    return folder / "model.safetensors"


DAMAGE = {
    "no folder": (lambda f: os.rename(f, f.with_name("moved")), "No such file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "No such file"),
    "no weights": (lambda f: weights(f).unlink(), "No such file"),
    "truncated manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:-50]),
        "it is no JSON",
    ),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\x80\x04\x95"), "it is no JSON"),
    "deep manifest": (lambda f: (f / "manifest.json").write_text("[" * 200_000), "it is no JSON"),
    "foreign manifest": (
        lambda f: (f / "manifest.json").write_text('{"model_type": "bert"}'),
        "not the manif",
    ),
    "list as manifest": (lambda f: (f / "manifest.json").write_text("[]"), "not the manifest"),
    "newer version": (
        lambda f: edit(f, lambda m: m.update(version=2)),
        "found format version 2, this Cria reads 1",
    ),
    "no plan": (lambda f: edit(f, lambda m: m.pop("plan")), "'plan' is missing"),
    "tensors a list": (
        lambda f: edit(f, lambda m: m.update(tensors=[])),
        "'tensors' is missing or of the wrong",
    ),
    "damaged plan": (lambda f: edit(f, lambda m: m["plan"]["kept"].update(first=[9])), "the size is 7"),
    "plan of another net": (
        lambda f: edit(f, lambda m: m["plan"]["cuts"][0].update(size=9)),
        r"Replaying the plan on Net: the plan does not fit it .*'first.weight' is \(7, 5\)",
    ),
    "truncated weights": (lambda f: os.truncate(weights(f), 100), "its SHA-256 is"),
    "one bit": (
        lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-1] + b"\x55"),
        r"its SHA-256 is .{12}\.\.\., the manifest says",
    ),
    "pickle as weights": (
        lambda f: (
            weights(f).write_bytes(pickle.dumps([1])),
            edit(f, lambda m: m.update(sha256=sha256(weights(f)))),
        ),
        "it is no safetensors file",
    ),
    "unknown architecture": (
        lambda f: edit(f, lambda m: m.update(architecture="os.system")),
        "known are net",
    ),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop("first.bias")),
        "'first.bias' only in the manifest",
    ),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(more=torch.ones(1))), "'more' only in the file"),
    "shape in the file": (
        lambda f: rewrite(f, lambda t: t.update({"first.bias": torch.ones(4)})),
        r"'first.bias' is .*\[3\].* in the manifest, .*\[4\].* in the file",
    ),
    "type in the file": (
        lambda f: rewrite(f, lambda t: t.update({"first.bias": torch.ones(3, dtype=torch.float64)})),
        "'first.bias' is .*float32.* in the manifest, .*float64.* in the file",
    ),
    "shape in both": (
        lambda f: to_both(f, "first.bias", torch.ones(4)),
        r"'first.bias' is .*\[4\].* in the checkpoint, .*\[3\].* in the pruned architecture",
    ),
    "type in both": (
        lambda f: to_both(f, "first.bias", torch.ones(3, dtype=torch.float16)),
        "float16.* in the checkpoint, .*float32",
    ),
    "extra in both": (lambda f: to_both(f, "more", torch.ones(1)), "'more' only in the checkpoint"),
    "alias of nothing": (
        lambda f: edit(f, lambda m: m["aliases"].update({"tied.weight": "x"})),
        "another name of",
    ),
    "alias of a list": (
        lambda f: edit(f, lambda m: m["aliases"].update({"tied.weight": []})),
        "another name of",
    ),
    "alias unknown": (lambda f: edit(f, lambda m: m["aliases"].update(z="last.weight")), "another name of"),
    "null tensor": (
        lambda f: edit(f, lambda m: m["tensors"].update({"first.bias": None})),
        "is None in the manif",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(folder, name):
    change, text = DAMAGE[name]
    load(folder)
    change(folder)
    with pytest.raises(ArtifactError, match=text):
        load(folder)


def test_the_wrong_dense_model(folder):
    with pytest.raises(ArtifactError, match="the plan does not fit it"):
        load(folder, Net(hidden=9))
    with pytest.raises(ArtifactError, match=r"'first.weight' is .*\[3, 5\].*in the pruned architecture"):
        load(folder, Net(inputs=6))


def test_without_a_named_architecture_the_model_is_needed(tmp_path):
    model, plan = pruned()
    where = save(tmp_path / "x", model, plan, architecture=None)
    with pytest.raises(ArtifactError, match=r"names None.*Pass an instance of the dense architecture"):
        load(where)
    assert same_state(load(where, Net()).model, model)


# Provenance


def test_provenance():
    found = provenance(7, command=["cria", "prune"], data_fingerprint="abc", device="cpu")
    assert json.loads(json.dumps(found)) == found
    assert (found["seed"], found["command"], found["data"], found["device"]) == (
        7,
        ["cria", "prune"],
        "abc",
        "cpu",
    )
    assert found["torch"] == torch.__version__ and found["time"].endswith("+00:00")
    assert found["commit"] is None or len(found["commit"]) == 40
    text = json.dumps(found)
    assert str(Path.cwd()) not in text and str(Path.home()) not in text


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = provenance(None)
    assert found["commit"] is None and found["dirty"] is None


def test_a_result_is_dirty_when_code_differs_not_when_results_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cria_prune.artifact.rebuild import provenance as module

    place = sys.modules["cria_prune.artifact.rebuild"]
    code, result = tmp_path / "code.py", tmp_path / "result.json"
    for path in (code, result):
        path.write_text("1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(place, "__file__", str(code))
    result.write_text("2\n")
    assert module(seed=0)["dirty"] is False
    code.write_text("2\n")
    assert module(seed=0)["dirty"] is True
