"""Repair of the consumers in closed form: what stays takes over what the removed units did.

Legend: n = features that a consumer reads, K, R = those that stay and those that leave,
W = its weight, one line (outputs times kernel places) for each feature, S (n, n) =
second moments, A (|R|, |K|) = the best linear prediction of y_R from y_K, e = ridge, r
= columns of a sketch, B (n, r) = the sketch over √M (docs/method.md section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cria_prune.base.errors import SignalError
from cria_prune.base.events import passed
from cria_prune.base.modules import copy_of, named_tensors
from cria_prune.graph.moments import BLOCK, Moments, sketch_gram, sketch_rows
from cria_prune.structure.groups import ParameterSlice, UnitGroup, UnitGroups


class Lines:
    """The weights that read each feature; what is added goes into the weight itself.

    Args:
        weight: the consumer's weight.
        dim: along which the features lie.
        positions: (n,) int64, where along it feature 0, 1, ... lies.
    """

    def __init__(self, weight: Tensor, dim: int, positions: Tensor) -> None:
        self._view = weight.movedim(dim, 0)
        self._positions = positions.to(weight.device)
        self.shape = self._view.shape[1:]

    def read(self, features: Tensor, device: torch.device) -> Tensor:
        """Return the weights of features (b,): (b, outputs times kernel places) float64 on a device."""
        return self._view[self._where(features)].flatten(1).to(device, torch.float64)

    def add(self, features: Tensor, update: Tensor) -> None:
        """Add an update (b, outputs times kernel places) float64; each weight is rounded once."""
        # Added in float64 and rounded once into the weight's own
        # type; half types would lose small updates otherwise.
        total = self.read(features, update.device).add_(update)  # what is read is a copy
        self._view[self._where(features)] = total.reshape(len(features), *self.shape).to(self._view)

    def _where(self, features: Tensor) -> Tensor:
        return self._positions[features.to(self._positions.device)]


RIDGES = tuple(10 ** (step / 2) for step in range(-8, 7))
"""What is tried, in |K|/r mean second moments of what stays: the size of the sketch's own noise."""


def repair_from_sketch(
    lines: Lines, moments: Moments, K: Tensor, R: Tensor, centred: bool
) -> tuple[Tensor, float, float]:
    """Give the features that stay what they predict of those that leave, with the ridge that predicts best.

    The update of W_K, (B_K B_Kᵀ + eI)⁻¹ B_K B_Rᵀ W_R, pushed through to the (r, r) side, is
    B_K (B_KᵀB_K + eI)⁻¹ B_Rᵀ W_R. One eigendecomposition of B_KᵀB_K serves every ridge; O(n r (r + outputs))
    time, O(r (r + outputs)) memory beside the sketch, whatever n is.

    A column of a sketch is as good as a sample, and there are fewer of them than features: with a ridge that
    suits exact moments (1e-4) the repair fits the sketch's noise, and can be far worse than none. So the
    ridge is that of the least generalised cross-validation ‖(I − H) B_RᵀW_R‖² / (1 − tr H / r)²,
    H = B_KᵀB_K (B_KᵀB_K + eI)⁻¹, an estimate of the error on other samples (Golub, Heath and Wahba,
    Technometrics 21, 1979); where none is below the error without repair, W_K stays. The fixed d/r of
    Marchenko and Pastur is right within a factor of 1,000 only. docs/decisions/0015 has the numbers.

    Args:
        lines: the weight; it is changed in place.
        moments: of the n features, with a sketch.
        K, R: (|K|,), (|R|,) int64.
        centred: leave the means out; otherwise they are one more column.

    Returns:
        What the bias has to grow by where the moments are centred (outputs,), the energy that the outputs
        lose with R, and the part of it that is expected to stay lost on other samples.
    """
    assert moments.sketch is not None
    sketch, mean, device = moments.sketch, moments.mean, moments.sketch.device
    if not centred:
        # A sketch is of centred signals. One more column √M m adds m mᵀ: without
        # a bias the units that stay have to stand in for the mean as well.
        column = mean[:, None].to(sketch) * moments.samples**0.5
        sketch = torch.cat([sketch, column], dim=1)
    # What the removed features do to the outputs, seen by each column as by a sample: B_Rᵀ W_R.
    target = sketch.new_zeros(sketch.shape[1], lines.shape.numel(), dtype=torch.float64)
    step = target.new_zeros(target.shape[1])
    for part, rows in zip(R.split(BLOCK), sketch_rows(sketch, moments.samples, R), strict=True):
        removed = lines.read(part, device)
        target.addmm_(rows.T, removed)
        step += mean[part.to(device)] @ removed
        del removed  # or it would be held while the next block is read
    core, lost, left = _regress(sketch_gram(sketch, moments.samples, K), target)
    if centred:
        # The outputs lose the mean of what leaves as well, which the bias gives back whole.
        lost += float(step.square().sum())
    for part, rows in zip(K.split(BLOCK), sketch_rows(sketch, moments.samples, K), strict=True):
        update = rows @ core
        # The features that stay bring their own mean with the
        # update, so the bias grows by W_R m_R − ΔW_K m_K.
        step -= mean[part.to(device)] @ update
        lines.add(part, update)
        del update
    return step, lost, left


