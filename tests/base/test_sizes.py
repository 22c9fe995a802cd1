"""Widths that follow from the input: calls that ask for sizes get those that the cut leaves."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune.base.errors import ArtifactError
from cria_prune.base.sizes import Restated, Sizing, restate_calls
from cria_prune.planning.plan import Plan, compose, make_plan
from cria_prune.stages import discover
from cria_prune.structure.groups import shrink
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import difference, mask, verify
from networks import randomize

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Heads whose size is the width of the input by their number."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads, self.n_embd = heads, width


class Divided(Attention):
    """As in timm's CaiT; the factor of the scores is worked out from the number of heads as well."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // self.num_heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Split(Attention):
    """As in nanoGPT."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.size()
        q, k, v = self.qkv(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(b, n, self.num_heads, c // self.num_heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(b, n, c)
        return self.proj(y)


class Merged(Attention):
    """Examples and heads in one dimension, for a batched product."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h, d = self.num_heads, c // self.num_heads
        q, k, v = (
            t.view(b, n, h, d).transpose(1, 2).reshape(b * h, n, d) for t in self.qkv(x).chunk(3, dim=-1)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.proj(y.view(b, h, n, d).transpose(1, 2).reshape(b, n, c))


class Net(nn.Module):
    def __init__(self, attention: type[Attention], width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(attention(width, heads) for _ in range(2))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def net(attention: type[Attention]) -> Any:
    return randomize(Net(attention)).eval().double()


def apart(dense: nn.Module, plan: Plan, smaller: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return difference([mask(dense, plan)(x)], [smaller(x)])


@pytest.mark.parametrize("kind", [Divided, Split, Merged])
def test_heads_leave_though_the_code_divides_the_width_of_its_input(kind: type[Attention]) -> None:
    model, x = net(kind), IMAGES.double()
    groups = discover(model, x[:2])
    assert all(groups[f"blocks.{i}.qkv"].frozen is None for i in (0, 1))
    plan = make_plan(groups, {"blocks.0.qkv": [0, 3], "blocks.1.qkv": [2], "up": range(7)})
    # What is saved is numbers alone, and is carried out on any model of the architecture.
    plan = Plan.from_json(plan.to_json())
    smaller = apply(model, plan)
    assert smaller.blocks[0].qkv.weight.shape == (36, 24) and smaller.blocks[1].proj.weight.shape == (24, 6)
    assert type(smaller.blocks[0]).__name__ == kind.__name__ and isinstance(smaller.blocks[0], kind)
    assert type(model.blocks[0]) is kind
    for batch in (x[:1], x[:2], x):
        assert apart(model, plan, smaller, batch) < 1e-12
    smaller.train()(x).sum().backward()  # gradients reach what is left
    assert smaller.blocks[0].qkv.weight.grad.abs().sum() > 0
    stored = io.BytesIO()
    torch.save(smaller.eval(), stored)
    stored.seek(0)
    expected = smaller(x)
    for other in (copy.deepcopy(smaller), torch.load(stored, weights_only=False)):
        assert torch.equal(other(x), expected)
    if kind is not Divided:  # the slow rest is the same for all
        return
    program = torch.export.export(smaller, (x[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert torch.allclose(program.module()(x), expected)
    # A second pruning begins from the smaller model, whose calls are restated anew.
    again = discover(smaller, x[:2])
    second = make_plan(again, {"blocks.0.qkv": [1]})
    assert apart(smaller, second, apply(smaller, second), x) < 1e-12


def test_rounds_compose_and_a_width_leaves_with_the_heads() -> None:
    model, x = net(Split), IMAGES.double()
    groups = discover(model, x[:2])
    stream = next(group for group in groups if group.kind == "residual")
    first = make_plan(groups, {"blocks.0.qkv": [0, 1, 3]})
    second = make_plan(shrink(groups, first.kept), {"blocks.0.qkv": [0, 2], stream.name: range(0, 24, 2)})
    plan = compose(first, second)
    smaller = apply(model, plan)
    assert apart(model, plan, smaller, x) < 1e-12
    assert verify(model, plan, smaller, x).difference < 1e-12
    assert torch.equal(apply(apply(model, first), second)(x), smaller(x))


class Folded(nn.Module):
    """Windows that are unfolded, weighed and folded again, as in Volo."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        v = F.unfold(self.value(x), 3, padding=1)
        return self.out(F.fold(v * v.detach().cos(), x.shape[2:], 3, padding=1))


def test_windows_fold_back_and_their_channels_leave() -> None:
    model, x = randomize(Folded()).eval().double(), IMAGES.double()
    plan = make_plan(discover(model, x[:2]), {"value": [0, 4]})
    assert apart(model, plan, apply(model, plan), x) < 1e-12


class Partial(nn.Module):
    """A convolution of the first channels only, which two attributes count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim_conv, self.dim_rest = width // 4, width - width // 4
        self.conv = nn.Conv2d(self.dim_conv, self.dim_conv, 3, 1, 1)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [self.dim_conv, self.dim_rest], dim=1)
        return self.mlp(torch.cat((self.conv(first), rest), 1))


class Written(Partial):
    """The same with the numbers in the code."""

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split([4, 12], 1)
        return self.mlp(torch.cat((self.conv(first), rest), 1))


@pytest.mark.parametrize("kind", [Partial, Written])
def test_each_part_of_a_split_loses_its_own(kind: type[Partial]) -> None:
    parts = nn.Sequential(nn.Conv2d(3, 16, 3), kind(16), nn.Flatten(2), nn.Linear(36, 1), nn.Flatten())
    model: Any = randomize(nn.Sequential(*parts, nn.Linear(16, 3))).eval().double()
    groups = discover(model, IMAGES[:2].double())
    rest, first = groups["0"], groups["0#2"]
    assert (first.size, rest.size, first.frozen, rest.frozen) == (4, 12, None, None)
    plan = make_plan(groups, {"0": range(5), "0#2": [1, 2, 3], "1.conv": [0, 3]})
    smaller = apply(model, plan)
    assert apart(model, plan, smaller, IMAGES.double()) < 1e-12
    told = (smaller[1].dim_conv, smaller[1].dim_rest)
    assert told == ((3, 5) if kind is Partial else (4, 12))
    assert isinstance(smaller[1], Restated) is (kind is Written)


class Streams(nn.Module):
    """Two streams that read each other; nothing reads what the last block gives to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.ins = nn.ModuleList([nn.Linear(6, 12), nn.Linear(6, 8)])
        self.across = nn.ModuleList(
            nn.ModuleDict({"ab": nn.Linear(12, 8), "ba": nn.Linear(8, 12)}) for _ in range(2)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (layer(x) for layer in self.ins)
        for pair in self.across:
            a, b = a + pair["ba"](b).relu(), b + pair["ab"](a).relu()
        return self.head(a)


def test_what_nothing_reads_is_cut_with_the_rest() -> None:
    model: Any = randomize(Streams()).eval().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    groups = discover(model, x)
    # The last layer to the second stream is run for nothing, but it is run.
    assert "across.1.ab.weight" in [item.tensor for item in groups["ins.0"].consumers]
    plan = make_plan(groups, {"ins.0": [0, 4, 5], "ins.1": [1, 7]})
    smaller = apply(model, plan)
    assert smaller.across[1]["ab"].weight.shape == (2, 3)
    assert apart(model, plan, smaller, x) < 1e-12


def test_calls_that_take_the_same_are_told_apart() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            b, n, _ = x.shape
            return x.view(b, n, 2, 2), x.transpose(1, 2).reshape(b, 4, n // 2, 2)

    module = Two()
    heads = Sizing("reshape", (None, None, 4), (None, None, 4, 1), (0, 1, None, None))
    square = Sizing("reshape", (None, 4, None), (None, 4, None, None), (0, 1, None, None))
    restate_calls(module, [heads, square])
    first, second = module(torch.zeros(3, 4, 4))  # as many positions as units: both rules fit both tensors
    assert (first.shape, second.shape) == ((3, 4, 4, 1), (3, 4, 2, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"operation": "roll"}, r"calls\[0\] of module 'm': 'roll'"),
        ({"gives": [None, 0]}, r"calls\[0\].gives = '0', not an integer of at least 1"),
        ({"gives": [[1], [7]]}, r"calls\[0\] names a dimension of 2 that is not there"),
        ({"passes": [None]}, r"calls\[0\] of module 'm'"),
        ({"more": 1}, r"calls\[0\] without \[\], with unknown \['more'\]"),
    ],
)
def test_a_damaged_call_is_named(change: dict[str, Any], text: str) -> None:
    model = nn.Linear(2, 2)
    values = make_plan(
        discover(nn.Sequential(model, nn.ReLU(), nn.Linear(2, 1)), torch.zeros(2, 2)), {}
    ).to_dict()
    call = {"module": "m", "place": 0, "operation": "reshape", "takes": [None, 4], "gives": [[0], 2]}
    call |= {"passes": [0, None], "dim": -1}
    assert Plan.from_dict({**values, "calls": [call]}).to_dict()["calls"] == [call]
    with pytest.raises(ArtifactError, match=text):
        Plan.from_json(json.dumps({**values, "calls": [{**call, **change}]}))
