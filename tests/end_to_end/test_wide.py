"""Groups above the exact bound: no criterion, and no repair, makes a matrix of units by units."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from tests.graph.test_graph import signals
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cria_prune import PlanConfig, PruneConfig, discover, prune, record
from cria_prune.config import RecordConfig, ScoreConfig
from cria_prune.criteria.score import score
from cria_prune.criteria.table import CRITERIA
from cria_prune.graph.moments import MomentAccumulator, Moments
from cria_prune.spectrum.distortions import SKETCH_RIDGE, distortion, innovation, unpredicted
from cria_prune.spectrum.importance import rank_correlation

UNITS = 2100
"""More than a block of neighbours or of distances (1,024), so that a block is no square."""


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for item in tree_leaves(found):
            if isinstance(item, torch.Tensor) and not item.is_sparse_csr:
                self.elements = max(self.elements, item.numel())
        return found


def layer() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, UNITS), nn.BatchNorm1d(UNITS), nn.ReLU(), nn.Linear(UNITS, 3)).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)  # as they are made, scales say nothing
    return model, [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(8)]


@pytest.fixture(scope="module")
def wide() -> Any:
    model, batches = layer()
    groups = discover(model, batches[0])
    settings = RecordConfig(exact_units=512, sketch_columns=48)
    return model, groups, record(model, groups, batches, settings, per_example=True)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_criterion_makes_a_matrix_of_units_by_units(criterion: str, wide: Any) -> None:
    model, groups, states = wide
    assert states["0"].output.sketch is not None
    few = {
        name: value for name, value in (("sketch", 16), ("neighbors", 8)) if name in CRITERIA[criterion].reads
    }
    settings = ScoreConfig(criterion=criterion, split_half=False, **few)
    with Largest() as seen:
        found = score(model, groups, states, settings)["0"].scores
    assert torch.isfinite(found).all() and len(found) == UNITS
    assert seen.elements < UNITS * UNITS / 1.5


def test_pruning_with_repair_makes_no_matrix_of_units_by_units() -> None:
    model, batches = layer()
    config = PruneConfig(
        record={"exact_units": 512, "sketch_columns": 48},
        plan=PlanConfig(reduction=0.4, rounds=1),
        score={"split_half": False},
        repair="once",
    )
    with Largest() as seen:
        result = prune(model, batches, config)
    (repair,) = result.rounds[0].repairs
    assert repair.tensor == "3.weight" and 0 < repair.recovered <= 1
    assert seen.elements < UNITS * UNITS / 10


def sketch(S: torch.Tensor, samples: int = 100) -> Moments:
    S = S.float()
    variance = S.double().square().sum(dim=1) / samples
    return Moments(samples, torch.zeros(len(S)).double(), variance, sketch=S)


def test_innovation_of_orthogonal_groups_of_copies_by_hand() -> None:
    """A column of k units of variance v: h = v / (k v + e), so e h / (1 − h) = v e / ((k − 1) v + e)."""
    copies, sizes = (1, 2, 5), (1.0, 2.0, 0.5)
    S = torch.zeros(8, 3)
    row = 0
    for column, (count, size) in enumerate(zip(copies, sizes, strict=True)):
        S[row : row + count, column] = 10 * size**0.5
        row += count
    ridge = SKETCH_RIDGE * 8 / 3 * (1 + 4 + 2.5) / 8
    expected = [
        v * ridge / ((k - 1) * v + ridge) for k, v in zip(copies, sizes, strict=True) for _ in range(k)
    ]
    np.testing.assert_allclose(unpredicted(sketch(S), 1e-4).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("d, r", [(300, 40), (40, 300), (64, 64)])
@pytest.mark.parametrize("eps", [1e-4, 30.0])
def test_innovation_of_a_sketch_is_that_of_its_inverse(
    d: int, r: int, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cria_prune.graph.moments.BLOCK", 37)
    moments = sketch(torch.randn(d, r, generator=torch.Generator().manual_seed(0)))
    B = moments.sketch.double().numpy() / 10
    ridge = max(eps, SKETCH_RIDGE * d / r) * float(moments.variance.mean())
    expected = 1 / np.diag(np.linalg.inv(B @ B.T + ridge * np.eye(d))) - ridge
    np.testing.assert_allclose(unpredicted(moments, eps).numpy(), expected, rtol=1e-9)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(1))
    turned = unpredicted(moments.select(order), eps)
    np.testing.assert_allclose(turned.numpy(), expected[order.numpy()], rtol=1e-9)


def test_innovation_of_few_columns_ranks_like_the_exact_one() -> None:
    """Consumers of unequal size show a score that is one constant, the ridge, for every unit."""
    Y = signals(300, 6000) * torch.linspace(0.3, 3, 300)[:, None]
    norms = torch.rand(300, generator=torch.Generator().manual_seed(4)) + 0.5
    total = MomentAccumulator(300, exact=False, columns=30)
    total.add(Y)
    found = innovation(total.moments(), norms).scores
    exact = innovation(Moments.from_signals(Y), norms).scores
    assert rank_correlation(found, exact) > 0.9


def test_the_size_of_blocks_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours, distances, signs and edges come in blocks that end unevenly."""
    X = signals(120, 400)
    before, after = sketch(X.float(), 400), sketch(X.relu().float(), 400)
    monkeypatch.setattr("cria_prune.spectrum.distortions.DENSE_UNITS", 64)
    whole = distortion(before, after, neighbors=5).scores
    for path, name, size in (
        ("graph.graph", "BLOCK", 37),
        ("graph.graph", "ROWS", 7),
        ("graph.graph", "EDGE_BLOCK", 50),
        ("spectrum.pcg", "ROWS", 50),
        ("spectrum.distortions", "EDGES", 50),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[f"cria_prune.{path}"], name, size)
            found = distortion(before, after, neighbors=5).scores
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=0, msg=f"{path}.{name}")
