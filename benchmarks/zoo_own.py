"""Small networks written out here, of kinds that no library builds small: what users write themselves.

Recurrent, of computed weights, of widths that follow from the input, without skips, of graphs, a detector of
YOLO11's kind, and the kinds of twelve public reports of users of pruning tools (`users-*`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

from zoo_blocks import Bottleneck, C2f, C3k2, ConvNorm, Detect, PixelAttention, Pooling

TOKENS, LENGTH, CLASSES, WIDTH = 99, 12, 5, 48
Built = tuple[nn.Module, Any]


def tokens() -> Tensor:
    return torch.randint(1, TOKENS, (2, LENGTH))


class Tagger(nn.Module):
    """A tag for every token, by a recurrent layer of any kind."""

    def __init__(
        self, kind: type[nn.RNNBase], layers: int = 2, both: bool = True, packed: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.packed = nn.Embedding(TOKENS, 24), packed
        self.recurrent = cast(Any, kind)(24, WIDTH, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(WIDTH * (2 if both else 1), CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if not self.packed:
            return self.head(self.recurrent(x)[0])
        lengths = torch.tensor([LENGTH, LENGTH - 3, LENGTH][: len(x)])
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(rnn.pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0])


class LastState(nn.Module):
    """A class of a text, by the last state of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(TOKENS, 24), nn.GRU(24, WIDTH, batch_first=True)
        self.hidden, self.head = nn.Linear(WIDTH, 32), nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.recurrent(self.embed(tokens))[1][-1])))


class Cells(nn.Module):
    """A loop over a cell."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = cast(Any, kind)(20, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], self.cell.hidden_size)
        state: Any = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for step in range(6):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Loop(nn.Module):
    """A recurrence by hand: two linears and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.onward = nn.Linear(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.inward(x[:, 0]))
        for step in range(1, 6):
            state = torch.tanh(self.inward(x[:, step]) + self.onward(state))
        return self.head(state)


class Translator(nn.Module):
    """A GRU that reads, a GRU that writes, attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(TOKENS, 24), nn.Embedding(TOKENS, 24)
        self.reads = nn.GRU(24, WIDTH, batch_first=True)
        self.writes = nn.GRU(24, WIDTH, batch_first=True)
        self.joins, self.head = nn.Linear(2 * WIDTH, 40), nn.Linear(40, TOKENS)

    def forward(self, source: Tensor, written: Tensor) -> Tensor:
        memory, state = self.reads(self.source(source))
        x = self.writes(self.target(written), state)[0]
        weights = torch.softmax(x @ memory.transpose(1, 2), -1)
        return self.head(torch.tanh(self.joins(torch.cat([x, weights @ memory], -1))))


class Crnn(nn.Module):
    """Text in a picture: convolutions, columns as time, two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(1, 16, 3), nn.MaxPool2d(2), ConvNorm(16, 32, 3), nn.MaxPool2d(2), ConvNorm(32, 48, 3),
            nn.MaxPool2d((2, 1)),
        )  # fmt: skip
        self.recurrent = nn.LSTM(48 * 2, WIDTH, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.recurrent(x)[0])


class KanLayer(nn.Module):
    """Splines on every edge (efficient-kan): cubic B-splines over a fixed grid, plus a base."""

    def __init__(self, inner: int, out: int, grid: int = 5, order: int = 3) -> None:
        super().__init__()
        self.order, self.inner, self.out = order, inner, out
        points = (torch.arange(-order, grid + order + 1) * (2 / grid) - 1).expand(inner, -1).contiguous()
        self.register_buffer("grid", points)
        self.base_weight = nn.Parameter(torch.randn(out, inner) / inner**0.5)
        self.spline_weight = nn.Parameter(torch.randn(out, inner, grid + order) / inner**0.5)

    def splines(self, x: Tensor) -> Tensor:
        grid, x = self.grid, x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)])
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)])
            bases = left * bases[:, :, :-1] + right * bases[:, :, 1:]
        return bases

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(F.silu(x), self.base_weight)
        return base + F.linear(self.splines(x).flatten(1), self.spline_weight.view(self.out, -1))


