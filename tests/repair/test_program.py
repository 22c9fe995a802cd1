"""Captured operations, run step by step: the output is the model's, and the model stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cria_prune.base.batches import model_inputs
from cria_prune.base.errors import CaptureError
from cria_prune.repair.program import Program, Run, programs_for
from cria_prune.structure.trace import canonical_tensors
from networks import Mixed, OptionA, Plain, randomize


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(model: nn.Module, batches: list[Any], programs: int) -> list[Program]:
    """Each batch's output by its program is the model's, bit for bit; nothing of either is changed."""
    model.eval()
    before = [tensor.clone() for tensor in canonical_tensors(model).values()]
    copies = [
        [item.clone() for item in torch.utils._pytree.tree_leaves(batch) if isinstance(item, Tensor)]
        for batch in batches
    ]
    found = programs_for(model, batches)
    assert len(set(map(id, found))) == programs
    with torch.no_grad():
        runs = [
            Run(program, batch, torch.device("cpu")) for program, batch in zip(found, batches, strict=True)
        ]
        for run in runs:  # stopped in between, and some of it run twice
            run.advance(len(run.program.steps) // 2, canonical_tensors(model).__getitem__)
            run.release()
        outputs = [run.outputs(canonical_tensors(model).__getitem__) for run in runs]
        assert all(map(torch.equal, canonical_tensors(model).values(), before))
        for run, batch, copied, output in zip(runs, batches, copies, outputs, strict=True):
            leaves = [item for item in torch.utils._pytree.tree_leaves(batch) if isinstance(item, Tensor)]
            assert all(map(torch.equal, leaves, copied))
            # what nobody reads any more is let go: the outputs and what was there before are left
            kept = [run.program.steps[item] for item in run.values if item not in run.program.outputs]
            assert all(step.kind != "call" for step in kept), [step.name for step in kept]
            args, kwargs = model_inputs(
                torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
            )
            expected = [
                item
                for item in torch.utils._pytree.tree_leaves(model(*args, **kwargs))
                if isinstance(item, Tensor)
            ]
            assert len(output) == len(expected)
            for one, other in zip(output, expected, strict=True):
                assert torch.equal(one, other)
    return found


@pytest.mark.parametrize("kind", [Plain, OptionA, Mixed])
def test_the_output_is_the_models(kind: type[nn.Module]) -> None:
    check(randomize(kind()), [drawn(4, 3, 8, 8), drawn(3, 3, 8, 8)], 2)


class Many(nn.Module):
    """Inputs by keyword in another order than the forward's, a flag, a list, a write into an input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(
        self, a: Tensor, b: Tensor, scale: float = 1.0, more: Any = None, double: bool = False
    ) -> Any:
        self.seen += 1
        a.mul_(2)
        with torch.no_grad():
            x = self.one(a) * scale + self.table
        x = x + self.two(b) + more[0]
        return {"x": x * 2 if double else x, "a": a, "pair": (x + 1, None, 3)}


def many(size: int = 4, **other: Any) -> dict[str, Any]:
    return {"b": drawn(size, 5), "more": [drawn(size, 3)], "a": drawn(size, 4), "scale": 0.5, **other}


def test_inputs_by_keyword_and_what_is_written_into() -> None:
    """The counter and the input of the caller are left alone, in every batch."""
    found = check(Many(), [many(), many(double=True), many(3), many()], 3)
    assert found[0] is found[3] and found[0] is not found[1]


class Attends(nn.Module):
    """Sizes of the input stand in reshapes and in a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, 2, 3).permute(2, 0, 3, 1, 4)
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, 6)
        return self.out(y).mean(1)


def test_many_shapes_are_one_program_with_open_sizes() -> None:
    sizes = [(4, 5), (4, 7), (3, 4), (2, 9), (4, 2), (1, 6)]
    check(Attends(), [drawn(*size, 6) for size in sizes], 1)


class Fixed(Attends):
    """Its forward takes the length for a number of Python: each shape is an own program."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * sum(range(int(x.shape[1])))


def test_sizes_that_a_forward_counts_with_are_captured_one_by_one() -> None:
    check(Fixed(), [drawn(2, size, 6) for size in (3, 4, 5, 6, 3)], 4)


class Asks(Attends):
    """Its forward does something else with a long sequence, and with an even one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.shape[1] > 4 else 1) * (3 if x.shape[0] % 2 else 1)


@pytest.mark.parametrize("sizes", [[(2, 3), (2, 4), (2, 7), (2, 8)], [(2, 3), (3, 3), (4, 3), (5, 3)]])
def test_sizes_that_a_forward_asks_for_are_captured_one_by_one(sizes: list[tuple[int, int]]) -> None:
    check(Asks(), [drawn(*size, 6) for size in sizes], 4)


def test_an_open_size_that_is_taken_for_a_number_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"any size of dimension 1.*takes it for 4"):
        Program(Fixed().eval(), drawn(2, 4, 6), frozenset([(0, 1)]))


class Cast(nn.Module):
    """A block under autocast, with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.one(x)
            z = self.two(F.relu(y))
        with torch.autocast("cpu", enabled=False):
            y = y.float() + 1
        return y, z.float()


def test_autocast_is_kept() -> None:
    check(Cast(), [drawn(4, 6)], 1)
