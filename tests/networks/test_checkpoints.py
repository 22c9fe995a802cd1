"""Checkpoints and budgets on the real networks: discover, plan, apply, save, load."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cria_prune.artifact.checkpoint import load, save
from cria_prune.base.errors import ArtifactError
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import count_parameters
from cria_prune.planning.plan import compose, identity_plan, plan
from cria_prune.structure.discovery import discover
from cria_prune.structure.groups import shrink
from cria_prune.surgery.removal import apply
from cria_prune.tasks.models import ARCHITECTURES

EXAMPLES = {"digits": (2, 1, 8, 8), "cifar10-resnet20": (2, 3, 32, 32)}


@pytest.mark.parametrize(
    ("name", "ranking"), [("digits", "uniform"), ("digits", "global"), ("cifar10-resnet20", "global")]
)
def test_two_rounds_saved_and_loaded(tmp_path, name, ranking):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    dense_model = ARCHITECTURES[name]().eval()
    x = torch.randn(EXAMPLES[name])
    dense = discover(dense_model, x)
    assert count_parameters(dense) == sum(value.numel() for value in dense_model.parameters())
    model, groups, total = dense_model, dense, identity_plan(dense)
    for target in (0.25, 0.5):
        scores = {group.name: rng.random(group.size) for group in groups.prunable}
        part = plan(groups, scores, PlanConfig(ranking=ranking), dense=dense, target=target)
        model, groups, total = apply(model, part), shrink(groups, part.kept), compose(total, part)
    left = sum(value.numel() for value in model.parameters())
    assert left == total.report["parameters"] == count_parameters(groups)
    assert 0.5 <= total.report["reached"] == 1 - left / total.report["parameters_dense"] < 0.53
    loaded = load(save(tmp_path / "x", model, total, architecture=name))
    assert torch.equal(loaded.model(x), model.eval()(x))
    assert loaded.plan == total
    other = next(key for key in ARCHITECTURES if key != name)
    with pytest.raises(ArtifactError, match="the plan does not fit it"):
        load(tmp_path / "x", ARCHITECTURES[other]())
