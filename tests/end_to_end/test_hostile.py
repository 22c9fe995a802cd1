"""Networks that try to be cut wrongly: each group says why it stays, and what is offered is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generator_check import random_plan
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from cria_prune import discover
from cria_prune.base.errors import CriaError, VerificationError
from cria_prune.planning.plan import compose, make_plan
from cria_prune.structure.groups import UnitGroups, shrink
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import verify
from networks import randomize

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
HEADS = 2
Middle = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """c1, c2, `middle`, c3, a linear: `middle` sees the eight channels of c2."""

    def __init__(self, middle: Middle | nn.Module = F.relu, entering: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c3, self.fc, self.middle = nn.Conv2d(entering, 6, 1), nn.Linear(6, 4), middle

    def forward(self, x: Tensor) -> Any:
        x = self.middle(self.c2(F.relu(self.c1(x))))
        return self.fc(F.gelu(self.c3(x)).mean((2, 3)))


def proven(model: nn.Module, example: Any, plans: int = 4) -> UnitGroups:
    """Discover, prune at random, the last time everything to one unit, and verify; return the groups."""
    groups = discover(model, example)
    random = np.random.default_rng(0)
    for number in range(plans):
        kept = random_plan(groups, random)
        if number == plans - 1:
            kept = {group.name: np.array([group.size - 1]) for group in groups.prunable}
        plan = make_plan(groups, kept)
        assert verify(model, plan, apply(model, plan), example).difference <= 1e-10
    return groups


def reasons(groups: UnitGroups) -> dict[str, str | None]:
    return {group.name: group.frozen for group in groups}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


class Accumulated(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


@torch.library.custom_op("cria_hostile::mirrored", mutates_args=())
def mirrored(x: Tensor) -> Tensor:
    return x.flip(1) + x


@mirrored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def written(x: Tensor, *where: Any) -> Tensor:
    x = F.relu(x)
    x[where] = 0.5
    return x


class Fixed(nn.Module):
    """A middle that holds a buffer for its eight channels."""

    def __init__(
        self, buffer: Tensor, use: Callable[[Tensor, Tensor], Tensor], *, plain: bool = False
    ) -> None:
        super().__init__()
        self.use = use
        if plain:
            self.held = (buffer,)
        else:
            self.register_buffer("held", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.held[0] if isinstance(self.held, tuple) else self.held)


ORDER = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
SCALE = torch.arange(1.0, 9.0)
KERNEL = torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(2))

FROZEN: dict[str, tuple[Middle | nn.Module, str]] = {
    "no rule": (torch.special.i0e, "no rule for the operation special_i0e"),
    "order by data": (lambda x: x.gather(1, x.argsort(1)), "no rule for the operation argsort"),
    "order by one mean": (
        lambda x: x.index_select(1, x.mean((0, 2, 3)).argsort()),
        "no rule for the operation argsort",
    ),
    "sort": (lambda x: x.sort(1).values, "no rule for the operation sort"),
    "cumsum": (lambda x: torch.cumsum(x, 1), "cumsum"),
    "cumsum in a function": (Accumulated.apply, "cumsum"),
    "fft": (lambda x: torch.fft.fft(x, dim=1).real, "no rule for the operation fft_fft"),
    "softmax": (lambda x: F.softmax(x, 1), "is reduced over by softmax"),
    "distance": (
        lambda x: x * torch.cdist(x.flatten(2).mT, x.flatten(2).mT).mean((1, 2))[:, None, None, None],
        "cdist",
    ),
    "norm of all": (lambda x: x / x.flatten(1).norm(dim=1)[:, None, None, None], "norm"),
    "custom operation": (lambda x: mirrored(x), "no rule for the operation"),
    "literal slice": (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), "slice"),
    "literal split": (lambda x: torch.cat(x.split([5, 3], 1)[::-1], 1), "split"),
    "every second": (lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]], "index"),
    "written over": (lambda x: F.gelu(x).copy_(x.sort(1).values), "sort"),
    "literal zeros": (
        lambda x: x + torch.zeros(2, 8, 1, 1, dtype=x.dtype),
        "a trial cut failed although zeros",
    ),
    "literal mean": (lambda x: x.sum(1, keepdim=True) / x.shape[1] * 8 + x, "a trial cut failed"),
    "share of the width": (lambda x: x * (8 / x.shape[1]), "a trial cut failed"),
    "a branch on the width": (lambda x: F.relu(x) if x.shape[1] == 8 else x, "a trial cut failed"),
    "chance": (lambda x: F.dropout(x, 0.5, True), "a trial cut failed"),
    "fixed kernel": (lambda x: F.conv2d(x, KERNEL.to(x.dtype)), ""),
    "held weight": (Fixed(KERNEL, lambda x, held: F.conv2d(x, held.to(x.dtype)), plain=True), ""),
    "held order": (Fixed(ORDER, lambda x, held: x[:, held], plain=True), ""),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_channels_that_are_mixed_stay(kind: str) -> None:
    middle, reason = FROZEN[kind]
    found = reasons(proven(randomize(Net(middle)), IMAGE))
    assert reason in str(found["c2"])
    assert found["c2"] is not None
    assert found["c1"] is None
    assert found["c3"] is None


MAYBE: dict[str, Middle | nn.Module] = {
    "written channels": lambda x: written(x, slice(None), slice(0, 2)),
    "written channels in the middle": lambda x: written(x, slice(None), slice(3, 5)),
    "written half": lambda x: written(x, slice(None), slice(0, x.shape[1] // 2)),
    "half over half": lambda x: halved(x, lambda left, right: left.copy_(right)),
    "half into half": lambda x: halved(x, lambda left, right: left.add_(right)),
    "flipped half over half": lambda x: halved(x, lambda left, right: left.copy_(right.flip(1))),
    "one channel over the last": lambda x: written(x, slice(None), -1),
    "mean of the channels": lambda x: x.sum(1, keepdim=True) / 8 + x,
    "layer norm by hand": lambda x: (
        (x - x.mean(1, keepdim=True)) * (x.var(1, False, keepdim=True) + 1).rsqrt()
    ),
    "batch and channels": lambda x: x.reshape(-1, 4, 8, 8).softmax(1).reshape(x.shape),
    "flip": lambda x: x.flip(1),
    "roll by half": lambda x: x.roll(x.shape[1] // 2, 1),
    "last half": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "held order": Fixed(ORDER, lambda x, held: x[:, held]),
    "place in the sum": lambda x: x * torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None, None],
    "outer product": lambda x: torch.einsum("bchw,bdhw->bchw", x, x.sigmoid()) / 8,
    "gram": lambda x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view(x.shape) * 0.01,
}


def halved(x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x = F.relu(x)
    half = x.shape[1] // 2
    change(x[:, :half], x[:, half:])
    return x


@pytest.mark.parametrize("kind", MAYBE)
def test_channels_that_are_moved_or_summed_are_never_cut_wrongly(kind: str) -> None:
    found = reasons(proven(randomize(Net(MAYBE[kind])), IMAGE))
    assert found["c1"] is None
    assert found["c3"] is None


FREE: dict[str, Middle | nn.Module] = {
    "a function of one's own": Doubled.apply,
    "written places": lambda x: written(x, ..., 0),
    "scalar": Fixed(torch.tensor(0.7), lambda x, held: x * held),
    "one number": Fixed(torch.tensor([0.7]), lambda x, held: x * held),
    "buffer of the channels": Fixed(SCALE, lambda x, held: x * held[:, None, None]),
    "an empty part": lambda x: torch.cat([x[:, :0], x], 1),
    "nothing along space": lambda x: torch.cat([x, x[:, :, :0]], 2),
    "type and back": lambda x: x.to(torch.float64).relu().to(x.dtype),
    "complex": lambda x: torch.complex(x, x * 0.5).abs(),
    "fourier over space": lambda x: torch.fft.fft2(x).abs() * 0.1,
    "sort over space": lambda x: x.flatten(2).sort(-1).values.view_as(x),
    "flag": lambda x: x * (x > 0),
    "unfold": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
}


@pytest.mark.parametrize("kind", FREE)
def test_channels_that_pass_may_leave_or_say_why(kind: str) -> None:
    found = reasons(proven(randomize(Net(FREE[kind])), IMAGE))
    assert found["c1"] is None
    assert found["c2"] is None or "no rule for the operation" in found["c2"]


def test_a_cut_to_one_channel_that_a_bare_squeeze_would_swallow_is_an_error() -> None:
    model = randomize(Net(lambda x: x.mean((2, 3), keepdim=True).squeeze()[:, :, None, None]))
    groups = discover(model, IMAGE)
    plan = make_plan(groups, {"c2": [5]} if groups["c2"].frozen is None else {})
    if groups["c2"].frozen is None:
        with pytest.raises(VerificationError):
            verify(model, plan, apply(model, plan), IMAGE)


def test_a_branch_that_a_trial_cannot_see_is_an_error() -> None:
    model = randomize(Net(lambda x: F.relu(x) if x.shape[1] > 2 else x))
    groups = discover(model, IMAGE)
    with pytest.raises(VerificationError, match="the relative difference is"):
        verify(model, plan := make_plan(groups, {"c2": [0, 5]}), apply(model, plan), IMAGE)


class Sums(Net):
    """Sizes remembered in __init__, in a list that no rule can see."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"c2": [self.c2.out_channels]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(F.relu(self.c1(x)))
        x = x.view(len(x), self.sizes["c2"][0], -1).softmax(-1)
        return self.fc(self.c3(x[..., None]).mean((2, 3)))


