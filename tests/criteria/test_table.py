"""Criteria of one's own, the settings that criteria read, and scores that say nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune import (
    CRITERIA,
    PruneConfig,
    ScoreConfig,
    ablate,
    discover,
    predict_memory,
    prune,
    register_criterion,
    score,
)
from cria_prune.base.errors import ConfigError, CriterionError, SignalError
from cria_prune.bench.peer import IMPORTANCES
from cria_prune.bench.suite import read_suite
from cria_prune.criteria.score import graph_settings
from cria_prune.criteria.table import BUILT_IN, PEERS, unregister_criterion
from cria_prune.recording.states import reads_of
from cria_prune.spectrum.importance import Diagnosis, Importance
from cria_prune.torch_pruning import SpectralImportance

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own-criterion.md"


@pytest.fixture(autouse=True)
def only_our_own() -> Iterator[None]:
    yield
    for name in [name for name in CRITERIA if name not in BUILT_IN]:
        unregister_criterion(name)


def network(units: int = 12) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, units), nn.ReLU(), nn.Linear(units, 9), nn.ReLU(), nn.Linear(9, 3))
    return net.eval(), [torch.randn(16, 6) for _ in range(4)]


def spread(evidence: Any, config: Any) -> Tensor:
    """Spread of the output.

    More.
    """
    return evidence.output_side().variance


def constant(evidence: Any, config: Any) -> Tensor:
    return torch.full((evidence.units,), 0.1)


def test_the_guide_runs_and_its_setting_counts(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    said: dict[str, Any] = {}
    exec(compile(block, str(GUIDE), "exec"), said)
    assert said["result"].model[0].out_features < 64 and "swing" in capsys.readouterr().out
    net, batches = said["net"], said["batches"]
    config = PruneConfig(score={"criterion": "swing"}, plan={"reduction": 0.5, "rounds": 2})
    plain = prune(net, batches, config)
    assert plain.rounds[0].scores != said["result"].rounds[0].scores
    assert CRITERIA["swing"].reads == {"ridge"}


def test_one_of_its_own_goes_wherever_a_criterion_goes(tmp_path: Path) -> None:
    net, batches = network()
    found = register_criterion("spread", spread, needs={"output"}, source="us")
    assert found is CRITERIA["spread"] and found.needs == {"states", "output"} and found.source == "us"
    assert found.summary == "Spread of the output." and reads_of(found.needs) == {"output"}
    config = PruneConfig(score={"criterion": "spread"}, plan={"reduction": 0.4, "rounds": 1}, repair="none")
    result = prune(net, batches, config)
    scores = {name: torch.tensor(item, dtype=torch.float64) for name, item in result.rounds[0].scores.items()}
    with torch.no_grad():
        signals = net[:2](torch.cat(batches)).double()
    torch.testing.assert_close(scores["0"], signals.var(dim=0, correction=0), rtol=1e-6, atol=0)
    assert result.rounds[0].diagnosis["0"]["split_half"] is not None
    groups = discover(net, batches[0])
    curves = ablate(net, groups, scores, lambda model: float(model[0].out_features), (0.5,), seeds=(0,))
    assert curves is not None
    memory = predict_memory(net, groups, batches[0], config)
    assert memory.recorded == 1 and memory.stages[-1].parts["weights"] > 0
    (tmp_path / "grid.yaml").write_text("network: digits\ncriteria: [spread, l2]\nreductions: [0.5]\n")
    assert read_suite(str(tmp_path))[0].criteria == ("spread", "l2")
    unregister_criterion("spread")
    with pytest.raises(ConfigError, match="no criterion 'spread'"):
        read_suite(str(tmp_path))
    with pytest.raises(CriterionError, match=r"found 'spread'\. Known criteria: random"):
        prune(net, batches, config)


def test_it_scores_the_channels_of_torch_pruning() -> None:
    tp = pytest.importorskip("torch_pruning")
    net, batches = network()
    register_criterion("spread", spread, needs={"states"})
    pruner = tp.pruner.BasePruner(
        net, batches[0], importance=SpectralImportance(net, batches, "spread"), pruning_ratio=0.5,
        in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
    )  # fmt: skip
    with torch.no_grad():
        signals = net[:2](torch.cat(batches))
    expected = net[0].weight[signals.var(dim=0).topk(6).indices.sort().values].clone()
    pruner.step()
    assert torch.equal(net[0].weight, expected)


def test_an_importance_keeps_its_diagnosis_and_weights_need_no_recording() -> None:
    def own(evidence: Any, config: Any) -> Importance:
        return Importance(evidence.weights.producer_l1, Diagnosis(dead=(1,)))

    net, batches = network()
    register_criterion("own", own)
    found = score(net, discover(net, batches[0]), None, ScoreConfig(criterion="own"))
    assert found["0"].diagnosis.dead == (1,) and found["0"].diagnosis.split_half is None
    torch.testing.assert_close(found["0"].scores, net[0].weight.detach().double().abs().sum(dim=1))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("l2", {}, "Registering the criterion 'l2': there is one of that name"),
        ("tp-own", {}, "no name for one.*another beginning than 'tp-'"),
        ("a/b", {}, "no name for one"),
        (
            "own",
            {"needs": {"states", "weights"}},
            "found needs 'weights'. Choose from examples, gradients, in",
        ),
        ("own", {"reads": {"seed"}}, "found reads 'seed'. Choose from neighbors, pairs, ridge, sketch"),
    ],
)
def test_what_cannot_be_registered(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(CriterionError, match=match):
        register_criterion(name, spread, **options)
    assert set(CRITERIA) == BUILT_IN
    assert all(name.startswith(PEERS) for name in IMPORTANCES)


def test_what_is_not_there_or_built_in_is_not_removed() -> None:
    with pytest.raises(CriterionError, match=r"'l2': it is Cria's own\. Registered are: none"):
        unregister_criterion("l2")
    with pytest.raises(CriterionError, match="there is none of that name"):
        unregister_criterion("magic")


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (
            lambda e, c: torch.ones(e.units + 1),
            r"'own' for group '0': it returned scores of shape \(13,\).*\(12,\)",
        ),
        (lambda e, c: torch.ones(e.units, 1), r"scores of shape \(12, 1\)"),
        (lambda e, c: torch.full((e.units,), math.nan), "12 of its scores are NaN or infinite"),
        (lambda e, c: [1.0] * e.units, "it returned list"),
        (lambda e, c: torch.ones(e.units, dtype=torch.complex64), "it returned complex numbers"),
        (
            lambda e, c: e.output_side().mean,
            "reads the output side.*Register it with 'states' among its needs",
        ),
        (
            lambda e, c: e.both_sides()[0].mean,
            "reads the input side.*Register it with 'input' among its needs",
        ),
        (constant, "'own': it scores the units of every group all alike"),
        (lambda e, c: 0 * constant(e, c), "'own': it scores the units of every group all alike"),
    ],
)
def test_answers_that_are_no_scores(answer: Any, match: str) -> None:
    net, batches = network()
    register_criterion("own", answer)
    with pytest.raises(CriterionError, match=match):
        prune(net, batches, PruneConfig(score={"criterion": "own"}))


def test_scores_alike_where_they_may_be() -> None:
    """Few units, or a group without any effect: no error, for another group tells its units apart."""

    level = [0.0]

    def own(evidence: Any, config: Any) -> Tensor:
        ones = torch.ones(evidence.units, dtype=torch.float64)
        return evidence.weights.producer_l2 if evidence.name == "2" else level[0] * ones

    register_criterion("own", own)
    for units, level[0], refused in ((40, 0.0, False), (15, 0.1, False), (16, 0.1, True), (40, 1e-30, False)):
        net, batches = network(units)
        groups = discover(net, batches[0])
        if refused:
            with pytest.raises(
                CriterionError, match=r"'own' for group '0': it scores its 16 units all alike, at 0\.1"
            ):
                score(net, groups, None, ScoreConfig(criterion="own"))
        else:
            assert set(score(net, groups, None, ScoreConfig(criterion="own"))) == {"0", "2"}


def test_scales_as_they_are_made_are_no_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.raises(CriterionError, match="'bn-scale': it scores the units of every group all alike"):
        prune(net, [torch.randn(16, 4)] * 2, PruneConfig(score={"criterion": "bn-scale"}))


GIVEN = {"neighbors": 8, "ridge": 0.5, "pairs": 3, "sketch": 16}


@pytest.mark.parametrize("setting", GIVEN)
def test_a_setting_that_is_not_read_is_an_error_before_any_work(setting: str) -> None:
    net, batches = network()

    class Unread(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            pytest.fail("the data were read")

    readers = [name for name, item in CRITERIA.items() if setting in item.reads]
    assert set(readers) - {"innovation", "innovation-magnitude"} == {
        *("distortion", "distortion-weighted", "consumed-distortion"),
        *(() if setting == "ridge" else ("grounded-distortion",)),
    }
    for name in CRITERIA:
        config = PruneConfig(score={"criterion": name, setting: GIVEN[setting]}, plan={"rounds": 1})
        if name in readers:
            assert len(prune(net, batches, config, loss=lambda model, batch: model(batch).sum()).rounds) == 1
            continue
        with pytest.raises(
            CriterionError, match=rf"{name!r} with {setting} .*Leave {setting} out.*{readers[0]}"
        ):
            prune(net, Unread(batches), config)
        with pytest.raises(CriterionError, match=f"does not read {setting}"):
            predict_memory(net, discover(net, batches[0]), batches[0], config)
    as_it_is = ScoreConfig().model_dump() | {"criterion": "l2", "ridge": 0.01}
    assert prune(net, batches, PruneConfig(score=as_it_is)).rounds  # values of no choice, and those of before


def test_every_setting_that_is_read_changes_the_scores() -> None:
    net, batches = network(80)
    for name, item in CRITERIA.items():
        found = []
        for given in (
            ({}, *({key: GIVEN[key]} for key in sorted(item.reads - {"sketch"}))) if item.reads else ()
        ):
            config = PruneConfig(score={"criterion": name, **given}, plan={"rounds": 1})
            found.append(prune(net, batches, config).rounds[0].scores["0"])
        assert len(set(found)) == len(found), name


@pytest.mark.parametrize("ridge", [1e300, 1e-300, math.inf, 0, -1, math.nan])
def test_bounds_of_the_ridge(ridge: float) -> None:
    with pytest.raises(ConfigError, match=r"ridge: .*must be between 1e-08 and 1000 \(found"):
        ScoreConfig(ridge=ridge)


@pytest.mark.parametrize("pairs", [1e300, 1e-300, math.inf, 0, -1, math.nan, 1.5, 0.0, 10**9])
def test_bounds_of_the_pairs(pairs: float) -> None:
    with pytest.raises(
        ConfigError, match=r'pairs.*"all", a whole number from 1 to 65536, or a share from 1e-06'
    ):
        ScoreConfig(pairs=pairs)
    with pytest.raises(ConfigError, match="pairs"):
        ScoreConfig(pairs="most")


@pytest.mark.parametrize(
    ("name", "value"), [("neighbors", 0), ("neighbors", 10**6), ("sketch", 0), ("sketch", 10**9)]
)
def test_bounds_of_the_counts(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: .*must be between 1 and \d+"):
        ScoreConfig(**{name: value})


@pytest.mark.parametrize("ridge", [1e-8, 1e3])
@pytest.mark.parametrize("criterion", ["distortion", "consumed-distortion", "innovation"])
def test_scores_are_sound_at_both_ends_of_the_ridge(criterion: str, ridge: float) -> None:
    net, batches = network(100)
    result = prune(
        net, batches, PruneConfig(score={"criterion": criterion, "ridge": ridge}, plan={"rounds": 1})
    )
    assert len(set(result.rounds[0].scores["0"])) > 50


def test_graphs_that_are_kept_are_those_of_the_criterion() -> None:
    for criterion, given, expected in (
        ("distortion", {"ridge": 0.5, "neighbors": 8}, {"ridge": 0.5, "neighbors": 8}),
        ("innovation", {"ridge": 0.5}, {"neighbors": 32}),
        ("l2", {}, {"neighbors": 32}),
    ):
        assert graph_settings(ScoreConfig(criterion=criterion, **given)) == expected


def test_a_share_is_a_share_however_it_is_typed() -> None:
    assert ScoreConfig(pairs="1.0").pairs == 1.0 and isinstance(ScoreConfig(pairs="1.0").pairs, float)
    assert ScoreConfig.setting("pairs", "1.0") == 1.0
    assert isinstance(ScoreConfig.setting("pairs", "1.0"), float)
    found = ScoreConfig.setting("pairs", "4")
    assert found == 4 and isinstance(found, int)
    for wrong in (True, "some"):
        with pytest.raises(ConfigError, match=r"pairs: must be \"all\" or a number"):
            ScoreConfig(pairs=wrong)


def test_negative_scores_are_no_importance_for_torch_pruning() -> None:
    """They were all made 1 where the mean was not above 0: channels went by their place."""
    register_criterion("below", lambda evidence, config: torch.arange(evidence.units) - 1000.0)
    net, batches = network()
    importance = SpectralImportance(net, batches, "below")
    torch_pruning = pytest.importorskip("torch_pruning")
    pruner = torch_pruning.pruner.BasePruner(net, batches[0], importance=importance, pruning_ratio=0.5)
    with pytest.raises(SignalError, match=r"a score is negative, -1000.*uniform ranking"):
        pruner.step()


def test_an_error_of_ones_own_function_names_the_criterion_and_the_group() -> None:
    register_criterion("broken", lambda evidence, config: 1 / 0)
    net, batches = network()
    with pytest.raises(CriterionError, match=r"'broken' for group '0'.*ZeroDivisionError: division by zero"):
        prune(net, batches, PruneConfig(score={"criterion": "broken"}))


@pytest.mark.parametrize(
    ("name", "function", "options", "match"),
    [
        ("own", "no function", {}, "its function is 'no function'"),
        (5, spread, {}, "it is no name"),
        ("own", spread, {"needs": "states"}, "its needs are the text 'states'"),
        ("own", spread, {"reads": "ridge"}, "its reads are the text 'ridge'"),
    ],
)
def test_what_is_no_criterion(name: Any, function: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(CriterionError, match=match):
        register_criterion(name, function, **options)
    assert name not in CRITERIA
