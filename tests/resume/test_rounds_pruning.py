"""A pruning that was stopped, by SIGKILL too, goes on after its finished rounds, with the same bits."""

import json
import os
import resource
import signal
from dataclasses import replace as with_fields
from pathlib import Path

import pytest
import torch
from kills import at_call, half_written, kill, replace, replaced_and_killed, save, signals_of
from torch import nn
from watching import at, counted, interrupted_at

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.errors import ArtifactError
from cria_prune.resume import rounds as rounds
from cria_prune.resume import store

ROUNDS = 3


def network(seed=0):
    """A convolution with batch norm and a consumer, and two linear layers that share one weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 16),
            nn.GELU(),
            nn.Linear(16, 3),
        )
    return net.eval()


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 2, 4, 4, generator=generator)
    y = torch.randint(3, (96,), generator=generator)
    return [(x[start : start + 32], y[start : start + 32]) for start in (0, 32, 64)]


def config(**score):
    return PruneConfig(plan={"reduction": 0.5, "rounds": ROUNDS}, score=score)


CONFIGS = {
    "innovation": config(),
    "taylor": config(criterion="taylor"),
    "distortion": config(criterion="distortion"),
}


def pruned(name="innovation", folder=None, on_round=None, **options):
    options = {"model": network(), "batches": data(), "config": CONFIGS[name], "graphs": True, **options}
    model, batches, config = (options.pop(part) for part in ("model", "batches", "config"))
    return prune(model, batches, config, state=folder, on_round=on_round, **options)


def same(left, right):
    """Equal in every bit but the wall times."""
    one, two = left.model.state_dict(), right.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert left.plan == right.plan and str(left.groups) == str(right.groups)
    for mine, other in zip(left.rounds, right.rounds, strict=True):
        assert with_fields(mine, seconds={}) == with_fields(other, seconds={})
    assert left.graphs.keys() == right.graphs.keys() and left.graphs
    for name, both in left.graphs.items():
        for graph, twin in ((both.input, right.graphs[name].input), (both.output, right.graphs[name].output)):
            assert graph.ridge == twin.ridge and torch.equal(graph.weights, twin.weights)
            assert torch.equal(graph.rows, twin.rows) and torch.equal(graph.cols, twin.cols)
    return True


@pytest.fixture(scope="module")
def whole():
    """The same prunings without a state or an interruption."""
    return {name: pruned(name) for name in CONFIGS}


# The children: killed for real, each in a process of its own.

KILLS = {  # name: (what is replaced, finished rounds that are left)
    "in-the-first-recording": ({"record": 1}, 0),
    "in-a-later-recording": ({"record": 3}, 2),
    "half-of-the-first-state": ({"save_file": at_call(1, half_written, save)}, 0),
    "half-of-a-later-state": ({"save_file": at_call(2, half_written, save)}, 1),
    "before-the-rename": ({"replace": at_call(2, lambda *_: kill(), replace)}, 1),
    "after-the-rename": ({"replace": at_call(2, replaced_and_killed, replace)}, 2),
    "after-the-last-rename": ({"replace": at_call(3, replaced_and_killed, replace)}, 3),
}


def children(folder, threads):
    """Run each case in a fork until it is killed; print the signals as JSON (the main of a subprocess)."""
    torch.set_num_threads(1)  # no thread is there to be lost in a fork
    discover(network(), data()[0])  # imports much
    signals = {}
    for name, (patches, _) in KILLS.items():
        child = os.fork()
        if child == 0:
            torch.set_num_threads(threads)
            store.save_file = patches.get("save_file", save)
            os.replace = patches.get("replace", replace)
            with at("record", patches.get("record", 0), lambda _: kill()):
                pruned(folder=Path(folder) / name)
            os._exit(0)
        signals[name] = os.WTERMSIG(os.waitpid(child, 0)[1])
    print(json.dumps(signals))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what the killed processes left."""
    folder = tmp_path_factory.mktemp("killed")
    assert signals_of(
        "tests.resume.test_rounds_pruning", str(folder), torch.get_num_threads()
    ) == dict.fromkeys(KILLS, signal.SIGKILL)
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_after_a_sigkill_the_same_bits_come_out_and_no_finished_round_is_run_again(name, killed, whole):
    left, folder, seen = KILLS[name][1], killed / name, []
    assert (folder / rounds.NAME).exists() == bool(left)
    with counted("record") as recordings:
        result = pruned(folder=folder, on_round=lambda item: seen.append(len(item.rounds)))
    assert same(result, whole["innovation"])
    assert len(recordings) == ROUNDS - left
    assert seen == list(range(max(left, 1), ROUNDS + 1))  # the last that was kept is told again
    if left < ROUNDS:  # what the killed one was writing goes when the next state is written
        assert [path.name for path in folder.iterdir()] == [rounds.NAME]