class MlpKan(nn.Module):
    """Experts that are splines, behind a softmax gate, between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(16, 32), nn.Linear(32, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 40), nn.SiLU(), nn.Linear(40, 24)) if place else
            nn.Sequential(KanLayer(32, 20), KanLayer(20, 24)) for place in range(3)
        )  # fmt: skip
        self.last = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        shares = torch.softmax(self.gate(x), -1)
        both = torch.stack([expert(x) for expert in self.experts], 1)
        return self.last((shares.unsqueeze(-1) * both).sum(1))


class WaveNet(nn.Module):
    """Gated dilated convolutions with a skip sum, each under a weight norm of the old or the new style."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(1, 32, 1))
        self.gates = nn.ModuleList(
            norm(nn.Conv1d(32, 64, 3, padding=2**step, dilation=2**step)) for step in range(3)
        )
        self.residual = nn.ModuleList(norm(nn.Conv1d(32, 32, 1)) for _ in range(3))
        self.skips = nn.ModuleList(norm(nn.Conv1d(32, 48, 1)) for _ in range(3))
        self.end, self.last = norm(nn.Conv1d(48, 48, 1)), nn.Conv1d(48, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), cast(Tensor, 0)
        for gate, residual, skip in zip(self.gates, self.residual, self.skips, strict=True):
            one, other = gate(x).chunk(2, 1)
            inner = torch.tanh(one) * torch.sigmoid(other)
            total, x = total + skip(inner), x + residual(inner)
        return self.last(F.relu(self.end(F.relu(total))))


def old_norm(layer: nn.Module) -> nn.Module:
    """Weight norm as hooks, as files of before torch 2 have it."""
    return nn.utils.weight_norm(layer)


def discriminator() -> nn.Module:
    """Strided convolutions under a spectral norm."""
    layers: list[nn.Module] = []
    for inner, out in ((3, 32), (32, 64), (64, 96)):
        layers += [parametrizations.spectral_norm(nn.Conv2d(inner, out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), parametrizations.spectral_norm(nn.Linear(96 * 16, 1)))


class Standardised(nn.Conv2d):
    """Weights with mean 0 and variance 1 for every output (Big Transfer)."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (
            self.weight.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5
        ).sqrt()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


def standardised() -> nn.Module:
    """Three standardised convolutions with batch norms."""
    layers: list[nn.Module] = []
    for inner, out in ((3, 24), (24, 40), (40, 56)):
        layers += [Standardised(inner, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(56, CLASSES))


class Decoder(nn.Module):
    """`nn.TransformerDecoder` over a memory: self attention, cross attention, feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Embedding(TOKENS, WIDTH), nn.Linear(20, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 6, 84, dropout=0.1, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=features.dtype)
        return self.head(self.decoder(self.embed(tokens), self.memory(features), tgt_mask=mask))


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, norm first, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 84, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Cross(nn.Module):
    """Queries of their own read an image through `nn.MultiheadAttention` (Perceiver, DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.queries = nn.Conv2d(3, 40, 4, 4), nn.Parameter(torch.randn(7, WIDTH))
        self.attend = nn.MultiheadAttention(WIDTH, 6, kdim=40, vdim=40, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.stem(x).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(x), -1, -1)
        x = queries + self.attend(queries, pixels, pixels, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class CausalAttention(nn.Module):
    """nanoGPT's: three projections at once, heads of width / heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (item.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for item in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoGpt(nn.Module):
    """nanoGPT: learned positions, norm first, tied head."""

    def __init__(self, heads: int = 6) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(TOKENS, WIDTH), nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "ln_1": nn.LayerNorm(WIDTH), "attn": CausalAttention(WIDTH, heads),
                "ln_2": nn.LayerNorm(WIDTH), "c_fc": nn.Linear(WIDTH, 4 * WIDTH),
                "c_proj": nn.Linear(4 * WIDTH, WIDTH),
            })
            for _ in range(2)
        )  # fmt: skip
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in cast(Any, self.blocks):
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["c_proj"](F.gelu(block["c_fc"](block["ln_2"](x))))
        return self.lm_head(self.ln_f(x))


