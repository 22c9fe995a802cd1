"""Networks that a review found to be refused, to crash or to be misread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import PruneConfig, discover, prune
from cria_prune.base.errors import DataError
from cria_prune.result import PruneResult
from networks import randomize

IMAGES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class Net(nn.Module):
    """Three convolutions and a linear; `middle` says what happens between the last two."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c3, self.fc, self.middle = nn.Conv2d(8, 8, 1), nn.Linear(8, 4), middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.c2(F.relu(self.c1(x))))
        return self.fc(F.relu(self.c3(x)).mean((2, 3)))


def frozen(model: nn.Module) -> dict[str, str | None]:
    return {group.name: group.frozen for group in discover(model, IMAGES[0])}


def pruned(model: nn.Module, batches: list[Tensor] = IMAGES) -> PruneResult:
    """Prune in two rounds; `prune` itself verifies that masked equals pruned."""
    return prune(randomize(model), batches, PruneConfig(plan={"reduction": 0.05, "rounds": 2}))


@pytest.mark.parametrize("kind", ["constant", "constant, grouped"])
def test_channels_around_a_convolution_with_a_constant_weight_are_frozen(kind: str) -> None:
    model = Net()
    if kind == "constant":
        model.middle = lambda x: F.conv2d(x, torch.ones(8, 8, 1, 1, dtype=x.dtype))
    else:
        model.middle = lambda x: F.conv2d(x, torch.ones(8, 1, 2, 2, dtype=x.dtype), groups=8)
    result = pruned(model)
    assert "the weight of conv2d in the model is a constant" in str(frozen(model)["c2"])
    assert result.model(IMAGES[0]).shape == (4, 4)


def test_channels_pass_an_adaptive_maximum() -> None:
    model = Net(nn.AdaptiveMaxPool2d(3))
    assert frozen(model)["c2"] is None
    assert pruned(model).rounds[-1].verification is not None


@pytest.mark.parametrize("call", [lambda x: x.std(unbiased=False), lambda x: x.var(False), torch.std])
def test_a_deviation_of_everything_freezes_the_channels(call: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda x: x / (call(x) + 1))
    assert "is reduced over by" in str(frozen(model)["c2"])
    pruned(model)


def test_the_type_of_another_tensor_ties_nothing() -> None:
    model = Net(lambda x: F.relu(x).type_as(torch.ones(7, 5, dtype=x.dtype)))
    assert frozen(model)["c2"] is None
    pruned(model)


def test_a_forward_that_does_not_run_in_float64_is_verified_in_float32() -> None:
    def middle(x: Tensor) -> Tensor:
        return x + F.conv2d(x.mean(1, keepdim=True), torch.ones(1, 1, 3, 3), padding=1)  # always float32

    verification = pruned(Net(middle)).rounds[-1].verification
    assert verification is not None
    assert verification.dtype == "float32"


def test_each_twin_gets_its_own_input() -> None:
    class Scales(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(3).add_(1))

    pruned(Scales(), [batch.clone() for batch in IMAGES])


def test_outputs_that_are_no_numbers_or_infinite_are_compared() -> None:
    class Many(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x = super().forward(x)
            masked = x.masked_fill(torch.tensor([True, False, False, False]), -torch.inf)
            return x, x > 0, x.argmax(-1), masked

    verification = pruned(Many()).rounds[-1].verification
    assert verification is not None
    assert verification.difference < 1e-10


@pytest.mark.parametrize("batches", [torch.randn(32, 3), {"x": torch.randn(32, 3)}, "images", 3])
def test_one_batch_in_place_of_many_is_refused(batches: object) -> None:
    with pytest.raises(DataError, match=r"Calibration batches: found .*Pass a list or loader of batches"):
        prune(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), batches)  # type: ignore[arg-type]


def test_a_weight_that_is_used_forwards_and_transposed_is_cut() -> None:
    class Tied(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.c2(F.relu(self.c1(x))))
            x = F.relu(F.conv_transpose2d(x, self.c2.weight, padding=1))
            return self.fc(self.c3(x).mean((2, 3)))

    assert frozen(Tied())["c1"] is None and frozen(Tied())["c2"] is None
    pruned(Tied())


WIDTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "divided by the width": lambda x: x / x.shape[1] ** 0.5,
    "shape of another tensor": lambda x: x.flatten(2).view_as(torch.empty(len(x), 8, 8, 8)),
}


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_forward_that_depends_on_a_width_freezes_its_group_alone(kind: str) -> None:
    torch.manual_seed(0)
    reasons = frozen(Net(WIDTHS[kind]))
    assert "a trial cut failed" in str(reasons["c2"])
    assert reasons["c1"] is None
    assert reasons["c3"] is None
    pruned(Net(WIDTHS[kind]))


def test_a_change_of_type_freezes_nothing() -> None:
    assert frozen(Net(lambda x: F.relu(x.float()).to(x.dtype)))["c2"] is None
