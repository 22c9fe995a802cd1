"""A network of the user's own: what its functions may look like, and what is said where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cria_prune.base.errors import ArtifactError, ConfigError, CriaError, DataError
from cria_prune.base.modules import digest
from cria_prune.tasks.own import (
    Evaluation,
    Loader,
    Objective,
    Own,
    OwnTask,
    metric_of,
    read_weights,
)

CODE = """
import itertools, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def batch(seed=0):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % 3
def make():
    print("made")
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
def steady():
    torch.manual_seed(5)
    return make()
def wide(width, depth, bias=True): return make()
def endless(): return (batch(seed) for seed in itertools.count())
def none(): return []
def fails():
    yield batch()
    raise OSError("a broken picture")
once = iter([batch(seed) for seed in range(4)])
dataset = TensorDataset(*batch())
shuffled = DataLoader(TensorDataset(torch.randn(64, 6), torch.zeros(64).long()), batch_size=8, shuffle=True)
both = lambda: (shuffled, shuffled)
number = 3

def accuracy(model): return torch.tensor(0.5)
def on(model, loader): return len(loader)
def test(net, device, test_loader): return sum(len(x) for x, y in test_loader) if device.type == "cpu" else 0
def swapped(data, model): return float(isinstance(model, nn.Module))
def maybe(model, loader=None): return 0.0 if loader is None else 1.0
def top(model, loader, criterion, topk): return 1.0
def printed(model): print("accuracy 0.9")
def dictionary(model): return {"acc": 0.9, "loss": 1.0}
def mode(model): return 0.0 if model.training else 1.0
def nan(model): return float("nan")
def percent(model): return 93.0
class Percent:
    accuracy = staticmethod(percent)
def broken(model): return 1 / 0