class Rep(nn.Module):
    """RepVGG in training form: 3 x 3, 1 x 1 and, where the width stays, a norm alone."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(inner, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))
        self.point = nn.Sequential(nn.Conv2d(inner, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.identity = nn.BatchNorm2d(inner) if inner == out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x) + self.point(x)
        return F.relu(out if self.identity is None else out + self.identity(x))


def repvgg(identity: bool) -> nn.Module:
    """Blocks that each change the width, or with two of equal width."""
    sizes = (
        [(3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2)]
        if identity
        else [(3, 16, 1), (16, 32, 2), (32, 48, 2)]
    )
    return nn.Sequential(
        *(Rep(*item) for item in sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES)
    )


class Temporal(nn.Module):
    """A TCN's block: two causal convolutions; the skip is a 1 x 1 where `skip`."""

    def __init__(self, inner: int, out: int, dilation: int, skip: bool) -> None:
        super().__init__()
        self.one = parametrizations.weight_norm(
            nn.Conv1d(inner, out, 3, padding=2 * dilation, dilation=dilation)
        )
        self.two = parametrizations.weight_norm(
            nn.Conv1d(out, out, 3, padding=2 * dilation, dilation=dilation)
        )
        self.down, self.cut = nn.Conv1d(inner, out, 1) if skip else None, 2 * dilation

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x)[:, :, : -self.cut])
        y = F.relu(self.two(y)[:, :, : -self.cut])
        return y if self.down is None else F.relu(y + self.down(x))


def tcn(skip: bool) -> nn.Module:
    """Three temporal blocks and a head."""
    return nn.Sequential(
        Temporal(4, 24, 1, skip),
        Temporal(24, 32, 2, skip),
        Temporal(32, 40, 4, skip),
        nn.Conv1d(40, CLASSES, 1),
    )


class UNet(nn.Module):
    """Down twice and up twice; the skips are concatenations, or there are none."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        more = 2 if skips else 1
        self.skips = skips
        self.down1, self.down2, self.bottom = ConvNorm(3, 16, 3), ConvNorm(16, 32, 3), ConvNorm(32, 48, 3)
        self.up2, self.up1 = nn.ConvTranspose2d(48, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1 = ConvNorm(32 * more, 32, 3), ConvNorm(16 * more, 16, 3)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.bottom(F.max_pool2d(two, 2)))
        x = self.join2(torch.cat([x, two], 1) if self.skips else x)
        x = self.up1(x)
        return self.head(self.join1(torch.cat([x, one], 1) if self.skips else x))


class Graph(nn.Module):
    """Messages along edges: gathered by `index_select`, summed by `index_add` or `scatter_add`."""

    def __init__(self, scatter: bool) -> None:
        super().__init__()
        self.scatter = scatter
        self.first, self.message, self.own = nn.Linear(10, 32), nn.Linear(64, 40), nn.Linear(32, 40)
        self.last, self.head = nn.Linear(40, 24), nn.Linear(24, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = F.relu(self.first(nodes))
        messages = F.relu(self.message(torch.cat([x[edges[:, 0]], x[edges[:, 1]]], 1)))
        zeros = messages.new_zeros(len(x), messages.shape[1])
        if self.scatter:
            to = edges[:, 1:].expand(-1, messages.shape[1])
            total = zeros.scatter_add(0, to, messages)
        else:
            total = zeros.index_add(0, edges[:, 1], messages)
        return self.head(F.relu(self.last(F.relu(self.own(x) + total))))


class GraphAttention(nn.Module):
    """Heads that weigh neighbours by two vectors (GAT), over a dense adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(10, 4 * 8), nn.Linear(4 * 8, CLASSES)
        self.source, self.target = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))

    def forward(self, nodes: Tensor, near: Tensor) -> Tensor:
        x = self.project(nodes).view(len(nodes), 4, 8)
        score = (x * self.source).sum(-1)[:, None] + (x * self.target).sum(-1)[None]
        score = F.leaky_relu(score, 0.2).masked_fill(near.unsqueeze(-1) == 0, -1e4)
        return self.head(F.elu(torch.einsum("ijh,jhd->ihd", score.softmax(1), x).flatten(1)))


