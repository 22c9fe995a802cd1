"""Small nets whose unit groups are written by hand, for the tests of recording and criteria."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cria_prune.structure.groups import ParameterSlice, Tap, UnitGroup, UnitGroups


def each(units, width=1):
    return np.arange(units * width, dtype=np.int64).reshape(units, width)


def slices(units, producers=(), followers=(), consumers=(), width=1):
    """(tensor name) lists to slices: producers and followers along dimension 0, consumers along 1."""
    return (
        *(ParameterSlice(name, 0, each(units), "produces") for name in producers),
        *(ParameterSlice(name, 0, each(units), "follows") for name in followers),
        *(ParameterSlice(name, 1, each(units, width), "consumes") for name in consumers),
    )


def gather(model, *groups):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return UnitGroups(tuple(groups), shapes, tuple(dict(model.named_parameters())), {})


def conv_net(units=6, dtype=torch.float32):
    """conv, batch norm, ReLU, conv, ReLU, flatten, linear: groups 0 and 3 (width 16 at the linear)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, units, 3, padding=1),
        nn.BatchNorm2d(units),
        nn.ReLU(inplace=True),
        nn.Conv2d(units, 5, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(80, 4),
    ).to(dtype)
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    follow = ["0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    a = UnitGroup(
        "0",
        "channel",
        units,
        units,
        slices(units, ["0.weight"], follow, ["3.weight"]),
        (Tap("1.weight", "output", 1, each(units)),),
        (Tap("3.weight", "input", 1, each(units)),),
    )
    b = UnitGroup(
        "3",
        "channel",
        5,
        5,
        slices(5, ["3.weight"], ["3.bias"], ["6.weight"], width=16),
        (Tap("3.weight", "output", 1, each(5)),),
        (Tap("6.weight", "input", -1, each(5, 16)),),
    )
    out = UnitGroup("6", "neuron", 4, 4, slices(4, ["6.weight"], ["6.bias"]), frozen="a network output")
    return model.eval(), gather(model, a, b, out)


class Mlp(nn.Module):
    """linear, ReLU, a shared linear twice, linear; the last one by functional.linear with keywords."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(7, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = functional.relu(self.first(x), inplace=True)
        x = functional.relu(self.shared(x), inplace=True)
        x = functional.relu(self.shared(x), inplace=True)
        return functional.linear(input=x, bias=self.last.bias, weight=self.last.weight)


def mlp(dtype=torch.float32):
    torch.manual_seed(1)
    model = Mlp().to(dtype).eval()
    hidden = UnitGroup(
        "first",
        "neuron",
        8,
        8,
        slices(
            8,
            ["first.weight", "shared.weight"],
            ["first.bias", "shared.bias"],
            ["shared.weight", "last.weight"],
        ),
        (Tap("first.weight", "output", -1, each(8)), Tap("shared.weight", "output", -1, each(8))),
        (Tap("shared.weight", "input", -1, each(8)), Tap("last.weight", "input", -1, each(8))),
    )
    return model, gather(model, hidden)


def images(examples, batch=8, dtype=torch.float32, side=8):
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(examples, 3, side, side, generator=generator, dtype=dtype)
    y = torch.randint(0, 4, (examples,), generator=generator)
    return [(X[i : i + batch], y[i : i + batch]) for i in range(0, examples, batch)]


def test_nets_run():
    assert conv_net()[0](images(2)[0][0]).shape == (2, 4)
    assert mlp()[0](torch.zeros(2, 7)).shape == (2, 3)
