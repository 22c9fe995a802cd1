"""Recording: right numbers against a slow twin, and nothing left behind."""

import random

import numpy as np
import pytest
import torch
from tests.recording.test_collect_networks import conv_net, each, gather, images, mlp, slices
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from cria_prune.base.errors import (
    CriterionError,
    DataError,
    ResourceError,
    SignalError,
    StructureError,
)
from cria_prune.config import RecordConfig
from cria_prune.recording import sampling
from cria_prune.recording.collect import record
from cria_prune.recording.taps import Taps
from cria_prune.structure.groups import Tap, UnitGroup

ALL = RecordConfig(examples=10_000, positions=64)


def reference(signals):
    """Signals (units, S), float64, to mean and covariance."""
    mean = signals.mean(1)
    centred = signals - mean[:, None]
    return mean, centred @ centred.T / signals.shape[1]


def channels(activation):
    """(B, C, H, W) to (C, B*H*W)."""
    return activation.movedim(1, 0).flatten(1)


def check(moments, signals):
    mean, covariance = reference(signals)
    assert moments.samples == signals.shape[1]
    torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moments.covariance, covariance, rtol=1e-9, atol=1e-10)


def hooked(model, X, before=(), after=()):
    """Full activations of a forward by module hooks: inputs of `before`, outputs of `after`, cloned."""
    seen, handles = {}, []
    modules = dict(model.named_modules())
    try:
        for name in before:
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda module, args, name=name: seen.setdefault(("in", name), []).append(args[0].clone())
                )
            )
        for name in after:
            handles.append(
                modules[name].register_forward_hook(
                    lambda module, args, out, name=name: seen.setdefault(("out", name), []).append(
                        out.clone()
                    )
                )
            )
        with torch.no_grad():
            model(X)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_moments_are_those_of_full_activations_through_in_place_relu_and_flatten():
    model, groups = conv_net(dtype=torch.float64)
    batches = images(12, batch=5, dtype=torch.float64)
    states = record(model, groups, batches, ALL)
    X = torch.cat([x for x, _ in batches])
    seen = hooked(model, X, before=["3", "6"], after=["1", "3"])
    pre, post = seen["out", "1"][0], seen["in", "3"][0]
    assert (pre < 0).any() and (post >= 0).all()
    check(states["0"].input, channels(pre))
    check(states["0"].output, channels(post))
    check(states["3"].input, channels(seen["out", "3"][0]))
    check(states["3"].output, seen["in", "6"][0].reshape(12, 5, 16).permute(1, 0, 2).reshape(5, -1))
    check(states["0"].inputs[0], channels(pre[0::2]))
    check(states["0"].inputs[1], channels(pre[1::2]))
    check(states["3"].outputs[1], seen["in", "6"][0][1::2].reshape(6, 5, 16).movedim(1, 0).flatten(1))
    assert set(states.groups) == {"0", "3"}  # the frozen group is passed over
    assert states.examples == 12 and states.batches == 3
    assert "exact" in str(states) and "12 examples" in str(states)


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_shared_modules_and_keyword_calls_are_read_once_per_call(tokens):
    model, groups = mlp(torch.float64)
    X = torch.randn(6, *tokens, 7, dtype=torch.float64)
    states = record(model, groups, [X[:4], X[4:]], ALL)
    seen = hooked(model, X, before=["shared"], after=["first", "shared"])
    last = seen["out", "shared"][1].relu()
    inputs = [*seen["out", "first"], *seen["out", "shared"]]
    outputs = [*seen["in", "shared"], last]
    check(states["first"].input, torch.cat([item.reshape(-1, 8) for item in inputs]).T)
    check(states["first"].output, torch.cat([item.reshape(-1, 8) for item in outputs]).T)