class GraphConvolution(nn.Module):
    """A normalised adjacency times features times raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(10, 32) / 3), nn.Parameter(torch.randn(32, 24) / 5)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, nodes: Tensor, near: Tensor) -> Tensor:
        near = near / near.sum(1, keepdim=True)
        return self.head(F.relu(near @ (F.relu(near @ (nodes @ self.one)) @ self.two)))


class Yolo(nn.Module):
    """A detector of YOLO11's kind: C3k2, SPPF, attention over pixels, a top-down neck, decoupled heads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(ConvNorm(3, w, 3, 2), ConvNorm(w, 2 * w, 3, 2), C3k2(2 * w, 2 * w))
        self.p3 = nn.Sequential(ConvNorm(2 * w, 4 * w, 3, 2), C3k2(4 * w, 4 * w))
        self.p4 = nn.Sequential(ConvNorm(4 * w, 4 * w, 3, 2), C3k2(4 * w, 4 * w, deep=True))
        self.p5 = nn.Sequential(
            ConvNorm(4 * w, 8 * w, 3, 2), C3k2(8 * w, 8 * w, deep=True), Pooling(8 * w), PixelAttention(8 * w)
        )
        self.n4, self.n3 = C3k2(12 * w, 4 * w), C3k2(8 * w, 4 * w)
        self.down3, self.m4 = ConvNorm(4 * w, 4 * w, 3, 2), C3k2(8 * w, 4 * w)
        self.down4, self.m5 = ConvNorm(4 * w, 4 * w, 3, 2), C3k2(12 * w, 8 * w, deep=True)
        self.detect = Detect(CLASSES, (4 * w, 4 * w, 8 * w))

    def forward(self, x: Tensor) -> Any:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        n3 = self.n3(torch.cat([F.interpolate(n4, scale_factor=2.0), p3], 1))
        m4 = self.m4(torch.cat([self.down3(n3), n4], 1))
        return self.detect([n3, m4, self.m5(torch.cat([self.down4(m4), p5], 1))])


