"""The regression of one layer: regressors are what the operation reads, and the sums what lstsq finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune.base.ranks import World
from cria_prune.repair import regress
from cria_prune.repair.program import Program
from cria_prune.repair.regress import Regression, Solution, add_update, at_places, regressors
from cria_prune.repair.sites import find_sites

Case = tuple[Callable[..., Tensor], Tensor, Tensor, Tensor | None]
"""A call, its input, weight and bias."""


class Calls(nn.Module):
    """Calls of a weight (and a bias) each, on inputs of their own."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.calls = [call for call, *_ in cases]
        self.weights = nn.ParameterList([weight for _, _, weight, _ in cases])
        self.biases = nn.ParameterList([torch.zeros(1) if bias is None else bias for *_, bias in cases])
        self.biased = [bias is not None for *_, bias in cases]

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        return [
            call(x, weight, bias if biased else None)
            for call, x, weight, bias, biased in zip(
                self.calls, inputs.values(), self.weights, self.biases, self.biased, strict=True
            )
        ]


def check(cases: Sequence[Case]) -> None:
    """Regressors times an update are what the call makes of a weight of zeros with that update."""
    model = Calls(cases)
    inputs = {f"x{number}": x for number, (_, x, _, _) in enumerate(cases)}
    sites, left = find_sites(Program(model, inputs))  # one capture for all of them
    assert [item.weight for item in sites] == [f"weights.{number}" for number in range(len(cases))]
    assert not left
    generator = torch.Generator().manual_seed(0)
    for site, (call, x, weight, bias) in zip(sites, cases, strict=True):
        assert (site.bias is None) == (bias is None)
        places = (call(x, weight, bias)[0, 0] if site.spatial else call(x, weight, bias)[..., 0]).numel()
        chosen = torch.randperm(places, generator=generator)[: max(1, places // 2)]
        P = regressors(site, x, weight, chosen)
        _, G, n = P.shape
        assert site.groups == G
        update = torch.randn(G, weight.numel() // G // n, n, generator=generator, dtype=torch.float64)
        changed = call(x, add_update(site, torch.zeros_like(weight), update), None)
        found = torch.einsum("mgn,gon->mgo", P, update)
        torch.testing.assert_close(at_places(site, changed, chosen), found, rtol=0, atol=1e-10)
        assert torch.equal(add_update(site, weight, torch.zeros_like(update)), weight)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "turned": lambda x, w, b: F.linear(x, w.t(), b),
    "addmm": lambda x, w, b: x.flatten(0, -2) @ w if b is None else torch.addmm(b, x.flatten(0, -2), w),
    "matmul": lambda x, w, b: x @ w,
    "turned twice": lambda x, w, b: x @ w.T.contiguous().mT,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, -2), w.permute(1, 0).transpose(0, 1)),
}


def test_regressors_of_products() -> None:
    cases: list[Case] = []
    for shape in ((4, 5), (4, 3, 5), (2, 3, 2, 5)):
        cases += [(call, drawn(*shape), drawn(5, 7), None) for call in PRODUCTS.values()]
        cases += [(PRODUCTS["addmm"], drawn(*shape), drawn(5, 7), drawn(7))]
        cases += [
            (F.linear, drawn(*shape), drawn(7, 5), drawn(7)),
            (F.linear, drawn(*shape), drawn(7, 5), None),
        ]
    check(cases)


def options(spatial: int) -> list[tuple[int, int, Any, int, int, int]]:
    """Kernel, stride, padding, dilation, groups, channels of a group: a seeded part of all there are."""
    everything = [*itertools.product((1, 2, 3), (1, 2), (0, 1, 2, "same", "valid"), (1, 2), (1, 2), (1, 2))]
    return random.Random(spatial).sample(everything, {1: 26, 2: 26, 3: 10}[spatial])


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_regressors_of_convolutions(spatial: int) -> None:
    def case(kernel: int, stride: int, padding: Any, dilation: int, groups: int, each: int) -> Case:
        # kernels differ from dimension to dimension; groups come with a multiplier of outputs
        weight = drawn(groups * 3, each, *(kernel + dim % 2 for dim in range(spatial)))
        bias = drawn(groups * 3) if stride > 1 else None
        return (
            lambda x, w, b: CONVOLUTIONS[spatial](x, w, b, stride, padding, dilation, groups),
            drawn(2, groups * each, *range(8, 8 + spatial)), weight, bias,
        )  # fmt: skip

    cases = [case(*item) for item in options(spatial) if item[1] == 1 or item[2] != "same"]
    assert len(cases) > 6
    if spatial == 2:  # depthwise, other numbers in each dimension
        call = lambda x, w, b: F.conv2d(x, w, b, (2, 1), (0, 1), (1, 2), 4)  # noqa: E731
        cases.append((call, drawn(2, 4, 5, 6), drawn(8, 1, 3, 2), drawn(8)))
    check(cases)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_regressors_of_transposed_convolutions(spatial: int) -> None:
    def case(kernel: int, stride: int, padding: int, dilation: int, groups: int, each: int) -> Case:
        weight = drawn(groups * each, 3, *(kernel + 1 - dim % 2 for dim in range(spatial)))
        extra = int(max(stride, dilation) > 1)
        return (
            lambda x, w, b: TRANSPOSED[spatial](x, w, b, stride, padding, extra, groups, dilation),
            drawn(2, groups * each, *range(4, 4 + spatial)), weight, None,
        )  # fmt: skip

    cases = [case(*item) for item in options(spatial) if not isinstance(item[2], str)]
    assert len(cases) > 3
    check(cases)


