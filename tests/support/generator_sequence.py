"""Blocks over sequences (batch, time, width); sequence and token networks."""

from __future__ import annotations

from generator import Draw, Value, block
from generator_attention import attention

OWN_RMS = "{0} * torch.rsqrt({0}.pow(2).mean(-1, keepdim=True) + 1e-5)"


def linear(draw: Draw, width: int, out: int, name: str = "linear") -> str:
    return draw.attribute(name, f"nn.Linear({width}, {out}{draw.pick('', '', ', bias=False')})")


def normed(draw: Draw, x: Value) -> Value:
    form = draw.pick(
        "layer", "layer", "plain", "rms", "functional", "own", "own class", "batch", "group", "none"
    )
    if form == "none":
        return x
    if form in ("layer", "plain", "rms"):
        more = ", elementwise_affine=False" if form == "plain" else ""
        layer = draw.attribute("norm", f"nn.{'RMSNorm' if form == 'rms' else 'LayerNorm'}({x.width}{more})")
        text = f"{layer}({x.name})"
    elif form == "functional":
        text = f"F.rms_norm({x.name}, ({x.name}.shape[-1],), {draw.parameter('norm', x.width)})"
    elif form == "own":
        text = f"{OWN_RMS.format(x.name)} * {draw.parameter('norm', x.width)}"
    elif form == "own class":
        part = draw.part("OwnNorm", "x")
        weight = part.attribute("weight", f"nn.Parameter(torch.ones({x.width}))", number=False)
        return Value(
            draw.use(part, part.let(f"{weight} * ({OWN_RMS.format('x')})"), x.name), x.width, x.space
        )
    else:
        kind = (
            f"BatchNorm1d({x.width})" if form == "batch" else f"GroupNorm({draw.divisor(x.width)}, {x.width})"
        )
        text = f"{draw.attribute('norm', f'nn.{kind}')}({x.name}.transpose(1, 2)).transpose(1, 2)"
    return Value(draw.let(text), x.width, x.space)


def added(draw: Draw, x: Value, name: str, share: float = 0.8) -> Value:
    """The residual sum, sometimes with a scale of its own, sometimes left out."""
    if draw.chance(0.2):
        name = draw.let(f"{name} * {draw.parameter('layer_scale', x.width)}")
    return Value(draw.let(f"{x.name} + {name}") if draw.chance(share) else name, x.width, x.space)


@block("sequence", 3)
def dense(draw: Draw, x: Value) -> Value:
    out = draw.width()
    return Value(draw.let(draw.activation(f"{linear(draw, x.width, out)}({x.name})")), out, x.space)


@block("sequence", 3)
def mlp(draw: Draw, x: Value) -> Value:
    own, inner = normed(draw, x), draw.width()
    up, down = linear(draw, x.width, inner, "mlp"), linear(draw, inner, x.width, "mlp")
    middle = draw.let(draw.activation(draw.let(f"{up}({own.name})")))
    return added(draw, x, draw.let(f"{down}({middle})"))


@block("sequence", 4)
def gated(draw: Draw, x: Value) -> Value:
    own, inner = normed(draw, x), draw.width()
    if draw.chance(0.5):
        gate, up = linear(draw, x.width, inner, "gated"), linear(draw, x.width, inner, "gated")
        middle = draw.let(f"F.silu({gate}({own.name})) * {up}({own.name})")
    else:
        both = draw.let(f"{linear(draw, x.width, 2 * inner, 'gated')}({own.name})")
        form = draw.pick("glu", "chunk", "chunk", "split", "slice", "view")
        if form == "glu":
            middle = draw.let(f"F.glu({both}, dim=-1)")
        elif form == "slice":
            half = draw.pick(str(inner), f"{both}.shape[-1] // 2")
            middle = draw.let(f"{both}[..., :{half}] * torch.tanh({both}[..., {half}:])")
        elif form == "view":
            pair = draw.let(f"{both}.unflatten(-1, (2, -1))")
            middle = draw.let(f"{pair}[:, :, 0] * torch.sigmoid({pair}[:, :, 1])")
        else:
            call = "chunk(2, -1)" if form == "chunk" else f"split({inner}, dim=-1)"
            left, right = draw.lets(2, f"{both}.{call}")
            middle = draw.let(f"{left} * F.gelu({right})")
    return added(draw, x, draw.let(f"{linear(draw, inner, x.width, 'gated')}({middle})"))


