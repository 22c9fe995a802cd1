"""Blocks of detectors after YOLOv8 and YOLO11, for the networks of `zoo_own`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(
        self, inner: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__(
            nn.Conv2d(inner, out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out),
            nn.SiLU() if act else nn.Identity(),
        )


class Bottleneck(nn.Module):
    """Two convolutions; with a skip where the width stays."""

    def __init__(self, inner: int, out: int, share: float = 0.5, normed: bool = True) -> None:
        super().__init__()
        hidden = int(out * share)
        if normed:
            self.one, self.two = ConvNorm(inner, hidden, 3), ConvNorm(hidden, out, 3)
        else:
            self.one = nn.Sequential(nn.Conv2d(inner, hidden, 3, 1, 1), nn.ReLU())
            self.two = nn.Conv2d(hidden, out, 3, 1, 1)
        self.skip = inner == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        return x + y if self.skip else y


class C2f(nn.Module):
    """Halves, a chain of bottlenecks, everything concatenated (YOLOv8)."""

    def __init__(self, inner: int, out: int, count: int = 1) -> None:
        super().__init__()
        self.half = out // 2
        self.first, self.last = ConvNorm(inner, out, 1), ConvNorm((2 + count) * self.half, out, 1)
        self.chain = nn.ModuleList(Bottleneck(self.half, self.half, 1.0) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.chain)
        return self.last(torch.cat(parts, 1))


class C3(nn.Module):
    """Two ways, one with two bottlenecks, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.one, self.two, self.last = (
            ConvNorm(width, half, 1),
            ConvNorm(width, half, 1),
            ConvNorm(2 * half, width, 1),
        )
        self.chain = nn.Sequential(Bottleneck(half, half, 1.0), Bottleneck(half, half, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.chain(self.one(x)), self.two(x)], 1))


class C3k2(nn.Module):
    """C2f whose chain is a bottleneck or a C3 (YOLO11); the halves by `split` in the forward."""

    def __init__(self, inner: int, out: int, deep: bool = False) -> None:
        super().__init__()
        self.half = out // 2
        self.first, self.last = ConvNorm(inner, out, 1), ConvNorm(3 * self.half, out, 1)
        self.chain = C3(self.half) if deep else Bottleneck(self.half, self.half)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x).split((self.half, self.half), 1)
        return self.last(torch.cat([one, other, self.chain(other)], 1))


class Pooling(nn.Module):
    """SPPF: three poolings in a row, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = ConvNorm(width, width // 2, 1), ConvNorm(width * 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class PixelAttention(nn.Module):
    """C2PSA: half of the channels attend over pixels, with a depthwise position and a feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half, self.heads = width // 2, 2
        self.head = self.half // self.heads
        self.key = self.head // 2
        self.first, self.last = ConvNorm(width, width, 1), ConvNorm(width, width, 1)
        self.qkv = ConvNorm(self.half, self.half + 2 * self.key * self.heads, 1, act=False)
        self.position = ConvNorm(self.half, self.half, 3, groups=self.half, act=False)
        self.project = ConvNorm(self.half, self.half, 1, act=False)
        self.up, self.down = (
            ConvNorm(self.half, 2 * self.half, 1),
            ConvNorm(2 * self.half, self.half, 1, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x).split((self.half, self.half), 1)
        B, C, H, W = other.shape
        qkv = self.qkv(other).view(B, self.heads, 2 * self.key + self.head, H * W)
        q, k, v = qkv.split([self.key, self.key, self.head], 2)
        weights = (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(B, C, H, W) + self.position(v.reshape(B, C, H, W))
        other = other + self.project(y)
        return self.last(torch.cat([one, other + self.down(self.up(other))], 1))


class Detect(nn.Module):
    """Decoupled heads: distances as distributions, decoded to boxes in evaluation mode."""

    def __init__(self, classes: int, widths: tuple[int, ...], bins: int = 8) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvNorm(w, 32, 3), ConvNorm(32, 32, 3), nn.Conv2d(32, 4 * bins, 1)) for w in widths
        )
        self.kinds = nn.ModuleList(
            nn.Sequential(ConvNorm(w, w, 3, groups=w), ConvNorm(w, 24, 1), nn.Conv2d(24, classes, 1))
            for w in widths
        )
        self.register_buffer("places", torch.arange(bins, dtype=torch.float32))

    def forward(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        found = [
            torch.cat([boxes(x), kinds(x)], 1)
            for boxes, kinds, x in zip(self.boxes, self.kinds, maps, strict=True)
        ]
        if self.training:
            return found
        flat = torch.cat([x.view(x.shape[0], 4 * self.bins + self.classes, -1) for x in found], 2)
        boxes, kinds = flat.split((4 * self.bins, self.classes), 1)
        B, _, count = boxes.shape
        distances = boxes.view(B, 4, self.bins, count).softmax(2)
        distances = (distances * self.places[:, None]).sum(2)
        return torch.cat([distances, kinds.sigmoid()], 1)
