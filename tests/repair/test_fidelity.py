"""Fidelity against closed forms and a slow twin on whole tensors, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cria_prune import Fidelity, fidelity
from cria_prune.base.batches import (
    fit_batches,
    held_batches,
    hold_out_every,
    rows_of,
)
from cria_prune.base.errors import DataError, SignalError
from cria_prune.repair.fidelity import comparable


class Given(nn.Module):
    """Gives out what a function makes of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, **others: Tensor) -> Any:
        return self.function(x, **others)


def compared(dense: Any, other: Any, *batches: Any) -> Fidelity:
    return fidelity(Given(dense), Given(other), batches)


def test_a_network_is_next_to_itself_and_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    net[1].eval()
    before = [item.clone() for item in net.state_dict().values()]
    state = torch.get_rng_state()
    found = fidelity(net, net, [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))])
    (only,) = found.outputs
    assert (only.relative_error, only.divergence, only.agreement, found.loss) == (0, 0, 1, 0)
    assert only.cosine == pytest.approx(1, abs=1e-12)
    assert str(found) == "KL 0, agrees on 100.00 % of 5 examples"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, two) for one, two in zip(before, net.state_dict().values(), strict=True))
    assert [item.training for item in net] == [True, False, True, True]


def test_the_closed_forms() -> None:
    # ln p/(1-p) against ln 1: KL = p ln 2p + (1-p) ln 2(1-p).
    p = torch.tensor([0.9, 0.2], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], 1)
    kl = p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log()
    for scale in (lambda x: x, torch.exp):  # logits, and the same as probabilities
        found = compared(scale, lambda x, scale=scale: scale(torch.zeros_like(x) - math.log(2)), logits)
        assert found.loss == pytest.approx(float(kl.mean()), rel=1e-12)
        assert found.outputs[0].agreement == 0.5 and found.unit == "KL"
    # f̂ = f/2 of centred f: (1/4)‖f‖² of ‖f‖²; around a mean m, ‖f‖² is n m² more. Far from 0, too.
    centred = torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)
    for shift in (0.0, 1e6):
        found = compared(lambda x: {"z": x}, lambda x: {"z": x / 2}, centred[:1] + shift, centred[1:] + shift)
        whole = float((centred + shift).square().sum() / 4 / centred.square().sum())
        assert found.loss == pytest.approx(whole, rel=1e-9) and found.outputs[0].cosine == pytest.approx(1)
        assert str(found).startswith("relative error") and "(z), cosine 1.000" in str(found)
    # Examples all alike: over ‖f‖² then.
    alike = compared(lambda x: {"z": x}, lambda x: {"z": x * 0.9}, torch.ones(4, 3).double())
    assert alike.loss == pytest.approx(0.01)
    assert compared(lambda x: {"z": x * 0}, lambda x: {"z": x}, torch.ones(4, 3)).loss == math.inf


