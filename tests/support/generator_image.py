"""Blocks over images (batch, channels, *space) of one to three spatial dimensions, and image networks."""

from __future__ import annotations

import math

from generator import Draw, Value, block
from generator_sequence import heads, tokens_to_image


def ones(x: Value) -> str:
    """The trailing sizes of a parameter that is broadcast over space."""
    return ", 1" * len(x.space)


def convolution(draw: Draw, x: Value, out: int, kernel: int = 3, name: str = "conv", more: str = "") -> str:
    bias = draw.pick("", "", ", bias=False")
    padding = f", padding={kernel // 2}" if kernel > 1 else ""
    layer = f"nn.Conv{len(x.space)}d({x.width}, {out}, {kernel}{padding}{more}{bias})"
    return draw.attribute(name, layer)


@block("image", 5)
def conv(draw: Draw, x: Value) -> Value:
    out, stride = draw.width(), draw.pick(1, 1, 1, 2) if min(x.space) > 3 else 1
    layer = convolution(draw, x, out, draw.pick(1, 3), more=f", stride={stride}" if stride > 1 else "")
    return Value(draw.let(f"{layer}({x.name})"), out, tuple((size - 1) // stride + 1 for size in x.space))


@block("image", 2)
def grouped(draw: Draw, x: Value) -> Value | None:
    groups = draw.divisor(x.width)
    if groups == 1:
        return None
    out = groups * draw.pick(1, 2, 3)
    layer = convolution(draw, x, out, draw.pick(1, 3), "grouped", f", groups={groups}")
    return Value(draw.let(f"{layer}({x.name})"), out, x.space)


@block("image", 2)
def depthwise(draw: Draw, x: Value) -> Value:
    out = x.width * draw.pick(1, 1, 2)
    layer = convolution(draw, x, out, 3, "depthwise", f", groups={x.width}")
    return Value(draw.let(f"{layer}({x.name})"), out, x.space)


@block("image", 2)
def transposed(draw: Draw, x: Value) -> Value:
    out, groups = draw.width(), 1
    if draw.chance(0.3):
        groups = draw.pick(draw.divisor(x.width), x.width)
        out = groups * draw.pick(1, 2)
    grow = draw.chance(0.3) and max(x.space) <= 4
    how = "2, stride=2" if grow else "3, padding=1"
    layer = f"nn.ConvTranspose{len(x.space)}d({x.width}, {out}, {how}, groups={groups})"
    space = tuple(size * 2 for size in x.space) if grow else x.space
    return Value(draw.let(f"{draw.attribute('transposed', layer)}({x.name})"), out, space)


@block("image", 4)
def norm(draw: Draw, x: Value) -> Value:
    dims = len(x.space)
    forms = {
        "batch": f"nn.BatchNorm{dims}d({x.width})",
        "plain batch": f"nn.BatchNorm{dims}d({x.width}, affine=False)",
        "group": f"nn.GroupNorm({draw.divisor(x.width)}, {x.width})",
        "one group": f"nn.GroupNorm(1, {x.width})",
        "own group": f"nn.GroupNorm({x.width}, {x.width})",
        "instance": f"nn.InstanceNorm{dims}d({x.width}, affine={draw.chance(0.5)})",
        "layer": f"nn.LayerNorm([{x.width}, {', '.join(map(str, x.space))}])",
    }
    kind = draw.pick("batch", "batch", "batch", *forms)
    return Value(draw.let(f"{draw.attribute('norm', forms[kind])}({x.name})"), x.width, x.space)


@block("image", 3)
def activation(draw: Draw, x: Value) -> Value:
    expression = draw.activation(x.name)
    if draw.chance(0.2):
        layer = draw.pick(f"nn.PReLU({x.width})", "nn.PReLU()", "nn.ReLU(inplace=True)", "nn.Softplus()")
        expression = f"{draw.attribute('act', layer)}({x.name})"
    return Value(draw.let(expression), x.width, x.space)


@block("image", 4)
def residual(draw: Draw, x: Value) -> Value:
    inner = draw.width()
    first = convolution(draw, x, inner, draw.pick(1, 3), "residual")
    body = draw.let(draw.activation(draw.let(f"{first}({x.name})")))
    if draw.chance(0.4):
        own = Value(body, inner, x.space)
        depth = convolution(draw, own, inner, 3, "residual", f", groups={inner}")
        norm = draw.attribute("residual_norm", f"nn.BatchNorm{len(x.space)}d({inner})")
        body = draw.let(draw.activation(f"{norm}({depth}({body}))"))
    last = convolution(draw, Value(body, inner, x.space), x.width, 1, "residual")
    return Value(draw.let(f"{x.name} + {last}({body})"), x.width, x.space)


def joined(draw: Draw, x: Value, same_width: bool) -> Value | None:
    fitting = [
        item
        for item in draw.values
        if item.space == x.space and item.name != x.name and (item.width == x.width or not same_width)
    ]
    return draw.pick(*fitting) if fitting else None


@block("image", 3)
def meet(draw: Draw, x: Value) -> Value | None:
    other = joined(draw, x, same_width=True)
    if other is None:
        return None
    form = draw.pick(
        "{0} + {1}",
        "{0} + {1}",
        "{0} - {1}",
        "{0} * torch.sigmoid({1})",
        "torch.maximum({0}, {1})",
        "torch.stack([{0}, {1}]).mean(0)",
        "{0}.add_({1})",
    )
    name = draw.let(f"{x.name} * 1.5") if "add_" in form else x.name
    return Value(draw.let(form.format(name, other.name)), x.width, x.space)


@block("image", 3)
def concatenated(draw: Draw, x: Value) -> Value | None:
    other = joined(draw, x, same_width=False)
    if other is None:
        return None
    parts = [other, x] if draw.chance(0.7) else [x, other, x]
    text = ", ".join(item.name for item in parts)
    return Value(draw.let(f"torch.cat([{text}], 1)"), sum(item.width for item in parts), x.space)


@block("image", 2)
def broadcast(draw: Draw, x: Value) -> Value:
    dims = ", ".join(str(dim + 2) for dim in range(len(x.space)))
    if draw.chance(0.4):
        layer = convolution(draw, x, draw.pick(1, x.width), 1, "broadcast")
        form = draw.pick(
            "{x} * torch.sigmoid({layer}({x}))", "{x} + {layer}({x}).mean(({dims}), keepdim=True)"
        )
    else:
        form = draw.pick(
            "{x} - {x}.mean(({dims}), keepdim=True)",
            "{x} / (1 + {x}.abs().amax(2, keepdim=True))",
            "{x} * F.softmax({x}.flatten(2), -1).view_as({x})",
            "{x} + {x}.flatten(2).mean(-1)[(...,) + (None,) * {count}]",
        )
        layer = ""
    text = form.format(x=x.name, layer=layer, dims=dims, count=len(x.space))
    return Value(draw.let(text), x.width, x.space)


def halves(x: Value) -> tuple[str, str]:
    """The bounds of two halves of the channels, read from the shape."""
    return f": {x.name}.shape[1] // 2", f"{x.name}.shape[1] // 2 :"


@block("image", 3)
def parts(draw: Draw, x: Value) -> Value | None:
    if x.width % 2:
        return None
    call = draw.pick("chunk(2, 1)", "chunk(2, dim=1)", f"split({x.width // 2}, 1)", "tensor_split(2, 1)")
    if draw.chance(0.25):
        first, second = (draw.let(f"{x.name}[:, {part}]") for part in halves(x))
    else:
        first, second = draw.lets(2, f"{x.name}.{call}")
    form = draw.pick("torch.cat([{1}, {0}], 1)", "{0} * torch.sigmoid({1})", "torch.maximum({0}, {1})",
                     "torch.cat([{0}, F.relu({1})], 1)", "{0} + {1}")  # fmt: skip
    width = x.width if "cat" in form else x.width // 2
    return Value(draw.let(form.format(first, second)), width, x.space)


@block("image", 2)
def unequal(draw: Draw, x: Value) -> Value:
    left = draw.pick(*range(1, x.width))
    if draw.chance(0.5):
        first, second = draw.lets(2, f"{x.name}.split([{left}, {x.width - left}], dim=1)")
    else:
        first, second = draw.let(f"{x.name}[:, :{left}]"), draw.let(f"{x.name}[:, {left}:]")
    if draw.chance(0.5):
        own = Value(second, x.width - left, x.space)
        second = draw.let(draw.activation(f"{convolution(draw, own, own.width, 3, 'unequal')}({second})"))
    return Value(draw.let(f"torch.cat([{first}, {second}], 1)"), x.width, x.space)


@block("image", 1)
def sliced(draw: Draw, x: Value) -> Value:
    if draw.chance(0.5):
        return Value(draw.let(f"{x.name}[:, ::2]"), (x.width + 1) // 2, x.space)
    left = draw.pick(*range(1, x.width))
    bound = draw.pick(f":{left}", f"-{left}:")
    return Value(draw.let(f"{x.name}[:, {bound}]"), left, x.space)


@block("image", 2)
def space(draw: Draw, x: Value) -> Value | None:
    if min(x.space) < 3:
        return None
    form = draw.pick(
        "{0}.flip(-1)",
        "torch.roll({0}, 1, -1)",
        "torch.roll({0}, (1, 2), (2, -1))",
        "F.pad({0}[..., 1:], (0, 1))",
        "F.pad({0}[..., 1:-1], (1, 1), value=0.5)",
        "torch.cat([{0}[..., -1:], {0}[..., :-1]], -1)",
        "{0}.transpose(2, -1)",
        "torch.cumsum({0}, -1) * 0.2",
        "{0}[..., [*range({1})[::-1]]]",
        "{0}.index_select(-1, torch.arange({1} - 1, -1, -1))",
    )
    return Value(draw.let(form.format(x.name, x.space[-1])), x.width, x.space)


@block("image", 2)
def pool(draw: Draw, x: Value) -> Value | None:
    dims = len(x.space)
    if min(x.space) >= 4:
        form = draw.pick("F.max_pool{1}d({0}, 2)", "F.avg_pool{1}d({0}, 2)", "F.max_pool{1}d({0}, 3, 2, 1)")
        return Value(
            draw.let(form.format(x.name, dims)),
            x.width,
            tuple((s + ("3" in form.split(",", 1)[1])) // 2 for s in x.space),
        )
    if max(x.space) > 4 or dims == 3:
        return None
    form = draw.pick("F.interpolate({0}, scale_factor=2)", "F.adaptive_avg_pool{1}d({0}, {2})",
                     "{0}.repeat_interleave(2, 2).repeat_interleave(2, -1)")  # fmt: skip
    if dims == 1 and "interleave" in form:
        return None
    size = tuple(2 * item for item in x.space)
    return Value(draw.let(form.format(x.name, dims, size)), x.width, size)


@block("image", 1)
def padded(draw: Draw, x: Value) -> Value:
    left, right = draw.pick(0, 1, 2), draw.pick(1, 2)
    widths = "0, " * 2 * len(x.space)
    return Value(draw.let(f"F.pad({x.name}, ({widths}{left}, {right}))"), x.width + left + right, x.space)


@block("image", 1)
def mixed(draw: Draw, x: Value) -> Value:
    form = draw.pick(
        "{0}.flip(1)",
        "torch.roll({0}, 1, 1)",
        "{0}[:, [*range({1})][::-1]]",
        "{0}.repeat(1, 2{2})",
        "{0}.repeat_interleave(2, 1)",
        "F.softmax({0}, 1)",
        "torch.cumsum({0}, 1)",
        "{0} / {0}.norm(dim=1, keepdim=True).clamp(min=0.1)",
    )
    width = 2 * x.width if "repeat" in form else x.width
    return Value(draw.let(form.format(x.name, x.width, ones(x))), width, x.space)


@block("image", 2)
def excite(draw: Draw, x: Value) -> Value:
    dims = ", ".join(str(dim + 2) for dim in range(len(x.space)))
    inner = draw.width()
    if draw.chance(0.5):
        down = draw.attribute("excite", f"nn.Linear({x.width}, {inner})")
        up = draw.attribute("excite", f"nn.Linear({inner}, {x.width})")
        scale = draw.let(f"torch.sigmoid({up}(F.relu({down}({x.name}.mean(({dims}))))))")
        scale = f"{scale}[(...,) + (None,) * {len(x.space)}]"
    else:
        down = convolution(draw, x, inner, 1, "excite")
        up = convolution(draw, Value("", inner, x.space), x.width, 1, "excite")
        scale = draw.let(f"torch.sigmoid({up}(F.relu({down}({x.name}.mean(({dims}), keepdim=True)))))")
    return Value(draw.let(f"{x.name} * {scale}"), x.width, x.space)


@block("image", 2)
def shuffle(draw: Draw, x: Value) -> Value | None:
    groups = draw.divisor(x.width)
    if groups == 1:
        return None
    spatial = ", ".join(f"{x.name}.shape[{dim + 2}]" for dim in range(len(x.space)))
    form = draw.pick(
        "{0}.view({0}.shape[0], {1}, {0}.shape[1] // {1}, {2}).transpose(1, 2).flatten(1, 2)",
        "{0}.view({0}.shape[0], {1}, -1, {2}).transpose(1, 2).reshape({0}.shape)",
        "{0}.unflatten(1, ({1}, -1)).transpose(1, 2).flatten(1, 2)",
        "{0}.unflatten(1, (-1, {1})).transpose(1, 2).flatten(1, 2)",
        "F.channel_shuffle({0}, {1})" if len(x.space) == 2 else "{0}.unflatten(1, (-1, {1})).amax(2)",
    )
    width = x.width // groups if "amax" in form else x.width
    return Value(draw.let(form.format(x.name, groups, spatial)), width, x.space)


@block("image", 1)
def pixels(draw: Draw, x: Value) -> Value | None:
    if len(x.space) != 2:
        return None
    if x.width % 4 == 0 and max(x.space) <= 4:
        return Value(draw.let(f"F.pixel_shuffle({x.name}, 2)"), x.width // 4, tuple(2 * s for s in x.space))
    if x.width <= 12 and not any(size % 2 for size in x.space):
        return Value(draw.let(f"F.pixel_unshuffle({x.name}, 2)"), x.width * 4, tuple(s // 2 for s in x.space))
    return None


@block("image", 2)
def outside(draw: Draw, x: Value) -> Value:
    sizes = [x.width, *[1] * len(x.space)]
    make = draw.pick(draw.parameter, draw.parameter, draw.buffer)
    if draw.chance(0.5):
        text = f"{x.name} {draw.pick('*', '+', '-')} {make('scale', *sizes)}"
    elif draw.chance(0.5):
        text = f"{x.name} * {make('scale', x.width)}[(...,) + (None,) * {len(x.space)}]"
    else:
        text = f"torch.einsum('bc...,cd->bd...', {x.name}, {draw.parameter('outside', x.width, x.width)})"
    return Value(draw.let(text), x.width, x.space)


@block("image", 2)
def shared(draw: Draw, x: Value) -> Value:
    layer = convolution(draw, x, x.width, draw.pick(1, 3), "shared")
    first = draw.let(draw.activation(f"{layer}({x.name})"))
    return Value(draw.let(f"{layer}({first}){draw.pick('', f' + {x.name}')}"), x.width, x.space)


@block("image", 2)
def last(draw: Draw, x: Value) -> Value:
    inner, count = draw.width(), len(x.space)
    forwards = ", ".join(str(dim) for dim in [0, *range(2, count + 2), 1])
    back = ", ".join(str(dim) for dim in [0, count + 1, *range(1, count + 1)])
    name = draw.let(f"{x.name}.permute({forwards})")
    if draw.chance(0.5):
        layer = draw.pick(f"nn.LayerNorm({x.width})", f"nn.RMSNorm({x.width})")
        name = draw.let(f"{draw.attribute('last_norm', layer)}({name})")
    up, down = (
        draw.attribute("last", f"nn.Linear({x.width}, {inner})"),
        draw.attribute("last", f"nn.Linear({inner}, {x.width})"),
    )
    name = draw.let(f"{down}({draw.activation(draw.let(f'{up}({name})'))})")
    return Value(draw.let(f"{name}.permute({back}){draw.pick('', f' + {x.name}')}"), x.width, x.space)


@block("image", 2)
def film(draw: Draw, x: Value) -> Value | None:
    if draw.condition is None:
        return None
    name, width = draw.condition
    layer = draw.attribute("film", f"nn.Linear({width}, {2 * x.width})")
    scale, shift = draw.lets(2, f"{layer}({name})[(...,) + (None,) * {len(x.space)}].chunk(2, 1)")
    return Value(draw.let(f"{x.name} * (1 + {scale}) + {shift}"), x.width, x.space)


@block("image", 2)
def tokens(draw: Draw, x: Value) -> Value:
    length = math.prod(x.space)
    form = draw.pick("{0}.flatten(2).transpose(1, 2)", "{0}.flatten(2).permute(0, 2, 1)",
                     "{0}.reshape({0}.shape[0], {0}.shape[1], -1).mT")  # fmt: skip
    own = Value(draw.let(form.format(x.name)), x.width, (length,))
    kept, draw.values = draw.values, [own]
    own = draw.step("sequence", own)
    draw.values = kept
    return tokens_to_image(draw, own, x) if own.space == (length,) else x


def image(draw: Draw) -> None:
    """Draw an image network: a stem, blocks, one or two heads."""
    dims = draw.pick(1, 2, 2, 2, 2, 3)
    side = {1: draw.pick(6, 8, 12), 2: draw.pick(4, 6, 8), 3: 4}[dims]
    channels = draw.pick(1, 3, 3, 4)
    draw.program.arguments = ("x",)
    draw.program.example = {"x": f"torch.randn(2, {', '.join(map(str, [channels, *[side] * dims]))})"}
    if draw.chance(0.3):
        width = draw.pick(3, 4, 8)
        draw.condition = ("condition", width)
        draw.program.arguments = ("x", "condition")
        draw.program.example["condition"] = f"torch.randn(2, {width})"
    x = conv(draw, Value("x", channels, (side,) * dims))
    draw.values.append(x)
    for _ in range(draw.pick(3, 4, 5, 6, 7)):
        x = draw.step("image", x)
    neck = draw.width()
    layer = convolution(draw, x, neck, 1, "neck")
    x = Value(draw.let(draw.activation(f"{layer}({x.name})")), neck, x.space)
    if draw.chance(0.2):
        flat = Value(draw.let(f"{x.name}.flatten(2).transpose(1, 2)"), x.width, (math.prod(x.space),))
        draw.program.returns = heads(draw, flat)
        return
    spatial = ", ".join(str(dim + 2) for dim in range(dims))
    form = draw.pick(
        "{0}.mean(({1}))",
        "{0}.amax(({1}))",
        "{0}.flatten(1)",
        "F.adaptive_avg_pool{2}d({0}, 1).flatten(1)",
        "F.adaptive_max_pool{2}d({0}, 2).flatten(1)",
    )
    size = {
        "{0}.flatten(1)": x.width * math.prod(x.space),
        "F.adaptive_max_pool{2}d({0}, 2).flatten(1)": x.width * 2**dims,
    }
    flat = draw.let(form.format(x.name, spatial, dims))
    layer = draw.attribute("head", f"nn.Linear({size.get(form, x.width)}, {draw.pick(3, 4, x.width)})")
    results = [draw.let(f"{layer}({flat})")]
    if draw.chance(0.15):
        results.append(draw.pick(*draw.values).name)
    draw.program.returns = tuple(results)
