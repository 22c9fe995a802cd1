"""Scores that are kept: they cut a network to any size as one round of pruning does, and to no other one."""

import json
from dataclasses import replace

import pytest
import torch
from tests.resume.test_rounds_pruning import data, network
from torch import nn
from watching import never

from cria_prune import PruneConfig, load_scores, prune, save_scores, score_once
from cria_prune.artifact import scores as kept
from cria_prune.base.errors import ArtifactError, ConfigError, StructureError
from cria_prune.config import ScoreConfig
from cria_prune.resume.rounds import PARTS


def config(share=0.5, **options):
    return PruneConfig(**{"plan": {"reduction": share, "rounds": 1}, **options})


@pytest.fixture(scope="module")
def scored():
    return score_once(network(), data())


def same(left, right):
    one, two = left.model.state_dict(), right.model.state_dict()
    assert left.plan == right.plan
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("criterion", ["innovation", "l2", "taylor", "distortion"])
def test_any_size_is_what_one_round_gives_and_nothing_is_recorded(criterion, tmp_path):
    options = {"score": {"criterion": criterion}}
    made = score_once(network(), data(), config(**options))
    again = load_scores(save_scores(tmp_path / "scores", made))
    expected = {share: prune(network(), data(), config(share, **options)) for share in (0.2, 0.5, 0.7)}
    for share, result in expected.items():
        for given in (made, again):
            with never("record", "score"):
                found = prune(network(), data(), config(share), scores=given)
            assert same(found, result) and found.config.score.criterion == criterion
            assert found.rounds[0].diagnosis == result.rounds[0].diagnosis
            assert found.rounds[0].repairs == result.rounds[0].repairs


def test_sketches_and_consumers_of_their_own_come_back_too(tmp_path):
    record = {"exact_units": 8, "sketch_columns": 64}
    made = score_once(network(), data(), config(record=record, repair="once"))
    folder = save_scores(tmp_path / "scores", made)
    again = load_scores(folder)
    for name, by_weight in made.consumed.items():
        for weight, moments in by_weight.items():
            for part in PARTS:
                one, two = getattr(moments, part), getattr(again.consumed[name][weight], part)
                assert (one is None and two is None) or torch.equal(one, two)
    assert same(
        prune(network(), data(), config(record=record, repair="once")),
        prune(network(), data(), config(repair="once"), scores=again),
    )


def test_what_the_scores_do_not_fit_is_refused(scored):
    with pytest.raises(ConfigError, match=r"in 4 rounds .* Ask for one round"):
        prune(network(), data(), PruneConfig(plan={"rounds": 4}), scores=scored)
    with pytest.raises(StructureError, match="of a model with other weights"):
        prune(network(1), data(), config(), scores=scored)
    first = next(iter(scored.importances))
    rest = {name: item for name, item in scored.importances.items() if name != first}
    with pytest.raises(StructureError, match=f"1 of 3 groups have none, the first is '{first}'"):
        prune(network(), data(), config(), scores=replace(scored, importances=rest))
    short = replace(scored.importances[first], scores=scored.importances[first].scores[1:])
    with pytest.raises(StructureError, match="has 12 units, the scores 11"):
        prune(network(), data(), config(), scores=replace(scored, importances={**rest, first: short}))


def test_without_moments_there_is_no_repair(tmp_path):
    made = score_once(network(), data(), config(repair="none"))
    again = load_scores(save_scores(tmp_path / "scores", made))
    assert made.consumed is None and again.consumed is None
    with pytest.raises(ConfigError, match="the moments for it were not kept"):
        prune(network(), data(), config(repair="once"), scores=again)
    plain = config(repair="none")
    assert same(prune(network(), data(), plain, scores=again), prune(network(), data(), plain))


def test_rounds_that_are_kept_belong_to_their_scores(scored, tmp_path):
    first = prune(network(), data(), config(), scores=scored, state=tmp_path)
    assert same(prune(network(), data(), config(), scores=scored, state=tmp_path), first)
    name = next(iter(scored.importances))
    other = replace(scored.importances[name], scores=scored.importances[name].scores.flip(0))
    with pytest.raises(ArtifactError, match="scores: there"):
        changed = replace(scored, importances={**scored.importances, name: other})
        prune(network(), data(), config(), scores=changed, state=tmp_path)
    with pytest.raises(ArtifactError, match=r"scores: there .*, here nothing"):
        prune(network(), data(), config(), state=tmp_path)