def test_a_slow_twin_on_whole_tensors_batch_by_batch_and_without_the_padding() -> None:
    torch.manual_seed(0)
    ids = torch.randn(7, 5, 6, dtype=torch.float64) + 3
    mask = torch.ones(7, 5, dtype=torch.long)
    mask[1, 2:], mask[4, 1:] = 0, 0
    noise, head = torch.randn(6, 6, dtype=torch.float64) / 4, torch.randn(6, 6, dtype=torch.float64)

    def dense(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = torch.where(attention_mask[..., None] > 0, x, math.nan)  # what is padding may be anything
        return {"last_hidden_state": states, "logits": states @ head, "start_logits": x.sum(-1)}

    def other(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        found = dense(x + x @ noise, attention_mask)
        return found

    batches = [{"x": ids[a:b], "attention_mask": mask[a:b]} for a, b in ((0, 2), (2, 3), (3, 7))]
    found = {item.name: item for item in fidelity(Given(dense), Given(other), batches).outputs}
    keep = mask.flatten() > 0
    f, g = ids.flatten(0, 1)[keep], (ids + ids @ noise).flatten(0, 1)[keep]
    states = found["last_hidden_state"]
    assert states.samples == int(mask.sum()) and states.divergence is None
    twin = (f - g).square().sum() / (f - f.mean(0)).square().sum()
    assert states.relative_error == pytest.approx(float(twin), rel=1e-10)
    assert states.cosine == pytest.approx(float(functional.cosine_similarity(f, g).mean()), rel=1e-10)
    p, q = (f @ head).log_softmax(1), (g @ head).log_softmax(1)
    twin = functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert found["logits"].divergence == pytest.approx(float(twin), rel=1e-10)
    assert found["logits"].agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    # Those of an answer's start choose among the tokens that count.
    one, two = (item.sum(-1).masked_fill(mask == 0, -1e30) for item in (ids, ids + ids @ noise))
    twin = functional.kl_div(two.log_softmax(1), one.log_softmax(1), reduction="batchmean", log_target=True)
    assert found["start_logits"].divergence == pytest.approx(float(twin), rel=1e-10)


def test_maps_are_compared_position_by_position_and_classes_are_told_by_the_target() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 2, 2).double(), torch.zeros(3, 2, 2, dtype=torch.long)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    for batch, loss in ((x, None), ((x, y), "KL")):
        found = compared(lambda x: x, lambda x: x.flip(1), batch)
        assert found.unit == (loss or "relative error")
        twin = functional.cosine_similarity(rows, rows.flip(1)).mean()
        assert found.outputs[0].cosine == pytest.approx(float(twin))
        assert found.outputs[0].samples == 12 and found.examples == 3
    twin = functional.kl_div(
        rows.flip(1).log_softmax(1), rows.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found.loss == pytest.approx(float(twin))
    # A target of floating numbers: no classes.
    assert compared(lambda x: x, lambda x: x, (x[:, :, 0, 0], torch.zeros(3))).unit == "relative error"


def test_the_worst_output_is_named_and_a_file_gives_the_same_back() -> None:
    x = torch.randn(6, 4)
    found = compared(lambda x: (x, [x, {"deep": x}]), lambda x: (x, [x, {"deep": x * 2}]), x)
    assert found.worst.name == "1.1.deep" and "(1.1.deep)" in str(found)
    broken = compared(lambda x: x, lambda x: x / 0, x)
    assert broken.loss == math.inf and "KL inf" in str(broken)
    for item in (found, broken):
        assert Fidelity.from_dict(json.loads(json.dumps(item.to_dict(), allow_nan=False))) == item


def test_what_cannot_be_compared_is_said() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(DataError, match="without a floating tensor"):
        compared(lambda x: x.long(), lambda x: x.long(), x)
    with pytest.raises(DataError, match=r"'h' is \(4, 3\) in the dense network, \(4, 2\) in the other"):
        compared(lambda x: {"h": x}, lambda x: {"h": x[:, :2]}, x)
    with pytest.raises(DataError, match="'h' is given by one of the two alone"):
        compared(lambda x: {"h": x, "g": x}, lambda x: {"g": x}, x)
    with pytest.raises(SignalError, match="'h' of the dense network holds NaN"):
        compared(lambda x: {"h": x / 0}, lambda x: {"h": x}, x)
    with pytest.raises(DataError, match=r"'output' is .* apart in two runs .* in evaluation mode"):
        compared(torch.rand_like, lambda x: x, x)
    with pytest.raises(DataError, match="the batches are empty"):
        compared(lambda x: x, lambda x: x)
    with pytest.raises(DataError, match="3 features in one batch, 2 in another"):
        compared(lambda x: x, lambda x: x, x, x[:, :2])
    # What both rule out is no distance.
    barred = torch.tensor([0.0, -math.inf, 0.0])
    found = compared(lambda x: x + barred, lambda x: x * 0 + barred, x.double())
    p = x[:, ::2].double().log_softmax(1)
    assert found.loss == pytest.approx(float((p.exp() * (p + math.log(2))).sum(1).mean()))
    # A cut measures what is left to compare.
    wide, narrow = Given(lambda x: {"h": x, "g": x}), Given(lambda x: {"h": x[:, :2], "g": x})
    some = comparable(wide, narrow, [x])
    assert some is not None and [item.name for item in some.outputs] == ["g"]
    assert comparable(Given(lambda x: x), Given(lambda x: x[:, :2]), [x]) is None


def test_examples_are_held_out_spread_and_those_left_are_the_others() -> None:
    assert [hold_out_every(count) for count in (2, 3, 10, 64, 128, 320, 1024)] == [2, 2, 2, 2, 4, 10, 10]
    for count, examples, batch in ((1024, 2000, 32), (130, 128, 7), (10, 10, 1), (3, 9, 2)):
        x = torch.arange(count)[:, None].float()
        batches = [(part, part[:, 0].long()) for part in x.split(batch)]
        used = min(count, examples)
        every = hold_out_every(used)
        held, fit = held_batches(batches, examples), list(fit_batches(batches, examples))
        for kind, expected in (
            (held, [i for i in range(used) if i % every == every - 1]),
            (fit, [i for i in range(used) if i % every != every - 1]),
        ):
            inputs, targets = torch.cat([item[0] for item in kind]), torch.cat([item[1] for item in kind])
            assert inputs[:, 0].tolist() == targets.tolist() == expected
        assert len(held) <= max(1, -(-len(expected) // batch)) and all(len(item[0]) <= batch for item in held)
    for few, said in (([torch.ones(1, 2)], "one calibration example"), ([], "no calibration examples")):
        with pytest.raises(DataError, match=said):
            held_batches(few, 100)
    # Masks that are all alike are joined too; texts of other lengths are not.
    texts = [{"x": torch.zeros(8, n, 2), "attention_mask": torch.ones(8, n)} for n in (3, 3, 4)]
    assert [item["x"].shape[:2] for item in held_batches(texts, 24)] == [(8, 3), (4, 4)]
    assert rows_of({"x": torch.arange(4), "scale": torch.ones(2)}, [1, 3])["x"].tolist() == [1, 3]


class Lazy(nn.Module):
    """Installs its hooks when it first runs, and notes that it has, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 3), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "installed", False):
            self.inner.register_forward_hook(lambda _module, _given, out: self.seen.append(out))
            self.installed = True
        self.seen.clear()
        self.inner(x)
        return torch.stack(self.seen).sum(0)


def test_hooks_that_a_first_run_installs_are_not_installed_twice() -> None:
    """The note was taken back and the hooks were not: from then on the network gave something else."""
    net, x = Lazy(), torch.randn(2, 4)
    expected = net.inner(x)
    fidelity(net, net, [x])
    assert torch.equal(net(x), expected) and len(net.inner._forward_hooks) == 1
