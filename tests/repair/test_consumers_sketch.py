"""Repairing wide consumers from a sketch: a dense twin, known answers, and never worse than no repair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cria_prune.graph.moments import MomentAccumulator, Moments
from cria_prune.repair.consumers import RIDGES, Lines, repair_from_sketch


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(units: int, samples: int, seed: int = 0) -> Tensor:
    """Signals (units, samples) of a gated layer on inputs whose directions differ in size by 100."""
    inner = 24
    scales = torch.logspace(0, -2, inner, dtype=torch.float64)[:, None]
    x = scales * seeded(inner, samples, seed=seed)
    gate, up = (seeded(units, inner, seed=1000 + side) for side in (1, 2))
    return nn.functional.silu(gate @ x) * (up @ x) + 0.2


def sketch_of(Y: Tensor, columns: int) -> Moments:
    total = MomentAccumulator(len(Y), exact=False, columns=columns)
    total.add(Y)
    return total.moments()


def repair(moments: Moments, W: Tensor, R: Tensor, centred: bool) -> tuple[Tensor, Tensor, float, float]:
    """Return the repaired weight (outputs, n), the step of the bias, and the energies lost and left."""
    weight = W.clone()
    K = torch.tensor([p for p in range(len(moments.mean)) if p not in set(R.tolist())])
    lines = Lines(weight, 1, torch.arange(W.shape[1]))
    return weight, *repair_from_sketch(lines, moments, K, R, centred)


def twin(moments: Moments, W: Tensor, R: Tensor, centred: bool) -> tuple[np.ndarray, float]:
    """The same with an (n, n) matrix, the hat matrix written out, and every ridge tried on its own."""
    assert moments.sketch is not None
    B = moments.sketch.double().numpy() / moments.samples**0.5
    if not centred:
        B = np.column_stack([B, np.float32(moments.mean.numpy())])
    W, R = W.numpy(), R.numpy()
    K = np.setdiff1d(np.arange(len(B)), R)
    target, r = B[R].T @ W[:, R].T, B.shape[1]
    best, repaired = (target**2).sum(), W.copy()
    for ridge in RIDGES:
        e = ridge * (B[K] ** 2).sum() / r
        inverse = np.linalg.inv(B[K] @ B[K].T + e * np.eye(len(K)))
        H = B[K].T @ inverse @ B[K]
        error = (((np.eye(r) - H) @ target) ** 2).sum() / (1 - np.trace(H) / r) ** 2
        if error < best:
            best, repaired = error, W.copy()
            repaired[:, K] += W[:, R] @ (B[R] @ B[K].T) @ inverse
    return repaired, best


@pytest.mark.parametrize("centred, rtol", [(True, 1e-9), (False, 1e-6)])  # the column of means is float32
def test_it_is_the_dense_ridge_regression_of_the_best_ridge(centred: bool, rtol: float) -> None:
    Y, W, R = gated(90, 4000), seeded(5, 90, seed=7), torch.arange(3, 90, 3)
    moments = sketch_of(Y, 40)
    weight, step, _, left = repair(moments, W, R, centred)
    expected, best = twin(moments, W, R, centred)
    assert not np.array_equal(expected, W.numpy())
    np.testing.assert_allclose(weight.numpy(), expected, rtol=rtol, atol=rtol)
    assert left == pytest.approx(best, rel=100 * rtol)
    change, mean = torch.from_numpy(expected) - W, moments.mean
    np.testing.assert_allclose(step, W[:, R] @ mean[R] - change @ mean, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("blocked", [False, True])
def test_a_copy_takes_over_what_leaves(blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocked:  # features come in blocks of 7
        for module in ("cria_prune.graph.moments.BLOCK", "cria_prune.repair.consumers.BLOCK"):
            monkeypatch.setattr(module, 7)
    Y, W, R = seeded(20, 600), seeded(3, 20, seed=7), torch.tensor([4, 17])
    Y[4], Y[17] = 2 * Y[1], -Y[2]
    weight, _, lost, left = repair(sketch_of(Y, 1024), W, R, True)  # as many columns as samples: exact
    expected = W.clone()
    expected[:, 1] += 2 * W[:, 4]
    expected[:, 2] -= W[:, 17]
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-3)
    assert left < 1e-6 * lost


def test_relabelled_features_get_the_same_repair() -> None:
    Y, W, R = gated(60, 3000), seeded(4, 60, seed=7), torch.arange(0, 60, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    moments, where = sketch_of(Y, 48), torch.argsort(order)
    plain, *_ = repair(moments, W, R, True)
    turned, *_ = repair(moments.select(order), W[:, order], where[R].sort().values, True)
    torch.testing.assert_close(turned, plain[:, order], rtol=1e-8, atol=1e-10)


def held_out(weight: Tensor, step: Tensor, W: Tensor, R: Tensor, Y: Tensor) -> float:
    """Mean squared error of the consumer on signals that were not recorded, without the features R."""
    weight = weight.clone()
    weight[:, R] = 0
    return float((W @ Y - weight @ Y - step[:, None]).square().mean())


def test_it_helps_on_held_out_samples_where_a_small_ridge_hurts() -> None:
    """As many columns as features that stay; what it promises is what it keeps."""
    Y, W, R = gated(384, 9000), seeded(8, 384, seed=7), torch.arange(0, 384, 2)
    train, test = Y[:, :6000], Y[:, 6000:]
    moments, exact = sketch_of(train, 192), Moments.from_signals(train)
    weight, step, lost, left = repair(moments, W, R, True)
    mean_alone = held_out(W, W[:, R] @ exact.mean[R], W, R, test)
    error = held_out(weight, step, W, R, test)
    assert error < 0.7 * mean_alone
    assert left / lost == pytest.approx(error / held_out(W, torch.zeros(8).double(), W, R, test), rel=0.3)


def test_what_stays_is_left_alone_where_it_predicts_nothing() -> None:
    Y, W, R = seeded(400, 9000), seeded(8, 400, seed=7), torch.arange(0, 400, 2)
    weight, step, lost, left = repair(sketch_of(Y[:, :6000], 64), W, R, True)
    error = held_out(weight, step, W, R, Y[:, 6000:])
    assert error < 1.02 * held_out(W, torch.zeros(8).double(), W, R, Y[:, 6000:])
    assert 0.9 * lost < left <= lost


def test_a_direction_that_only_fits_is_not_taken() -> None:
    """Columns (1, 0) and (0, 0.01) stay, (0, 1) leaves: each ridge fits half the columns, none predicts."""
    S = torch.tensor([[1.0, 0.0], [0.0, 0.01], [0.0, 1.0]])
    moments = Moments(1, torch.zeros(3).double(), S.double().square().sum(dim=1), sketch=S)
    W = seeded(4, 3)
    weight, step, lost, left = repair(moments, W, torch.tensor([2]), True)
    assert torch.equal(weight, W) and not step.any() and left == lost > 0


def test_empty_columns_are_no_samples() -> None:
    """Of 500 columns 452 are empty: taken for samples, they would make the smallest ridge win."""
    Y, W, R = gated(200, 48), seeded(4, 200, seed=7), torch.arange(0, 200, 2)
    wide, narrow = sketch_of(Y, 500), sketch_of(Y, 48)
    for found, expected in zip(repair(wide, W, R, True), repair(narrow, W, R, True), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