@block("sequence", 6)
def attend(draw: Draw, x: Value) -> Value:
    own = normed(draw, x)
    others = [item for item in draw.values if item.name != x.name and len(item.space) == 1]
    context = draw.pick(*others) if others and draw.chance(0.15) else None
    return added(draw, x, attention(draw, own, context))


@block("sequence", 1)
def multihead(draw: Draw, x: Value) -> Value:
    count = draw.divisor(x.width)
    layer = draw.attribute("multihead", f"nn.MultiheadAttention({x.width}, {count}, batch_first=True)")
    return added(draw, x, draw.let(f"{layer}({x.name}, {x.name}, {x.name}, need_weights=False)[0]"))


@block("sequence", 2)
def norm_alone(draw: Draw, x: Value) -> Value:
    return normed(draw, x)


@block("sequence", 2)
def outside_weight(draw: Draw, x: Value) -> Value:
    out = draw.width()
    if draw.chance(0.3):
        weight = draw.parameter("outside", out, x.width)
        form = draw.pick("{0} @ {1}.T", "F.linear({0}, {1})", "torch.einsum('btc,dc->btd', {0}, {1})",
                         "torch.matmul({0}, {1}.t())", "torch.einsum('...c,dc->...d', {0}, {1})")  # fmt: skip
    else:
        weight = draw.parameter("outside", x.width, out)
        form = draw.pick(
            "{0} @ {1}",
            "torch.einsum('btc,cd->btd', {0}, {1})",
            "F.linear({0}, {1}.T)",
            "{0}.flatten(0, 1).mm({1}).view(*{0}.shape[:2], -1)",
            "torch.tensordot({0}, {1}, dims=1)",
        )
    name = draw.let(form.format(x.name, weight))
    if draw.chance(0.5):
        name = draw.let(f"{name} + {draw.parameter('outside_bias', out)}")
    return Value(name, out, x.space)


@block("sequence", 2)
def meet_sequence(draw: Draw, x: Value) -> Value | None:
    others = [item for item in draw.values if item.name != x.name and item.space == x.space]
    if not others:
        return None
    other = draw.pick(*others)
    if other.width == x.width and draw.chance(0.7):
        form = draw.pick(
            "{0} + {1}", "{0} * torch.sigmoid({1})", "{0} - {1}", "torch.stack([{0}, {1}], 1).amax(1)"
        )
        return Value(draw.let(form.format(x.name, other.name)), x.width, x.space)
    form = draw.pick("torch.cat([{0}, {1}], -1)", "torch.cat([{0}, {1}], dim=2)")
    return Value(draw.let(form.format(x.name, other.name)), x.width + other.width, x.space)


@block("sequence", 2)
def time(draw: Draw, x: Value) -> Value | None:
    length = x.space[0]
    if length < 2:
        return None
    form = draw.pick(
        "{0}.flip(1)",
        "torch.roll({0}, 1, 1)",
        "torch.roll({0}, shifts=-1, dims=1)",
        "F.pad({0}[:, 1:], (0, 0, 0, 1))",
        "torch.cat([{0}[:, 1:], {0}[:, :1]], 1)",
        "{0} + {0}.mean(1, keepdim=True)",
        "{0} - {0}[:, :1]",
        "{0} + {0}[:, -1].unsqueeze(1)",
        "{0} * F.softmax({0}, 1)",
        "torch.cumsum({0}, 1) / {1}",
        "{0}[:, torch.arange({1} - 1, -1, -1)]",
        "{0}.unsqueeze(2).expand(-1, -1, 2, -1).mean(2)",
        "{0} + {0}.amax(1).unsqueeze(1).expand_as({0})",
        "{0} + {0}.amax(1, keepdim=True).repeat(1, {1}, 1)",
        "{0}.masked_fill(torch.arange({1})[None, :, None] > 1, 0.3)",
        "torch.tril(torch.ones({1}, {1}, dtype={0}.dtype)) @ {0}",
        "{0}.sort(1).values",
        "{0}.topk(2, 1).values.mean(1, keepdim=True) + {0}",
        "{0}.clone().index_fill_(1, torch.tensor([0]), 0.5)",
    )
    return Value(draw.let(form.format(x.name, length)), x.width, x.space)


@block("sequence", 1)
def mixer(draw: Draw, x: Value) -> Value:
    length, inner = x.space[0], draw.width()
    up, down = linear(draw, length, inner, "mixer"), linear(draw, inner, length, "mixer")
    turned = draw.let(f"{normed(draw, x).name}.transpose(1, 2)")
    return added(draw, x, draw.let(f"{down}({draw.activation(draw.let(f'{up}({turned})'))}).transpose(1, 2)"))