class Functional(nn.Module):
    """Functional convolutions and products in all the ways to call them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, 3))
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.v = nn.Parameter(torch.randn(4, 5))
        self.u = nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        x = torch.conv1d(x, weight=self.w, padding=1)
        x = self.norm(x).relu_().mean(2)
        x = torch.addmm(torch.zeros(5, dtype=x.dtype), x, self.v)
        return x.tanh_() @ self.u.t()


def test_functional_calls_transposes_and_norms_without_weights_are_read():
    torch.manual_seed(3)
    model = Functional().double().eval()
    nn.init.normal_(model.norm.running_mean)
    rows = UnitGroup(
        "v",
        "neuron",
        5,
        5,
        (),
        (Tap("v", "output", -1, each(5)),),
        (Tap("u", "input", -1, each(5)),),
    )
    lines = UnitGroup(
        "w",
        "channel",
        4,
        4,
        slices(4, ["w"], ["norm.running_mean", "norm.running_var"], ["v"]),
        (Tap("norm.running_mean", "output", 1, each(4)), Tap("w", "output", 1, each(4))),
        (Tap("v", "input", 1, each(4)),),
    )
    X = torch.randn(6, 3, 10, dtype=torch.float64)
    states = record(model, gather(model, rows, lines), [X], ALL)
    with torch.no_grad():
        conv = functional.conv1d(X, model.w, padding=1)
        normed = model.norm(conv)
        mean = normed.relu().mean(2)
        product = mean @ model.v
    check(states["w"].input, torch.cat([channels(normed), channels(conv)], 1))
    check(states["w"].output, mean.T)
    check(states["v"].input, product.T)
    check(states["v"].output, product.tanh().T)


def test_feed_forward_of_a_fused_transformer_layer_is_read():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    group = UnitGroup(
        "linear1",
        "neuron",
        16,
        16,
        slices(16, ["linear1.weight"], ["linear1.bias"], ["linear2.weight"]),
        (Tap("linear1.weight", "output", -1, each(16)),),
        (Tap("linear2.weight", "input", -1, each(16)),),
    )
    states = record(layer, gather(layer, group), [torch.randn(4, 5, 8)])
    assert states["linear1"].input.samples == states["linear1"].output.samples == 20
    assert (states["linear1"].output.mean >= 0).all()


def test_padding_is_left_out():
    model, groups = mlp(torch.float64)
    model.forward = lambda x, attention_mask: Mlp.forward(model, x)
    Mlp = type(model)
    X = torch.randn(3, 4, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    states = record(model, groups, [{"x": X, "attention_mask": mask, "labels": torch.zeros(3)}], ALL)
    kept = record(mlp(torch.float64)[0], groups, [X[mask.bool()]], ALL)
    torch.testing.assert_close(states["first"].input.covariance, kept["first"].input.covariance)
    assert [half.samples for half in states["first"].outputs] == [3 * 3, 4 * 3]


def moments_equal(one, other):
    for name, group in one.groups.items():
        for side in ("input", "output"):
            a, b = getattr(group, side), getattr(other[name], side)
            assert a.samples == b.samples
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("positions", [64, 5])
def test_batch_size_does_not_matter_and_the_limit_cuts_the_last_batch(positions):
    model, groups = conv_net(dtype=torch.float64)
    config = RecordConfig(examples=11, positions=positions, seed=3)
    runs = [
        record(model, groups, images(16, batch=batch, dtype=torch.float64), config)
        for batch in (16, 4, 3, 11)
    ]
    assert {run.examples for run in runs} == {11}
    for run in runs[1:]:
        moments_equal(runs[0], run)
        moments_equal(  # the halves too
            type(run)({name: half_as_whole(runs[0][name]) for name in run.groups}, 0, 0, 0, 0, 0, "", False),
            type(run)({name: half_as_whole(run[name]) for name in run.groups}, 0, 0, 0, 0, 0, "", False),
        )


def half_as_whole(group):
    return type(group)(group.name, group.inputs, group.outputs, group.inputs[1], group.outputs[1])


def test_no_more_batches_are_fetched_than_needed():
    model, groups = conv_net()
    fetched = []

    def stream():
        for batch in images(40):
            fetched.append(len(batch[0]))
            yield batch

    record(model, groups, stream(), RecordConfig(examples=10))
    assert fetched == [8, 8]


def test_both_sides_use_the_same_positions_and_another_seed_uses_others():
    """Group `a` of a net without norm and ReLU: the sides hold the same numbers, so the moments agree."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Identity(), nn.Conv2d(4, 2, 3)).double()
    group = UnitGroup(
        "0",
        "channel",
        4,
        4,
        slices(4, ["0.weight"], ["0.bias"], ["2.weight"]),
        (Tap("0.weight", "output", 1, each(4)),),
        (Tap("2.weight", "input", 1, each(4)),),
    )
    groups = gather(model, group)
    batches = images(8, dtype=torch.float64)
    one = record(model, groups, batches, RecordConfig(positions=3))
    assert one["0"].input.samples == 24
    assert torch.equal(one["0"].input.covariance, one["0"].output.covariance)
    other = record(model, groups, batches, RecordConfig(positions=3, seed=1))
    assert not torch.allclose(one["0"].input.covariance, other["0"].input.covariance)
    last = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    moments_equal(one, record(model, groups, last, RecordConfig(positions=3)))


