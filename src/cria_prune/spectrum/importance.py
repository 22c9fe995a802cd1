"""One score per unit, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Diagnosis:
    """How far a score can be trusted.

    Attributes:
        pieces_in, pieces_out: connected components of the graphs before the ridge; None without graph.
        dead: units with a constant output, in order; their score is 0.
        residual: largest relative residual of the solver; None where nothing was solved.
        gap: (z_s − z_{s+1}) / z_s at the cut; None with all pairs.
        split_half: rank correlation of the scores from two halves of the samples; the caller fills it.
        solver: "dense", "lobpcg", "lanczos", "pcg", "cholesky" or "none".
        values: top eigenvalues z, at most 32; empty without eigensolver, as with all pairs above 64 units.
        status: "converged", "unconverged" or "nothing to solve".
        unreached: experts of the layer that no example was sent to, by number: their share of a unit is
            judged by the signals of the other experts.
    """

    pieces_in: int | None = None
    pieces_out: int | None = None
    dead: tuple[int, ...] = ()
    residual: float | None = None
    gap: float | None = None
    split_half: float | None = None
    solver: str = "none"
    values: tuple[float, ...] = ()
    status: str = "nothing to solve"
    unreached: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them; `unreached` only where there are some."""
        fields = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {key: value for key, value in fields.items() if value or key != "unreached"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the diagnosis that `to_dict` made these fields of."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class Importance:
    """One score per unit: high is kept, low is a candidate for removal.

    Attributes:
        scores: (d,) float64, dead units 0, all others positive.
        diagnosis: how far to trust them.
    """

    scores: Tensor
    diagnosis: Diagnosis

    def __repr__(self) -> str:
        d = self.diagnosis
        pieces = "" if d.pieces_in is None else f", {d.pieces_in} and {d.pieces_out} pieces"
        residual = "" if d.residual is None else f", residual {d.residual:.1e}"
        split = "" if d.split_half is None else f", split-half {d.split_half:.2f}"
        return (
            f"Importance of {len(self.scores)} units, {len(d.dead)} dead{pieces}; "
            f"{d.solver}: {d.status}{residual}{split}"
        )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of a and b (d,), average ranks at ties; 0 if one is constant.

    Examples:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0]))
        1.0
    """
    a, b = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return 0.0
    from scipy.stats import spearmanr  # half a second, which a command that scores nothing need not wait

    value = float(spearmanr(a.numpy(), b.numpy()).statistic)
    return round(value, 12) if value == value else 0.0
