"""What items of a batch are taken for; what a model may come as; whose parts a copy's hooks hold."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cria_prune import CriaError, PruneConfig, apply, discover, load, prune, save
from cria_prune.base.batches import batch_target, map_tensors, model_inputs
from cria_prune.base.inputs import Reader

CONFIG = PruneConfig(plan={"reduction": 0.3}, compensate=False)
LABELS = torch.tensor([1, 3])


class Net(nn.Module):
    """A small network, the forward of which is the tests'."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(x))


class Masked(Net):
    def forward(self, x: Any, mask: Any = None) -> Tensor:
        h = self.body(x)
        return self.b((h if mask is None else h * mask[..., None]).mean(1))


Masked.forward.__annotations__.clear()  # as most people write it


class Pair(Net):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.b(self.body(left) - self.body(right))


class Conditioned(Net):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.b(self.body(x) * target)


X, TEXT, MASK = torch.randn(2, 6), torch.randn(2, 3, 6), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("net", "batch", "inputs", "count", "target"),
    [
        (Plain(), (X, LABELS), None, 1, True),
        (Masked(), (TEXT, LABELS), None, 1, True),
        (Masked(), (TEXT, MASK), 2, 2, False),
        (Masked(), (TEXT, MASK, LABELS), ("x", "mask"), 2, True),
        (Pair(), (X, X, LABELS), None, 2, True),
        (Pair(), [X, X], 2, 2, False),
        (Conditioned(), {"x": X, "target": torch.ones(2, 1), "idx": LABELS}, None, 2, True),
        (Plain(), {"x": X, "sentence": ["a", "b"], "labels": LABELS}, None, 1, True),
    ],
)
def test_items_are_read_by_the_signature(
    net: nn.Module, batch: Any, inputs: Any, count: int, target: bool
) -> None:
    read = map_tensors(Reader(net, inputs)(batch), torch.clone)  # what it is read as stays with it
    args, kwargs = model_inputs(read)
    assert len(args) + len(kwargs) == count and (batch_target(read) is not None) == target
    net(*args, **kwargs)


@pytest.mark.parametrize(
    ("net", "batch", "inputs", "text"),
    [
        (Masked(), (TEXT, MASK), None, "may be a target, or the argument 'mask'.*inputs=2"),
        (Masked(), {"x": TEXT, "attn_mask": MASK}, None, "does not take 'attn_mask', but mask"),
        (Pair(), (X, X), None, "needs 'left', 'right'.*mapping of keyword"),
        (Pair(), X, None, "needs 'left', 'right'.*mapping"),
        (Pair(), (X, X), ("left", "rigth"), "names rigth.*Its arguments are left, right"),
        (Pair(), (X, X), 5, "5 of its items"),
        (Pair(), {"left": X}, 2, "counts the items of a tuple"),
        (Plain(), (["a", "b"], LABELS), None, "tokenizer"),
        (Plain(), {"x": ["a", "b"]}, None, "'x' holds texts.*tokenizer"),
        (Plain(), ((X, X), LABELS), None, "tuples within tuples"),
        (Plain(), {"z": X}, None, "the forward takes none.*Its arguments are x"),
        (Plain(), (X, X, X), None, "needs 'x'"),
        (Pair(), (None, X, LABELS), None, "an input is None"),
    ],
)
def test_what_cannot_be_told_is_asked_for(net: nn.Module, batch: Any, inputs: Any, text: str) -> None:
    with pytest.raises(CriaError, match=re.compile(text, re.DOTALL)):
        Reader(net, inputs)(batch)


def test_several_inputs_are_pruned_and_said() -> None:
    torch.manual_seed(0)
    result = prune(Pair(), [(torch.randn(8, 6), torch.randn(8, 6)) for _ in range(4)], CONFIG, inputs=2)
    assert "item 2 is the input 'right'" in str(result) and result.report["reached"] > 0.2
    with pytest.raises(CriaError, match="Leave empty batches out"):
        prune(Plain(), [torch.randn(0, 6)], CONFIG)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_model_is_given_back_so(wrap: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, batches = Plain(), [torch.randn(8, 6) for _ in range(4)]
    wrapped = wrap(net)
    result, plain = prune(wrapped, batches, CONFIG), prune(net, batches, CONFIG)
    assert type(result.model) is type(wrapped) and "was taken out of" in str(result)
    assert torch.equal(result.model(X), plain.model(X)) and discover(wrapped, X).shapes.keys() == {
        "a.weight", "a.bias", "b.weight", "b.bias"
    }  # fmt: skip
    assert type(apply(wrapped, result.plan)) is type(wrapped)
    save(tmp_path / "small", result.model, result.plan)
    for fresh in (wrap(Plain()), Plain()):
        again = load(tmp_path / "small", model=fresh).model
        assert type(again) is type(fresh) and torch.equal(again(X), plain.model(X))


def test_what_is_no_plain_network_is_refused_before_the_capture() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    packed = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    packed[0].weight = nn.Parameter(torch.ones(8, 6, dtype=torch.int8), requires_grad=False)
    for model, text in [
        (
            torch.ao.quantization.quantize_dynamic(net, {nn.Linear}),
            "quantised model.*Prune before quantising",
        ),
        (packed, "quantised model.*int8"),
        (torch.jit.trace(net, X), "scripted or traced.*script the result"),
        (net.forward, "no torch.nn.Module"),
    ]:
        with pytest.raises(CriaError, match=text):
            discover(model, X)


class Tap(Plain):
    """A hook keeps the features that the forward reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.a.register_forward_hook(lambda module, given, out: self.kept.__setitem__("low", out))

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(torch.relu(self.kept["low"]))


GLOBAL = Plain()


def _into_the_global(module: nn.Module, given: Any, out: Tensor) -> None:
    GLOBAL.kept["low"] = out  # type: ignore[operator]


def test_a_copys_hooks_hold_its_own_parts() -> None:
    torch.manual_seed(0)
    net, batches = Tap(), [torch.randn(8, 6) for _ in range(4)]
    net(X)  # it has features with a gradient, and stale ones, from before
    small = prune(net, batches, CONFIG).model.eval()
    first, x = small.a, torch.randn(3, 6)
    assert first.out_features < 16
    assert torch.allclose(small(x), small.b(torch.relu(first(x))))  # the same without the hook


def test_a_hook_whose_store_no_forward_reads_passes() -> None:
    GLOBAL.kept = {}  # type: ignore[assignment]
    handle = GLOBAL.a.register_forward_hook(_into_the_global)
    discover(GLOBAL, X)  # nothing reads what it keeps
    handle.remove()


def test_a_harmful_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Tap()
    net.a._forward_hooks.clear()
    monkeypatch.setitem(globals(), "GLOBAL", net)
    net.a.register_forward_hook(_into_the_global)
    with pytest.raises(CriaError, match="hook _into_the_global on 'a' writes into the original"):
        discover(net, X)