def test_gathering_small_batches_changes_nothing(monkeypatch):
    model, groups = conv_net(dtype=torch.float64)
    whole = record(model, groups, images(30, batch=7, dtype=torch.float64), ALL)
    for held in (1, 700, 2000, 5000):
        monkeypatch.setattr(sampling, "BUFFERED", held)
        moments_equal(whole, record(model, groups, images(30, batch=7, dtype=torch.float64), ALL))


def test_wide_groups_are_sketched():
    model, groups = conv_net()
    states = record(model, groups, images(16), RecordConfig(exact_units=5, sketch_columns=32))
    assert states["3"].output.covariance is not None
    assert states["0"].output.covariance is None and states["0"].output.sketch.shape == (6, 32)
    exact = record(model, groups, images(16))
    torch.testing.assert_close(states["0"].output.variance, exact["0"].output.variance)


def snapshot(model):
    return (
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        len(_get_current_function_mode_stack()),
        torch.is_grad_enabled(),
        [tensor.clone().tolist() for tensor in model.state_dict().values()],
    )


class Noisy(nn.Module):
    """Uses every global generator, and raises on images of 7 pixels."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        torch.rand(1), random.random(), np.random.rand()
        y = self.net[:4](x)
        if x.shape[-1] == 7:
            raise RuntimeError("seven pixels are too few")
        return self.net[4:](y)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("how", ["normal run", "bad argument", "forward that raises"])
def test_nothing_is_left_behind(how, gradients):
    net, groups = conv_net()
    model = Noisy(net).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[6].weight.grad = torch.ones_like(net[6].weight)
    groups = renamed(groups, "net.")
    batches = {
        "normal run": images(8),
        "bad argument": [images(8)[0], "no batch"],
        "forward that raises": [*images(8), *images(8, side=7)],
    }[how]
    before = snapshot(model)
    if how == "normal run":
        record(model, groups, batches, gradients=gradients)
    else:
        with pytest.raises(DataError, match="found str" if how == "bad argument" else "seven pixels"):
            record(model, groups, batches, gradients=gradients)
    assert snapshot(model) == before


def renamed(groups, prefix):
    from dataclasses import replace

    def named(items):
        return tuple(replace(item, tensor=prefix + item.tensor) for item in items)

    return replace(
        groups,
        groups=tuple(
            replace(
                group,
                slices=named(group.slices),
                inputs=named(group.inputs),
                outputs=named(group.outputs),
            )
            for group in groups
        ),
    )


def test_errors_say_what_to_do():
    model, groups = conv_net()
    with pytest.raises(DataError, match=r"batches are empty\. Pass two examples or more"):
        record(model, groups, [])
    with pytest.raises(DataError, match="Pass an iterable of batches"):
        record(model, groups, images(8)[0][0])
    with pytest.raises(DataError, match=r"\(Tensor \(8, 1, 8, 8\)\): RuntimeError: .*expected input"):
        record(model, groups, [torch.zeros(8, 1, 8, 8)])
    with pytest.raises(SignalError, match="8 and 0 samples in the two halves"):
        record(model, groups, images(1))
    bad = images(8)
    bad[0][0][3] = float("nan")
    with pytest.raises(SignalError, match="group '0', input side"):
        record(model, groups, bad)
    with pytest.raises(StructureError, match=r"no parameter or buffer of that name"):
        record(nn.Sequential(nn.Linear(2, 2)), groups, bad)
    with pytest.raises(DataError, match=r"cross-entropy of a batch: found no target.*\(inputs, target\)"):
        record(model, groups, [x for x, _ in images(8)], gradients=True)
    with pytest.raises(CriterionError, match="not a tensor of one element"):
        record(
            model, groups, images(8), gradients=True, loss=lambda model, batch: model(batch[0]).detach().sum()
        )
    other, narrow = conv_net(units=4)[0], groups
    with pytest.raises(StructureError, match="the activation has 4 features, the group needs 6"):
        record(other, narrow, images(8))


def test_a_layer_that_never_runs_is_an_error():
    model, groups = mlp()
    model.forward = lambda x: model.last(torch.zeros(len(x), 8))
    with pytest.raises(SignalError, match="input side of group 'first': it was never reached"):
        record(model, groups, [torch.zeros(4, 7)])


def test_taylor_is_the_squared_first_order_change_of_a_gate_after_the_batch_norm():
    model, groups = conv_net()
    batches = images(16)
    states = record(model, groups, batches, gradients=True)
    expected = torch.zeros(6, dtype=torch.float64)
    for x, y in batches:
        gate = torch.ones(6, requires_grad=True)
        hook = model[1].register_forward_hook(lambda _m, _i, out, gate=gate: out * gate[:, None, None])
        functional.cross_entropy(model(x), y).backward()
        hook.remove()
        expected += gate.grad.double() ** 2
    assert expected.min() > 0
    torch.testing.assert_close(states["0"].taylor, expected, rtol=1e-4, atol=1e-12)
    assert states.gradients and record(model, groups, batches)["0"].taylor is None
    moments_equal(states, record(model, groups, batches))


def test_taps_hand_over_the_activation_before_it_is_overwritten():
    model, _ = conv_net()
    kept = []
    with torch.no_grad(), Taps(model, [("1.weight", "output")], lambda *args: kept.append(args[2].clone())):
        model(images(2)[0][0])
    with torch.no_grad():
        expected = model[1](model[0](images(2)[0][0]))
    assert (expected < 0).any()
    torch.testing.assert_close(kept[0], expected)


def test_a_lack_of_memory_names_the_batch_the_group_and_what_to_lower(monkeypatch):
    model, groups = mlp()
    batches = [torch.randn(32, 7) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *_: torch.empty(2**50, dtype=torch.uint8))
        with pytest.raises(
            ResourceError, match=r"calibration batch \(Tensor \(32, 7\)\).*not suffice.*smaller"
        ):
            record(model, groups, batches)

    def failing(error):
        def add(*_args):
            raise error

        return add

    for buffered in (sampling.BUFFERED, 1):  # at the end, and in the forward
        monkeypatch.setattr(sampling, "BUFFERED", buffered)
        for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()):
            monkeypatch.setattr(sampling.MomentAccumulator, "add", failing(error))
            with pytest.raises(ResourceError, match=r"group 'first' from 32 examples .*exact_units \(2048\)"):
                record(model, groups, batches)
    monkeypatch.setattr(sampling.MomentAccumulator, "add", failing(ZeroDivisionError("mine")))
    with pytest.raises(DataError, match="ZeroDivisionError: mine"):
        record(model, groups, batches)


class Gated(nn.Module):
    """Two producers of one group of neurons."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(7, 8), nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.gate(x).relu() * self.up(x))


