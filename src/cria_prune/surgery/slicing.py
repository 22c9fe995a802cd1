"""(tensor, dimension, kept positions) -> smaller tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def slice_tensor(tensor: Tensor, cuts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return a contiguous copy of `tensor` that keeps the given positions of each named dimension.

    A parameter stays a parameter with the same `requires_grad`; its gradient is dropped. Works on
    the meta device too.

    >>> slice_tensor(torch.arange(6).reshape(2, 3), [(1, [0, 2])])
    tensor([[0, 2],
            [3, 5]])
    """
    smaller = tensor.detach()
    for dim, kept in cuts:
        smaller = smaller.index_select(dim, torch.as_tensor(kept, dtype=torch.long, device=tensor.device))
    smaller = smaller.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller
