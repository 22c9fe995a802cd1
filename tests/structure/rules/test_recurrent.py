"""Recurrent layers: hidden units are found with their gate rows, cut exactly, and said again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from cria_prune import PruneConfig, discover, load, prune, save
from cria_prune.planning.budget import largest_reachable
from cria_prune.planning.plan import make_plan
from cria_prune.structure.groups import UnitGroups, without_residual
from cria_prune.surgery.removal import apply

DICE = torch.Generator().manual_seed(0)
WORDS = torch.randint(1, 30, (3, 6), generator=DICE)
WORDS[1, 4:], WORDS[2, 2:] = 0, 0  # 0 is padding
VECTORS = torch.randn(3, 6, 5, generator=DICE)


class Tagger(nn.Module):
    """Words, some recurrent layers, a label for each word."""

    def __init__(
        self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 2, both: bool = True, **more: Any
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 10, padding_idx=0)
        self.layer = kind(10, 12, layers, bidirectional=both, **more)
        self.head = nn.Linear((self.layer.proj_size or 12) * (2 if both else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        if not self.layer.batch_first:
            return self.head(self.layer(x.transpose(0, 1))[0]).transpose(0, 1)
        return self.head(self.layer(x)[0])


class Packed(Tagger):
    """Padded words are left out; the rows between are normalised."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.norm = nn.LayerNorm(self.head.in_features)

    def forward(self, x: Tensor) -> Tensor:
        lengths, first = (x != 0).sum(1).cpu(), self.layer.batch_first
        data = self.words(x) if first else self.words(x).transpose(0, 1)
        found, _ = self.layer(pack_padded_sequence(data, lengths, first, enforce_sorted=False))
        rows = PackedSequence(self.norm(found.data), *found[1:])
        padded, _ = pad_packed_sequence(rows, batch_first=first)
        return self.head(padded if first else padded.transpose(0, 1))


class Reader(nn.Module):
    """A CRNN: convolutions, whose columns are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)
        self.layer, self.head = nn.LSTM(8 * 3, 12, 2, bidirectional=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(F.relu(self.norm(self.one(x[:, None]))))
        batch, channels, height, steps = x.transpose(2, 3).shape
        return self.head(
            self.layer(x.transpose(2, 3).reshape(batch, channels * height, steps).permute(2, 0, 1))[0]
        )


class Normed(nn.Module):
    """An LSTM into a layer norm into a GRU, the last states of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.LSTM(5, 12, batch_first=True), nn.LayerNorm(12)
        self.two, self.head = nn.GRU(12, 10, 2, bidirectional=True, batch_first=True), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.two(self.norm(self.one(x)[0]))
        return self.head(torch.cat([last[-2], last[-1]], dim=1))


class Loop(nn.Module):
    """Two cells in a loop by hand, with states of zeros as wide as an attribute says."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.width, self.pair = 12, kind is nn.LSTMCell
        self.one, self.two, self.head = kind(5, 12), kind(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(len(x), self.width)
        one = two = (zeros, zeros) if self.pair else zeros
        for step in x.unbind(1):
            one = self.one(step, one)
            two = self.two(one[0] if self.pair else one, two)
        return self.head(two[0] if self.pair else two)


class Translator(nn.Module):
    """An encoder whose last state begins a decoder that reads what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(30, 10), nn.GRU(10, 12, batch_first=True)
        self.written, self.decoder, self.head = nn.Embedding(30, 8), nn.GRUCell(8, 12), nn.Linear(12, 30)

    def forward(self, x: Tensor) -> Tensor:
        state, word, found = self.encoder(self.words(x))[1][-1], x[:, 0], []
        for _ in range(3):
            state = self.decoder(self.written(word), state)
            found.append(self.head(state))
            word = found[-1].argmax(1)
        return torch.stack(found, dim=1)