@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_after_every_round_each_criterion_ends_with_the_same_bits(name, whole, tmp_path):
    for number in range(2, ROUNDS + 1):
        with interrupted_at("record", 2), pytest.raises(KeyboardInterrupt):
            pruned(name, tmp_path)
        assert len(store.Store(tmp_path, rounds.NAME, rounds.FORMAT, "").read()[0]["rounds"]) == number - 1
    assert same(pruned(name, tmp_path), whole[name])


def test_one_weight_of_two_names_stays_one(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 16), nn.Linear(16, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.down(torch.relu(self.up(self.embed(x)))))

    batches = [(torch.arange(88).reshape(8, 11) + torch.arange(8)[:, None]) % 11]
    options = {"model": Tied(), "batches": batches, "graphs": False}
    first, again = pruned(folder=tmp_path, **options), pruned(folder=tmp_path, **options)
    assert again.model.head.weight is again.model.embed.weight
    weights = store.Store(tmp_path, rounds.NAME, rounds.FORMAT, "").read()[1]["weights"]
    assert "embed.weight" in weights and "head.weight" not in weights
    assert torch.equal(first.model(batches[0]), again.model(batches[0])) and again.graphs is None


def test_the_state_of_another_pruning_is_refused_and_told(tmp_path):
    pruned(folder=tmp_path, data="a" * 64)
    kept = (tmp_path / rounds.NAME).read_bytes()
    for match, options in {
        r"config, plan, reduction: there 0\.5, here 0\.4": {
            "config": PruneConfig(plan={"reduction": 0.4, "rounds": ROUNDS})
        },
        r"config, score, criterion: there innovation, here taylor": {"name": "taylor"},
        r"weights at the start, model: there \w{12}\.\.\., here": {"model": network(1)},
        r"first examples: there \w{12}\.\.\., here": {"batches": data(2)},
        r"data: there a{12}\.\.\., here b{12}": {"data": "b" * 64},
        r"graphs: there True, here False": {"graphs": False},
    }.items():
        with pytest.raises(
            ArtifactError, match=f"its state is of another one: .*{match}.*Pass another folder"
        ):
            pruned(**{"folder": tmp_path, "data": "a" * 64, **options})
    assert (tmp_path / rounds.NAME).read_bytes() == kept


def test_the_state_of_another_version_of_the_code_is_refused(tmp_path, monkeypatch):
    pruned(folder=tmp_path)
    monkeypatch.setattr(rounds, "code_version", lambda: "another")
    with pytest.raises(ArtifactError, match=r"code: there \w{12}\.\.\., here another"):
        pruned(folder=tmp_path)


def test_the_version_of_the_code_is_that_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "__file__", str(tmp_path / "resume" / "store.py"))
    found = set()
    for text in ("a", "b"):
        (tmp_path / "store.py").write_text(text)
        store.code_version.cache_clear()
        found |= {store.code_version(), store.code_version()}
    store.code_version.cache_clear()
    assert len(found) == 2


def test_a_damaged_state_is_an_error_and_the_model_is_as_it_was(tmp_path):
    pruned(folder=tmp_path)
    path = tmp_path / rounds.NAME
    good = path.read_bytes()
    for damaged in (b"", good[:40], good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1]), good + b"0"):
        path.write_bytes(damaged)
        model = network()
        with pytest.raises(ArtifactError, match=r"rounds\.safetensors: .*Pass another folder, or remove"):
            pruned(folder=tmp_path, model=model)
        assert all(
            torch.equal(one, two)
            for one, two in zip(model.state_dict().values(), network().state_dict().values(), strict=True)
        )


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda facts, parts: parts["kept1"]["0"].sub_(1), "do not give the units that it kept"),
        (lambda facts, parts: parts["scores1"].pop("0"), "fit the model|'0'"),
        (lambda facts, parts: parts["weights"].pop("0.weight"), "its weights have other names"),
        (lambda facts, parts: parts.pop("graph0"), "'graph0'"),
        (lambda facts, parts: facts.pop("ridges"), "ridges"),
        (lambda facts, parts: facts["rounds"][0].pop("seconds"), "seconds"),
    ],
)
def test_an_edited_state_with_a_right_hash_is_an_error(edit, match, tmp_path):
    pruned(folder=tmp_path)
    kept = store.Store(tmp_path, rounds.NAME, rounds.FORMAT, "pruning")
    facts, parts = kept.read()
    edit(facts, parts)
    kept.write(facts, parts)
    with pytest.raises(ArtifactError, match=match):
        pruned(folder=tmp_path)


def test_a_full_disk_is_an_error_and_the_last_round_serves(whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with at("record", 2, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))):
        try:
            with pytest.raises(
                ArtifactError, match=r"Keeping the state .* the system refused.*the disk has room"
            ):
                pruned(folder=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = [path.name for path in tmp_path.iterdir() if not path.name.startswith("walk-")]
    assert found == [rounds.NAME]
    with counted("record") as recordings:
        assert same(pruned(folder=tmp_path), whole["innovation"])
    assert len(recordings) == ROUNDS - 1


def test_nothing_is_written_without_a_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruned()
    assert not list(tmp_path.iterdir())