def test_scores_are_not_written_over_files(scored, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        save_scores(tmp_path, scored)
    save_scores(tmp_path, scored, overwrite=True, said={"target": "mine"})
    assert json.loads((tmp_path / kept.SCORES).read_text())["target"] == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", kept.SCORES, kept.TENSORS]


def edited(change):
    def edit(folder):
        values = json.loads((folder / kept.SCORES).read_text())
        change(values)
        (folder / kept.SCORES).write_text(json.dumps(values))

    return edit


DAMAGES = {
    "no folder": (lambda folder: (folder / kept.SCORES).unlink(), "holds no scores.json"),
    "no JSON": (lambda folder: (folder / kept.SCORES).write_text("{"), "it is damaged"),
    "no tensors": (lambda folder: (folder / kept.TENSORS).unlink(), "missing or another"),
    "cut": (lambda folder: (folder / kept.TENSORS).write_bytes(b"cut"), "missing or another"),
    "newer": (edited(lambda values: values.update(version=3)), "version 3, this Cria reads"),
    "foreign": (edited(lambda values: values.update(groups=3)), "'groups' is damaged"),
    "fewer": (edited(lambda values: values["diagnosis"].popitem()), "it is damaged"),
    "more": (edited(lambda values: values["groups"].append("more")), "it is damaged"),
    "config": (edited(lambda values: values["config"].update(surprise=1)), "damaged|surprise"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_scores_are_an_error(name, scored, tmp_path):
    folder = save_scores(tmp_path / "scores", scored)
    damage, match = DAMAGES[name]
    damage(folder)
    with pytest.raises(ArtifactError, match=match):
        load_scores(folder)


def test_scores_of_before_say_settings_that_were_not_read(scored, tmp_path):
    """Version 1 says ridge 0.01 for every criterion, where `innovation` took 0.0001."""
    said = {"neighbors": 32, "ridge": 0.01, "pairs": "all", "sketch": 256}
    for criterion, given, expected in (
        ("innovation", said, {}),
        ("l2", {**said, "neighbors": 8, "ridge": 0.5}, {}),
        ("distortion", said, {}),
        ("distortion", {**said, "neighbors": 8, "ridge": 0.5}, {"neighbors": 8, "ridge": 0.5}),
        ("grounded-distortion", {**said, "pairs": 3, "ridge": 0.5}, {"pairs": 3}),
    ):
        folder = save_scores(tmp_path / "scores", scored, overwrite=True)
        values = json.loads((folder / kept.SCORES).read_text())
        values["version"], values["config"]["score"] = 1, {"criterion": criterion, **given}
        (folder / kept.SCORES).write_text(json.dumps(values))
        assert load_scores(folder).config.score == ScoreConfig(criterion=criterion, **expected)
    own = replace(scored, config=config(score={"ridge": 0.01}))
    assert load_scores(save_scores(tmp_path / "own", own)).config.score.ridge == 0.01


def test_a_link_out_of_the_folder_is_not_followed(scored, tmp_path):
    folder = save_scores(tmp_path / "scores", scored)
    (folder / kept.TENSORS).rename(tmp_path / "elsewhere")
    (folder / kept.TENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="missing or another"):
        load_scores(folder)


def test_scores_of_no_finite_numbers_are_refused(scored, tmp_path):
    name = next(iter(scored.importances))
    broken = replace(scored.importances[name], scores=scored.importances[name].scores * float("nan"))
    folder = save_scores(tmp_path / "s", replace(scored, importances={**scored.importances, name: broken}))
    with pytest.raises(ArtifactError, match="no finite float64"):
        load_scores(folder)


def test_a_network_of_nothing_but_linear_layers_can_be_scored_once():
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)).eval()
    batches = [torch.randn(48, 4, generator=torch.Generator().manual_seed(0))]
    made = score_once(net, batches)
    assert same(prune(net, batches, config(0.3), scores=made), prune(net, batches, config(0.3)))