def test_a_sketch_does_not_depend_on_the_batches_and_is_exact_up_to_its_columns():
    torch.manual_seed(2)
    model, X = Gated().eval(), torch.randn(12, 3, 7)
    producers = ["gate.weight", "up.weight"]
    hidden = UnitGroup(
        "gate",
        "neuron",
        8,
        8,
        slices(8, producers, ["gate.bias", "up.bias"], ["down.weight"]),
        tuple(Tap(name, "output", -1, each(8)) for name in producers),
        (Tap("down.weight", "input", -1, each(8)),),
    )
    groups = gather(model, hidden)
    exact = record(model, groups, [X])["gate"]

    def sketched(batch, columns):
        config = RecordConfig(exact_units=2, sketch_columns=columns)
        return record(model, groups, X.split(batch), config)["gate"]

    found = sketched(4, columns=36)  # 2 calls x 6 examples x 3 tokens
    for side in ("inputs", "outputs"):
        for half, expected in zip(getattr(found, side), getattr(exact, side), strict=True):
            S = half.sketch.double()
            torch.testing.assert_close(S @ S.T / half.samples, expected.covariance, rtol=1e-5, atol=1e-6)
    one, other = (sketched(batch, columns=10).input.sketch for batch in (12, 5))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (one @ one.T / 72 - exact.input.covariance).abs().max() > 1e-3  # it is a sketch after all
