"""Weights that are no parameters but views of some, or computed: cut, compared, recorded, repaired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from transformers import MambaConfig, MambaForCausalLM

from cria_prune import PruneConfig, apply, discover, load, prune, save, verify
from cria_prune.structure.groups import end_of
from networks import randomize


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    """An autoencoder whose decoder reads the encoder's weights transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(6, 16), nn.Linear(16, 8)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.inner(F.relu(self.outer(x))))
        return F.relu(F.linear(code, self.inner.weight.t(), self.bias)) @ self.outer.weight


class Joined(nn.Module):
    """Weights joined, sliced, and multiplied from the left."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (
            (6, 12),
            (6, 10),
            (22, 9),
            (9, 3),
        )  # a bias that is not read keeps its units
        self.a, self.b, self.c, self.last = (nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        n = self.a.weight.shape[0]
        h = F.relu(F.linear(x, torch.cat([self.a.weight, self.b.weight])))
        h = F.linear(h[:, :n], self.c.weight[:, :n]) + F.linear(h[:, n:], self.c.weight[:, n:])
        return (self.last.weight @ F.relu(h).t()).t()


class Spline(nn.Module):
    """A KAN's layer: features of every input times a weight that is scaled elementwise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 3))
        self.scaler = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([x, x.square(), x.tanh()], -1).flatten(1)
        return F.linear(features, (self.weight * self.scaler.unsqueeze(-1)).flatten(1))


class Einsum(nn.Module):
    """Attention over raw parameters of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": (6, 4, 5), "k": (6, 4, 5), "v": (6, 4, 5), "out": (4, 5, 3)}
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bld,dhk->blhk", x, item) for item in (self.q, self.k, self.v))
        shares = torch.einsum("blhk,bmhk->bhlm", q, k).softmax(-1)
        return torch.einsum("blhk,hkd->bld", torch.einsum("bhlm,bmhk->blhk", shares, v), self.out)


class Standardised(nn.Conv1d):
    """A convolution whose weight is standardised over its inputs, as in NFNets."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Positive(nn.Linear):
    """A weight that is not zero where its parameter is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.softplus(self.weight), self.bias)


class StateSpace(nn.Module):
    """Mamba: a squeezed depthwise filter, a product from the left, and one width that is gated by itself."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 6, "intermediate_size": 12, "state_size": 3, "time_step_rank": 2}
        self.net = MambaForCausalLM(MambaConfig(vocab_size=9, num_hidden_layers=1, **sizes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(inputs_embeds=x, use_cache=False).logits


def stacked(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def convolutions(norm: Callable[[Any], Any]) -> nn.Sequential:
    """Plain, grouped, depthwise and transposed, each under a norm."""
    return stacked(
        norm(nn.Conv1d(3, 8, 3)), norm(nn.Conv1d(8, 12, 3, groups=4)), norm(nn.Conv1d(12, 12, 1, groups=12)),
        norm(nn.ConvTranspose1d(12, 10, 3)), nn.Conv1d(10, 2, 1),
    )  # fmt: skip


IMAGES, ROWS, WORDS = (4, 3, 9), (8, 6), (4, 7, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tied": (Tied, ROWS),
    "joined": (Joined, ROWS),
    "spline": (lambda: nn.Sequential(Spline(6, 12), Spline(12, 10), Spline(10, 3)), ROWS),
    "einsum": (Einsum, WORDS),
    "state space": (StateSpace, WORDS),
    "positive": (lambda: stacked(Positive(6, 12), Positive(12, 10), nn.Linear(10, 3)), ROWS),
    "standardised": (
        lambda: stacked(*(Standardised(i, o, 3) for i, o in ((3, 8), (8, 10), (10, 2)))),
        IMAGES,
    ),
    "weight norm": (lambda: convolutions(parametrizations.weight_norm), IMAGES),
    "old weight norm": (lambda: convolutions(weight_norm), IMAGES),
    "spectral norm": (lambda: convolutions(parametrizations.spectral_norm), IMAGES),
    "old spectral norm": (lambda: convolutions(spectral_norm), IMAGES),
}
SLOW = {"positive", "weight norm", "old spectral norm"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS]
)
def test_weights_that_are_no_parameters_are_cut(name: str) -> None:
    """Masked equals pruned, on another batch of another size too; the network given is as it was."""
    build, shape = NETWORKS[name]
    model = build()
    model(drawn(*shape))  # a spectral norm begins with its vectors anywhere
    model = randomize(model).eval() if "norm" not in name else model.eval()
    before = {key: item.clone() for key, item in model.state_dict().items()}
    batches = [drawn(*shape, seed=number) for number in range(4)]
    result = prune(model, batches, PruneConfig(plan={"reduction": 0.4, "rounds": 2}))
    assert result.report["reached"] >= 0.35
    bare = apply(model, result.plan)
    other = drawn(2 * shape[0], *shape[1:], seed=9)
    assert verify(model, result.plan, bare, other).difference <= 1e-10
    result.model.train()(other).square().mean().backward()
    assert all(torch.equal(item, before[key]) for key, item in model.state_dict().items())


def normed(norm: Callable[[Any], Any]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), norm(nn.Linear(12, 4))).eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_a_weight_norm_is_that_of_what_stays(norm: Callable[[Any], Any], tmp_path: Any) -> None:
    """By hand: what is left of a direction gets the length again. The repair sets length and direction."""
    model, x = normed(norm), drawn(64, 6)
    batches, before = [drawn(64, 6, seed=number) for number in range(4)], model(x)
    plan = {"reduction": 0.4, "rounds": 1}
    bare = prune(model, batches, PruneConfig(plan=plan, compensate=False)).model
    lengths, directions = (
        item for name, item in bare.named_parameters() if item.shape[0] == 4 and item.ndim > 1
    )
    assert isinstance(bare[2], nn.Linear) and bare[2].in_features == directions.shape[1] < 12
    weight = lengths * directions / directions.norm(dim=1, keepdim=True)
    assert torch.allclose(bare(x), F.linear(F.relu(bare[0](x)), weight, bare[2].bias), atol=1e-6)
    whole = dict(model.named_parameters())
    assert all(torch.isin(item, whole[name]).all() for name, item in bare.named_parameters())
    result = prune(model, batches, PruneConfig(plan=plan))
    assert [name for name, _ in result.model.named_parameters()] == list(whole)
    assert (result.model(x) - model(x)).norm() < 0.8 * (bare(x) - model(x)).norm()
    save(tmp_path / "saved", result.model, result.plan)
    assert torch.equal(load(tmp_path / "saved", model=normed(norm)).model.eval()(x), result.model(x))
    assert torch.equal(model(x), before)  # torch's own class of the layer, which copies share, is whole


def test_the_layers_that_read_one_parameter_are_told_apart() -> None:
    """A tied decoder reads the code where the encoder makes it; each has a signal of its own."""
    groups = discover(randomize(Tied()), drawn(*ROWS))
    code = groups["inner"]
    assert {(tap.tensor, tap.site) for tap in code.inputs} == {("inner.weight", "output")}
    assert {(tap.tensor, tap.site) for tap in code.outputs} == {("inner.weight", "input:1")}
    hidden = groups["outer"]
    assert {end_of(tap.site) for tap in hidden.outputs} == {"input"} and len(hidden.inputs) == 2
    assert {(item.tensor, item.dim) for item in hidden.consumers} == {
        ("outer.weight", 0),
        ("inner.weight", 1),
    }