class Language(nn.Module):
    """A language model with a learned first state, whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.down = nn.Embedding(30, 8), nn.LSTM(8, 12, 2), nn.Linear(12, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.words.weight
        self.first = nn.ParameterList(torch.zeros(2, 1, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states = [item.expand(-1, len(x), -1).contiguous() for item in self.first]
        return self.head(self.down(self.layer(self.words(x.t()), states)[0]))


NETWORKS: dict[str, Any] = {
    "LSTM tagger": lambda: Tagger(batch_first=True),
    "GRU without biases, steps first": lambda: Tagger(nn.GRU, bias=False),
    "one direction": lambda: Tagger(nn.RNN, 1, False, nonlinearity="relu"),
    "projected": lambda: Tagger(proj_size=5),
    "packed": lambda: Packed(batch_first=True),
    "packed, steps first": lambda: Packed(kind=nn.GRU),
    "CRNN": Reader,
    "normed": Normed,
    "LSTM cells": lambda: Loop(nn.LSTMCell),
    "GRU cells": lambda: Loop(nn.GRUCell),
    "plain cells": lambda: Loop(nn.RNNCell),
    "translator": Translator,
    "language model": Language,
}


def filled(model: nn.Module) -> nn.Module:
    """Give every weight values that are there once, so that a value tells where it came from."""
    with torch.no_grad():
        for tensor in model.parameters():
            order = torch.randperm(tensor.numel(), generator=DICE).view(tensor.shape)
            tensor.copy_((order + 0.5) / tensor.numel() * 1.2 - 0.6)
    return model.eval()


def by_hand(dense: nn.Module, smaller: nn.Module) -> nn.Module:
    """Zero all values of matrices that are gone; a layer norm is taken over the units that stay."""
    left, twin = dict(smaller.named_parameters()), copy.deepcopy(dense)
    for name, tensor in twin.named_parameters():
        if tensor.ndim > 1 and tensor.shape != left[name].shape:
            tensor.data *= torch.isin(tensor, left[name])
    for name, module in twin.named_modules():
        if isinstance(module, nn.LayerNorm):
            stays = torch.isin(module.weight.detach(), left[f"{name}.weight"])

            def normed(x: Tensor, module: nn.LayerNorm = module, stays: Tensor = stays) -> Tensor:
                kept = F.layer_norm(
                    x[..., stays], (int(stays.sum()),), module.weight[stays], module.bias[stays]
                )
                return x.new_zeros(x.shape).index_copy(-1, stays.nonzero()[:, 0], kept)

            module.forward = normed  # type: ignore[method-assign]
    return twin


def cut(model: nn.Module, groups: UnitGroups, seed: int) -> nn.Module:
    dice = np.random.default_rng(seed)
    kept = {group.name: dice.permutation(group.size)[: max(1, group.size // 2)] for group in groups.prunable}
    return apply(model, make_plan(groups, kept))


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_units_are_cut_exactly(name: str) -> None:
    model = filled(NETWORKS[name]()).double()
    example = WORDS if hasattr(model, "words") else VECTORS.double()
    groups = discover(model, example)
    assert largest_reachable(without_residual(groups), 0.05, "parameters") > 0.7
    smaller = cut(model, groups, 0)
    other = torch.cat([example, example.flip(0)[:1]])  # another number of examples
    for mode in (False, True):
        expected, found = (item.train(mode)(other) for item in (by_hand(model, smaller), smaller))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    found.sum().backward()
    assert smaller.head.weight.grad is not None


def test_what_leaves_with_a_hidden_unit() -> None:
    model = Tagger(batch_first=True).eval()
    groups = discover(model, WORDS)
    group = groups["layer"]
    assert (group.kind, group.size) == ("neuron", 12)
    slices = {(item.tensor, item.dim): item.positions[1].tolist() for item in group.slices}
    gates = [1, 13, 25, 37]
    for end in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for name in (f"weight_ih_{end}", f"weight_hh_{end}", f"bias_ih_{end}", f"bias_hh_{end}"):
            assert slices.pop((f"layer.{name}", 0)) == gates
        assert slices.pop((f"layer.weight_hh_{end}", 1)) == [1]
    readers = [("layer.weight_ih_l1", 1), ("layer.weight_ih_l1_reverse", 1), ("head.weight", 1)]
    assert slices == {key: [1, 13] for key in readers}
    rows = 2 * 48  # of both directions
    assert f"{6 * (rows * (10 + 12) + rows * (24 + 12) + 4 * 24):,} MACs" in str(groups)


def test_the_layer_says_its_sizes() -> None:
    model = Tagger(proj_size=5).eval()
    groups = discover(model, WORDS)
    assert groups["layer"].frozen == "has to stay larger than the projection in lstm in layer"
    layer = apply(model, make_plan(groups, {"layer#2": [1, 4], "words": range(7)})).layer
    assert (layer.input_size, layer.hidden_size, layer.proj_size) == (7, 12, 2)
    again = nn.LSTM(7, 12, 2, bidirectional=True, proj_size=2)
    again.load_state_dict(layer.state_dict())
    data = torch.randn(4, 3, 7)
    assert torch.equal(again(data)[0], layer(data)[0])
    cell = apply(Loop(nn.GRUCell), make_plan(discover(Loop(nn.GRUCell), VECTORS), {"one": range(3)})).two
    assert (cell.input_size, cell.hidden_size) == (3, 3)


def test_a_state_that_is_given_keeps_its_width() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(5, 12, batch_first=True), nn.Linear(12, 4)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return self.head(self.layer(x, state[None])[0])

    groups = discover(Given(), {"x": VECTORS, "state": torch.zeros(3, 12)})
    said = (
        "begins with a state of a fixed width in gru in layer: let the forward make it, as wide as the layer"
    )
    assert groups["layer"].frozen == f"{said} says"


@pytest.mark.parametrize(("kind", "repair"), [(Packed, "walk"), (Tagger, "once")])
def test_a_network_is_pruned_saved_and_pruned_again(kind: Any, repair: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = kind(batch_first=True)
    batches = [torch.cat([WORDS[:1], words]) for words in torch.randint(1, 30, (4, 9, 6))]
    config = PruneConfig(plan={"reduction": 0.4}, repair=repair)
    result = prune(dense, batches, config)
    sizes = [sum(item.numel() for item in model.parameters()) for model in (dense, result.model)]
    assert sizes[1] < 0.62 * sizes[0]
    # The walk refits what one operation reads, and the weights of a layer are in one with its steps.
    last = result.rounds[-1]
    repaired = "layer.weight_hh_l0" in {item.tensor for item in last.repairs}
    why = last.unrepaired.get("layer.weight_hh_l0", "")
    assert (repaired, "inside a recurrent layer" in why) == (repair == "once", repair == "walk")
    save(tmp_path / "pruned", result.model, result.plan)
    again = load(tmp_path / "pruned", kind(batch_first=True)).model
    torch.testing.assert_close(again.eval()(WORDS), result.model.eval()(WORDS))
    config = PruneConfig(plan={"reduction": 0.4}, repair="none")
    assert prune(again, batches, config).model.layer.hidden_size < again.layer.hidden_size
