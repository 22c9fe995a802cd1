"""A pruning layer by layer that was killed goes on after its finished turns, with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import half_written, kill, signals_of
from tests.offload.test_prune import MODELS, batches_of, config_of
from watching import at, counted, interrupted_at

from cria_prune import load, prune_offloaded
from cria_prune.base.errors import ArtifactError
from cria_prune.base.events import Event
from cria_prune.resume import store

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROUNDS = 2


def half_of_the_next_state() -> None:
    store.save_file = half_written


def half_a_shard(written: Event) -> None:
    """Kill the process when all is written but for the note that it is."""
    (written.facts["folder"] / "model-00099-of-00099.safetensors").write_bytes(b"half a shard")
    kill()


# name: (event, its number, what happens there, recordings that are left to do); a round of this Llama has two
# turns, and the second state is written after the second of them
KILLS: dict[str, tuple[str, int, Callable[[Event], object], int]] = {
    "in-the-first-turn": ("record", 1, lambda _: kill(), 4),
    "half-of-the-second-state": ("record", 2, lambda _: half_of_the_next_state(), 3),
    "after-the-first-cut": ("written", 1, half_a_shard, 2),
    "in-the-second-walk": ("refitted", 18, lambda _: kill(), 0),
    "in-the-second-round": ("record", 4, lambda _: kill(), 1),
    "in-the-last-cut": ("write", 2, lambda _: kill(), 0),
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
    torch.set_num_threads(1)
    signals = {}
    for name, (event, number, action, _) in KILLS.items():
        child = os.fork()
        if child == 0:
            with at(event, number, action):
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
    assert signals_of("tests.offload.test_prune_resumed", str(folder)) == dict.fromkeys(KILLS, signal.SIGKILL)
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_after_a_sigkill_the_same_bits_come_out_and_no_finished_turn_is_recorded_again(
    name: str, killed: Path
) -> None:
    assert not (killed / name).exists()
    with counted("record") as calls:
        done = pruned(killed, name)
    assert len(calls) == KILLS[name][-1]
    one, other = (load(killed / part).model.state_dict() for part in ("whole", name))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    whole = load(killed / "whole").plan
    assert done.plan.kept == whole.kept and load(killed / name).plan.kept == whole.kept
    assert [item.number for item in done.rounds] == [1, 2] and all(item.turns == 2 for item in done.rounds)
    assert not (killed / f".{name}").exists()


ONCE = {"repair": "once"}  # of which moments are kept


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A folder with a model, and a pruning of it that was stopped in its second turn."""
    made(tmp_path)

    with interrupted_at("record", 2), pytest.raises(KeyboardInterrupt):
        pruned(tmp_path, "small", config=ONCE)
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
    changes["config"] = {**ONCE, **changes.get("config", {})}
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
        pruned(stopped, "small", config=dict(ONCE))
    spilled.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="Reading the moments of"):
        pruned(stopped, "small", config=dict(ONCE))
    spilled.write_bytes(whole)
    kept = state.read_bytes()
    state.write_bytes(kept[:-8] + b"\0" * 8)
    with pytest.raises(ArtifactError, match="do not have the hash"):
        pruned(stopped, "small", config=dict(ONCE))
    state.write_bytes(kept)
    config = stopped / "llama" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ArtifactError, match=r"files, config\.json"):
        pruned(stopped, "small", config=dict(ONCE))
