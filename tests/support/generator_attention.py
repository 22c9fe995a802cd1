"""Attention as people write it: how the heads are made, who shares them, and how they meet."""

from __future__ import annotations

from generator import Draw, Value


class Attention:
    """Draws one attention class; `heads`, `keys` and `size` are its head count, key heads and head size."""

    def __init__(self, outer: Draw, x: Value, context: Value | None) -> None:
        self.x, self.context = x, context
        self.draw = outer.part("Attention", *(["x", "context"] if context else ["x"]))
        draw = self.draw
        self.heads, self.size = draw.pick(1, 2, 2, 3, 4, 4), draw.pick(2, 3, 4, 4, 6)
        if draw.chance(0.3) and x.width % self.heads == 0:
            self.size = x.width // self.heads
        self.keys = draw.divisor(self.heads) if draw.chance(0.4) else self.heads
        if draw.chance(0.1):
            self.keys = 1
        draw.attribute("num_heads", self.heads, number=False)
        draw.attribute("head_dim", self.size, number=False)
        draw.attribute("num_key_value_heads", self.keys, number=False)
        self.form = draw.pick(
            "{0}.view({0}.shape[0], {0}.shape[1], {heads}, -1)",
            "{0}.view(*{0}.shape[:2], {heads}, -1)",
            "{0}.view({0}.shape[0], {0}.shape[1], -1, {size})",
            "{0}.view({0}.shape[0], -1, {heads}, {size})",
            "{0}.view({0}.shape[0], {0}.shape[1], {heads}, {size})",
            "{0}.unflatten(-1, ({heads}, -1))",
            "{0}.unflatten(-1, (-1, {size}))",
            "{0}.reshape(*{0}.shape[:2], {heads}, {0}.shape[-1] // {heads})",
        )
        self.literal = draw.chance(0.1)
        # Widths that follow from the input: the head size is its width by the number of heads.
        self.divided = self.heads * self.size == x.width and draw.chance(0.5)

    def linear(self, width: int, out: int, name: str) -> str:
        bias = self.draw.pick("", ", bias=False")
        return self.draw.attribute(name, f"nn.Linear({width}, {out}{bias})", number=False)

    def split(self, name: str, keys: bool) -> str:
        """(batch, time, heads * size) -> (batch, heads, time, size)."""
        attribute = "num_key_value_heads" if keys else "num_heads"
        count = f"self.{attribute}" if not self.literal else str(self.keys if keys else self.heads)
        size = "self.head_dim" if not self.literal else str(self.size)
        size = "x.shape[-1] // self.num_heads" if self.divided else size
        made = self.draw.let(self.form.format(name, heads=count, size=size))
        return self.draw.let(f"{made}.{self.draw.pick('transpose(1, 2)', 'permute(0, 2, 1, 3)')}")

    def fused(self) -> list[str]:
        """Queries, keys and values of one projection."""
        draw, inner = self.draw, self.heads * self.size
        layer = self.linear(self.x.width, 3 * inner, "qkv")
        both = draw.let(f"{layer}(x)")
        form = draw.pick("chunk", "chunk", "split", "permute", "permute", "inside", "size first")
        if form in ("chunk", "split"):
            call = "chunk(3, -1)" if form == "chunk" else draw.pick(
                f"split({inner}, -1)", "split(self.num_heads * self.head_dim, dim=-1)")  # fmt: skip
            return [self.split(name, False) for name in draw.lets(3, f"{both}.{call}")]
        if form == "inside":
            made = draw.let(
                f"{both}.view({both}.shape[0], {both}.shape[1], self.num_heads, -1).transpose(1, 2)"
            )
            return draw.lets(3, f"{made}.chunk(3, -1)")
        sizes = draw.pick("self.num_heads, -1", "self.num_heads, self.head_dim", "-1, self.head_dim")
        if form == "size first":
            made = draw.let(f"{both}.unflatten(-1, (3, {sizes}))")
            return [draw.let(f"{name}.transpose(1, 2)") for name in draw.lets(3, f"{made}.unbind(2)")]
        made = draw.let(
            f"{both}.reshape({both}.shape[0], {both}.shape[1], 3, {sizes}).permute(2, 0, 3, 1, 4)"
        )
        if draw.chance(0.5):
            return draw.lets(3, f"{made}.unbind(0)")
        return [draw.let(f"{made}[{index}]") for index in range(3)]

    def separate(self) -> list[str]:
        draw, source = self.draw, "context" if self.context else "x"
        width = self.context.width if self.context else self.x.width
        if draw.chance(0.2) and not self.context:  # the grouped-query form of one projection
            sizes = [self.heads * self.size, self.keys * self.size, self.keys * self.size]
            names = draw.lets(3, f"{self.linear(width, sum(sizes), 'qkv')}(x).split({sizes}, -1)")
        else:
            inner = self.keys * self.size
            names = [draw.let(f"{self.linear(self.x.width, self.heads * self.size, 'q')}(x)")]
            names += [draw.let(f"{self.linear(width, inner, name)}({source})") for name in ("k", "v")]
        return [self.split(name, keys) for name, keys in zip(names, (False, True, True), strict=True)]

    def rotated(self, name: str, length: int) -> str:
        """A rotary position."""
        draw = self.draw
        cos, sin = (f"torch.{item}(torch.arange({length})[:, None] * 0.3)" for item in ("cos", "sin"))
        if draw.chance(0.5):
            first, second = draw.lets(2, f"{name}.chunk(2, -1)")
            turned = draw.let(f"torch.cat([-{second}, {first}], -1)")
        else:
            half = draw.pick(str(self.size // 2), f"{name}.shape[-1] // 2")
            turned = draw.let(f"torch.cat([-{name}[..., {half}:], {name}[..., :{half}]], -1)")
        if draw.chance(0.5):
            cos, sin = draw.buffer("cos", length, self.size), draw.buffer("sin", length, self.size)
        return draw.let(f"{name} * {cos} + {turned} * {sin}")

    def repeated(self, name: str, length: int) -> str:
        """Give every query head its key head."""
        times = self.heads // self.keys
        if times == 1:
            return name
        draw = self.draw
        groups = draw.pick("self.num_heads // self.num_key_value_heads", str(times))
        form = draw.pick(
            "{0}.repeat_interleave({1}, dim=1)",
            "{0}.repeat_interleave({1}, 1)",
            "{0}[:, :, None].expand(-1, -1, {1}, -1, -1).flatten(1, 2)",
            "{0}[:, :, None].expand({0}.shape[0], {0}.shape[1], {1}, {0}.shape[2], {0}.shape[3]).reshape("
            "{0}.shape[0], {0}.shape[1] * {1}, {0}.shape[2], {0}.shape[3])",
            "{0}[:, :, None].expand({0}.shape[0], self.num_key_value_heads, {1}, {0}.shape[2], self.head_dim)"
            ".reshape({0}.shape[0], self.num_heads, {0}.shape[2], self.head_dim)",
        )
        return draw.let(form.format(name, groups))

    def bias(self, queries: int, keys: int) -> str:
        """An expression that broadcasts to (batch, heads, queries, keys)."""
        draw = self.draw
        form = draw.pick("embedding", "table", "parameter", "slopes", "one")
        if form == "embedding":
            table = draw.attribute("relative", f"nn.Embedding(5, {self.heads})", number=False)
            index = f"(torch.arange({keys}) - torch.arange({queries})[:, None]).clamp(-2, 2) + 2"
            if draw.chance(0.5):
                index = draw.attribute("index", f"nn.Buffer({index})", number=False)
            return draw.let(f"{table}({index}).permute(2, 0, 1){draw.pick('', '.unsqueeze(0)')}")
        if form == "table":
            table = draw.parameter("table", 9, self.heads)
            index = draw.attribute("index", f"nn.Buffer(torch.arange({queries * keys}) % 9)", number=False)
            return draw.let(f"{table}[{index}].view({queries}, {keys}, -1).permute(2, 0, 1).contiguous()")
        if form == "slopes":
            return draw.let(f"{draw.buffer('slopes', self.heads, 1, 1)} * torch.arange({keys})")
        return draw.parameter("relative", *([self.heads] if form == "parameter" else []), queries, keys)

    def meet(self, q: str, k: str, v: str, queries: int, keys: int) -> str:
        """(batch, heads, time, size) of the values that the queries find."""
        draw = self.draw
        bias = self.bias(queries, keys) if draw.chance(0.3) else None
        if draw.chance(0.4):
            form = draw.pick("", "", ", scale=self.head_dim**-0.5", ", scale=0.5")
            if bias:
                form += f", attn_mask={bias}.expand({q}.shape[0], {q}.shape[1], -1, -1)"
            elif queries == keys and draw.chance(0.3):
                form += ", is_causal=True"
            if self.keys != self.heads and draw.chance(0.3):
                return draw.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{form}, enable_gqa=True)")
            k, v = self.repeated(k, keys), self.repeated(v, keys)
            return draw.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{form})")
        k, v = self.repeated(k, keys), self.repeated(v, keys)
        scale = draw.pick(
            "self.head_dim ** -0.5",
            f"{q}.shape[-1] ** -0.5",
            "self.scale",
            "0.5",
            "1 / math.sqrt(self.head_dim)",
        )
        if scale == "self.scale":
            draw.attribute("scale", f"{self.size}**-0.5", number=False)
        meet = draw.pick("{0} @ {1}.transpose(-2, -1) * {2}", "torch.matmul({0} * {2}, {1}.mT)",
                         "torch.einsum('bhqd,bhkd->bhqk', {0}, {1}) * {2}")  # fmt: skip
        scores = draw.let(meet.format(q, k, scale))
        if draw.chance(0.1):
            scores = draw.let(f"{scores} * {draw.parameter('temperature', self.heads, 1, 1)}")
        if bias:
            scores = draw.let(f"{scores} + {bias}")
        elif queries == keys and draw.chance(0.3):
            mask = draw.attribute("mask", f"nn.Buffer(torch.ones({keys}, {keys}).tril() == 0)", number=False)
            scores = draw.let(f"{scores}.masked_fill({mask}, -torch.inf)")
        weights = draw.let(f"{draw.pick('F.softmax({0}, -1)', '{0}.softmax(dim=-1)')}".format(scores))
        if draw.chance(0.1):
            mix = draw.parameter("talking", self.heads, self.heads)
            weights = draw.let(f"torch.einsum('bhqk,hg->bgqk', {weights}, {mix})")
        return draw.let(
            draw.pick("{0} @ {1}", "torch.einsum('bhqk,bhkd->bhqd', {0}, {1})").format(weights, v)
        )

    def draw_all(self) -> str:
        draw, x = self.draw, self.x
        queries, keys = x.space[0], (self.context or x).space[0]
        fused = self.keys == self.heads and not self.context and draw.chance(0.5)
        q, k, v = self.fused() if fused else self.separate()
        if draw.chance(0.2):
            kind = draw.pick("LayerNorm", "RMSNorm")
            q = draw.let(f"{draw.attribute('q_norm', f'nn.{kind}({self.size})', number=False)}({q})")
            k = draw.let(f"{draw.attribute('k_norm', f'nn.{kind}({self.size})', number=False)}({k})")
        if self.size % 2 == 0 and draw.chance(0.2):
            q, k = self.rotated(q, queries), self.rotated(k, keys)
        out = self.meet(q, k, v, queries, keys)
        if draw.chance(0.1):
            weight = draw.parameter("out", self.heads, self.size, x.width)
            return draw.let(f"torch.einsum('bhtd,hdc->btc', {out}, {weight})")
        form = draw.pick(
            "{0}.transpose(1, 2).flatten(2)",
            "{0}.transpose(1, 2).reshape({0}.shape[0], {0}.shape[2], -1)",
            "{0}.permute(0, 2, 1, 3).contiguous().view({0}.shape[0], {0}.shape[2], -1)",
            "{0}.transpose(1, 2).reshape({0}.shape[0], {0}.shape[2], self.num_heads * self.head_dim)",
            "{0}.transpose(1, 2).reshape({0}.shape[0], {0}.shape[2], {0}.shape[1] * {0}.shape[3])",
        )
        if self.divided:
            form = "{0}.transpose(1, 2).reshape(x.shape)"
        flat = draw.let(form.format(out))
        if draw.chance(0.1):
            gate = self.linear(x.width, self.heads * self.size, "gate")
            flat = draw.let(f"{flat} * torch.sigmoid({gate}(x))")
        return draw.let(f"{self.linear(self.heads * self.size, x.width, 'out')}({flat})")


def attention(draw: Draw, x: Value, context: Value | None = None) -> str:
    """Draw an attention class over `x` (queries) and `context`; return the variable of its call."""
    drawn = Attention(draw, x, context)
    result = drawn.draw_all()
    return draw.use(drawn.draw, result, *([x.name, context.name] if context else [x.name]))
