"""Networks that a review of the structure found to be misread, to crash, or to change the user's state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune import discover
from cria_prune.base.attention import MultiheadAttention
from networks import randomize

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two linears; the hidden units are divided by their number, so none may leave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)
        self.register_buffer("masked", torch.arange(5) == 4)
        self.register_buffer("turn", 1j * torch.ones(2))

    def hidden(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return x / x.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x))


class Sentinel(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x)).masked_fill(self.masked, -1e9)


class Complex(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.hidden(x))[..., :4].reshape(2, 3, 2, 2).contiguous()
        return torch.view_as_real(torch.view_as_complex(y) * self.turn)


class Gate(Net):
    """A mean over 16 units that gates 6 others."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.b(a) + self.d(self.c(x) * torch.sigmoid(a.mean(-1, keepdim=True)))


@pytest.mark.parametrize("kind", [Sentinel, Complex])
def test_a_division_by_the_width_is_seen_behind(kind: type[Net]) -> None:
    assert "a trial cut failed" in str(discover(randomize(kind()), X)["a"].frozen)


def test_a_statistic_that_gates_other_units_freezes() -> None:
    groups = discover(randomize(Gate()), X)
    assert "has a statistic that meets other units" in str(groups["a"].frozen) and groups["c"].frozen is None


def test_only_the_attribute_that_is_needed_is_restated() -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = self.reach = self.n_ahead = 4
            self.inp, self.qkv, self.out = nn.Linear(8, 10), nn.Linear(10, 60), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.h, 5).permute(2, 0, 3, 1, 4).unbind(0)
            step = torch.arange(x.shape[1])
            near = (step[:, None] - step[None]).abs() < self.reach
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
            return self.out(mixed.transpose(1, 2).flatten(2))[:, -self.n_ahead :]

    group = discover(randomize(Far()), X)["qkv"]
    assert group.frozen is None and {item.name for item in group.counts if item.sure} == {"h"}


def test_a_dictionary_as_configuration_and_a_bias_of_one_number() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"use_cache": True}
            self.a, self.b = nn.Linear(8, 6, bias=False), nn.Linear(6, 3)
            self.shift, self.slope = nn.Parameter(torch.rand(1)), nn.Parameter(torch.tensor(0.2))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.prelu(F.linear(x, self.a.weight, self.shift), self.slope))

    assert discover(Plain(), X)["a"].frozen is None


def test_nested_inputs_and_counters_stay_as_they_were() -> None:
    class Writes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
            self.calls += 1
            return self.b(self.a(x + more[0].mul_(2)).relu())

    model, more = randomize(Writes()), [torch.ones(2, 3, 8)]
    discover(model, {"x": X, "more": more})
    assert torch.equal(more[0], torch.ones(2, 3, 8)) and float(model.calls) == 0


def test_the_plain_attention_refuses_a_hint_without_a_mask() -> None:
    x = torch.randn(2, 3, 8)
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            kind(8, 2)(x, x, x, is_causal=True, need_weights=False)