@block("sequence", 1)
def merge(draw: Draw, x: Value) -> Value | None:
    length = x.space[0]
    if length % 2 or x.width > 12:
        return None
    form = draw.pick(
        "{0}.reshape({0}.shape[0], {1}, -1)",
        "torch.cat([{0}[:, ::2], {0}[:, 1::2]], -1)",
        "{0}.reshape({0}.shape[0], {1}, 2 * {0}.shape[2])",
        "{0}.unflatten(1, (-1, 2)).flatten(2)",
    )
    out = draw.width()
    layer = linear(draw, 2 * x.width, out, "merge")
    return Value(draw.let(f"{layer}({draw.let(form.format(x.name, length // 2))})"), out, (length // 2,))


@block("sequence", 2)
def conformer(draw: Draw, x: Value) -> Value:
    inner = draw.width()
    own = draw.let(f"{normed(draw, x).name}.transpose(1, 2)")
    point = draw.attribute("conformer", f"nn.Conv1d({x.width}, {2 * inner}, 1)")
    deep = draw.attribute("conformer", f"nn.Conv1d({inner}, {inner}, 3, padding=1, groups={inner})")
    back = draw.attribute("conformer", f"nn.Conv1d({inner}, {x.width}, 1)")
    middle = draw.let(draw.activation(f"{deep}(F.glu({point}({own}), dim=1))"))
    return added(draw, x, draw.let(f"{back}({middle}).transpose(1, 2)"))


@block("sequence", 1)
def experts(draw: Draw, x: Value) -> Value:
    count, inner = draw.pick(2, 3), draw.width()
    gate = draw.let(f"F.softmax({linear(draw, x.width, count, 'router')}({x.name}), -1)")
    terms = []
    for index in range(count):
        up, down = linear(draw, x.width, inner, "experts"), linear(draw, inner, x.width, "experts")
        terms.append(f"{gate}[..., {index}:{index + 1}] * {down}(F.gelu({up}({x.name})))")
    return added(draw, x, draw.let(" + ".join(terms)))


@block("sequence", 1)
def shared_linear(draw: Draw, x: Value) -> Value:
    layer = linear(draw, x.width, x.width, "shared")
    return Value(draw.let(f"{layer}({draw.activation(draw.let(f'{layer}({x.name})'))})"), x.width, x.space)


@block("sequence", 2)
def pieces(draw: Draw, x: Value) -> Value | None:
    if x.width % 2:
        return None
    left, right = draw.lets(2, f"{x.name}.{draw.pick('chunk(2, -1)', f'split({x.width // 2}, -1)')}")
    form = draw.pick("torch.cat([{1}, {0}], -1)", "{0} + {1}", "torch.cat([-{1}, {0}], -1)", "{0} * {1}")
    return Value(draw.let(form.format(left, right)), x.width if "cat" in form else x.width // 2, x.space)


@block("sequence", 1)
def state_space(draw: Draw, x: Value) -> Value:
    """A recurrence written as a loop over time, with a decay per channel."""
    decay = draw.parameter("decay", x.width)
    state = draw.let(f"{x.name}[:, 0]")
    rows = [state]
    for index in range(1, min(x.space[0], 4)):
        rows.append(draw.let(f"{rows[-1]} * torch.sigmoid({decay}) + {x.name}[:, {index}]"))
    return Value(
        draw.let(f"{x.name} + torch.stack([{', '.join(rows)}], 1).mean(1, keepdim=True)"), x.width, x.space
    )


def tokens_to_image(draw: Draw, own: Value, x: Value) -> Value:
    """Take a sequence back to the spatial sizes of an image."""
    sizes = ", ".join(map(str, x.space))
    form = draw.pick("{0}.transpose(1, 2).reshape({1}.shape[0], -1, {2})", "{0}.mT.unflatten(2, ({2},))",
                     "{0}.permute(0, 2, 1).reshape({0}.shape[0], {0}.shape[-1], {2})")  # fmt: skip
    return Value(draw.let(form.format(own.name, x.name, sizes)), own.width, x.space)


def heads(draw: Draw, x: Value) -> tuple[str, ...]:
    """Close a network over a sequence: per position, pooled, flattened, or two of them."""
    results = []
    own = normed(draw, x)
    for _ in range(draw.pick(1, 1, 1, 2)):
        form = draw.pick("{0}", "{0}.mean(1)", "{0}[:, 0]", "{0}[:, -1]", "{0}.amax(1)", "{0}.flatten(1)")
        width = own.width * own.space[0] if "flatten" in form else own.width
        layer = linear(draw, width, draw.pick(3, 4, own.width), "head")
        results.append(draw.let(f"{layer}({form.format(own.name)})"))
    if draw.chance(0.1):
        results.append(draw.pick(*draw.values).name)
    return tuple(results)


def sequence(draw: Draw) -> None:
    """Draw a network over sequences of vectors; sometimes a second sequence comes in."""
    length, features = draw.pick(3, 4, 6, 8), draw.pick(3, 4, 6)
    draw.program.example = {"x": f"torch.randn(2, {length}, {features})"}
    if draw.chance(0.25):
        other = draw.pick(length, 5)
        draw.program.arguments = ("x", "context")
        draw.program.example["context"] = f"torch.randn(2, {other}, {features})"
        width = draw.width()
        name = draw.let(f"{linear(draw, features, width, 'context')}(context)")
        draw.values.append(Value(name, width, (other,)))
    width = draw.width()
    x = Value(draw.let(f"{linear(draw, features, width, 'stem')}(x)"), width, (length,))
    draw.values.append(x)
    if draw.chance(0.3):
        token = draw.attribute("cls", f"nn.Parameter(torch.randn(1, 1, {width}))")
        name = draw.let(f"torch.cat([{token}.expand({x.name}.shape[0], -1, -1), {x.name}], 1)")
        x = Value(name, width, (length + 1,))
    if draw.chance(0.4):
        sizes = draw.pick([1, x.space[0], width], [x.space[0], width])
        make = draw.pick(draw.parameter, draw.buffer)
        x = Value(draw.let(f"{x.name} + {make('positions', *sizes)}"), width, x.space)
    for _ in range(draw.pick(2, 3, 4, 5)):
        x = draw.step("sequence", x)
    draw.program.returns = heads(draw, x)


def token(draw: Draw) -> None:
    """Draw a network over token ids, with free, tied or shared output weights."""
    length, vocabulary, width = draw.pick(3, 4, 6, 8), draw.pick(7, 8, 11), draw.width()
    draw.program.arguments = ("ids",)
    draw.program.example = {"ids": f"torch.randint({vocabulary}, (2, {length}))"}
    small = width if draw.chance(0.8) else 5
    embed = draw.attribute("embed", f"nn.Embedding({vocabulary}, {small})")
    name = draw.let(
        draw.pick(
            f"{embed}(ids)", f"{embed}(ids)", f"F.embedding(ids, {embed}.weight)", f"{embed}.weight[ids]"
        )
    )
    if draw.chance(0.2):
        name = draw.let(f"{name} * {draw.pick(f'{name}.shape[-1] ** 0.5', 1.7)}")
    if small != width:
        name = draw.let(f"{linear(draw, small, width, 'factor')}({name})")
    if draw.chance(0.6):
        places = draw.attribute("places", f"nn.Embedding({length + 2}, {width})")
        name = draw.let(
            f"{name} + "
            + draw.pick(f"{places}(torch.arange(ids.shape[1]))", f"{places}.weight[:ids.shape[1]]")
        )
    if draw.chance(0.25):
        draw.program.arguments = ("ids", "types")
        draw.program.example["types"] = f"torch.randint(2, (2, {length}))"
        name = draw.let(f"{name} + {draw.attribute('types', f'nn.Embedding(2, {width})')}(types)")
    x = Value(name, width, (length,))
    draw.values.append(x)
    for _ in range(draw.pick(2, 3, 4, 5)):
        x = draw.step("sequence", x)
    if draw.chance(0.5):
        draw.program.returns = heads(draw, x)
        return
    own = normed(draw, x)
    if own.width != small:
        own = Value(draw.let(f"{linear(draw, own.width, small, 'neck')}({own.name})"), small, own.space)
    if draw.chance(0.3):
        layer = draw.attribute("head", f"nn.Linear({small}, {vocabulary}, bias=False)")
        draw.program.attributes[f"{layer.removeprefix('self.')}.weight"] = f"{embed}.weight"
        text = f"{layer}({own.name})"
    else:
        text = draw.pick("F.linear({0}, {1}.weight)", "{0} @ {1}.weight.T").format(own.name, embed)
    draw.program.returns = (draw.let(text),)
