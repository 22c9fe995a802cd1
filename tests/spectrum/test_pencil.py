"""The pencil and its solvers against known answers; eigenspaces are compared as projectors."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from tests.graph.test_graph import complete, cycle, known, path, signals

from cria_prune.base.errors import CriterionError, SignalError
from cria_prune.graph.graph import learn_graph
from cria_prune.graph.moments import Moments
from cria_prune.spectrum import pencil
from cria_prune.spectrum.pcg import distortion_embedding, pcg
from cria_prune.spectrum.pencil import count_pairs, solve_pencil

TINY = 1e-7


def pair(d=90, neighbors=6, ridge=1e-2, M=200):
    X = signals(d, M)
    return tuple(
        learn_graph(Moments.from_signals(S), neighbors, ridge, complete=min(64, d // 2))
        for S in (X, (X + 0.3 * signals(d, M, 1)).relu())
    )


def edge_scores(graph, F):
    return (F[graph.rows] - F[graph.cols]).square().sum(dim=1)


def projector(found, L_out):
    V = found.vectors
    return V @ V.T @ L_out


def test_dense_pairs_are_those_of_the_square_root():
    a, b = pair()
    found = solve_pencil(a, b, "all")
    z, _ = oracles.pencil(a.dense_laplacian().numpy(), b.dense_laplacian().numpy())
    np.testing.assert_allclose(found.values.numpy(), z, rtol=1e-9)
    torch.testing.assert_close(found.vectors.T @ b.dense_laplacian() @ found.vectors, torch.eye(90).double())
    assert found.status == "converged" and float(found.residuals.max()) < 1e-10 and found.gap is None
    assert "90 pairs of 90 units" in repr(found)


@pytest.mark.parametrize("graph, resistance", [(path(7), 1), (cycle(7), 6 / 7), (complete(7), 2 / 7)])
def test_identical_graphs_give_ones_and_effective_resistances(graph, resistance):
    graph = replace(graph, ridge=TINY)
    found = solve_pencil(graph, graph)
    torch.testing.assert_close(found.values, torch.ones(7).double(), rtol=1e-6, atol=0)
    scores = edge_scores(graph, found.embedding())
    torch.testing.assert_close(scores, torch.full_like(scores, resistance), rtol=1e-5, atol=0)


def test_foster_through_the_pencil():
    a, _ = pair(ridge=TINY)
    scores = edge_scores(a, solve_pencil(a, a).embedding())
    assert float((a.weights * scores).sum()) == pytest.approx(89, rel=1e-6)


def test_scaled_graph_gives_the_inverse_scale():
    a, _ = pair()
    scaled = replace(a, weights=4 * a.weights, ridge=4 * a.ridge)
    torch.testing.assert_close(solve_pencil(a, scaled).values, torch.full((90,), 0.25).double())


@pytest.mark.parametrize("factor", [0.1, 0.5])
def test_one_scaled_edge(factor):
    a, _ = pair(d=40, ridge=TINY)
    weights = a.weights.clone()
    weights[5] *= factor
    found = solve_pencil(a, replace(a, weights=weights))
    expected = 1 / (1 + (factor - 1) * a.weights[5] * a.effective_resistances()[5])
    assert float(found.values[0]) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(found.values[1:], torch.ones(39).double(), rtol=1e-6, atol=0)


def test_sum_rule_and_trace():
    a, b = pair()
    found = solve_pencil(a, b)
    L_in, L_out = a.dense_laplacian(), b.dense_laplacian()
    assert float(found.values.sum()) == pytest.approx(float(torch.linalg.solve(L_out, L_in).trace()))
    V = found.embedding()
    with_ridge = (a.weights * edge_scores(a, V)).sum() + a.ridge * V.square().sum()
    assert float(with_ridge) == pytest.approx(float(found.values.square().sum()))
    a, b = pair(ridge=TINY)
    # Without the ridge the constant vector is in both null spaces; with e -> 0 it keeps one z of e_in/e_out.
    found = solve_pencil(a, b)
    null = (a.ridge / b.ridge) ** 2
    total = (a.weights * edge_scores(a, found.embedding())).sum()
    assert float(total) == pytest.approx(float(found.values.square().sum()) - null, rel=1e-5)


def test_a_cut_never_splits_a_cluster():
    a = replace(cycle(9), ridge=0.1)
    b = replace(complete(9), ridge=0.1)
    found = solve_pencil(a, b, 2)  # the constant vector, then the two fastest waves of the cycle
    assert len(found.values) == 3 and found.gap > 0.1
    assert len(solve_pencil(a, a, 3).values) == 9


def test_count_pairs():
    assert [count_pairs(p, 40) for p in ("all", 7, 100, 0.25, 1.0, 1e-9)] == [40, 7, 40, 10, 40, 1]
    for wrong in (0, -1, 1.5, 0.0, True, "half"):
        with pytest.raises(CriterionError, match="The number of eigenpairs: found"):
            count_pairs(wrong, 40)


def test_lobpcg_agrees_with_dense():
    a, b = pair(d=400)
    dense, found = solve_pencil(a, b, 5), solve_pencil(a, b, 5, dense_units=100)
    assert (found.solver, found.status) == ("lobpcg", "converged")
    torch.testing.assert_close(found.values, dense.values, rtol=1e-6, atol=0)
    L_out = b.dense_laplacian()
    torch.testing.assert_close(projector(found, L_out), projector(dense, L_out), atol=1e-3, rtol=0)
    assert found.gap == pytest.approx(dense.gap, rel=1e-2)
    again = solve_pencil(a, b, 5, dense_units=100)
    assert torch.equal(found.vectors, again.vectors)


def stopped(L_in, L_out, pairs, tolerance, seed):
    V = np.random.default_rng(seed).standard_normal((L_in.shape[0], pairs + 8))
    return np.arange(pairs + 8.0, 0, -1), V, 1


@pytest.mark.parametrize("limit, solver", [(4096, "dense"), (100, "lanczos")])
def test_fallback_where_lobpcg_stops_early(monkeypatch, limit, solver):
    monkeypatch.setattr(pencil, "solve_lobpcg", stopped)
    monkeypatch.setattr(pencil, "FALLBACK_UNITS", limit)
    a, b = pair(d=300)
    found = solve_pencil(a, b, 4, dense_units=100)
    assert (found.solver, found.status) == (solver, "converged")
    torch.testing.assert_close(found.values, solve_pencil(a, b, 4).values, rtol=1e-7, atol=0)


def test_an_unconverged_pair_says_so(monkeypatch):
    monkeypatch.setattr(pencil, "solve_lobpcg", stopped)
    monkeypatch.setattr(pencil, "solve_lanczos", lambda *_: (np.zeros(0), np.zeros((300, 0)), 0))
    monkeypatch.setattr(pencil, "FALLBACK_UNITS", 100)
    a, b = pair(d=300)
    found = solve_pencil(a, b, 4, dense_units=100)
    assert found.status == "unconverged" and float(found.residuals.max()) > 1e-2


def test_a_cluster_wider_than_the_guards_is_found_whole():
    a, _ = pair(d=200)
    found = solve_pencil(a, a, 3, dense_units=100)  # every z is 1
    assert len(found.values) == 200 and found.status == "converged"


def test_lanczos_alone():
    a, b = pair(d=200)
    z, V, _ = pencil.solve_lanczos(a.laplacian(), b.laplacian(), 4, 1e-6, 0)
    np.testing.assert_allclose(z, solve_pencil(a, b, 4).values.numpy(), rtol=1e-8)
    assert V.shape == (200, 4)


def test_pcg_solves_and_measures():
    _, b = pair()
    B = torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B[:, 1] = 0
    X, residual, steps = pcg(b.laplacian(), B, 1e-11, 500)
    torch.testing.assert_close(X, torch.linalg.solve(b.dense_laplacian(), B), rtol=1e-8, atol=1e-9)
    assert residual < 1e-10 and 1 < steps < 200
    assert pcg(b.laplacian(), B, 1e-11, 2)[1] > 1e-4


@pytest.mark.parametrize("grounded", [False, True])
def test_exact_incidence_gives_the_dense_scores(grounded):
    X = signals(90, 200)
    a, b = (learn_graph(Moments.from_signals(S), 6, 0 if grounded else 1e-2, grounded) for S in (X, X.relu()))
    F, _, _ = distortion_embedding(a, b, sketch=None, tolerance=1e-12)
    V = solve_pencil(a, b).embedding()
    torch.testing.assert_close(edge_scores(a, F), edge_scores(a, V), rtol=1e-8, atol=0)
    torch.testing.assert_close(F.square().sum(dim=1), V.square().sum(dim=1), rtol=1e-8, atol=0)


def test_errors_tell_the_mend():
    with pytest.raises(SignalError, match="found 3 and 4 units"):
        solve_pencil(path(3), path(4))
    with pytest.raises(CriterionError, match="a dense one ends at 16384 units"):
        solve_pencil(replace(path(17000), ridge=1.0), replace(path(17000), ridge=1.0), 0.5)
    with pytest.raises(SignalError, match=r"Use a ridge > 0"):
        solve_pencil(path(3), known([(0, 1), (1, 2)]))
