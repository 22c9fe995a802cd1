"""Moments and their accumulator."""

import pytest
import torch

from cria_prune.base.errors import SignalError
from cria_prune.graph.moments import MomentAccumulator, Moments, dead_units


def signals(d, M, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, 6, generator=generator, dtype=torch.float64)
    X = mixing @ torch.randn(6, M, generator=generator, dtype=torch.float64)
    return X + 0.5 * torch.randn(d, M, generator=generator, dtype=torch.float64) + 3


def gather(X, step=37, **kind):
    total = MomentAccumulator(len(X), **kind)
    for piece in X.split(step, dim=1):
        total.add(piece)
    return total


def close(a, b, rtol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def test_from_signals_is_the_covariance():
    X = signals(5, 40)
    moments = Moments.from_signals(X)
    close(moments.mean, X.mean(dim=1))
    close(moments.covariance, torch.cov(X, correction=0))
    close(moments.variance, X.var(dim=1, correction=0))


def test_batches_give_the_exact_moments_also_with_a_large_offset():
    X = signals(7, 200) + 1e5
    found, expected = gather(X).moments(), Moments.from_signals(X)
    assert found.samples == 200
    close(found.mean, expected.mean)
    close(found.covariance, torch.cov(X, correction=0), rtol=1e-8)


def test_merge_is_exact_and_leaves_its_arguments_alone():
    X = signals(6, 150)
    a, b = gather(X[:, :50]), gather(X[:, 50:])
    before = a.moments().covariance.clone()
    merged = a.merge(b).moments()
    close(merged.covariance, Moments.from_signals(X).covariance)
    close(a.moments().covariance, before, rtol=0)
    close(a.moments().merge(b.moments()).covariance, merged.covariance)
    close(a.merge(MomentAccumulator(6)).moments().covariance, before)


def test_the_triangle_that_is_computed_makes_the_whole_covariance():
    X = signals(300, 500)  # more than two blocks of rows
    total = gather(X[:, :350], step=110)
    half = total.moments()
    expected = Moments.from_signals(X)
    close(half.covariance, Moments.from_signals(X[:, :350]).covariance)
    total.add(X[:, 350:])  # what was read off before does no harm
    found = total.moments()
    close(found.covariance, expected.covariance)
    close(found.variance, expected.variance)
    assert torch.equal(found.covariance[:128, 128:], found.covariance[128:, :128].T)
    close(gather(X[:, :90]).merge(gather(X[:, 90:])).moments().covariance, expected.covariance)
    total.pool(torch.clone)
    close(total.moments().covariance, expected.covariance)


@pytest.mark.parametrize("exact", [True, False])
def test_without_pairs_means_and_variances_alone_are_kept(exact):
    X = signals(6, 150)
    kind = {"exact": exact, "pairs": False, "positive": True}
    a, b = gather(X[:, :50], **kind), gather(X[:, 50:], **kind)
    expected = Moments.from_signals(X)
    pooled = gather(X, **kind)
    pooled.pool(torch.clone)
    for found in (gather(X, **kind).moments(), a.merge(b).moments(), pooled.moments()):
        assert found.covariance is None and found.sketch is None and found.samples == 150
        close(found.mean, expected.mean)
        close(found.variance, expected.variance)
        close(found.positive, expected.positive)
    with pytest.raises(SignalError, match=r"pairs=False and True"):
        a.merge(gather(X, exact=exact))


@pytest.mark.parametrize("exact", [True, False])
def test_the_positive_share_is_counted_and_merged_where_asked_for(exact):
    X = signals(6, 150) - 3
    X[2, ::3] = 0  # a zero is not positive
    expected = [sum(value > 0 for value in row) / 150 for row in X.tolist()]
    a, b = (gather(part, exact=exact, positive=True) for part in (X[:, :50], X[:, 50:]))
    assert a.merge(b).moments().positive.tolist() == pytest.approx(expected)
    assert gather(X, exact=exact).moments().positive is None
    assert a.merge(gather(X, exact=exact)).moments().positive is None
    assert Moments.from_signals(X).positive.tolist() == pytest.approx(expected)
    assert Moments.from_signals(X).select(torch.tensor([4, 2])).positive[1] == expected[2]
    if exact:
        assert a.moments().merge(b.moments()).positive.tolist() == pytest.approx(expected)


def test_sketch_is_exact_up_to_its_columns():
    X = signals(8, 60)
    sketch = gather(X, exact=False, columns=64).moments().sketch.double()
    close(sketch @ sketch.T / 60, Moments.from_signals(X).covariance, rtol=1e-5)


def test_sketch_keeps_mean_and_norm_and_estimates_the_covariance():
    X = signals(8, 20_000) + 50
    moments = gather(X, step=999, exact=False, columns=1024).moments()
    exact = Moments.from_signals(X)
    close(moments.mean, exact.mean)
    close(moments.variance, exact.variance, rtol=1e-8)
    S = moments.sketch.double()
    close(S.square().sum(dim=1) / moments.samples, exact.variance, rtol=1e-5)
    error = (S @ S.T / moments.samples - exact.covariance).abs().max()
    assert error < 0.15 * exact.variance.max()


def test_merged_sketches_of_one_seed_stay_unbiased():
    # The same samples in both halves: unshuffled buckets would double every product.
    X = signals(8, 4000)
    a, b = (gather(X, exact=False, columns=512) for _ in range(2))
    moments = a.merge(b).moments()
    assert moments.samples == 8000
    S = moments.sketch.double()
    norm_before_rescaling = a.merge(b)._buckets.square().sum() / moments.variance.sum() / 8000
    assert 0.8 < norm_before_rescaling < 1.2
    assert (S @ S.T / 8000 - Moments.from_signals(X).covariance).abs().max() < 0.25 * moments.variance.max()


def test_sketch_is_the_same_bit_for_bit():
    X = signals(8, 3000).float()
    a, b = (gather(X, exact=False, columns=256, seed=3).moments() for _ in range(2))
    assert torch.equal(a.sketch, b.sketch)
    assert not torch.equal(a.sketch, gather(X, exact=False, columns=256, seed=4).moments().sketch)


def test_dead_units_are_the_constant_ones():
    X = torch.randn(5, 100, dtype=torch.float64)
    X[0], X[1] = 0.0, 7.3
    X[2] = 1000 + 1e-5 * X[2]
    X[3] = 1000 + 1e-2 * X[3]
    assert dead_units(Moments.from_signals(X)).tolist() == [True, True, True, False, False]
    assert dead_units(gather(X, exact=False, columns=16).moments()).tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert dead_units(gather(X.float(), step=7).moments())[:2].all()


def test_select_restricts():
    X = signals(6, 30)
    chosen = torch.tensor([4, 1])
    close(Moments.from_signals(X).select(chosen).covariance, Moments.from_signals(X[chosen]).covariance)
    sketch = gather(X, exact=False, columns=16).moments()
    assert torch.equal(sketch.select(chosen).sketch, sketch.sketch[chosen])


def test_errors_tell_the_mend():
    with pytest.raises(SignalError, match=r"found shape \(3,\)"):
        Moments.from_signals(torch.zeros(3))
    with pytest.raises(SignalError, match="Pass \\(4, samples\\)"):
        MomentAccumulator(4).add(torch.zeros(3, 2))
    with pytest.raises(SignalError, match="found no sample"):
        MomentAccumulator(4).moments()
    with pytest.raises(SignalError, match="units=0"):
        MomentAccumulator(0)
    with pytest.raises(SignalError, match="Make both with the same arguments"):
        MomentAccumulator(4).merge(MomentAccumulator(5))
    with pytest.raises(SignalError, match="accumulators merge sketches"):
        a = gather(signals(3, 9), exact=False, columns=8).moments()
        a.merge(a)
    X = signals(4, 9)
    X[2, 5] = torch.nan
    with pytest.raises(
        SignalError, match=r"layer3: found NaN or infinity in 1 of 4 units, the first is unit 2"
    ):
        MomentAccumulator.moments(gather(X, exact=False, columns=8)).check_finite("layer3")


def test_scaled_moments_are_those_of_scaled_signals() -> None:
    X = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).double() + 1
    factors = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0]).double()
    found, expected = Moments.from_signals(X).scaled(factors), Moments.from_signals(X * factors[:, None])
    for name in ("mean", "variance", "covariance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    accumulator = MomentAccumulator(5, exact=False, columns=8)
    accumulator.add(X)
    plain = accumulator.moments()
    assert plain.sketch is not None
    sketched = plain.scaled(factors)
    torch.testing.assert_close(sketched.sketch, plain.sketch * factors.float()[:, None])
    assert dead_units(sketched).tolist() == [True, False, False, False, False]
