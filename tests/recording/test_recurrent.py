"""The signals inside recurrent layers, against the same steps run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from cria_prune import PruneConfig, prune
from cria_prune.base.errors import CriterionError
from cria_prune.recording.taps import Taps

LENGTHS = (5, 3, 3, 1)  # of packed sequences, of four examples and five steps


def steps(layer: Any, end: str, data: Tensor, length: int, back: bool) -> dict[str, Tensor]:
    """Run one example (T, features) through one layer and direction by the textbook; all signals by step."""
    names = [f"{name}_{end}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    one, other, first, second = (getattr(layer, name) for name in names)
    state, memory = (torch.zeros(layer.hidden_size, dtype=data.dtype) for _ in range(2))
    before, gates, states = (torch.zeros(len(data), size) for size in (len(state), len(first), len(state)))
    for place in range(length)[:: -1 if back else 1]:
        before[place], x = state, one @ data[place] + first
        gates[place] = x + other @ state + second
        if isinstance(layer, nn.LSTM):
            i, f, g, o = gates[place].chunk(4)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
        elif isinstance(layer, nn.GRU):
            r, z, n = x.chunk(3)
            u, v, w = (other @ state + second).chunk(3)
            n, z = torch.tanh(n + (r + u).sigmoid() * w), (z + v).sigmoid()
            state = (1 - z) * n + z * state
        else:
            state = gates[place].tanh()
        states[place] = state
    return {names[0]: gates, names[1]: before, "states": states}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_signals_are_those_of_the_steps(kind: Any, packed: bool) -> None:
    torch.manual_seed(0)
    first = kind is nn.GRU  # one of the two layouts
    layer = kind(3, 4, 2, bidirectional=True, batch_first=first).double()
    data, lengths = torch.randn(4, 5, 3).double(), LENGTHS if packed else (5,) * 4
    torch.set_default_dtype(torch.float64)
    try:
        sequence, expected = list(data), dict[tuple[str, str], list[Tensor]]()
        for number in range(2):
            given: list[list[Tensor]] = [[] for _ in data]
            for back, end in enumerate((f"l{number}", f"l{number}_reverse")):
                for example, (row, length) in enumerate(zip(sequence, lengths, strict=True)):
                    found = steps(layer, end, row, length, bool(back))
                    given[example].append(found.pop("states"))
                    for name, value in found.items():
                        site = "output" if name.startswith("weight_ih") else "input"
                        expected.setdefault((name, site), []).append(value)
                    expected.setdefault((f"weight_ih_{end}", "input"), []).append(row)
            sequence = [torch.cat(parts, dim=1) for parts in given]
    finally:
        torch.set_default_dtype(torch.float32)
    seen = dict[tuple[str, str], Tensor]()
    given_data = data if first else data.transpose(0, 1)
    fed: Any = pack_padded_sequence(given_data, torch.tensor(lengths), first) if packed else given_data
    with Taps(layer, expected, lambda name, site, value: seen.update({(name, site): value.clone()})):
        outputs = layer(fed)[0]
    for key, rows in expected.items():
        whole = torch.stack(rows)
        if packed:
            whole = pack_padded_sequence(whole, torch.tensor(lengths), batch_first=True).data
        torch.testing.assert_close(seen[key], whole, rtol=1e-10, atol=1e-12)
    last = torch.stack(sequence)
    made = outputs.data if packed else outputs if first else outputs.transpose(0, 1)
    whole = pack_padded_sequence(last, torch.tensor(lengths), batch_first=True).data if packed else last
    torch.testing.assert_close(made, whole, rtol=1e-10, atol=1e-12)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(len(x), self.cell.hidden_size),) * 2
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


def test_a_cell_is_read_at_every_step() -> None:
    model, data = Cell(), torch.randn(6, 5, 3)
    wanted = [("cell.weight_ih", "input"), ("cell.weight_ih", "output"), ("cell.weight_hh", "input")]
    seen: dict[tuple[str, str], list[Tensor]] = {key: [] for key in wanted}
    with Taps(model, wanted, lambda name, site, value: seen[name, site].append(value)):
        model(data)
    assert torch.equal(torch.stack(seen[wanted[0]], dim=1), data)
    cell, state = model.cell, seen[wanted[2]]
    assert not state[0].any() and len(state) == 5
    gates = functional.linear(data[:, 4], cell.weight_ih, cell.bias_ih) + state[4] @ cell.weight_hh.T
    torch.testing.assert_close(seen[wanted[1]][4], gates + cell.bias_hh)


def test_gradients_of_single_examples_are_refused() -> None:
    batches = [(torch.randn(8, 5, 3), torch.randint(2, (8,)))]
    with pytest.raises(CriterionError, match=r"'cell\.weight_ih'.*inside one operation.*Use 'taylor'"):
        prune(Cell(), batches, PruneConfig(plan={"reduction": 0.2}, score={"criterion": "fisher"}))
