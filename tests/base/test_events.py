"""Named moments: each is told, with its facts, to those who listen here, and may be interrupted."""

from __future__ import annotations

import ast
import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from watching import at, counted, interrupted_at, never

import cria_prune
from cria_prune import PruneConfig, RecoverConfig, prune, recover, watch
from cria_prune.base import events
from cria_prune.base.events import EVENTS, Event, passed

SOURCE = Path(cria_prune.__file__).parent


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        ).eval()


def data(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(32, 1, 2, 2, generator=draw), torch.randint(3, (32,), generator=draw))
        for _ in range(count)
    ]


CONFIG = PruneConfig(plan={"reduction": 0.3, "rounds": 2}, repair="once")


def test_the_table_names_every_event_with_the_facts_that_are_told() -> None:
    told: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        tells = "events import passed" in path.read_text()
        for node in ast.walk(ast.parse(path.read_text())) if tells else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "passed":
                (name,) = node.args
                assert isinstance(name, ast.Constant), path
                told.setdefault(name.value, set()).update(str(item.arg) for item in node.keywords)
    assert events.__doc__ is not None
    rows = events.__doc__.partition("event        the moment")[2].splitlines()[2:]
    table = {
        row.split()[0]: set(row.rstrip().rsplit("  ", 1)[1].strip().split(", "))
        for row in rows
        if row[4:5].isalpha()
    }
    assert table == told and set(EVENTS) == set(table) and len(set(EVENTS)) == len(EVENTS)


def test_a_name_that_is_not_in_the_table_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="lunch"):
        passed("lunch")
    with pytest.raises(AssertionError, match="lunch"), counted("lunch"):
        pass


def test_a_pruning_tells_its_stages_in_their_order() -> None:
    names = list[str]()
    with watch(lambda event: names.append(event.name)):
        prune(network(), data(), CONFIG)
    stages = [name for name in names if name not in ("cut", "verify")]  # those of trial cuts besides
    one = ["record", *["batch"] * 3, "score", "scored", "plan", "repair"]
    assert stages[:4] == ["inputs", "reference", "capture", "discover"]
    rest = [name for name in stages[4:] if name not in ("reference", "capture")]
    assert rest == [*one, "fidelity", "round", *one, "fidelity", "norms", "fidelity", "round"]
    with counted("cut") as cuts, counted("round") as rounds:
        prune(network(), data(), CONFIG)
    assert [item.facts["number"] for item in rounds] == [1, 2] and rounds[0].facts["rounds"] == 2
    assert cuts[-1].facts["plan"].sizes.keys() == {"0", "4"}


@pytest.mark.parametrize(
    "name",
    ["reference", "capture", "discover", "record", "batch", "score", "scored", "plan", "repair", "norms"],
)
def test_an_error_of_a_listener_ends_the_work_there_and_leaves_the_model(name: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    hooks = [dict(item._forward_hooks) for item in model.modules()]
    with interrupted_at(name) as seen, pytest.raises(KeyboardInterrupt):
        prune(model, data(), CONFIG)
    assert [item.name for item in seen] == [name] and not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [dict(item._forward_hooks) for item in model.modules()] == hooks
    prune(model, data(), CONFIG)
    assert len(seen) == 1  # nobody listens any more


@pytest.mark.parametrize(("name", "number"), [("train", 1), ("epoch", 2), ("step", 4), ("measure", 2)])
def test_a_fine_tune_is_interrupted_where_a_listener_says(name: str, number: int) -> None:
    model, looks = network(), list[nn.Module]()

    def evaluate(_model: nn.Module) -> float:
        looks.append(_model)
        return 1.0 / len(looks)

    before = copy.deepcopy(model.state_dict())
    with interrupted_at(name, number) as seen, pytest.raises(KeyboardInterrupt):
        recover(model, data(), RecoverConfig(epochs=3), evaluate=evaluate)
    assert len(seen) == number
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # the best epoch


def test_watches_are_nested_and_none_is_left() -> None:
    seen = list[str]()

    def inner(event: Event) -> None:
        seen.append("inner")
        raise ValueError("mine")

    with watch(lambda event: seen.append("outer")):
        with pytest.raises(ValueError, match="mine"), watch(inner):
            passed("plan", groups=None, target=0.5)
        passed("plan", groups=None, target=0.5)
    passed("plan", groups=None, target=0.5)
    assert seen == ["outer", "inner", "outer"]


def test_another_thread_is_not_heard() -> None:
    with counted("step") as seen:
        thread = threading.Thread(target=lambda: passed("step", step=1))
        thread.start()
        thread.join()
        passed("step", step=2)
    assert [item.facts for item in seen] == [{"step": 2}]


def test_the_helpers_of_the_tests_do_what_they_say() -> None:
    with at("step", 2, lambda item: found.append(item.facts["step"])) as seen:
        found = list[int]()
        for number in (5, 6, 7):
            passed("step", step=number)
    assert found == [6] and len(seen) == 3
    with pytest.raises(pytest.fail.Exception, match="step"), never("step", "cut"):
        passed("step", step=1)
    with never("cut"):
        passed("step", step=1)
