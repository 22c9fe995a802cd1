"""Scores against loops, known answers, invariances and degenerate groups."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from tests.graph.test_graph import signals

from cria_prune.base.errors import CriterionError, SignalError
from cria_prune.graph.graph import Graph, learn_graph
from cria_prune.graph.moments import MomentAccumulator, Moments
from cria_prune.spectrum import distortions
from cria_prune.spectrum.distortions import distortion, grounded_distortion, innovation
from cria_prune.spectrum.importance import rank_correlation
from cria_prune.spectrum.pcg import factor_embedding
from cria_prune.spectrum.pencil import solve_pencil as solve

SCORES = {
    "distortion": distortion,
    "grounded": grounded_distortion,
    "innovation": lambda _, y, neighbors=0, **kw: innovation(y, **kw),
}


def sides(d=90, M=300, seed=0):
    X = signals(d, M, seed)
    return X, (X + 0.4 * signals(d, M, seed + 100)).relu()


def score(X, Y, kind="distortion", **kw):
    return SCORES[kind](Moments.from_signals(X), Moments.from_signals(Y), **kw).scores


def close(a, b, rtol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=0)


def sketched(X, columns, seed=0):
    total = MomentAccumulator(len(X), exact=False, columns=columns, seed=seed)
    total.add(X)
    return total.moments()


@pytest.mark.parametrize("d, pairs", [(12, "all"), (12, 3), (75, "all"), (75, 0.2)])
def test_distortion_is_that_of_the_loops(d, pairs):
    X, Y = sides(d, 60)
    s = {"all": d, 3: 3, 0.2: 15}[pairs]
    expected = oracles.distortion(X.numpy(), Y.numpy(), 5, 0.01, s)
    np.testing.assert_allclose(score(X, Y, neighbors=5, pairs=pairs).numpy(), expected, rtol=1e-6)


def test_grounded_is_that_of_the_loops():
    X, Y = sides(70, 60)
    expected = oracles.grounded(X.numpy(), Y.numpy(), 5)
    np.testing.assert_allclose(score(X, Y, "grounded", neighbors=5).numpy(), expected, rtol=1e-6)


def test_innovation_is_the_error_of_least_squares():
    _, Y = sides(25, 300)
    expected = oracles.innovation(Y.numpy())
    np.testing.assert_allclose(score(Y, Y, "innovation", eps=1e-12).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", SCORES)
def test_consumer_norms_multiply(kind):
    X, Y = sides(20, 60)
    norms = torch.rand(20) + 0.1
    close(score(X, Y, kind, consumer_norm2=norms), score(X, Y, kind) * norms)
    assert (score(X, Y, kind, consumer_norm2=torch.zeros(20)) > 0).all()


def test_a_moved_unit_has_the_top_score():
    X, _ = sides()
    Y = X.clone()
    Y[17] += 20 * torch.randn(300, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert int(score(X, Y).argmax()) == 17
    assert int(score(X, Y, pairs=2).argmax()) == 17


@pytest.mark.parametrize("kind", SCORES)
def test_relabelling_permutes(kind):
    X, Y = sides()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    close(score(X[order], Y[order], kind), score(X, Y, kind)[order])


@pytest.mark.parametrize("kind", SCORES)
def test_order_repetition_and_rotation_of_the_samples_change_nothing(kind):
    X, Y = sides()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    close(score(X[:, order], Y[:, order], kind), score(X, Y, kind))
    close(score(X.repeat(1, 3), Y.repeat(1, 3), kind), score(X, Y, kind))
    close(score(X + torch.arange(90)[:, None], Y, kind), score(X, Y, kind))
    # A rotation of the centred sample axis that keeps the constant vector, so the rows stay centred.
    basis = torch.randn(300, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis[:, 0] = 1
    Q, _ = torch.linalg.qr(basis)
    turn = torch.linalg.qr(basis[1:, 1:])[0]
    rotation = Q @ torch.block_diag(torch.ones(1, 1).double(), turn) @ Q.T
    X, Y = (S - S.mean(dim=1, keepdim=True) for S in (X, Y))
    close(score(X @ rotation, Y @ rotation, kind), score(X, Y, kind))


def test_a_signal_added_to_all_units_changes_nothing():
    X, Y = sides()
    common = 30 * torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(score(X + common, Y - 2 * common), score(X, Y))


def test_scaling_laws_without_the_median():
    # w = 1/D²: X -> cX multiplies L_in by c⁻², Y -> cY multiplies L_out by c⁻².
    X, Y = (learn_graph(Moments.from_signals(S), 6) for S in sides())

    def scores(a: Graph, b: Graph):
        return distortions._mean_over_neighbors(a, solve(a, b).embedding())

    def scaled(graph: Graph, c):
        return replace(graph, weights=graph.weights / c**2, ridge=graph.ridge / c**2)

    close(scores(scaled(X, 3), Y), scores(X, Y) * 3**-2)
    close(scores(X, scaled(Y, 3)), scores(X, Y) * 3**4)


def test_scale_of_the_signals_is_taken_out_by_the_median():
    X, Y = sides()
    close(score(5 * X, 0.1 * Y), score(X, Y))
    close(score(5 * X, 0.1 * Y, "grounded"), score(X, Y, "grounded"))


@pytest.mark.parametrize("kind", SCORES)
def test_dead_units_score_zero_and_take_no_part(kind):
    X, Y = sides(30, 60)
    wide_x, wide_y = torch.cat([X, X[:2] + 1]), torch.cat([Y, torch.full((2, 60), 0.7).double()])
    found = SCORES[kind](Moments.from_signals(wide_x), Moments.from_signals(wide_y))
    assert found.scores[30:].tolist() == [0, 0] and found.diagnosis.dead == (30, 31)
    close(found.scores[:30], score(X, Y, kind))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("d, M", [(1, 20), (2, 20), (3, 2), (70, 5), (40, 3)])
def test_small_groups_and_few_samples_are_defined(kind, d, M):
    X = signals(d, M)
    found = score(X, X + 0.1 * signals(d, M, 7), kind, neighbors=5)
    assert torch.isfinite(found).all() and (found > 0).all()


@pytest.mark.parametrize("kind", SCORES)
def test_duplicates_are_defined_and_alike(kind):
    X, Y = sides(80, 60)
    X[40:], Y[40:] = X[0], Y[0]
    found = score(X, Y, kind, neighbors=5)
    assert torch.isfinite(found).all() and (found > 0).all()
    assert score(X[:1].expand(70, 60), Y[:1].expand(70, 60), kind).min() > 0


def test_one_unit_scores_one_and_all_dead_score_zero():
    X, _ = sides(1, 20)
    assert score(X, X).tolist() == [1.0]
    constant = torch.ones(4, 20).double()
    for kind in SCORES:
        found = SCORES[kind](Moments.from_signals(signals(4, 20)), Moments.from_signals(constant))
        assert found.scores.tolist() == [0.0] * 4
        assert found.diagnosis.dead == (0, 1, 2, 3) and found.diagnosis.status == "nothing to solve"


@pytest.mark.parametrize("kind", ["distortion", "grounded"])
def test_block_pcg_ranks_like_dense(monkeypatch, kind):
    X, Y = sides(300, 500)
    dense = score(X, Y, kind)
    monkeypatch.setattr(distortions, "DENSE_UNITS", 100)
    found = SCORES[kind](Moments.from_signals(X), Moments.from_signals(Y))
    assert (found.diagnosis.solver, found.diagnosis.status) == ("pcg", "converged")
    assert rank_correlation(found.scores, dense) > 0.97
    assert abs(float((found.scores / dense).mean()) - 1) < 0.05
    again = SCORES[kind](Moments.from_signals(X), Moments.from_signals(Y))
    assert torch.equal(found.scores, again.scores)


@pytest.mark.parametrize("kind", ["distortion", "grounded"])
def test_all_pairs_at_once_are_those_of_the_eigensolver(monkeypatch, kind):
    X, Y = (Moments.from_signals(part) for part in sides(150, 400))
    at_once = SCORES[kind](X, Y)
    assert at_once.diagnosis.solver == "cholesky" and at_once.diagnosis.status == "converged"
    assert at_once.diagnosis.residual < 1e-12 and at_once.diagnosis.values == ()
    monkeypatch.setattr(distortions, "SMALL_UNITS", 1000)
    one_by_one = SCORES[kind](X, Y)
    assert one_by_one.diagnosis.solver == "dense" and len(one_by_one.diagnosis.values) == 32
    close(at_once.scores, one_by_one.scores, rtol=1e-8)
    monkeypatch.setattr(distortions, "SMALL_UNITS", 64)
    monkeypatch.setattr(distortions, "factor_embedding", lambda *graphs: None)  # not positive definite
    assert torch.equal(SCORES[kind](X, Y).scores, one_by_one.scores)


def test_what_is_not_positive_definite_is_not_factored():
    X = signals(70, 100, 0)
    graph = learn_graph(Moments.from_signals(X), 8, 1e-2)
    found = factor_embedding(graph, graph)
    assert found is not None and found[1] < 1e-12
    L, F = graph.dense_laplacian(), found[0]
    close(F @ F.T, torch.linalg.inv(L), rtol=1e-8)  # L⁻¹ L L⁻¹
    bad = replace(graph, ridge=-1e3)
    assert factor_embedding(bad, graph) is None and factor_embedding(graph, bad) is None


@pytest.mark.parametrize("kind, least", [("distortion", 0.85), ("grounded", 0.9)])
def test_sketched_moments_rank_like_exact_ones(kind, least):
    X, Y = sides(200, 3000)
    found = SCORES[kind](sketched(X, 2048), sketched(Y, 2048, 1)).scores
    assert rank_correlation(found, score(X, Y, kind)) > least


def test_innovation_from_a_sketch():
    _, Y = sides(300, 6000)
    Y = Y * torch.linspace(0.5, 2, 300)[:, None]
    found = innovation(sketched(Y, 1024)).scores
    assert rank_correlation(found, innovation(Moments.from_signals(Y)).scores) > 0.8


def test_scores_are_the_same_bit_for_bit():
    X, Y = sides(150, 200)
    for kind in SCORES:
        assert torch.equal(score(X, Y, kind), score(X, Y, kind))


def test_diagnosis_tells_and_serialises():
    X, Y = sides(100, 60)
    found = distortion(Moments.from_signals(X), Moments.from_signals(Y), pairs=5, neighbors=5)
    told = found.diagnosis.to_dict()
    assert told["solver"] == "dense" and told["gap"] > 0 and len(told["values"]) >= 5 and told["dead"] == []
    assert told["pieces_in"] >= 1 and told["residual"] < 1e-8 and told["split_half"] is None
    assert "Importance of 100 units, 0 dead" in repr(found)
    assert replace(found.diagnosis, split_half=0.9).split_half == 0.9


def test_pieces_are_counted():
    X = signals(140, 60)
    X[70:] += 1000 * torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = distortion(Moments.from_signals(X), Moments.from_signals(X), neighbors=5)
    assert found.diagnosis.pieces_in == 2 and torch.isfinite(found.scores).all()


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert rank_correlation(a, a) == 1.0
    assert rank_correlation(a, -a) == -1.0
    assert rank_correlation(a, torch.ones(4)) == 0.0
    assert rank_correlation(torch.ones(1), torch.ones(1)) == 0.0


@pytest.mark.parametrize("kind", SCORES)
def test_nan_names_the_group(kind):
    X, Y = sides(5, 20)
    Y[3, 2] = torch.inf
    with pytest.raises(
        SignalError, match="layer1 after the activation: found NaN or infinity in 1 of 5 units"
    ):
        score(X, Y, kind, name="layer1")


def test_errors_tell_the_mend():
    X, Y = sides(5, 20)
    bad = X.clone()
    bad[0, 0] = torch.nan
    for call, text in {
        lambda: score(bad, Y, name="g"): "g before the activation: found NaN",
        lambda: score(X[:4], Y): "found 4 units before and 5 after",
        lambda: score(X, Y, ridge=0.0): "found ridge=0.0",
        lambda: score(X, Y, sketch=0): "found sketch=0",
        lambda: score(X[:, :1], Y[:, :1]): "found 1 sample",
        lambda: score(X, Y, consumer_norm2=torch.ones(4)): r"found shape \(4,\)",
        lambda: score(X, Y, consumer_norm2=-torch.ones(5)): "negative square",
        lambda: score(X, Y, "innovation", eps=0.0): "Use eps > 0",
    }.items():
        with pytest.raises(SignalError, match=text):
            call()
    with pytest.raises(CriterionError, match="The number of eigenpairs"):
        score(X, Y, pairs=0)
