"""A lack of memory while the structure is found says nothing of the model: no group is frozen for it."""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn
from watching import counted, interrupted_at

from cria_prune import discover, prune
from cria_prune.base.errors import DataError, ResourceError
from cria_prune.planning.plan import make_plan
from cria_prune.surgery.removal import apply
from cria_prune.surgery.verify import verify

ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")


class Hungry(nn.Module):
    """Raises an error where `wanted` says so; on the meta device, where nothing is allocated, never."""

    def __init__(self, error, wanted):
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 3)
        self.error, self.wanted = error, wanted

    def forward(self, x):
        if x.device.type != "meta" and self.wanted(self, x):
            raise self.error
        return self.down(self.up(x).relu())


def narrow(model, x):
    return model.up.weight.shape[0] < 16


def untouched(model, call, match):
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(ResourceError, match=match):
        call()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("error", [*ERRORS, CPU], ids=["cuda", "python", "cpu"])
def test_in_a_trial_cut(error):
    model = Hungry(error, narrow)
    untouched(model, lambda: discover(model, torch.ones(2, 4)), "pruned model with the masked.*float64")


@pytest.mark.parametrize("error", ERRORS)
def test_in_the_capture(error):
    model = Hungry(error, lambda model, x: True)
    untouched(model, lambda: discover(model, torch.ones(2, 4)), "Capturing the operations of Hungry")


@pytest.mark.parametrize("error", ERRORS)
def test_what_does_not_fit_in_float64_is_compared_in_float32(error):
    model = Hungry(error, lambda model, x: x.dtype is torch.float64)
    groups = discover(model, torch.ones(2, 4))
    assert groups["up"].frozen is None
    plan = make_plan(groups, {"up": torch.arange(8).numpy()})
    assert verify(model, plan, apply(model, plan), torch.ones(2, 4)).dtype == "float32"


@pytest.mark.parametrize("place", ["_in_type", "difference"])
def test_in_the_copy_and_in_the_comparison(place, monkeypatch):
    model, batch = Hungry(None, lambda model, x: False), torch.ones(2, 4)
    plan = make_plan(discover(model, batch), {"up": torch.arange(8).numpy()})
    smaller = apply(model, plan)
    monkeypatch.setattr(import_module("cria_prune.surgery.verify"), place, raising(MemoryError()))
    match = "A copy of the model" if place == "_in_type" else "Comparing the pruned model"
    untouched(model, lambda: verify(model, plan, smaller, batch), match)


def test_in_the_cut(monkeypatch):
    model, batches = Hungry(None, lambda model, x: False), [torch.randn(8, 4)]
    with counted("cut") as trials:
        discover(model, batches[0])
    with interrupted_at("cut", len(trials) + 1, ERRORS[0]):
        untouched(model, lambda: prune(model, batches), "Cutting the model")
    monkeypatch.setattr(import_module("cria_prune.surgery.trial")._Shapes, "of", lambda *_: None)
    with interrupted_at("cut", 1, ERRORS[0]):
        untouched(model, lambda: discover(model, batches[0]), "A trial cut")


def raising(error):
    def call(*_args, **_named):
        raise error

    return call


@pytest.mark.parametrize("error", ERRORS)
def test_in_the_verification(error):
    model = Hungry(error, lambda model, x: False)
    batch = torch.randn(2, 4)
    plan = make_plan(discover(model, batch), {"up": torch.arange(8).numpy()})
    smaller = apply(model, plan)
    smaller.wanted = narrow
    untouched(model, lambda: verify(model, plan, smaller, batch), "Comparing the pruned model")
    model.wanted = lambda model, x: not narrow(model, x)
    untouched(model, lambda: verify(model, plan, smaller, batch), "Comparing the pruned model")


def test_another_error_is_still_told_of_the_model():
    broken = Hungry(ZeroDivisionError("mine"), narrow)
    found = discover(broken, torch.randn(2, 4))
    assert "ZeroDivisionError: mine" in found["up"].frozen
    with pytest.raises(DataError, match="ZeroDivisionError"):
        discover(Hungry(ZeroDivisionError("mine"), lambda model, x: True), torch.randn(2, 4))
