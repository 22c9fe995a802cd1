"""The Plan: what stays of every group, and of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorCut:
    """What stays of one tensor along one dimension.

    Attributes:
        tensor: qualified name of a parameter or buffer of the dense model.
        dim: dimension.
        size: length of the dimension before the cut.
        kept: positions that stay, ascending.
        role: `produces`, `consumes` or `follows`, see `ParameterSlice`.
    """

    tensor: str
    dim: int
    size: int
    kept: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Plan:
    """Kept units per group and kept positions per tensor, relative to the model it applies to.

    Attributes:
        sizes: group name -> units before.
        kept: group name -> unit indices that stay, ascending.
        cuts: the same as positions in tensors: all that surgery needs.
        report: asked, reached and reachable shares and their denominators.
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]
    cuts: tuple[TensorCut, ...]
    report: Mapping[str, float | str]