class Says(Net):
    """A division by what a layer says of its size."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(F.relu(self.c1(x))) / self.c2.out_channels
        return self.fc(F.gelu(self.c3(x)).mean((2, 3)))


class Exposes(Net):
    """The hidden features, and a weight, are part of the output."""

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.c2(F.relu(self.c1(x))))
        return {"features": [x.mean((2, 3))], "out": self.fc(self.c3(x).mean((2, 3)))}


class ExposesWeight(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.c2.weight.square().sum((1, 2, 3))


class Standardized(Net):
    """A weight that is normalised before each use."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.c2.weight - self.c2.weight.mean((1, 2, 3), keepdim=True)
        x = F.conv2d(F.relu(self.c1(x)), weight, self.c2.bias, padding=1)
        return self.fc(F.gelu(self.c3(x)).mean((2, 3)))


class Hyper(Net):
    """The weight of a convolution is the output of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Linear(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c2(F.relu(self.c1(x))))
        x = F.conv2d(x, self.hyper(x.new_ones(4)).view(8, 8, 1, 1))
        return self.fc(F.gelu(self.c3(x)).mean((2, 3)))


class Copied(Net):
    """A weight kept twice: as a parameter, and as a plain tensor beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [self.c2.weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x))
        x = self.c2(x) + F.conv2d(x, self.held[0].to(x.dtype), padding=1)
        return self.fc(F.gelu(self.c3(x)).mean((2, 3)))


