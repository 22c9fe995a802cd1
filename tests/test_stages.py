"""The stages: what is prepared is found once per command, and gives what `prune` finds by itself."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.test_folders import SMALL
from tests.end_to_end.test_folders import made as folders
from torch import Tensor, nn
from typer.testing import CliRunner

from cria_prune import PruneConfig, discover, prune, score_once, stages
from cria_prune.base.errors import StructureError, TargetError
from cria_prune.base.inputs import inputs_of
from cria_prune.cli.main import app
from cria_prune.result import PruneResult
from cria_prune.scores import scored_of
from cria_prune.stages import cut, prepare, rank
from cria_prune.surgery.verify import Reference
from cria_prune.tasks.images import ImageTask
from cria_prune.tasks.models import build
from networks import Plain, randomize

tracing = sys.modules["cria_prune.structure.trace"]
made = folders


class Stream(nn.Module):
    """A residual stream under a LayerNorm: less of its width has no twin of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.down(torch.relu(self.up(self.norm(x))))))


def images(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 3, 8, 8, generator=generator) for _ in range(2)]


def config(share: float = 0.4, rounds: int = 2, **options: Any) -> PruneConfig:
    plan = {"reduction": share, "rounds": rounds, **options.pop("plan", {})}
    return PruneConfig(**{"plan": plan, **options})