class SmallYolo(nn.Module):
    """A detector of YOLOv8's kind at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 32, 3, 2), C2f(32, 32))
        self.down = nn.Sequential(ConvNorm(32, 64, 3, 2), C2f(64, 64), Pooling(64))
        self.neck, self.detect = C2f(96, 32), Detect(CLASSES, (32, 64))

    def forward(self, x: Tensor) -> Any:
        one = self.stem(x)
        two = self.down(one)
        return self.detect([self.neck(torch.cat([F.interpolate(two, scale_factor=2.0), one], 1)), two])


class NormedCell(nn.Module):
    """An LSTM cell by hand with layer norms over the gates."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.onward = nn.Linear(20, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.width, self.head = WIDTH, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.width)
        for step in range(5):
            gates = (self.inward(x[:, step]) + self.onward(h)).chunk(4, 1)
            i, f, g, o = (norm(gate) for norm, gate in zip(self.norms, gates, strict=True))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class PartialConv(nn.Module):
    """FasterNet: a convolution on a quarter of the channels, the rest untouched, split by stored sizes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.sizes = ConvNorm(3, width, 3, 2), [width // 4, width - width // 4]
        self.partial = nn.Conv2d(width // 4, width // 4, 3, 1, 1)
        self.up, self.down = ConvNorm(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one, rest = torch.split(x, self.sizes, 1)
        x = x + self.down(self.up(torch.cat([self.partial(one), rest], 1)))
        return self.head(x.mean((2, 3)))


class Inputs(nn.Module):
    """Two inputs and an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.embed = nn.Linear(10, 32), nn.Linear(6, 24), nn.Embedding(TOKENS, 16)
        self.joins, self.head = nn.Linear(72, 40), nn.Linear(40, CLASSES)

    def forward(self, left: Tensor, right: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
        text = self.embed(words)
        text = (
            text.mean(1) if mask is None else (text * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        )
        return self.head(
            F.relu(self.joins(torch.cat([F.relu(self.one(left)), F.relu(self.two(right)), text], 1)))
        )


def plain() -> nn.Module:
    """Three convolutions and a linear."""
    return nn.Sequential(
        ConvNorm(3, 24, 3), ConvNorm(24, 32, 3, 2), ConvNorm(32, 40, 3, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(40, CLASSES),
    )  # fmt: skip


class Hooked(nn.Module):
    """Features that hooks keep, and that the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = ConvNorm(3, 24, 3), ConvNorm(24, 32, 3, 2), ConvNorm(32, 40, 3, 2)
        self.kept: dict[str, Tensor] = {}
        self.head = nn.Linear(24 + 40, CLASSES)
        self.one.register_forward_hook(Hooked.keep(self.kept))

    @staticmethod
    def keep(kept: dict[str, Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: kept.update(one=output)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(self.two(self.one(x)))
        return self.head(torch.cat([self.kept["one"].mean((2, 3)), x.mean((2, 3))], 1))


class TwoPaths(nn.Module):
    """A linear and a path of low rank beside it (LoRA by hand), twice."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((16, 64), (64, 48))
        self.dense = nn.ModuleList(nn.Linear(*item) for item in sizes)
        self.low = nn.ModuleList(nn.Linear(item[0], 4, bias=False) for item in sizes)
        self.high = nn.ModuleList(nn.Linear(4, item[1], bias=False) for item in sizes)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for dense, low, high in zip(self.dense, self.low, self.high, strict=True):
            x = F.relu(dense(x) + 2.0 * high(low(x)))
        return self.head(x)


class RoutedMlp(nn.Module):
    """Experts in one parameter of three dimensions, mixed by a softmax over the best two, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = nn.Linear(16, 4), nn.Linear(16, CLASSES)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 16, 40) / 4),
            nn.Parameter(torch.randn(4, 40, 16) / 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        best = scores.topk(2, -1).indices
        mask = torch.zeros_like(scores).scatter(-1, best, 1.0)
        shares = torch.softmax(scores.masked_fill(mask == 0, -1e4), -1)
        inner = F.gelu(torch.einsum("bi,eih->beh", x, self.up))
        return self.last(x + torch.einsum("beh,eho,be->bo", inner, self.down, shares))


class Autoencoder(nn.Module):
    """Down by convolutions, up by transposed ones, a decoder that reads the first weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(36, 64), nn.Linear(64, 24)
        self.shift1, self.shift2 = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(36))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.two(F.relu(self.one(x))))
        inner = F.relu(F.linear(code, self.two.weight.t(), self.shift1))
        return F.linear(inner, self.one.weight.t(), self.shift2)


class SelectiveScan(nn.Module):
    """Mamba by hand: gate, depthwise convolution, a scan in a Python loop."""

    def __init__(self, width: int = 24, inner: int = 48, states: int = 4) -> None:
        super().__init__()
        self.embed, self.states = nn.Embedding(TOKENS, width), states
        self.into, self.conv = (
            nn.Linear(width, 2 * inner),
            nn.Conv1d(inner, inner, 3, padding=2, groups=inner),
        )
        self.select, self.step = nn.Linear(inner, 6 + 2 * states), nn.Linear(6, inner)
        self.a_log, self.d = nn.Parameter(torch.rand(inner, states)), nn.Parameter(torch.rand(inner))
        self.out, self.head = nn.Linear(inner, width), nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        skip = self.embed(tokens)
        x, gate = self.into(skip).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2))
        low, b, c = self.select(x).split([6, self.states, self.states], -1)
        delta, a = F.softplus(self.step(low)), -torch.exp(self.a_log)
        state = x.new_zeros(len(x), x.shape[2], self.states)
        found = []
        for step in range(LENGTH):
            state = torch.exp(delta[:, step, :, None] * a) * state
            state = state + (delta[:, step] * x[:, step])[..., None] * b[:, step, None]
            found.append((state * c[:, step, None]).sum(-1))
        y = (torch.stack(found, 1) + self.d * x) * F.silu(gate)
        return self.head(skip + self.out(y))