class Anchored(Net):
    """A buffer with a copy of a weight, as in a moving average: it follows the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", self.c2.weight.detach() * 0.9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x))
        x = self.c2(x) + F.conv2d(x, self.average, padding=1)
        return self.fc(F.gelu(self.c3(x)).mean((2, 3)))


def reparametrized(kind: str) -> Net:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.abs()

    model = Net()
    if kind == "weight norm":
        parametrizations.weight_norm(model.c2)
    elif kind == "spectral norm":
        parametrizations.spectral_norm(model.c2)
    elif kind == "orthogonal":
        parametrizations.orthogonal(model.c2)
    else:
        parametrize.register_parametrization(model.c2, "weight", Positive())
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str | None]]] = {
    "sizes in a list": (Sums, {"c1": None, "c2": None, "c3": None}),
    "a layer's own word": (Says, {"c1": None, "c2": "a trial cut failed", "c3": None}),
    "exposed features": (Exposes, {"c1": None, "c2": "is part of the model's output", "c3": None}),
    "exposed weight": (ExposesWeight, {"c2": "", "c3": None}),
    "standardized": (Standardized, {"c3": None}),
    "hyper network": (Hyper, {"c1": None, "c3": None}),
    "a copy of a weight": (Copied, {"c1": "", "c2": "", "c3": None}),
    "a buffer with a weight": (Anchored, {"c1": None, "c2": None, "c3": None}),
    "weight norm": (lambda: reparametrized("weight norm"), {"c3": None}),
    "spectral norm": (lambda: reparametrized("spectral norm"), {"c3": None}),
    "orthogonal": (lambda: reparametrized("orthogonal"), {"c3": None}),
    "absolute weight": (lambda: reparametrized("absolute"), {"c3": None}),
    "training mode": (lambda: Net(nn.Dropout(0.5)).train(), {"c1": None, "c2": None, "c3": None}),
    "deep copies": (lambda: nn.Sequential(*[copy.deepcopy(Net().c2)] * 2, Net().c3), {"2": "output"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_hide_a_size_or_a_weight(kind: str) -> None:
    make, expected = MODELS[kind]
    image = IMAGE if kind != "deep copies" else torch.randn(2, 8, 4, 4)
    found = reasons(proven(make() if kind == "training mode" else randomize(make()), image))
    for name, reason in expected.items():
        assert (found[name] is None) == (reason is None), found
        assert (reason or "") in (found[name] or "")


class Sequence(nn.Module):
    """A linear, `middle` over (2, 5, 8) and a linear."""

    def __init__(self, middle: Middle | nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), middle, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(F.gelu(self.first(x))))


class Closure(nn.Module):
    """Attention whose head count is a global, not an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (item.view(*item.shape[:2], HEADS, -1).transpose(1, 2) for item in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class AutoEncoder(nn.Module):
    """One weight, used forwards and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.T)


class Square(nn.Module):
    """One linear along the width and along the time, which agree."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.both = nn.Linear(8, 5), nn.Linear(5, 5)
        self.up = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(self.both(x) + self.both(x.mT).mT)


class Boundary(nn.Module):
    """Two groups of six behind each other, read as three rows of four."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], -1)
        return self.out(F.gelu(x.view(*x.shape[:2], 3, 4)).amax(2))


class Listed(nn.Module):
    """Parameters in lists, one of them a deep copy of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ParameterList([nn.Parameter(torch.randn(8, 7) * 0.3) for _ in range(2)])
        self.down = copy.deepcopy(self.up)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + F.gelu(x @ up) @ down.T
        return x


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], dict[str, str | None]]] = {
    "heads in a global": (Closure, {"middle.qkv": None}),
    "lstm": (lambda: Recurrent(nn.LSTM), {"first": None}),
    "gru": (lambda: Recurrent(nn.GRU), {"first": None}),
    "tied autoencoder": (AutoEncoder, {}),
    "one weight along two dimensions": (Square, {"first": None}),
    "across a boundary": (Boundary, {"first": None, "middle.left": None, "middle.left#2": None}),
    "parameters in lists": (Listed, {"middle.up": None}),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_that_hide_a_size_or_a_weight(kind: str) -> None:
    make, expected = SEQUENCES[kind]
    found = reasons(proven(randomize(Sequence(make())), SEQUENCE))
    for name, reason in expected.items():
        assert (found[name] is None) == (reason is None), found


def test_a_counter_in_the_model_is_left_as_it_was() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x) * self.calls

    model = randomize(Counts())
    groups = proven(model, IMAGE)
    assert model.calls == 0
    assert groups["c2"].frozen is None


def test_one_channel_per_group_is_left_and_a_second_round_follows() -> None:
    """restate takes a grouped convolution with one input per group for a depthwise one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 4, 1))
    groups = discover(model, IMAGE)
    first = make_plan(groups, {"0": [0]})
    smaller, left = apply(model, first), shrink(groups, first.kept)
    second = make_plan(left, {"1": [0]})
    verify(model, compose(first, second), apply(smaller, second), IMAGE)


def test_no_numbers_are_an_error() -> None:
    model = randomize(Net(lambda x: (-x.abs() - 1).log()))
    groups = discover(model, IMAGE)
    plan = make_plan(groups, {"c1": [0, 1]})
    with pytest.raises(CriaError, match="the masked model's hold NaN"):
        verify(model, plan, apply(model, plan), IMAGE)