def solved(
    P: Tensor, own: Tensor, met: Tensor | None = None, *, centred: bool = True, gain: Tensor | None = None
) -> Solution | None:
    """What the regression finds, with every fourth sample held out."""
    _, G, n = P.shape
    o = own.shape[2]
    found = Regression((G, n, o), centred, torch.device("cpu"), 1000, 0)
    held = torch.arange(len(P)) % 4 == 3
    for part in torch.arange(len(P)).split(17):
        found.add(P[part], own[part], None if met is None else met[part], held[part])
    gain = torch.ones(G, o) if gain is None else gain
    return found.solve(gain, met is not None, World())


@pytest.mark.parametrize("centred", [True, False])
def test_the_update_is_that_of_least_squares(centred: bool) -> None:
    """Written out: numpy-like solve per group, on the samples that are not held out, with the ridge told."""
    P, truth = drawn(300, 2, 5) + 1, drawn(2, 3, 5)
    R = torch.einsum("mgn,gon->mgo", P, truth) + (2.0 if centred else 0.0) + 0.1 * drawn(300, 2, 3)
    found = solved(P, R, centred=centred)
    assert found is not None and found.ridge is not None
    fit = torch.arange(300) % 4 != 3
    left = 0.0
    for g in range(2):
        A, B = P[fit, g], R[fit, g]
        a, b = (A.mean(0), B.mean(0)) if centred else (0 * A[0], 0 * B[0])
        S = (A - a).T @ (A - a) / len(A)
        U = torch.linalg.solve(
            S + found.ridge * S.diagonal().mean() * torch.eye(5, dtype=S.dtype), (A - a).T @ (B - b) / len(A)
        ).T
        torch.testing.assert_close(found.update[g], U)
        torch.testing.assert_close(found.intercept[g], b - U @ a)
        left += float((R[~fit, g] - P[~fit, g] @ U.T - (b - U @ a)).square().sum())
    assert found.left == pytest.approx(left / 75) and found.lost == pytest.approx(
        float(R[~fit].square().sum() / 75)
    )


def test_noise_is_not_fitted() -> None:
    """Where no ridge is better on the held-out samples, the layer stays."""
    found = solved(drawn(40, 1, 25), drawn(40, 1, 3))
    assert found is not None and found.ridge is None
    assert found.left == found.lost and not found.update.any() and not found.intercept.any()


def test_the_shortcuts_error_is_asked_for_where_it_can_be_given() -> None:
    P = drawn(200, 1, 5)
    own = torch.einsum("mgn,gon->mgo", P, drawn(1, 3, 5))
    near = own + torch.einsum("mgn,gon->mgo", P, drawn(1, 3, 5).flip(1))
    found = solved(P, own, near)
    assert found is not None and found.shortcut and found.left < 1e-4 * found.lost


def test_a_channel_that_counts_for_nothing_decides_nothing() -> None:
    P = drawn(200, 1, 5)
    R = torch.einsum("mgn,gon->mgo", P, drawn(1, 2, 5))
    R[:, :, 1] = 100 * drawn(200, 1, 1)[:, :, 0]
    found = solved(P, R, gain=torch.tensor([[1.0, 0.0]]))
    assert found is not None and found.left < 1e-4 * found.lost


def test_values_that_are_not_finite_give_no_update() -> None:
    for number in (0, 3):  # fitted, held out
        P, R = drawn(40, 1, 3), drawn(40, 1, 2)
        P[number, 0, 1] = float("nan")
        assert solved(P, R) is None
        P[number, 0, 1], R[number, 0, 0] = 1.0, float("inf")
        assert solved(P, R) is None


def test_regressors_that_are_all_zero() -> None:
    P, R = drawn(40, 2, 3), drawn(40, 2, 2)
    P[:, 0] = 0
    found = solved(P, R + 1)
    assert found is not None and not found.update[0].any() and found.intercept[0].abs().min() > 0


def test_short_types_are_summed_in_long_ones() -> None:
    P = drawn(400, 1, 4).bfloat16()
    R = torch.einsum("mgn,gon->mgo", P.double(), drawn(1, 3, 4))
    found = solved(P, R.float())
    assert found is not None and found.left < 1e-6 * found.lost


def test_wide_layers_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than rows: the sketch is near the exact answer, and the held-out error says how near."""
    P, truth = drawn(3000, 1, 24) + 0.5, drawn(1, 3, 24)
    R = torch.einsum("mgn,gon->mgo", P, truth) + 1.5
    exact = solved(P, R)
    monkeypatch.setattr(regress, "WIDEST", 23)
    few = solved(P, R)
    assert exact is not None and few is not None and few.left < 0.5 * few.lost
    assert exact.left < 1e-4 * exact.lost