class TimeMix(nn.Module):
    """RWKV by hand: shifted time, a decay for every channel, receptance."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, width), nn.Linear(width, TOKENS)
        self.norm, self.mix = nn.LayerNorm(width), nn.Parameter(torch.rand(3, width))
        self.r, self.k, self.v = (nn.Linear(width, 48, bias=False) for _ in range(3))
        self.decay, self.out = nn.Parameter(torch.rand(48)), nn.Linear(48, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        skip = self.embed(tokens)
        x = self.norm(skip)
        past = F.pad(x, (0, 0, 1, -1))
        r, k, v = (
            layer(x * self.mix[place] + past * (1 - self.mix[place]))
            for place, layer in enumerate((self.r, self.k, self.v))
        )
        top = bottom = k.new_zeros(len(k), k.shape[2])
        found, decay = [], torch.exp(-torch.exp(self.decay))
        for step in range(LENGTH):
            weight = torch.exp(k[:, step].clamp(max=20))
            top, bottom = decay * top + weight * v[:, step], decay * bottom + weight
            found.append(top / (bottom + 1e-6))
        return self.head(skip + self.out(torch.sigmoid(r) * torch.stack(found, 1)))


class Generator(nn.Module):
    """DCGAN's generator: a vector, transposed convolutions, tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 48 * 16)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(48), nn.ReLU(), nn.ConvTranspose2d(48, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.first(x).view(len(x), 48, 4, 4))


class SuperResolution(nn.Module):
    """EDSR's kind: residual blocks without norms, a pixel shuffle."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)
        self.blocks = nn.ModuleList(Bottleneck(width, width, 1.0, normed=False) for _ in range(2))
        self.grow = nn.Conv2d(width, 4 * width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = skip = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(F.pixel_shuffle(self.grow(x + skip), 2))


class Diffusion(nn.Module):
    """A denoiser: group norms, the time as scale and shift, attention over pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 40), nn.SiLU(), nn.Linear(40, 2 * width))
        self.first, self.norm1, self.norm2 = (
            nn.Conv2d(3, width, 3, 1, 1),
            nn.GroupNorm(8, width),
            nn.GroupNorm(8, width),
        )
        self.one, self.two = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.qkv, self.out, self.last = (
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, 3, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(4, device=t.device, dtype=x.dtype) * math.log(10.0))
        scale, shift = self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None].chunk(2, 1)
        x = self.first(x)
        y = F.silu(self.norm2(self.one(F.silu(self.norm1(x)))) * (1 + scale) + shift)
        x = x + self.two(y)
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).reshape(B, 3, 4, C // 4, H * W).unbind(1)
        weights = torch.softmax(q.transpose(-1, -2) @ k * (C // 4) ** -0.5, -1)
        return self.last(x + self.out((v @ weights.transpose(-1, -2)).reshape(B, C, H, W)))


class Recommender(nn.Module):
    """Embeddings of items and users, their product and an MLP (NeuMF)."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(30, 16), nn.Embedding(40, 16)
        self.user2, self.item2 = nn.Embedding(30, 24), nn.Embedding(40, 24)
        self.one, self.two, self.head = nn.Linear(48, 40), nn.Linear(40, 20), nn.Linear(36, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        deep = torch.cat([self.user2(user), self.item2(item)], -1)
        deep = F.relu(self.two(F.relu(self.one(deep))))
        return self.head(torch.cat([self.user(user) * self.item(item), deep], -1))


class Siamese(nn.Module):
    """One encoder for two pictures, their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = plain(), nn.Linear(2 * CLASSES, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one, other = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(one - other).abs(), one * other], 1))


def image(pixels: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, pixels, pixels)


def graph() -> dict[str, Tensor]:
    return {"nodes": torch.randn(9, 10), "edges": torch.randint(0, 9, (20, 2))}


def dense_graph() -> dict[str, Tensor]:
    return {"nodes": torch.randn(9, 10), "near": ((torch.rand(9, 9) < 0.4) | torch.eye(9).bool()).float()}


def several() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH)
    mask[1, 7:] = 0
    return {"left": torch.randn(2, 10), "right": torch.randn(2, 6), "words": tokens(), "mask": mask}


def sequence() -> Tensor:
    return torch.randn(2, 8, 20)


def quantised() -> Built:
    """A network after dynamic quantisation: nothing to prune, and said so."""
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}), torch.randn(2, 20)


def normed() -> nn.Module:
    """Two convolutions under a weight norm, and a plain one."""
    layers = (parametrizations.weight_norm(nn.Conv1d(*item, 3, padding=1)) for item in ((4, 32), (32, 24)))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv1d(24, CLASSES, 1))


def mixture() -> Built:
    """Splines before and after."""
    return nn.Sequential(KanLayer(12, 40), KanLayer(40, 24), KanLayer(24, CLASSES)), torch.rand(
        2, 12
    ) * 1.6 - 0.8