def _regress(gram: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
    """Return (G + eI)⁻¹ T (r, outputs) of the best ridge e or 0, ‖T‖², and what of it is left.

    Columns in which nothing lies, of a sketch of few samples, are no samples.
    """
    core, lost = torch.zeros_like(target), float(target.square().sum())
    alive = (gram.diagonal() > 0).nonzero()[:, 0]
    if not len(alive) or not lost:
        return core, lost, lost
    values, vectors = torch.linalg.eigh(gram[alive][:, alive])
    values = values.clamp(min=0)
    turned = vectors.T @ target[alive]
    energy, size = turned.square().sum(dim=1), float(values.mean())
    apart = max(lost - float(energy.sum()), 0.0)  # in columns without anything that stays
    # No repair is the one to beat. ‖(I − H) T‖² alone is always least at the
    # smallest ridge; divided by (1 − tr H / r)² it tells a fit from a fit to noise.
    left, chosen = lost, None
    for ridge in RIDGES:
        residual = ridge * size / (values + ridge * size)  # the eigenvalues of I − H
        error = float((residual.square() * energy).sum() / residual.mean().square()) + apart
        if error < left:
            left, chosen = error, ridge
    if chosen is not None:
        core[alive] = vectors @ (turned / (values + chosen * size)[:, None])
    return core, lost, left


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
        cut: it reads units of which some have left; else it was refitted since what it reads has drifted.
        samples, regressors: what it was fitted to, and how many features each of its outputs reads.
        ridge: chosen on held-out samples, in mean variances; None where none was better than no change.
        shortcut: its target held the error that the stream had gathered.
        effective: samples without those of examples that came twice.
        lacking: examples that should be added, for four effective samples of each regressor.
    """

    tensor: str
    recovered: float
    bias: bool
    cut: bool = True
    samples: int | None = None
    regressors: int | None = None
    ridge: float | None = None
    shortcut: bool = False
    effective: int | None = None
    lacking: int = 0


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
    # The moments are those of the network before the round, and the units that leave are still in the
    # weights: the repair comes before the cut, which is then compared with this copy (docs/decisions/0012).
    for group in groups.prunable:
        stays = kept.get(group.name, range(group.size))
        # Under a norm the features that stay are not what was recorded once others have left.
        if len(stays) == group.size or group.normed:
            continue
        made = {(item.tensor, item.dim) for item in group.producers}
        for item in group.consumers:
            # Of a weight that is read forwards and transposed, a repair of one layer would change the other.
            if (item.tensor, item.dim) in made:
                continue
            moments = consumed.get(group.name, {}).get(item.tensor)
            if moments is None or not _along_signal(group, item):
                continue
            if _too_few(moments) or (moments.covariance is not None and moments.units > WIDEST):
                continue
            # A bias is changed where there is one and never made:
            # whatever configuration held the network holds it still.
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
    # S_RR − A S_KR is the error of the prediction; through W_R it is what the outputs go on losing.
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
    # The ridge is relative to the features, so that no unit of the signals counts.
    size = float(SKK.diagonal().mean())
    if size <= 0:  # what stays is constant: it predicts nothing
        return S.new_zeros(len(R), len(K))
    SKK.diagonal().add_(ridge * size)
    factor = torch.linalg.cholesky(SKK)
    del SKK  # (K, K) twice is enough
    return torch.cholesky_solve(S[K[:, None], R], factor).T