def same(left: PruneResult, right: PruneResult) -> bool:
    one, two = left.model.state_dict(), right.model.state_dict()
    assert left.plan == right.plan and left.report == right.report and one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model was captured, its structure found, and copied to be compared with."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        honest = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            found[what] += 1
            return honest(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(tracing, "capture", "captured")
    counted(stages, "follow", "discovered")
    counted(Reference, "__init__", "copied")
    return found


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with a dense model that nobody has to train; its weights are not the untrained ones."""
    torch.manual_seed(0)
    model = build("digits").eval()
    monkeypatch.setattr(ImageTask, "dense", lambda self, seed=0, progress=None: copy.deepcopy(model))
    monkeypatch.chdir(tmp_path)


FEW = ["--examples", "64", "--device", "cpu", "--quiet"]
COMMANDS = {  # words -> models copied to be compared with: the prepared one, and those that were repaired
    "prune digits --reduce 0.3 --rounds 2": 1 + 1,
    "prune digits --reduce 0.3 --rounds 2 --repair once": 1 + 2,
    "prune digits --reduce 0.3 --rounds 2 --repair none": 1,
    "run digits --reduce 0.3 --rounds 1 --repair none --epochs 1": 1,
    "run digits --reduce 0.2 --reduce 0.4 --rounds 1 --repair none --epochs 1": 1,
    "sweep digits --reduce 0.2 --reduce 0.4 --reduce 0.5 --repair none": 1,
    "plan digits": 1,
    "plan digits --dry-run": 1,
    "score digits": 1,
    "ablate digits --shares 0.3 --random-seeds 1 --limit 64": 1,
    "ablate digits --shares 0.3,0.6 --random-seeds 1 --limit 64 --repair once": 1 + 2 * 3,
    "ablate digits --shares 0.3 --random-seeds 1 --limit 64 --repair none": 1,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_captures_its_model_once(words: str, digits: None, counts: Counter[str]) -> None:
    again = ["--output", "out"] if words.split()[0] not in ("plan", "score") else []
    done = CliRunner().invoke(app, [*words.split(), *FEW, *again])
    assert done.exit_code == 0, done.output
    assert counts == {"captured": 1, "discovered": 1, "copied": COMMANDS[words]}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "words", ["prune --reduce 0.3", "prune --reduce 0.3 --repair none", "sweep --reduce 0.2 --reduce 0.3"]
)
def test_a_folder_is_captured_once(
    words: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counter[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = words.split()
    given = [str(made / "llama"), "--calibration", str(made / "text.txt"), *SMALL, "--output", "out"]
    given = [item for item in given if command == "prune" or item not in ("--rounds", "1")]
    done = CliRunner().invoke(app, [command, *given, *options])
    assert done.exit_code == 0, done.output
    assert counts["captured"] == counts["discovered"] == 1
    assert counts["copied"] == 1 if "none" in options else 2 if command == "prune" else 3


def test_what_a_sweep_cuts_is_what_prune_cuts_alone(digits: None) -> None:
    one = ["--repair", "none", *FEW]
    by_prune = ["prune", "digits", "--reduce", "0.3", "--rounds", "1"]
    answers = [
        json.loads(CliRunner().invoke(app, [*words, *one, "--output", words[0]]).stdout.splitlines()[-1])
        for words in (["sweep", "digits", "--reduce", "0.3"], by_prune)
    ]
    member = answers[0]["family"][0]
    for key in ("parameters", "macs", "reduction", "masked_equals_pruned", "pruned"):
        assert member[key] == answers[1][key]


@pytest.mark.parametrize("repair", ["once", "none"])
@pytest.mark.parametrize("criterion", ["innovation", "l2"])
def test_a_prepared_model_is_pruned_as_one_that_is_not(
    repair: str, criterion: str, counts: Counter[str]
) -> None:
    model, batches = randomize(Plain()), images()
    options: dict[str, Any] = {"repair": repair, "score": {"criterion": criterion}}
    shares = (0.2, 0.5)
    alone = [prune(model, batches, config(share, **options)) for share in shares]
    counts.clear()
    prepared = prepare(model, batches, config(**options))
    found = [prune(model, batches, config(share, **options), prepared=prepared) for share in shares]
    assert all(map(same, alone, found))
    assert counts["captured"] == counts["discovered"] == 1
    assert counts["copied"] == (1 + 4 if repair == "once" else 1)
    assert all(item.verification is not None for result in found for item in result.rounds)


def test_one_cut_is_one_round() -> None:
    model, batches = randomize(Plain()), images()
    asked = config(rounds=1)
    prepared = prepare(model, batches, asked)
    made = cut(prepared, rank(prepared))
    result = prune(model, batches, asked)
    assert made.plan == made.total == result.plan and made.repairs == result.rounds[0].repairs
    assert torch.equal(made.model(batches[0]), result.model(batches[0]))
    assert re.fullmatch(
        r"<Plain prepared in \d+\.\d s: 24 units in 3 of \d+ groups may be cut, [\d,]+ parameters>",
        repr(prepared),
    )


def test_scores_of_what_is_prepared_are_those_of_the_model() -> None:
    model, batches = randomize(Plain()), images()
    seconds: dict[str, float] = {}
    one, two = score_once(model, batches), scored_of(prepare(model, batches), seconds=seconds)
    assert seconds.keys() == {"structure", "record", "score"} and one.weights == two.weights
    assert all(
        torch.equal(item.scores, two.importances[name].scores) for name, item in one.importances.items()
    )


def test_a_trained_model_takes_the_place_of_an_untrained_one(counts: Counter[str]) -> None:
    untrained, trained = randomize(Plain()), randomize(Plain(), seed=1)
    asked = config(repair="none")
    alone = prune(trained, images(), asked)
    counts.clear()
    prepared = prepare(untrained, (), asked, example=images()[0]).with_model(trained, images())
    assert same(prune(trained, prepared.batches, asked, prepared=prepared), alone)
    assert counts == {"captured": 1, "discovered": 1, "copied": 1}


def test_a_twin_of_operations_takes_the_new_weights_too(counts: Counter[str]) -> None:
    torch.manual_seed(0)
    first, batches = Stream().eval(), [torch.randn(32, 5) for _ in range(2)]
    asked = config(0.5, repair="none", plan={"residual": True})
    prepared = prepare(first, batches, asked)
    with torch.no_grad():  # trained after it was prepared
        for tensor in first.parameters():
            tensor.add_(torch.randn_like(tensor) / 4)
    result = prune(first, batches, asked, prepared=prepared)
    assert result.plan.normed and {item.verification.twin for item in result.rounds} == {"operations"}
    assert counts == {"captured": 1, "discovered": 1, "copied": 1}
    assert same(result, prune(first, batches, asked))


def test_what_is_prepared_of_another_model_is_refused() -> None:
    model, batches = randomize(Plain()), images()
    prepared = prepare(model, batches, config())
    other = "what was prepared is of another model"
    with pytest.raises(StructureError, match=f"Pruning Plain: {other}.*with_model"):
        prune(randomize(Plain()), batches, config(), prepared=prepared)
    after = prepared.after(cut(prepared, rank(prepared)))
    with pytest.raises(StructureError, match=other):
        prune(after.model, batches, config(), prepared=after)
    with pytest.raises(StructureError, match=r"list of 2.* what was prepared is of other batches"):
        prune(model, images(), config(), prepared=prepared)
    with pytest.raises(StructureError, match=r"of a model with other parameters\. Prepare this model itself"):
        prepared.with_model(after.model)
    with pytest.raises(StructureError, match="is on cpu, the model on meta"):
        prepared.with_model(copy.deepcopy(model).to("meta"))
    model.fc1, model.fc2 = nn.Linear(24, 9), nn.Linear(9, 4)
    with pytest.raises(StructureError, match=other):
        prune(model, batches, config(), prepared=prepared)


def test_what_was_prepared_keeps_its_reading_of_the_batches() -> None:
    model, batches = randomize(Plain()), [(item, torch.zeros(len(item))) for item in images()]
    prepared = prepare(model, batches, config(), inputs=1)
    assert prune(model, batches, config(), prepared=prepared, inputs=1).plan.cuts
    with pytest.raises(StructureError, match=r"read by inputs='x', .*Give inputs to prepare\(\)"):
        prune(model, batches, config(), prepared=prepared, inputs="x")
    with pytest.raises(StructureError, match=r"Give examples to prepare\(\)"):
        prune(model, batches, config(), prepared=prepared, examples=[batches[0]])
    assert inputs_of(prepared.with_model(model, images()).batches) == 1


def test_another_plan_is_another_scope_of_the_same_structure(counts: Counter[str]) -> None:
    model, batches = randomize(Plain()), images()
    prepared = prepare(model, batches, config())
    heads = prepared.with_config(config(plan={"units": "heads"}))
    assert not heads.groups.prunable and heads.found is prepared.found and prepared.groups.prunable
    assert heads.with_config(config()).groups.prunable
    with pytest.raises(TargetError, match="at most"):
        prepared.with_config(config(0.97)).check_reach()
    assert counts["captured"] == 1


def test_what_is_no_preparation_is_refused() -> None:
    net, batches = Plain().eval(), images()
    with pytest.raises(StructureError, match=r"what was prepared is a UnitGroups\. Give what prepare\("):
        prune(net, batches, prepared=discover(net, batches[0]))  # type: ignore[arg-type]


def test_a_cut_of_what_was_prepared_for_repair_is_verified_without_it() -> None:
    repaired = PruneConfig(plan={"rounds": 1}, repair="once")
    plain = repaired.model_copy(update={"repair": "none"})
    ready = prepare(Plain().eval(), images(), repaired).with_config(plain)
    assert ready.reference is None
    made = cut(ready, rank(ready))
    assert made.verification is not None and made.verification.difference < 1e-10
