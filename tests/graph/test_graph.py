"""Neighbours, weights and Laplacians against loops and against known graphs."""

import numpy as np
import oracles
import pytest
import torch

from cria_prune.base.errors import SignalError
from cria_prune.graph.graph import Graph, learn_graph, nearest_neighbors, refine_graph
from cria_prune.graph.moments import MomentAccumulator, Moments


def signals(d, M, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, 6, generator=generator, dtype=torch.float64)
    X = mixing @ torch.randn(6, M, generator=generator, dtype=torch.float64)
    return X + 0.5 * torch.randn(d, M, generator=generator, dtype=torch.float64)


def known(edges, weights=None, ridge=0.0, units=None):
    rows, cols = (torch.tensor(ends) for ends in zip(*edges, strict=True))
    weights = torch.ones(len(rows)) if weights is None else torch.tensor(weights)
    return Graph(units or int(cols.max()) + 1, rows, cols, weights.double(), ridge)


def path(n):
    return known([(i, i + 1) for i in range(n - 1)])


def cycle(n):
    return known([*((i, i + 1) for i in range(n - 1)), (0, n - 1)])


def complete(n):
    return known([(i, j) for i in range(n) for j in range(i + 1, n)])


def sketched(X):
    total = MomentAccumulator(len(X), exact=False, columns=X.shape[1])
    total.add(X)
    return total.moments()


@pytest.mark.parametrize("moments", [Moments.from_signals, sketched])
@pytest.mark.parametrize("k", [1, 5, 99])
def test_neighbors_are_those_of_the_loops(moments, k):
    X = signals(80, 100)
    X = X - X.mean(dim=1, keepdim=True)
    rows, cols = nearest_neighbors(moments(X), k)
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == oracles.knn_edges(X.numpy(), k)


def test_ties_go_to_the_lower_index():
    X = torch.zeros(8, 16, dtype=torch.float64)
    X[:, 0] = torch.tensor([1.0, 1, 1, 1, 1, 9, 9, 9])
    rows, cols = nearest_neighbors(Moments.from_signals(X), 2)
    edges = list(zip(rows.tolist(), cols.tolist(), strict=True))
    assert edges == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (5, 6), (5, 7), (6, 7)]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_common_signal_does_not_change_the_neighbors_of_a_sketch(offset):
    X = signals(100, 64)
    common = offset * torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = nearest_neighbors(Moments.from_signals(X), 8)
    found = nearest_neighbors(sketched(X + common), 8)
    same = set(zip(*map(torch.Tensor.tolist, expected), strict=True)) & set(
        zip(*map(torch.Tensor.tolist, found), strict=True)
    )
    assert len(same) > 0.99 * len(expected[0])


@pytest.mark.parametrize("grounded", [False, True])
@pytest.mark.parametrize("d", [2, 30, 90])
def test_laplacian_is_that_of_the_loops(d, grounded):
    X = signals(d, 50)
    graph = learn_graph(Moments.from_signals(X), neighbors=7, ridge=0.02, grounded=grounded)
    _, weights, L = oracles.graph(X.numpy(), 7, 0.02, grounded)
    np.testing.assert_allclose(graph.weights.numpy(), weights, rtol=1e-9)
    np.testing.assert_allclose(graph.dense_laplacian().numpy(), L, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(graph.laplacian().toarray(), L, rtol=1e-9, atol=1e-9)
    A = graph.incidence().toarray()
    np.testing.assert_allclose(A @ A.T, L, rtol=1e-9, atol=1e-9)


def test_effective_resistances_of_path_cycle_and_complete_graph():
    for n in (3, 8):
        torch.testing.assert_close(path(n).effective_resistances(), torch.ones(n - 1).double())
        torch.testing.assert_close(cycle(n).effective_resistances(), torch.full((n,), (n - 1) / n).double())
        found = complete(n).effective_resistances()
        torch.testing.assert_close(found, torch.full_like(found, 2 / n))


def test_fosters_theorem():
    graph = learn_graph(Moments.from_signals(signals(90, 50)), neighbors=5, ridge=0.0)
    assert graph.pieces() == 1
    assert float((graph.weights * graph.effective_resistances()).sum()) == pytest.approx(89)


def test_pieces_and_counts():
    graph = known([(0, 1), (2, 3), (3, 4)], units=6)
    assert graph.pieces() == 3
    assert graph.neighbor_counts().tolist() == [1, 1, 1, 2, 1, 0]
    assert repr(graph).startswith("Graph of 6 units: 3 edges, 3 pieces, degrees 0 to 2")


def test_degenerate_signals_give_finite_graphs():
    one = learn_graph(Moments.from_signals(torch.randn(1, 9)), ridge=0.01)
    assert one.dense_laplacian().tolist() == [[0.01]]
    same = learn_graph(Moments.from_signals(torch.randn(1, 9).expand(70, 9)))
    assert torch.allclose(same.weights, torch.tensor(1000.0).double())
    half = torch.randn(80, 9, dtype=torch.float64)
    half[:60] = half[0]
    weights = learn_graph(Moments.from_signals(half), neighbors=4).weights
    assert torch.isfinite(weights).all() and weights.max() <= 1000.0001
    few = learn_graph(Moments.from_signals(torch.randn(70, 3)), neighbors=200)
    assert len(few.rows) == 70 * 69 // 2
    grounded = learn_graph(Moments.from_signals(torch.randn(1, 9)), ridge=0.0, grounded=True)
    assert float(grounded.dense_laplacian()) > 0


def test_refinement_reaches_its_fixed_point():
    graph = learn_graph(Moments.from_signals(signals(40, 200)), neighbors=6, complete=20)
    refined = refine_graph(graph, 100)
    ratio = refined.effective_resistances() * graph.weights  # R_e / d_e²: 1 in use, below 1 else
    assert float(ratio.max()) < 1.05
    assert float((refined.weights * (ratio - 1).abs()).sum() / refined.weights.sum()) < 0.02

    def objective(g):
        return float(g.dense_laplacian().logdet() - (g.weights / graph.weights).sum())

    values = [objective(refine_graph(graph, n)) for n in (0, 1, 5, 20)]
    assert values == sorted(values)
    grounded = refine_graph(learn_graph(Moments.from_signals(signals(20, 90)), ridge=0, grounded=True), 3)
    assert torch.isfinite(grounded.dense_laplacian()).all()


def test_graphs_are_the_same_bit_for_bit():
    moments = sketched(signals(300, 64))
    a, b = learn_graph(moments), learn_graph(moments)
    assert torch.equal(a.weights, b.weights) and torch.equal(a.rows, b.rows)


def test_errors_tell_the_mend():
    moments = Moments.from_signals(torch.randn(3, 5))
    with pytest.raises(SignalError, match="neighbors=0"):
        learn_graph(moments, neighbors=0)
    with pytest.raises(SignalError, match="Record a covariance or a sketch"):
        learn_graph(Moments(5, moments.mean, moments.variance))
    with pytest.raises(SignalError, match="found 3000 units"):
        refine_graph(path(3000))
