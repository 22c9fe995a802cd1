"""Recurrent blocks over sequences (batch, time, width): layers, packed ones, cells and gates by hand."""

from __future__ import annotations

from generator import Draw, Value, block

PACKED = "nn.utils.rnn.pack_padded_sequence({0}, torch.tensor({1}), True, enforce_sorted=False)"


def joined(draw: Draw, x: Value, name: str, width: int) -> Value:
    """The states, sometimes added to what was read."""
    if width == x.width and draw.chance(0.3):
        name = draw.let(f"{x.name} + {name}")
    return Value(name, width, x.space)


@block("further sequence", 4)
def recurrent(draw: Draw, x: Value) -> Value:
    inner, layers, both = draw.width(), draw.pick(1, 1, 2), draw.chance(0.5)
    kind, length = draw.pick("LSTM", "LSTM", "GRU", "RNN"), x.space[0]
    form = draw.pick("plain", "plain", "time first", "packed", "last", "begun")
    projected = kind == "LSTM" and form != "begun" and inner > 4 and draw.chance(0.2)
    more = f", batch_first={form != 'time first'}" + draw.pick("", "", ", bias=False")
    more += f", proj_size={inner - 2}" if projected else ""
    layer = draw.attribute(
        "recurrent", f"nn.{kind}({x.width}, {inner}, {layers}, bidirectional={both}{more})"
    )
    width, directions = inner - 2 if projected else inner, 2 if both else 1
    if form == "last":
        last = draw.let(f"{layer}({x.name})[1]{'[0]' if kind == 'LSTM' else ''}")
        ends = ", ".join(f"{last}[{place - directions}]" for place in range(directions))
        wide = draw.let(f"torch.cat([{ends}], 1).unsqueeze(1)")
        out = draw.width()
        head = draw.attribute("head", f"nn.Linear({width * directions}, {out})")
        back = draw.attribute("back", f"nn.Linear({x.width}, {out})")
        return Value(draw.let(f"{back}({x.name}) + {head}({wide})"), out, x.space)
    if form == "time first":
        name = draw.let(f"{layer}({x.name}.transpose(0, 1))[0].transpose(0, 1)")
    elif form == "packed":
        lengths = f"([{length}, {max(1, length - 1)}] * {x.name}.shape[0])[:{x.name}.shape[0]]"
        packed = draw.let(PACKED.format(x.name, lengths))
        name = draw.let(f"nn.utils.rnn.pad_packed_sequence({layer}({packed})[0], True)[0]")
    elif form == "begun":
        first = draw.attribute("begins", f"nn.Linear({x.width}, {inner})")
        state = draw.let(f"{first}({x.name}.mean(1)).expand({layers * directions}, -1, -1).contiguous()")
        given = f"({state}, torch.tanh({state}))" if kind == "LSTM" else state
        name = draw.let(f"{layer}({x.name}, {given})[0]")
    else:
        name = draw.let(f"{layer}({x.name})[0]")
    return joined(draw, x, name, width * directions)


@block("further sequence", 3)
def cells(draw: Draw, x: Value) -> Value:
    inner, kind = draw.width(), draw.pick("LSTM", "GRU", "RNN", "hand", "cat")
    zeros = f"{x.name}.new_zeros({x.name}.shape[0], {{}})"
    steps = [f"{x.name}[:, {place}]" for place in range(x.space[0])]
    if kind in ("hand", "cat"):
        sizes = [(x.width + inner, inner)] if kind == "cat" else [(x.width, inner), (inner, inner)]
        layers = [draw.attribute("hand", f"nn.Linear({one}, {other})") for one, other in sizes]
        state = draw.let(zeros.format(inner))
        form = "{0}({2}) + {1}({3})" if kind == "hand" else "{0}(torch.cat([{2}, {3}], 1))"
    else:
        layers = [draw.attribute("cell", f"nn.{kind}Cell({x.width}, {inner})")]
        state = zeros.format(f"{layers[0]}.hidden_size")
        state = draw.let(f"({state}, {state})" if kind == "LSTM" else state)
        form = "{0}({2}, {3})"
    found = []
    for step in steps:
        text = form.format(layers[0], layers[-1], step, state)
        state = draw.let(text if kind in ("LSTM", "GRU", "RNN") else f"torch.tanh({text})")
        found.append(f"{state}[0]" if kind == "LSTM" else state)
    return joined(draw, x, draw.let(f"torch.stack([{', '.join(found)}], 1)"), inner)
