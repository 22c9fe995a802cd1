"""Closed-form repair of the consumers: what stays takes over what the removed did (docs/method.md section 5).

Legend: K, R = features that stay, that leave; y = the features that a consumer reads, n of them;
W = its weight along y; S = second moments of y.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cria_prune.base.events import passed
from cria_prune.errors import SignalError
from cria_prune.graph import Moments
from cria_prune.modules import copy_of, named_tensors
from cria_prune.structure.groups import ParameterSlice, UnitGroup, UnitGroups
from cria_prune.surgery.lines import Lines
from cria_prune.surgery.sketched import repair_from_sketch

RIDGE = 1e-4
FEWEST, WIDEST = 32, 16384
"""Samples that say how features go together; features whose exact second moments are one matrix (2 GB)."""
_BIASED = (nn.Linear, nn.modules.conv._ConvNd)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True)
class Repair:
    """What became of one consumer.

    Attributes:
        tensor: its weight.
        recovered: share of the energy that its output loses with the removed units, and that the others
            give back, by the recorded moments; between 0 and 1 up to the ridge. From a sketch, of what is
            to be expected on other samples.
        bias: its bias took the mean; without one, the units that stay stand in for the mean too.
    """

    tensor: str
    recovered: float
    bias: bool


def compensate(
    model: nn.Module,
    groups: UnitGroups,
    kept: Mapping[str, Sequence[int]],
    consumed: Mapping[str, Mapping[str, Moments]],
    *,
    ridge: float = RIDGE,
) -> tuple[nn.Module, tuple[Repair, ...]]:
    """Return a copy of a model whose consumers do with the units that stay what they did with all.

    The best linear prediction of the features that leave, y_R ~ A y_K (+ c), goes into the weights of
    those that stay: W_K += W_R A with A = S_RK (S_KK + eI)^-1, kernel place by kernel place. With a bias the
    moments are centred and the bias gets W_R c; a bias is never added. No gradient, no training.

    From a sketch (features above `RecordConfig.exact_units`) the same without S, in time and memory linear
    in the features, with a ridge of its own choice: see `repair_from_sketch`.

    Groups whose units a normalisation takes its statistics over are passed over (other units change when
    some leave), and so are consumers whose weight does not lie along the signal that was recorded (grouped
    convolutions), those with fewer than 32 samples (or columns of a sketch), and those that read more than
    16,384 features of which exact moments were kept. The removed units are still there: `apply` cuts them.

    Args:
        model: the model that the groups are of; it is left as it was.
        kept: group name -> units that stay.
        consumed: group name -> consumer's tensor -> moments of the features that it reads (n = units times
            width, the features of a unit in a row), see `GroupStates.consumed`.
        ridge: e, in mean second moments of the features that stay, > 0; for exact moments.

    Raises:
        SignalError: the moments do not fit the group, or the ridge is not positive.
    """
    passed("repair", kept=kept, consumed=consumed)
    if not ridge > 0:
        raise SignalError("Repairing consumers", f"found ridge={ridge}", "Use a ridge > 0")
    repaired = copy_of(model)
    tensors, modules = named_tensors(repaired), dict(repaired.named_modules(remove_duplicate=False))
    repairs = []
    for group in groups.prunable:
        stays = kept.get(group.name, range(group.size))
        if len(stays) == group.size or group.normed:
            continue
        for item in group.consumers:
            moments = consumed.get(group.name, {}).get(item.tensor)
            if moments is None or not _along_signal(group, item):
                continue
            if _too_few(moments) or (moments.covariance is not None and moments.units > WIDEST):
                continue
            bias = _bias_of(item, modules, tensors)
            repairs.append(_repair(group, item, tensors[item.tensor], bias, stays, moments, ridge))
    return repaired, tuple(repairs)


def _too_few(moments: Moments) -> bool:
    columns = moments.samples if moments.sketch is None else moments.sketch.shape[1]
    return min(moments.samples, columns) < FEWEST


def _along_signal(group: UnitGroup, item: ParameterSlice) -> bool:
    return any(
        tap.tensor == item.tensor and np.array_equal(tap.positions, item.positions) for tap in group.outputs
    )


def _bias_of(
    item: ParameterSlice, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> Tensor | None:
    """Return the bias that is added once to the sum over all kernel places, where that is known."""
    path, _, name = item.tensor.rpartition(".")
    layer = modules.get(path)
    known = isinstance(layer, _BIASED) or type(layer).__name__ == "Conv1D"
    if isinstance(layer, _TRANSPOSED) and max(layer.stride) > 1:  # not every output sees every kernel place
        return None
    return tensors.get(f"{path}.bias") if known and name == "weight" else None


def _repair(
    group: UnitGroup,
    item: ParameterSlice,
    weight: Tensor,
    bias: Tensor | None,
    stays: Sequence[int],
    moments: Moments,
    ridge: float,
) -> Repair:
    """Change one consumer's weight, and its bias where it has one, in place."""
    if moments.units != item.positions.size:
        raise SignalError(
            f"Repairing {item.tensor!r}, which reads group {group.name!r}",
            f"found moments of {moments.units} features, it reads {item.positions.size}",
            "Record this model again",
        )
    K, R = _features(group.size, item.positions.shape[1], stays)
    with torch.no_grad():
        lines = Lines(weight, item.dim, torch.from_numpy(item.positions.ravel()))
        if moments.covariance is not None:
            step, lost, left = _from_covariance(lines, moments, K, R, bias is not None, ridge)
        else:
            step, lost, left = repair_from_sketch(lines, moments, K, R, centred=bias is not None)
        if bias is not None:
            outputs = step.reshape(lines.shape)  # (outputs, kernel places ...)
            bias += outputs.flatten(1).sum(dim=1).to(bias) if outputs.ndim > 1 else outputs.to(bias)
    return Repair(item.tensor, 1 - left / lost if lost > 0 else 1.0, bias is not None)


