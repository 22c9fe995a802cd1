"""Further blocks: stacked experts, computed weights, widths from the input, two ways without a skip.

Registered as kinds of their own (`further image`, `further sequence`), which only seeds from
`generator.FURTHER` on draw beside the usual blocks: the networks of all other seeds stay what they were.
"""

from __future__ import annotations

import generator_recurrent  # noqa: F401 - registers its blocks
from generator import Draw, Value, block
from generator_sequence import added, linear


@block("further sequence", 3)
def stacked(draw: Draw, x: Value) -> Value:
    """Experts in parameters of three dimensions, mixed by their shares, all of them or the best."""
    count, inner = draw.pick(2, 3, 4), draw.width()
    scores = draw.let(f"{linear(draw, x.width, count, 'stacked_gate')}({x.name})")
    if draw.chance(0.5):
        best = draw.let(f"{scores}.topk({count - 1}, -1).indices")
        mask = draw.let(f"torch.zeros_like({scores}).scatter(-1, {best}, 1.0)")
        scores = draw.let(f"{scores}.masked_fill({mask} == 0, -1e4)")
    shares = draw.let(f"F.softmax({scores}, -1)")
    up, down = (
        draw.parameter("stacked", count, x.width, inner),
        draw.parameter("stacked", count, inner, x.width),
    )
    if draw.chance(0.5):
        middle = draw.let(draw.activation(draw.let(f"torch.einsum('bti,eih->bteh', {x.name}, {up})")))
        out = draw.let(f"torch.einsum('bteh,eho,bte->bto', {middle}, {down}, {shares})")
    else:
        flat = draw.let(f"{x.name}.flatten(0, 1).unsqueeze(0).expand({count}, -1, -1)")
        middle = draw.let(draw.activation(draw.let(f"torch.bmm({flat}, {up})")))
        each = draw.let(f"torch.bmm({middle}, {down})")
        weighed = draw.let(f"({each} * {shares}.flatten(0, 1).t().unsqueeze(-1)).sum(0)")
        out = draw.let(f"{weighed}.view_as({x.name})")
    return added(draw, x, out)


@block("further sequence", 3)
def computed(draw: Draw, x: Value) -> Value:
    """A linear whose weight is a view, a product or a norm of parameters."""
    out = draw.width()
    form = draw.pick(
        "transposed", "scaled", "squeezed", "joined", "sliced", "weight norm", "spectral norm", "rows"
    )
    if form in ("weight norm", "spectral norm"):
        name = f"nn.utils.parametrizations.{form.replace(' ', '_')}(nn.Linear({x.width}, {out}))"
        return Value(draw.let(f"{draw.attribute('computed', name)}({x.name})"), out, x.space)
    if form == "transposed":
        weight = f"{draw.parameter('computed', x.width, out)}.t()"
    elif form == "scaled":
        weight = f"{draw.parameter('computed', out, x.width)} * {draw.parameter('computed', out, 1)}"
    elif form == "squeezed":
        weight = f"{draw.parameter('computed', out, 1, x.width)}.squeeze(1)"
    elif form == "sliced":
        weight = f"{draw.parameter('computed', out + 3, x.width)}[:{out}]"
    elif form == "rows":
        raw = draw.parameter("computed", out, x.width)
        weight = f"{raw} / {raw}.norm(dim=1, keepdim=True)"
    else:
        half = out // 2
        parts = [draw.parameter("computed", size, x.width) for size in (half, out - half)]
        weight = f"torch.cat([{', '.join(parts)}])"
    return Value(draw.let(f"F.linear({x.name}, {draw.let(weight)})"), out, x.space)


@block("further sequence", 3)
def divided(draw: Draw, x: Value) -> Value | None:
    """Attention whose heads have the width of the input over their number, as the code works it out."""
    heads = draw.divisor(x.width)
    if heads == 1 or heads == x.width:
        return None
    number = draw.attribute("heads", heads)
    layer, back = linear(draw, x.width, 3 * x.width, "divided"), linear(draw, x.width, x.width, "divided")
    b, t, c = draw.lets(3, f"{x.name}.shape")
    if draw.chance(0.5):
        form = f"{layer}({x.name}).reshape({b}, {t}, 3, {number}, {c} // {number}).permute(2, 0, 3, 1, 4)"
        q, k, v = draw.lets(3, draw.let(form))
    else:
        three = draw.lets(3, f"{layer}({x.name}).split({c}, -1)")
        q, k, v = (
            draw.let(f"{item}.view({b}, {t}, {number}, {c} // {number}).transpose(1, 2)") for item in three
        )
    y = draw.let(f"F.scaled_dot_product_attention({q}, {k}, {v})")
    return added(draw, x, draw.let(f"{back}({y}.transpose(1, 2).reshape({b}, {t}, {c}))"))


@block("further sequence", 2)
def two_ways(draw: Draw, x: Value) -> Value:
    """Two branches that are added, neither of which goes around the other."""
    out, low = draw.width(), draw.pick(2, 3, 4)
    dense = linear(draw, x.width, out, "two_ways")
    down, up = linear(draw, x.width, low, "two_ways"), linear(draw, low, out, "two_ways")
    return Value(draw.let(draw.activation(f"({dense}({x.name}) + {up}({down}({x.name})))")), out, x.space)


@block("further image", 3)
def branches(draw: Draw, x: Value) -> Value | None:
    """RepVGG in training form: a wide and a pointwise convolution with norms, added, of another width."""
    if len(x.space) != 2:
        return None
    out, more = draw.width(), ", padding=1"
    wide = draw.attribute("branches", f"nn.Conv2d({x.width}, {out}, 3{more})")
    point = draw.attribute("branches", f"nn.Conv2d({x.width}, {out}, 1)")
    norms = [draw.attribute("branches_norm", f"nn.BatchNorm2d({out})") for _ in range(2)]
    total = f"({norms[0]}({wide}({x.name})) + {norms[1]}({point}({x.name})))"
    return Value(draw.let(draw.activation(total)), out, x.space)


@block("further image", 2)
def standardised(draw: Draw, x: Value) -> Value | None:
    """A convolution whose weight has mean 0 and variance 1 for every output."""
    if len(x.space) != 2:
        return None
    out = draw.width()
    raw = draw.parameter("standardised", out, x.width, 3, 3)
    centred = draw.let(f"{raw} - {raw}.mean((1, 2, 3), keepdim=True)")
    weight = draw.let(f"{centred} / ({centred}.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()")
    return Value(draw.let(f"F.conv2d({x.name}, {weight}, padding=1)"), out, x.space)


@block("further image", 2)
def reordered(draw: Draw, x: Value) -> Value:
    """Channels in a fixed other order."""
    form = draw.pick(
        "{0}.flip(1)", f"{{0}}.roll({draw.pick(1, 2)}, 1)", "{0}[:, " + str(list(range(x.width))[::-1]) + "]"
    )
    return Value(draw.let(form.format(x.name)), x.width, x.space)
