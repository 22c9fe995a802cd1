"""Small hand-written networks for the tests, one for each rule; `generator.py` draws random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and slopes that a mistake cannot hide behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model.eval()


class Plain(nn.Module):
    """Convolutions with batch norm, in-place activation, a flatten and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        return self.fc2(torch.tanh(self.fc1(torch.flatten(x, 1))))


class OptionA(nn.Module):
    """A residual network whose second stage has the padded, strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.b2(F.relu(self.b1(x))) + short)
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excitation, chunk, concatenation, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depthwise, self.bn = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Linear(16, 5), nn.Linear(5, 16)
        self.project = nn.Conv2d(16, 12, 1)
        self.grouped = nn.Conv2d(12, 9, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(21, 6, 2, stride=2)
        self.slope = nn.PReLU(6)
        self.shared, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.depthwise(F.relu6(self.expand(x)))))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = self.project(x * scale[:, :, None, None])
        first, second = x.chunk(2, dim=1)
        x = torch.cat([second, self.grouped(x), first], dim=1)
        x = self.slope(self.up(x)).amax((2, 3))
        return self.out(F.relu(self.shared(F.relu(self.shared(x)))))


class Literal(nn.Module):
    """A reshape to a number that is written down: it cannot follow a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.free, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.reshape(x.shape[0], 8, -1).softmax(-1).reshape(x.shape)
        return self.fc(self.free(x).mean((2, 3)))


class Adaptive(Literal):
    """The same reshape, read from the input: it follows a cut."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).softmax(-1).reshape(x.shape)
        return self.fc(self.free(x).mean((2, 3)))


class NoRule(nn.Module):
    """Channels that are sorted by value: an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sort(self.conv(x), dim=1).values
        return self.fc(F.relu(self.mid(x)).mean((2, 3)))
