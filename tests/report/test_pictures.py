"""What is kept of the neuron graphs, where neurons are drawn, and the pictures of a layer and a metric."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cria_prune.graph.graph import Graph, choose_layer, keep_graphs, largest_piece, worth_keeping
from cria_prune.graph.moments import Moments
from cria_prune.report.curves import mean_interval, plot_ablation, plot_bench, plot_tradeoff
from cria_prune.report.pictures import plot_neuron_graph, plot_spectrum, strongest_edges, styles
from cria_prune.spectrum.embedding import laplacian_embedding


def graph(units: int, *edges: tuple[int, int, float]) -> Graph:
    rows, cols, weights = zip(*edges, strict=True)
    return Graph(
        units, torch.tensor(rows), torch.tensor(cols), torch.tensor(weights, dtype=torch.float64), 0.1
    )


def moments(units: int, dead: int = 0, samples: int = 40) -> Moments:
    X = torch.randn(units, samples, generator=torch.Generator().manual_seed(units), dtype=torch.float64)
    X[:dead] = 1.0
    return Moments.from_signals(X)


def sides(**units: int) -> dict[str, tuple[Moments, Moments]]:
    return {name: (moments(size), moments(size)) for name, size in units.items()}


def test_graphs_are_kept_of_live_units_in_the_order_of_the_network() -> None:
    found = keep_graphs({"b": (moments(6), moments(6, dead=2)), "a": (moments(4), moments(4))})
    assert list(found) == ["b", "a"]
    assert found["b"].units.tolist() == [2, 3, 4, 5]
    assert found["b"].input.units == found["b"].output.units == 4 and len(found["b"].input.rows) == 6


def test_when_edges_run_short_the_widest_that_can_be_drawn_comes_first() -> None:
    both = sides(small=10, wide=300, right=60)
    assert list(keep_graphs(both, edges=2 * 60 * 59 // 2)) == ["right"]
    assert list(keep_graphs(both, edges=2 * 60 * 59 // 2 + 90)) == ["small", "right"]
    assert list(keep_graphs(both)) == ["small", "wide", "right"]
    widths = {name: item.units for name, (item, _) in both.items()}
    assert worth_keeping(widths, edges=2 * 60 * 59 // 2) == {"right"}
    assert worth_keeping(widths, edges=2 * 60 * 59 // 2 + 90) == {"small", "right"}
    assert worth_keeping({**widths, "one": 1, "huge": 10**6}) == {"small", "wide", "right"}


def test_layers_without_two_live_units_or_too_many_keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cria_prune.graph.graph.KEPT_UNITS", 8)
    assert list(keep_graphs({**sides(wide=9, one=1, good=8), "dead": (moments(3), moments(3, dead=2))})) == [
        "good"
    ]


def test_the_layer_to_look_at() -> None:
    assert choose_layer({"a": 512, "b": 4096}) == "a"
    assert choose_layer({"a": 16, "b": 16}) == "a"
    assert choose_layer({}) is None


def test_a_ring_is_drawn_as_a_circle() -> None:
    n = 12
    places = laplacian_embedding(
        graph(n, *((min(i, j), max(i, j), 1.0) for i in range(n) for j in [(i + 1) % n]))
    )
    radii = places.square().sum(dim=1)
    assert torch.allclose(radii, radii[0].expand(n)) and float(radii[0]) > 0.01


def test_a_weighted_path_solves_its_own_eigenproblem() -> None:
    L = graph(4, (0, 1, 2.0), (1, 2, 0.5), (2, 3, 3.0))
    V = laplacian_embedding(L, 3).numpy()
    W = L.dense_laplacian().numpy() - 0.1 * np.eye(4)
    D = np.diag(np.diag(W))
    values = [v @ W @ v / (v @ D @ v) for v in V.T]
    assert np.allclose(W @ V, D @ V * values) and values == sorted(values) and values[0] > 1e-6
    assert np.allclose(np.ones(4) @ D @ V, 0)
    assert (V[np.abs(V).argmax(axis=0), range(3)] > 0).all()


def test_only_the_largest_piece_has_places() -> None:
    two = graph(5, (0, 1, 1.0), (2, 3, 1.0), (3, 4, 1.0))
    assert largest_piece(two).tolist() == [2, 3, 4]
    assert laplacian_embedding(two).isnan().any(dim=1).tolist() == [True, True, False, False, False]
    assert laplacian_embedding(graph(2, (0, 1, 1.0)))[:, 1].tolist() == [0, 0]


def test_the_strongest_edges_are_those_of_a_slow_twin() -> None:
    weights = torch.rand(45, generator=torch.Generator().manual_seed(3)).tolist()
    pairs = [(i, j) for i in range(10) for j in range(i + 1, 10)]
    whole = graph(10, *((i, j, w) for (i, j), w in zip(pairs, weights, strict=True)))
    wanted = set()
    for unit in range(10):
        own = sorted(((w, p) for p, w in zip(pairs, weights, strict=True) if unit in p), reverse=True)
        wanted |= {pair for _, pair in own[:3]}
    rows, cols = strongest_edges(whole)
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == wanted


# Pictures


def test_neurons_are_dots_and_removed_ones_crosses() -> None:
    L = graph(4, (0, 1, 2.0), (1, 2, 0.5), (2, 3, 3.0))
    ax = plot_neuron_graph(L, [1])
    kept, removed = ax.collections
    places = laplacian_embedding(L).numpy()
    assert np.allclose(kept.get_offsets(), places[[0, 2, 3]]) and np.allclose(
        removed.get_offsets(), places[[1]]
    )
    assert plot_neuron_graph(L, [], ax) is ax
    plot_neuron_graph(graph(1, (0, 0, 1.0)), [])


def test_a_spectrum_is_logarithmic_where_it_is_wide() -> None:
    ax = plot_spectrum([4.0, 2.0, math.nan])
    assert ax.lines[0].get_ydata().tolist() == [4, 2] and ax.get_yscale() == "linear"
    ax = plot_spectrum({"first": [100.0, 1.0], "last": [3.0]})
    assert ax.get_yscale() == "log" and [line.get_label() for line in ax.lines[:2]] == ["first", "last"]
    assert plot_spectrum([], ax) is ax


def test_a_tradeoff_draws_what_is_finite() -> None:
    ax = plot_tradeoff(
        {"dense": [(2e6, 0.9)], "pruned": [(1e6, 0.5)], "recovered": [(1e6, 0.8), (5e5, math.nan)]},
        metric="accuracy",
    )
    assert ax.get_xlabel() == "parameters (M)"
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert drawn["dense"] == [90] and drawn["recovered"] == [80]
    assert [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == ":"] == [[50, 80]]
    assert plot_tradeoff({}, ax) is ax


def test_ablation_has_a_band_where_there_are_seeds() -> None:
    curves = {
        "lowest": [[0.1, [0.9]], [0.5, [0.5]]],
        "random": [[0.1, [0.7, 0.9]]],
        "highest": [[0.1, [math.nan]], [0.5, [None]]],
    }
    ax = plot_ablation({"metric": "accuracy", "dense": 0.95, "curves": curves})
    assert len(ax.collections) == 1
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(lines) == ["dense", "lowest scores first", "at random"]
    assert np.allclose(lines["lowest scores first"], [90, 50]) and np.allclose(lines["at random"], [80])


def test_a_bench_draws_means_and_intervals() -> None:
    ax = plot_bench(
        {"l2": [(0.5, [0.2, 0.4])], "random": [(0.5, [0.1])]}, metric="accuracy", dense=[0.9, 0.8]
    )
    (points, _, (whisker,)), (other, _, none) = (item.lines for item in ax.containers)
    assert np.allclose(points.get_ydata(), [30]) and np.allclose(other.get_ydata(), [10]) and none == ()
    low, high = whisker.get_segments()[0][:, 1]
    half = mean_interval([20.0, 40.0])[1]
    assert np.allclose([low, high], [30 - half, 30 + half]) and half == pytest.approx(127.06, abs=0.01)
    assert ax.get_ylim()[1] <= 102 and points.get_xdata() < 50 < other.get_xdata()
    assert ax.lines[0].get_ydata() == pytest.approx([85, 85])


def test_a_wide_perplexity_is_logarithmic() -> None:
    curve = [(0.2, [50.0]), (0.5, [9000.0])]
    ax = plot_bench({"l2": curve}, metric="perplexity-128")
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "perplexity-128"
    assert plot_bench({"l2": curve}, metric="accuracy").get_yscale() == "linear"


def test_no_two_criteria_look_alike() -> None:
    assert len(set(styles([str(number) for number in range(77)]).values())) == 77
