"""Two processes against one: the same states, scores and plan; and what the others hear of a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import worker

from cria_prune.base.ranks import World
from cria_prune.graph.moments import MomentAccumulator, Moments

SCRIPT = Path(worker.__file__)


def spawn(folder: Path, size: int, *parts: str) -> list[int]:
    """Run parts of the worker in `size` processes; return their exit codes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, str(SCRIPT), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank), str(size), *parts], env=environment) for rank in range(size)
    ]
    try:
        return [process.wait(timeout=3 * worker.PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()


def read(folder: Path, part: str, rank: int) -> Any:
    return json.loads((folder / f"{part}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all parts in two processes, the second of which is killed in the last part."""
    folder = tmp_path_factory.mktemp("two")
    parts = ["exact", "sketched", "pruned", "recovered", "went_on", "replicated", "sharded"]
    assert spawn(folder, 2, *parts, "sharded_went_on", "raises", "leads", "killed") == [0, -9]
    return folder


def close(found: Any, expected: Any, rtol: float, path: str = "") -> None:
    """Compare numbers in nested containers, relative to the largest of a list; all else is equal."""
    if path.endswith("residual"):  # of the rounding alone
        return
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            close(found[key], value, rtol, f"{path}/{key}")
    elif isinstance(expected, list) and expected and not isinstance(expected[0], (str, dict)):
        a, b = (torch.tensor(item, dtype=torch.float64) for item in (found, expected))
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()), msg=path)
    else:
        assert found == expected or found == pytest.approx(expected, rel=rtol), path


@pytest.mark.parametrize("part", ["exact", "sketched", "pruned", "recovered"])
def test_two_processes_give_what_one_gives(two: Path, part: str) -> None:
    one = json.loads(json.dumps(getattr(worker, part)()))
    first, second = (read(two, part, rank) for rank in (0, 1))
    assert first == second
    if part == "pruned":
        assert first.pop("metric") == [1.0, 1.0]  # rank 0 alone looks, and is alone meanwhile
        assert one.pop("metric") == [1.0, 1.0]
        assert first.pop("kept") == one.pop("kept")
    elif part == "recovered":
        assert first["best"] == 2
        close(first.pop("weights"), one.pop("weights"), 1e-6)
    else:
        # exact sums in float64, sketches in float32
        close(first.pop("states"), one.pop("states"), {"exact": 1e-12, "sketched": 1e-6}[part])
    close(first, one, 1e-6)


def test_a_recovery_goes_on_on_all_processes(two: Path) -> None:
    first, second = (read(two, "went_on", rank) for rank in (0, 1))
    assert first["whole error"] == first["on error"] == second["on error"] == ""
    assert first["whole"] == second["whole"] == first["on"] == second["on"]
    assert first["whole"]["best"] == 3
    assert first["ended error"].startswith("StopIteration")
    assert "Evaluating on 2 processes: failed on rank 0: StopIteration" in second["ended error"]
    assert "rank 1 differs: it is at 'A training step'" in first["batches"]


def test_fsdp_trains_as_ddp_does_with_a_share_of_the_weights(two: Path) -> None:
    expected = read(two, "replicated", 0)
    first, second = (read(two, "sharded", rank) for rank in (0, 1))
    for name, item in first.items():
        looks = [item.pop("seen"), second[name].pop("seen"), expected[name].pop("seen")]
        assert item == second[name]
        close(item, expected[name], 1e-9, name)
        assert len(looks[0]) == (0 if name == "lora" else len(item["losses"]) + 1)
        for one, other, whole in zip(*looks, strict=True):
            assert one[0] == other[0] == pytest.approx(whole[0], rel=1e-9)
            assert one[1] + other[1] == whole[1] and abs(one[1] - other[1]) < 0.2 * whole[1]


def test_a_recovery_by_fsdp_goes_on_and_its_errors_reach_all(two: Path) -> None:
    first, second = (read(two, "sharded_went_on", rank) for rank in (0, 1))
    for found in (first, second):
        assert found["whole error"] == found["on error"] == found["again error"] == ""
        assert found["whole"] == found["on"] == found["again"] == first["whole"]
        assert found["whole"]["best"] > 0 and "-1.0" not in found["whole"]["text"]
        assert found["as it was"] and found["waited"] < worker.PATIENCE / 4 and found["after"] == 2
        assert "A training step on 2 processes" in found["other"]
        assert "The state of the recovery on 2 processes" in found["a state on one"]
        assert "Sharing Tied out over the processes: fully_shard doesn't support scalar" in found["scalar"]
        assert found["boxes"] == "" and "ZeroDivisionError" in found["late"] and found["late, as it was"]
        assert found["not waited"] < worker.PATIENCE / 4
    assert first["ended error"].startswith("StopIteration")
    assert "failed on rank 0: StopIteration" in second["ended error"]
    assert second["loss"] == "ArithmeticError: in the middle"
    assert "Recovering by FSDP on 2 processes: failed on rank 1: ArithmeticError" in first["loss"]


def test_the_others_hear_of_a_failure_and_all_can_go_on(two: Path) -> None:
    first, second = (read(two, "raises", rank) for rank in (0, 1))
    assert first["shape"].startswith(
        "RankError: Recording on 2 processes: failed on rank 1: Running Sequential"
    )
    assert second["shape"].startswith(
        "DataError: Running Sequential on a calibration batch (Tensor (6, 2, 8, 8))"
    )
    for what in ("fewer", "weights"):
        assert "RankError: Recording on 2 processes, rank 0: rank 1 differs" in first[what]
        assert "rank 1: rank 0 differs" in second[what]
    assert first["lead"] == "ZeroDivisionError: division by zero"
    assert "A look on 2 processes: failed on rank 0: ZeroDivisionError: division by zero" in second["lead"]
    assert (
        "rank 1 differs: it is at 'There'" in first["place"] and "rank 0 differs: it is at" in second["place"]
    )
    assert first["after"] == second["after"] == 2


def test_processes_wait_for_one_that_works_but_not_for_one_that_is_silent(two: Path) -> None:
    assert read(two, "leads", 0) == read(two, "leads", 1) == {"value": [1, {"found": [1, 2]}]}


def test_a_killed_process_ends_the_others_with_an_error(two: Path) -> None:
    said = read(two, "killed", 0)["error"]
    assert said.startswith("RankError: Recording: another process has ended or does not answer (")


def test_one_process_shares_nothing() -> None:
    here, tensor = World(), torch.arange(3)
    assert [here.mine(index) for index in range(3)] == [True] * 3 and here.first
    here.meet("A step", lambda: pytest.fail("computed for nobody"))
    assert here.lead("A look", lambda: here) is here and here.gathered(b"said") == [b"said"]
    assert torch.equal(here.total(tensor), tensor)


@pytest.mark.parametrize("exact", [True, False])
def test_pooled_accumulators_are_one_over_all_samples(exact: bool) -> None:
    X = torch.randn(6, 90, generator=torch.Generator().manual_seed(2)).double() * 3 + 1e3
    numbers = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    parts = [MomentAccumulator(6, exact, 16, positive=True) for _ in range(3)]  # the last one gets nothing
    for part, share in zip(parts, (slice(0, 20), slice(20, 90)), strict=False):
        part.add(X[:, share], numbers[share])
    whole = MomentAccumulator(6, exact, 16, positive=True)
    order = numbers.argsort()
    whole.add(X[:, order], numbers[order])
    barrier, said = Barrier(3, timeout=worker.PATIENCE), [torch.empty(0)] * 3

    def pooled(rank: int) -> Moments:
        def total(tensor: torch.Tensor) -> torch.Tensor:
            said[rank] = tensor.clone()
            barrier.wait()
            found = said[0] + said[1] + said[2]
            barrier.wait()
            return found

        parts[rank].pool(total)
        return parts[rank].moments()

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(pooled, range(3)))
    expected = whole.moments()
    for moments in found:
        assert moments.samples == 90 and moments.positive is not None and expected.positive is not None
        torch.testing.assert_close(moments.positive, expected.positive)
        for name in ("mean", "variance", "covariance" if exact else "sketch"):
            a, b = getattr(moments, name), getattr(expected, name)
            torch.testing.assert_close(a, b, rtol=1e-9 if exact else 1e-5, atol=1e-9 if exact else 1e-4)