OWN: dict[str, Callable[[], Built]] = {
    "lstm-tagger": lambda: (Tagger(nn.LSTM), tokens()),
    "gru-tagger": lambda: (Tagger(nn.GRU, 1, False), tokens()),
    "rnn-tagger": lambda: (Tagger(nn.RNN, 2, True), tokens()),
    "lstm-packed": lambda: (Tagger(nn.LSTM, 1, True, packed=True), tokens()),
    "gru-last-state": lambda: (LastState(), tokens()),
    "lstm-cell": lambda: (Cells(nn.LSTMCell), sequence()),
    "gru-cell": lambda: (Cells(nn.GRUCell), sequence()),
    "rnn-cell": lambda: (Cells(nn.RNNCell), sequence()),
    "rnn-by-hand": lambda: (Loop(), sequence()),
    "gru-translator": lambda: (Translator(), {"source": tokens(), "written": tokens()}),
    "crnn": lambda: (Crnn(), torch.randn(2, 1, 16, 40)),
    "kan": mixture,
    "mlp-kan": lambda: (MlpKan(), torch.randn(2, 16)),
    "wavenet-weight-norm": lambda: (WaveNet(parametrizations.weight_norm), torch.randn(2, 1, 40)),
    "wavenet-old-weight-norm": lambda: (WaveNet(old_norm), torch.randn(2, 1, 40)),
    "spectral-discriminator": lambda: (discriminator(), image()),
    "weight-standardised": lambda: (standardised(), image()),
    "transformer-encoder": lambda: (Encoder(), tokens()),
    "transformer-decoder": lambda: (Decoder(), {"tokens": tokens(), "features": torch.randn(2, 9, 20)}),
    "cross-attention": lambda: (Cross(), image(16)),
    "nanogpt": lambda: (NanoGpt(), tokens()),
    "repvgg-train": lambda: (repvgg(False), image()),
    "repvgg-train-identity": lambda: (repvgg(True), image()),
    "tcn": lambda: (tcn(True), torch.randn(2, 4, 40)),
    "tcn-without-skips": lambda: (tcn(False), torch.randn(2, 4, 40)),
    "unet": lambda: (UNet(True), image()),
    "unet-without-skips": lambda: (UNet(False), image()),
    "graph-index-add": lambda: (Graph(False), graph()),
    "graph-scatter": lambda: (Graph(True), graph()),
    "graph-attention": lambda: (GraphAttention(), dense_graph()),
    "graph-convolution": lambda: (GraphConvolution(), dense_graph()),
    "yolo11": lambda: (Yolo(), image(64)),
    "mixture-by-einsum": lambda: (RoutedMlp(), torch.randn(2, 16)),
    "autoencoder-tied": lambda: (Autoencoder(), torch.randn(2, 36)),
    "mamba-by-hand": lambda: (SelectiveScan(), tokens()),
    "rwkv-by-hand": lambda: (TimeMix(), tokens()),
    "dcgan-generator": lambda: (Generator(), torch.randn(2, 20)),
    "super-resolution": lambda: (SuperResolution(), image(16)),
    "diffusion": lambda: (Diffusion(), {"x": image(8), "t": torch.rand(2)}),
    "recommender": lambda: (Recommender(), {"user": torch.tensor([3, 8]), "item": torch.tensor([5, 1])}),
    "siamese": lambda: (Siamese(), {"left": image(), "right": image()}),
    "users-yolo-detect": lambda: (SmallYolo(), image(64)),
    "users-lstm-layernorm": lambda: (NormedCell(), sequence()),
    "users-weight-norm": lambda: (normed(), torch.randn(2, 4, 20)),
    "users-partial-conv": lambda: (PartialConv(), image()),
    "users-several-inputs": lambda: (Inputs(), several()),
    "users-data-parallel": lambda: (nn.DataParallel(plain()), image()),
    "users-compiled": lambda: (torch.compile(plain(), backend="eager"), image()),
    "users-hooked": lambda: (Hooked(), image()),
    "users-parallel-branches": lambda: (TwoPaths(), torch.randn(2, 16)),
    "users-quantised": quantised,
}  # fmt: skip


def build(name: str) -> Built:
    """Return a network of this file and its batch of two examples."""
    return OWN[name]()
