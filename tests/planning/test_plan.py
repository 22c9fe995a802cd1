"""Plans: made, composed, printed, written and read, and every way to damage one."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from tests.planning.test_budget import convnet, random_groups, random_kept, slow_shapes

from cria_prune.base.errors import ArtifactError, StructureError, TargetError
from cria_prune.config import PlanConfig
from cria_prune.planning.plan import Plan, compose, identity_plan, make_plan, plan
from cria_prune.structure.groups import removed_positions, shrink


def scores_for(groups, seed=0):
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in groups.prunable}


def cut_shapes(groups, made):
    shapes = {name: list(shape) for name, shape in groups.shapes.items()}
    for cut in made.cuts:
        assert shapes[cut.tensor][cut.dim] == cut.size
        shapes[cut.tensor][cut.dim] = len(cut.kept)
    return {name: tuple(shape) for name, shape in shapes.items()}


def test_cuts_by_hand():
    made = make_plan(convnet(), {"b": [4, 1]})
    assert made.kept == {"a": tuple(range(8)), "b": (1, 4), "fc": tuple(range(10))}
    assert [(c.tensor, c.dim, c.size, c.kept, c.role) for c in made.cuts] == [
        ("b.weight", 0, 6, (1, 4), "produces"),
        ("fc.weight", 1, 24, (4, 5, 6, 7, 16, 17, 18, 19), "consumes"),
    ]


@pytest.mark.parametrize("seed", range(15))
def test_cuts_give_the_shapes_of_shrink(seed):
    rng = np.random.default_rng(seed)
    groups = random_groups(rng)
    kept = random_kept(groups, rng)
    made = make_plan(groups, kept)
    assert cut_shapes(groups, made) == dict(shrink(groups, kept).shapes)


@pytest.mark.parametrize("seed", range(15))
def test_composing_equals_cutting_twice(seed):
    """On arrays of numbers: cut by the first, then the second; or once by the composed plan."""
    rng = np.random.default_rng(seed)
    dense = random_groups(rng)
    arrays = {name: rng.random(shape) for name, shape in dense.shapes.items()}
    total, groups = identity_plan(dense), dense
    cut_twice = dict(arrays)
    for _ in range(3):
        kept = random_kept(groups, rng)
        for (tensor, dim), gone in removed_positions(groups.groups, kept).items():
            cut_twice[tensor] = np.delete(cut_twice[tensor], gone, axis=dim)
        total = compose(total, make_plan(groups, kept))
        groups = shrink(groups, kept)
    cut_once = dict(arrays)
    for cut in total.cuts:
        cut_once[cut.tensor] = np.take(cut_once[cut.tensor], cut.kept, axis=cut.dim)
    assert all(np.array_equal(cut_once[name], cut_twice[name]) for name in arrays)
    assert total.sizes == {group.name: group.size for group in dense}
    assert {name: len(stays) for name, stays in total.kept.items()} == {g.name: g.size for g in groups}
    assert sorted(total.cuts, key=repr) == sorted(make_plan(dense, total.kept).cuts, key=repr)


def test_report_of_a_plan_over_rounds():
    dense = convnet()
    first = plan(dense, scores_for(dense), PlanConfig(reduction=0.6), target=0.3)
    smaller = shrink(dense, first.kept)
    second = plan(smaller, scores_for(smaller), PlanConfig(reduction=0.6), dense=dense)
    assert first.report["asked"] == 0.3 and second.report["asked"] == 0.6
    assert second.report["parameters_dense"] == first.report["parameters_dense"] == 932
    total = compose(first, second)
    left = sum(slow_shapes(dense, total.kept)[name] for name in dense.parameters)
    assert total.report["parameters"] == left
    assert total.report["reached"] == 1 - left / 932 >= 0.6
    assert total.report["of"] == "parameters"
    assert total.report["reachable"] == first.report["reachable"]
    text = str(total)
    assert "asked 60.00%" in text and f"parameters: 932 -> {left}" in text and "\nb " in text
    assert compose(identity_plan(dense), first) == first


def test_shares_of_another_dense_network_are_not_carried_over():
    dense = convnet()
    first = plan(dense, scores_for(dense), PlanConfig(reduction=0.3))
    smaller = shrink(dense, first.kept)
    second = plan(smaller, scores_for(smaller), PlanConfig(reduction=0.3))
    report = compose(first, second).report
    assert report == {
        "parameters_dense": 932,
        "macs_dense": first.report["macs_dense"],
        "parameters": second.report["parameters"],
        "macs": second.report["macs"],
    }


def test_same_scores_same_plan():
    groups = convnet()
    texts = {plan(groups, scores_for(groups), PlanConfig(ranking="global")).to_json() for _ in range(3)}
    assert len(texts) == 1


def test_target_of_the_configuration_is_checked():
    with pytest.raises(TargetError, match=r"A reduction of 1\.5"):
        plan(convnet(), scores_for(convnet()), PlanConfig(reduction=1.5))


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ({"x": [0]}, "no such group. Known groups: a, b, fc"),
        ({"a": []}, r"array of shape \(0,\)"),
        ({"a": [0, 0]}, "2 indices from 0 to 0 for 8 units"),
        ({"a": [8]}, "for 8 units"),
        ({"a": [-1]}, "from -1"),
        ({"a": [0.5]}, "float64"),
        ({"a": [True, False]}, "bool"),
        ({"fc": [0]}, "frozen: it is the model's output"),
    ],
)
def test_indices_that_do_not_fit(kept, text):
    with pytest.raises(StructureError, match=text):
        make_plan(convnet(), kept)


def test_plans_that_do_not_compose():
    dense = convnet()
    first = make_plan(dense, {"a": [0, 1]})
    with pytest.raises(StructureError, match="group 'a': the first leaves 2, the second expects 8"):
        compose(first, first)
    other = Plan({"z": 1}, {"z": (0,)}, (), {})
    with pytest.raises(StructureError, match="in one of them only"):
        compose(first, other)


def test_json_round_trip():
    made = plan(convnet(), scores_for(convnet()), PlanConfig())
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()
    assert isinstance(again.kept["a"], tuple) and isinstance(again.cuts[0].kept, tuple)


def damage(path, value):
    def change(values):
        *parents, last = path
        for key in parents:
            values = values[key]
        if value is ...:
            del values[last]
        else:
            values[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (damage(["format"], "other"), "format 'other'"),
        (damage(["version"], 3), "version 3"),
        (damage(["cuts"], ...), r"without \['cuts'\]"),
        (damage(["more"], 1), r"unknown \['more'\]"),
        (damage(["sizes"], []), "sizes is a list"),
        (damage(["sizes", "a"], "8"), "not an integer"),
        (damage(["sizes", "a"], True), "not an integer"),
        (damage(["sizes", "a"], 0), "at least 1"),
        (damage(["sizes", "a"], 3), "the size is 3"),
        (damage(["kept", "a"], ...), r"\['a'\] in only one"),
        (damage(["kept", "a"], []), "without items"),
        (damage(["kept", "a"], [1, 0]), "not in ascending"),
        (damage(["kept", "a"], [1, 1]), "not in ascending"),
        (damage(["kept", "a"], [-1, 1]), "at least 0"),
        (damage(["kept", "a"], [0, 8]), "index 8, but the size is 8"),
        (damage(["kept", "a"], [0.0, 1]), "not an integer"),
        (damage(["cuts"], {}), "cuts is a dict"),
        (damage(["cuts", 0], 3), r"cuts\[0\] is a int"),
        (damage(["cuts", 0, "dim"], -1), "at least 0"),
        (damage(["cuts", 0, "tensor"], None), "tensor None"),
        (damage(["cuts", 0, "role"], "eats"), "role 'eats'"),
        (damage(["cuts", 0, "role"], ["eats"]), "role"),
        (damage(["cuts", 0, "kept"], [99]), "index 99"),
        (damage(["report", "asked"], None), r"report\['asked'\]"),
        (damage(["report", "asked"], float("nan")), r"report\['asked'\]"),
    ],
)
def test_damaged_plans(change, text):
    values = json.loads(plan(convnet(), scores_for(convnet()), PlanConfig()).to_json())
    change(values)
    with pytest.raises(ArtifactError, match=text):
        Plan.from_dict(copy.deepcopy(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "\x00", "{}"])
def test_texts_that_are_no_plan(text):
    with pytest.raises(ArtifactError, match="Reading a plan: found"):
        Plan.from_json(text)


def test_doubled_cuts():
    values = make_plan(convnet(), {"b": [0]}).to_dict()
    values["cuts"].append(values["cuts"][0])
    with pytest.raises(ArtifactError, match="two cuts of one tensor dimension"):
        Plan.from_dict(values)


def test_printing_survives_odd_reports():
    assert "group" in str(Plan({"a": 1}, {"a": (0,)}, (), {"reached": "?"}))
    assert "group" in str(Plan({}, {}, (), {}))