def _from_covariance(
    lines: Lines, moments: Moments, K: Tensor, R: Tensor, centred: bool, ridge: float
) -> tuple[Tensor, float, float]:
    """Repair by the exact second moments; returns what `repair_from_sketch` does."""
    S = _second_moments(moments, centred)
    mean = moments.mean.to(S)
    A = _predictor(S, K, R, ridge)
    removed = lines.read(R, S.device)
    lines.add(K, A.T @ removed)
    SRR = S[R[:, None], R]
    left = SRR - A @ S[K[:, None], R]
    energy = SRR + torch.outer(mean[R], mean[R]) if centred else SRR
    lost, stayed = (float((removed * (matrix @ removed)).sum()) for matrix in (energy, left))
    return (mean[R] - A @ mean[K]) @ removed, lost, stayed


def _features(units: int, width: int, stays: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the features of the units that stay and of those that leave, each ascending."""
    keeps = torch.zeros(units, dtype=torch.bool)
    keeps[torch.as_tensor(np.asarray(stays, dtype=np.int64))] = True
    keeps = keeps.repeat_interleave(width)
    return keeps.nonzero()[:, 0], (~keeps).nonzero()[:, 0]


def _second_moments(moments: Moments, centred: bool) -> Tensor:
    """Return S (n, n) float64: the covariance, with the products of the means if not centred."""
    assert moments.covariance is not None
    S = moments.covariance.to(torch.float64)
    return S if centred else S + torch.outer(moments.mean, moments.mean).to(S)


def _predictor(S: Tensor, K: Tensor, R: Tensor, ridge: float) -> Tensor:
    """Return A (removed, kept): the best linear prediction of y_R from y_K."""
    SKK = S[K[:, None], K]
    size = float(SKK.diagonal().mean())
    if size <= 0:  # what stays is constant: it predicts nothing
        return S.new_zeros(len(R), len(K))
    SKK.diagonal().add_(ridge * size)
    factor = torch.linalg.cholesky(SKK)
    del SKK  # (K, K) twice is enough
    return torch.cholesky_solve(S[K[:, None], R], factor).T
