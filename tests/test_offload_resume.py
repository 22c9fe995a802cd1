"""A pruning layer by layer that was killed goes on after its finished turns, with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_prune import load, prune_offloaded, stages
from cria_prune.errors import ArtifactError
from cria_prune.offload import rounds
from kills import at_call, half_written, kill, save
from test_offload import MODELS, batches_of, config_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROUNDS = 2
write_model = rounds.write_model


def written_and_killed(folder: Path, *args: Any) -> None:
    """Kill the process when all is written but for the note that it is."""
    write_model(folder, *args)
    (folder / "model-00099-of-00099.safetensors").write_bytes(b"half a shard")
    kill()


# name: (what is replaced, recordings that are left to do); a round of this Llama has two turns
KILLS: dict[str, tuple[dict[str, Callable[..., Any]], int]] = {
    "in-the-first-turn": ({"record": at_call(1, lambda *_, **__: kill(), stages.record_for)}, 4),
    "half-of-the-second-state": ({"state": at_call(2, half_written, save)}, 3),
    "after-the-first-cut": ({"write": at_call(1, written_and_killed, rounds.write_model)}, 2),
    "in-the-second-round": ({"record": at_call(4, lambda *_, **__: kill(), stages.record_for)}, 1),
    "in-the-last-cut": ({"write": at_call(2, lambda *_, **__: kill(), rounds.write_model)}, 0),
}


def made(folder: Path) -> Path:
    kind, config, values = MODELS["llama"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**values))
    model.save_pretrained(folder / "llama", max_shard_size="60KB")
    return folder / "llama"


def pruned(folder: Path, name: str, **changes: Any) -> Any:
    config = config_of(plan={"reduction": 0.3, "rounds": ROUNDS}, **changes.pop("config", {}))
    values = {"memory": 1, "state": folder / f".{name}", **changes}
    return prune_offloaded(folder / "llama", folder / name, batches_of(), config, **values)


def children(folder: str) -> None:
    """Run each case in a fork until it is killed; print the signals as JSON (the main of a subprocess)."""
    from cria_prune import store

    torch.set_num_threads(1)
    signals = {}
    for name, (patches, _) in KILLS.items():
        child = os.fork()
        if child == 0:
            stages.record_for = patches.get("record", stages.record_for)
            rounds.write_model = patches.get("write", rounds.write_model)
            store.save_file = patches.get("state", save)
            pruned(Path(folder), name)
            os._exit(0)
        signals[name] = os.WTERMSIG(os.waitpid(child, 0)[1])
    print(json.dumps(signals))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, a pruning that was not killed, and what killed ones left."""
    folder = tmp_path_factory.mktemp("killed")
    made(folder)
    pruned(folder, "whole")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_offload_resume as test; "
    code += "test.children(sys.argv[2])"
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == dict.fromkeys(KILLS, signal.SIGKILL), done.stderr
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_after_a_sigkill_the_same_bits_come_out_and_no_finished_turn_is_recorded_again(
    name: str, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not (killed / name).exists()
    calls, honest = list[int](), stages.record_for

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return honest(*args, **kwargs)

    monkeypatch.setattr(stages, "record_for", counted)
    done = pruned(killed, name)
    assert len(calls) == KILLS[name][1]
    one, other = (load(killed / part).model.state_dict() for part in ("whole", name))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    whole = load(killed / "whole").plan
    assert done.plan.kept == whole.kept and load(killed / name).plan.kept == whole.kept
    assert [item.number for item in done.rounds] == [1, 2] and all(item.turns == 2 for item in done.rounds)
    assert not (killed / f".{name}").exists()


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and a pruning of it that was stopped in its second turn."""
    made(tmp_path)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "record_for", at_call(2, interrupt, stages.record_for))
        with pytest.raises(KeyboardInterrupt):
            pruned(tmp_path, "small")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"config": {"score": {"criterion": "l2"}}}, "config, score, criterion: there innovation, here l2"),
        ({"memory": 2}, "memory: there 1, here 2"),
        ({"data": "other"}, "data: there nothing, here other"),
    ],
    ids=str,
)
def test_a_state_of_another_pruning_is_refused(stopped: Path, changes: dict[str, Any], found: str) -> None:
    before = sorted(stopped.rglob("*"))
    with pytest.raises(ArtifactError, match=found):
        pruned(stopped, "small", **changes)
    assert [path for path in sorted(stopped.rglob("*")) if "trial" not in str(path)] == [
        path for path in before if "trial" not in str(path)
    ]


def test_another_model_or_a_damaged_state_is_refused(stopped: Path) -> None:
    state = stopped / ".small" / "round-1" / "turns.safetensors"
    spilled = next(state.parent.glob("moments-*.safetensors"))
    whole = spilled.read_bytes()
    spilled.unlink()
    with pytest.raises(ArtifactError, match=f"{spilled.name} is not there"):
        pruned(stopped, "small")
    spilled.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="Reading the moments of"):
        pruned(stopped, "small")
    spilled.write_bytes(whole)
    kept = state.read_bytes()
    state.write_bytes(kept[:-8] + b"\0" * 8)
    with pytest.raises(ArtifactError, match="do not have the hash"):
        pruned(stopped, "small")
    state.write_bytes(kept)
    config = stopped / "llama" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ArtifactError, match=r"files, config\.json"):
        pruned(stopped, "small")