def loss(outputs, targets): return nn.functional.cross_entropy(outputs, targets)
def of_model(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1])
def of_batch(outputs, batch): return nn.functional.cross_entropy(outputs, batch[1])
def each(outputs, targets): return nn.functional.cross_entropy(outputs, targets, reduction="none")
def item(outputs, targets): return loss(outputs, targets).item()
def detached(outputs, targets): return loss(outputs, targets).detach()
def alone(outputs): return outputs.sum()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, under a name of its own in every test."""
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name.replace('-', '_').replace('[', '_').replace(']', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    return name


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_loader_is_bounded_and_gone_through_again(mine: str) -> None:
    counts = {name: sum(1 for _ in Loader(f"{mine}:{name}", 20).batches(20)) for name in ("endless", "once")}
    assert counts == {"endless": 3, "once": 3}
    once = Loader(f"{mine}:once", 1024)
    assert [sum(1 for _ in once.batches()) for _ in range(2)] == [1, 1]  # what was left of it, twice
    assert not Loader(f"{mine}:endless", 20).sized and Loader(f"{mine}:shuffled", 20).sized


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "it gave no batch. Give one with at least one batch"),
        ("fails", "it raised OSError: a broken picture. Mend it, or leave out the examples that it fails on"),
        (
            "dataset",
            "it is a TensorDataset, a data set that gives single examples. Give its batches: DataLoader",
        ),
        ("both", r"it is tuple of 2: \(DataLoader, DataLoader\). Give a DataLoader"),
        ("number", "it is int. Give a DataLoader"),
        (
            "wide",
            r"the function needs the arguments width, depth. Wrap it in one that takes none: def my_wide",
        ),
        ("nowhere", "has no 'nowhere'"),
    ],
)
def test_a_loader_that_gives_no_batches_is_refused(mine: str, name: str, said: str) -> None:
    with pytest.raises(CriaError, match=f"The loader {mine}:{name}: .*{said}"):
        list(Loader(f"{mine}:{name}", 20).batches(20))


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [("accuracy", False, 0.5), ("on", False, 8), ("test", False, 64), ("swapped", False, 1),
     ("maybe", False, 0), ("maybe", True, 1), ("mode", False, 1)],
)  # fmt: skip
def test_a_function_that_measures_may_look_as_users_have_it(
    mine: str, name: str, given: bool, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net().train()
    state = torch.get_rng_state()
    assert Evaluation(f"{mine}:{name}", Loader(f"{mine}:shuffled", 99), given)(model) == value
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_an_endless_loader_is_measured_on_so_many_examples(mine: str) -> None:
    assert Evaluation(f"{mine}:test", Loader(f"{mine}:endless", 20), False)(net()) == 20


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("top", False, r"it takes \(model, loader, criterion, topk\), and is given a model, .* two. "
         r"Wrap it: def my_top\(model, loader\): return top\(model, loader, criterion=..., topk=...\)"),
        ("accuracy", True, r"it takes \(model\), and is given a model and the test loader. Leave out"),
        ("printed", False, "it returned nothing, and no number. Return the number; to print it is not"),
        ("dictionary", False, "it returned a dict of acc, loss, and no number. Return the number itself"),
        ("nan", False, "it returned nan. Return a finite number"),
        ("Percent.accuracy", False, "it returned 93, and an accuracy is a share between 0 and 1"),
        ("broken", False, "it raised ZeroDivisionError: division by zero. Mend it"),
        ("number", False, "it is a int. Name a function of a model"),
    ],
)  # fmt: skip
def test_a_function_that_does_not_measure_is_refused(
    mine: str, name: str, given: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CriaError, match=f"The function {mine}:{name}: .*{said}"):
        Evaluation(f"{mine}:{name}", Loader(f"{mine}:shuffled", 99), given)(net())
    assert not capsys.readouterr().out, "what is printed is no part of the answer"


@pytest.mark.parametrize("name", ["loss", "of_model", "of_batch"])
def test_a_loss_is_of_outputs_or_of_the_model(mine: str, name: str) -> None:
    model, batch = net(), (torch.randn(8, 6), torch.arange(8) % 3)
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1])
    assert torch.equal(Objective(f"{mine}:{name}", None)(model, batch), expected)
    assert torch.equal(Objective("torch.nn:CrossEntropyLoss", None)(model, batch), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("each", r"it returned Tensor \(8,\), and no scalar tensor. Return its mean"),
        ("item", "it returned float, and no scalar tensor. Return the tensor itself, without .item()"),
        ("detached", "its value has no gradient"),
        ("alone", r"it takes \(outputs\). Name a function of \(outputs, targets\)"),
        ("number", "it is a int"),
    ],
)
def test_a_loss_that_cannot_be_trained_by_is_refused(mine: str, name: str, said: str) -> None:
    batch = (torch.randn(8, 6), torch.arange(8) % 3)
    with pytest.raises(CriaError, match=f"The loss {mine}:{name}: {said}"):
        Objective(f"{mine}:{name}", None)(net(), batch)
    with pytest.raises(DataError, match=r"found no target in Tensor \(8, 6\). Give \(inputs, target\) pairs"):
        Objective(f"{mine}:loss", None)(net(), batch[0])


def test_lower_is_better_by_name_or_as_is_said() -> None:
    names = ("accuracy", "val_loss", "wer", "lossless")
    assert [metric_of(name, None) for name in names] == [
        "accuracy", "val_loss (lower is better)", "wer (lower is better)", "value of lossless",
    ]  # fmt: skip
    assert metric_of("f1", "lower") == "f1 (lower is better)" and metric_of("mse", "higher") == "mse"


def test_weights_are_read_from_safetensors_alone(tmp_path: Path) -> None:
    model, trained = net(), net()
    state = trained.state_dict()
    for prefix in ("", "module.", "_orig_mod."):
        save_file({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
        read_weights(model.apply(lambda item: hasattr(item, "weight") and item.weight.data.zero_()),
                     tmp_path / "model.safetensors")  # fmt: skip
        assert digest("", model.state_dict()) == digest("", state)
    for ending in (".pt", ".pth", ".bin"):
        with pytest.raises(ArtifactError) as caught:
            read_weights(model, tmp_path / f"model{ending}")
        text = str(caught.value)
        assert "it is a pickle" in text and "by two lines of Python" in text
    lines = text.partition("Python: ")[2].split(", and ")
    torch.save(state, tmp_path / "model.bin")
    (tmp_path / "model.safetensors").unlink()
    names = {"torch": torch}
    exec("\n".join(["import safetensors.torch", *lines]), names)  # the two lines do what they promise
    read_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"there is no such file; .* has model.safetensors"):
        read_weights(model, tmp_path / "modle.safetensors")
    with pytest.raises(ArtifactError) as caught:
        read_weights(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)), tmp_path / "model.safetensors")
    assert (
        "2 are missing (1.weight, 1.bias); 2 are not its own (2.bias, 2.weight); 0.bias is (16,) and not (9,)"
        in (str(caught.value))
    )
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="it cannot be read"):
        read_weights(model, tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}:wide", "the function needs the arguments width, depth. Wrap it in one that takes none: "
         r"def my_wide\(\): return wide\(width=..., depth=...\)"),
        ("{}:mak", "has no 'mak'; near it are make"),
        ("nowhere.nets:make", "there is no module 'nowhere' in .*; the current folder has mine_"),
        ("{}:number", "'number' is int"),
        ("{}:batch", "the function returned tuple"),
    ],
)  # fmt: skip
def test_what_makes_no_network_is_refused(mine: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OwnTask(text.format(mine))


def test_the_same_seed_gives_the_same_network_and_the_same_examples(mine: str) -> None:
    def task(seed: int = 0, examples: int | None = 24, name: str = "make") -> OwnTask:
        return OwnTask(f"{mine}:{name}", Own(loader=f"{mine}:shuffled", seed=seed, examples=examples))

    state = torch.get_rng_state()
    one, same, other = task(), task(), task(seed=1)
    assert one.weights == same.weights != other.weights
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert torch.equal(torch.get_rng_state(), state)
    assert "weights of" in " ".join(one.notes) and "random" in " ".join(one.notes)
    assert "random" not in " ".join(task(name="steady").notes)
    epoch = one.train_batches()(0)
    assert len(epoch) == len(list(epoch)) == 3  # 24 examples
    assert len(task(examples=None).train_batches()(1)) == 8


def test_what_was_not_given_is_named(mine: str) -> None:
    task = OwnTask(f"{mine}:make")
    with pytest.raises(ConfigError, match=r"there is no loader. Give --loader package.module:function"):
        task.calibration(8)
    with pytest.raises(ConfigError, match=r"it takes \(model, loader\), and there is no loader"):
        OwnTask(f"{mine}:make", Own(evaluate=f"{mine}:on"))
    with pytest.raises(ConfigError, match=r"knows by itself what it measures on. Leave out --limit"):
        task.test_batches(5)
