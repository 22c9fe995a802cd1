"""The regression of one layer: what it should give, from what it reads now (docs/method.md section 5).

Legend: M = samples, G = groups of a convolution (1 otherwise), n = regressors of a group: the features that
one output reads, o = outputs of a group, P (M, G, n) = regressors, R (M, G, o) = what is missing: the target
minus what the layer gives now. The update U (G, o, n) is that of least ‖R − U P‖² + λ ‖U‖²: it shrinks
towards the weights that are there, and is exactly 0 where nothing is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cria_prune.base.ranks import World
from cria_prune.repair.program import Look
from cria_prune.repair.sites import Site

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""What is tried for λ, in mean diagonals of E[P Pᵀ]."""
WIDEST = 8192
"""Regressors of which exact second moments are kept (0.5 GB); above, as many signed sums of samples."""
HELD = 4096
"""Held-out samples that a choice is made on, at most, over all processes."""


def regressors(site: Site, data: Tensor, weight: Tensor, places: Tensor) -> Tensor:
    """Return P (M, G, n), what each output at some places reads, in the order of the weight's elements.

    Args:
        site: the layer.
        data: its input: (..., n), or (B, channels, positions ...) of a convolution.
        weight: its weight now, for the size of the kernel.
        places: rows of the flattened input, or flat positions of a convolution's output, for all examples.
    """
    if not site.spatial:
        return data.reshape(-1, data.shape[-1]).index_select(0, places).unsqueeze(1)
    kernel = weight.shape[2:]
    windows = _windows(site, data, kernel)
    index = torch.unravel_index(places.cpu(), windows.shape[2 : 2 + site.spatial])
    index = tuple(item.to(data.device) for item in index)
    # (B, channels, places, kernel ...) -> (B · places, groups, channels of a group · kernel)
    every = slice(None)
    picked: Tensor = windows[(every, every, *index)]  # type: ignore[index]
    return picked.transpose(1, 2).reshape(len(data) * len(places), site.groups, -1)


def _windows(site: Site, data: Tensor, kernel: torch.Size) -> Tensor:
    """Return (B, channels, output positions ..., kernel ...), a view of the padded input."""
    if site.transposed:
        data, padding, stride = _spread(site, data, kernel), None, (1,) * site.spatial
    else:
        padding, stride = site.padding, site.stride
    if padding is not None:
        sides: list[int] = []
        for dim in reversed(range(site.spatial)):
            if isinstance(padding, str):
                whole = site.dilation[dim] * (kernel[dim] - 1) if padding == "same" else 0
                sides += [whole // 2, whole - whole // 2]
            else:
                sides += [padding[dim]] * 2
        data = F.pad(data, sides) if any(sides) else data
    for dim in range(site.spatial):
        data = data.unfold(2 + dim, site.dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])
    for dim, step in enumerate(site.dilation):
        if step > 1:
            at = 2 + site.spatial + dim
            data = data.movedim(at, -1)[..., ::step].movedim(-1, at)
    return data


def _spread(site: Site, data: Tensor, kernel: torch.Size) -> Tensor:
    """Return the input on which a plain convolution with the turned kernel is the transposed one."""
    size = [(n - 1) * step + 1 for n, step in zip(data.shape[2:], site.stride, strict=True)]
    spread = data.new_zeros(*data.shape[:2], *size)
    strided = spread
    for dim, step in enumerate(site.stride):
        strided = strided.unfold(2 + dim, 1, step).squeeze(-1)
    strided.copy_(data)
    sides: list[int] = []
    assert not isinstance(site.padding, str)
    for dim in reversed(range(site.spatial)):
        side = site.dilation[dim] * (kernel[dim] - 1) - site.padding[dim]
        sides += [side, side + site.output_padding[dim]]
    return F.pad(spread, sides)


def at_places(site: Site, output: Tensor, places: Tensor) -> Tensor:
    """Return the outputs at the same places: (M, G, o)."""
    if not site.spatial:
        return output.reshape(-1, output.shape[-1]).index_select(0, places).unsqueeze(1)
    flat = output.flatten(2).index_select(2, places)
    return flat.transpose(1, 2).reshape(len(output) * len(places), site.groups, -1)


def add_update(site: Site, weight: Tensor, update: Tensor) -> Tensor:
    """Return the weight with an update U (G, o, n) added, rounded once into its own type."""
    if site.transposed:
        kernel, each = weight.shape[2:], weight.shape[0] // site.groups
        update = update.reshape(site.groups, -1, each, *kernel).flip(tuple(range(3, 3 + site.spatial)))
        update = update.transpose(1, 2).reshape(weight.shape)
    elif site.experts is not None:
        update = update if site.outputs_first else update.mT
    elif site.outputs_first:
        update = update.reshape(weight.shape)
    else:
        update = update[0].T
    return (weight.double() + update.to(weight.device)).to(weight)


def changes_of(site: Site, look: Look, update: Tensor, shift: Tensor) -> list[tuple[str, Tensor]]:
    """Return a layer's new weight, and its new bias or the running mean behind it, by name.

    Args:
        site: the layer.
        look: name of a tensor to its value before.
        update: U (G, o, n); shift: what the outputs have to grow by, of as many elements.
    """
    changes = [(site.weight, add_update(site, look(site.weight), update))]
    name, sign = (site.bias, 1) if site.bias is not None else (site.norm, -1)
    if name is not None:
        before = look(name)
        changes.append((name, (before.double() + sign * shift.reshape(-1).to(before.device)).to(before)))
    return changes


@dataclass(frozen=True)
class Solution:
    """What the regression found.

    Attributes:
        update: U (G, o, n) float64; intercept: (G, o) float64, 0 where the layer has no place for it.
        lost: held-out energy of what is missing without an update; left: with it.
        ridge: λ in mean diagonals; None where nothing was better than no update.
        shortcut: the target holds the error that the stream has gathered.
    """

    update: Tensor
    intercept: Tensor
    lost: float
    left: float
    ridge: float | None
    shortcut: bool


class Regression:
    """Sums over samples, from which the update follows; exact over batches and processes.

    Args:
        size: (G, n, o).
        centred: there is a place for the intercept.
        device: where the sums are kept.
        held: held-out samples of each batch that are kept, at most.
        seed: of the signs of a sketch.
    """

    def __init__(
        self, size: tuple[int, int, int], centred: bool, device: torch.device, held: int, seed: int
    ) -> None:
        groups, n, o = size
        self._centred, self._device, self._room = centred, device, held
        self._wide = n > WIDEST
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        # Two targets: with the stream's error and without it. The first row is that of the layer alone.
        self._n = zeros(1)
        self._mean, self._means = zeros(groups, n), zeros(2, groups, o)
        rows = WIDEST if self._wide else n
        self._gram = zeros(groups, rows, n)  # or the sketch of P
        self._cross = zeros(2, groups, o, rows)  # or those of R
        self._sign = zeros(rows if self._wide else 0)  # what a sample of ones would have given
        self._signs = torch.Generator().manual_seed(seed)
        self._held: list[tuple[Tensor, Tensor]] = []

    def add(self, P: Tensor, own: Tensor, met: Tensor | None, held: Tensor) -> None:
        """Add samples.

        Args:
            P: (M, G, n); own: R (M, G, o) towards the dense layer's output; met: towards the sum; None where
                there is no meeting.
            held: (M,) bool, samples that nothing is fitted to.
        """
        # A sum of products in a short type says too little of which ridge is best.
        P, own = wide(P), wide(own)
        targets = torch.stack([own, own if met is None else wide(met)])
        kept = held.nonzero()[:, 0]
        if len(kept) > self._room:  # spread over the batch, for its first ones may be all of one example
            kept = kept[torch.arange(self._room, device=kept.device) * len(kept) // self._room]
        if len(kept):
            self._held.append((P[kept].clone(), targets[:, kept].clone()))
        fit = (~held).nonzero()[:, 0]
        if not len(fit):
            return
        P, targets = P[fit].transpose(0, 1), targets[:, fit].transpose(1, 2)  # (G, M, n), (2, G, M, o)
        self._n += len(fit)
        self._mean += P.sum(1)
        self._means += targets.sum(2)
        if not self._wide:
            self._gram += P.transpose(1, 2) @ P
            self._cross += targets.transpose(2, 3) @ P
            return
        # A sketch: each sample goes, with a sign, into one of the rows. Products of the rows
        # are then those of the samples in expectation, and their sums are exact over processes.
        bucket = torch.randint(WIDEST, (len(fit),), generator=self._signs).to(self._device)
        sign = (torch.randint(2, (len(fit), 1), generator=self._signs) * 2 - 1).to(P)
        self._sign.index_add_(0, bucket, sign[:, 0].double())
        self._gram.index_add_(1, bucket, (P * sign).double())
        self._cross.index_add_(3, bucket, (targets * sign).transpose(2, 3).double())

    def pool(self, world: World) -> None:
        """Add up what all processes have; the held-out samples stay where they are."""
        if world.size == 1:
            return
        for name in ("_n", "_mean", "_means", "_gram", "_cross", "_sign"):
            setattr(self, name, world.total(getattr(self, name)).to(self._device))

    @property
    def samples(self) -> int:
        """Samples that are fitted to."""
        return int(self._n)

    def solve(self, gain: Tensor, both: bool, world: World) -> Solution | None:
        """Return the update of the least held-out error at the sum, or none; None where sums are not finite.

        Args:
            gain: (G, o) what a unit of the output is at the sum; 1 where there is none.
            both: there is a meeting: the target with the stream's error is tried too.
            world: all processes, which hold other samples out.
        """
        count = max(self.samples, 1)
        mean, means = self._mean / count, self._means / count
        # Errors are weighed as they arrive at the sum, for that is what the next layer reads.
        weights = gain.double().square()
        none = torch.zeros_like(self._cross[0, :, :, :1]).expand(-1, -1, self._mean.shape[1])
        lost = self._error(none, torch.zeros_like(means[0]), weights, world)
        sums = (self._mean, self._means, self._gram, self._cross)
        if not math.isfinite(lost) or not all(bool(item.isfinite().all()) for item in sums):
            return None
        best = Solution(none, torch.zeros_like(means[0]), lost, lost, None, False)
        if not lost or self.samples < 2:
            return best
        for ridge in RIDGES:
            for number, update in self._updates(ridge, mean, means, count, both):
                shift = means[number] - torch.einsum("gon,gn->go", update, mean)
                shift = shift if self._centred else torch.zeros_like(shift)
                left = self._error(update, shift, weights, world)
                if left < best.left:
                    best = Solution(update, shift, lost, left, ridge, number == 1)
        return best

    def _updates(
        self, ridge: float, mean: Tensor, means: Tensor, count: int, both: bool
    ) -> list[tuple[int, Tensor]]:
        """Return (target, update) for a ridge."""
        numbers = (1, 0) if both else (0,)
        if self._wide:
            return [(number, self._from_sketch(number, ridge, mean, means, count)) for number in numbers]
        S = self._gram / count
        if self._centred:
            S = S - mean[:, :, None] * mean[:, None, :]
        size = S.diagonal(dim1=1, dim2=2).mean(1)
        # A group that reads constants alone can give nothing; 1 keeps its system solvable.
        S.diagonal(dim1=1, dim2=2).add_((ridge * size + (size <= 0) * 1.0)[:, None])
        factor, failed = torch.linalg.cholesky_ex(S)
        if int(failed.max()):
            return []
        found = []
        for number in numbers:
            C = self._cross[number] / count
            if self._centred:
                C = C - means[number][:, :, None] * mean[:, None, :]
            found.append((number, torch.cholesky_solve(C.transpose(1, 2), factor).transpose(1, 2)))
        return found

    def _from_sketch(self, number: int, ridge: float, mean: Tensor, means: Tensor, count: int) -> Tensor:
        """Return U = R Pᵀ (P Pᵀ + λI)⁻¹ from the rows of the sketch, on the side of the rows."""
        P, R = self._gram, self._cross[number]  # (G, rows, n), (G, o, rows)
        if self._centred:
            P = P - self._sign[:, None] * mean[:, None, :]
            R = R - means[number][:, :, None] * self._sign
        P, R = P / count**0.5, R / count**0.5
        K = P @ P.transpose(1, 2)
        size = K.diagonal(dim1=1, dim2=2).sum(1) / P.shape[2]
        K.diagonal(dim1=1, dim2=2).add_((ridge * size + (size <= 0) * 1.0)[:, None])
        return torch.linalg.solve(K, R.transpose(1, 2)).transpose(1, 2) @ P

    def _error(self, update: Tensor, shift: Tensor, weights: Tensor, world: World) -> float:
        """Return the mean held-out error at the sum, over all processes."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        if len(self._held) > 1:
            whole = [torch.cat(items, dim) for dim, items in enumerate(zip(*self._held, strict=True))]
            self._held = [(whole[0], whole[1])]
        for P, targets in self._held:
            # Towards the sum where there is one: that is what counts, whatever was fitted to.
            given = torch.matmul(P.transpose(0, 1), update.to(P).transpose(1, 2)).transpose(0, 1)
            left = targets[1].to(P) - given - shift.to(P)
            total[0] += (left.square().sum(0, dtype=torch.float64) * weights).sum()
            total[1] += len(P)
        total = world.total(total) if world.size > 1 else total
        return float(total[0] / total[1]) if total[1] else 0.0


class ExpertRegressions:
    """A regression for each expert of a layer, on the rows that go to it.

    Args:
        size: (experts, n, o).
        device, held, seed: see `Regression`.
    """

    def __init__(self, size: tuple[int, int, int], device: torch.device, held: int, seed: int) -> None:
        experts, n, o = size
        self._each = [Regression((1, n, o), False, device, held, seed + at) for at in range(experts)]

    def add(self, P: Tensor, own: Tensor, held: Tensor, experts: Tensor) -> None:
        """Add rows P (M, 1, n), own (M, 1, o), held (M,), each to the expert (M,) that it goes to."""
        for number in experts.unique().tolist():
            rows = (experts == number).nonzero()[:, 0]
            self._each[number].add(P[rows], own[rows], None, held[rows])

    def pool(self, world: World) -> None:
        """See `Regression.pool`."""
        for item in self._each:
            item.pool(world)

    @property
    def samples(self) -> int:
        """Samples that are fitted to, of an expert in the mean."""
        return sum(item.samples for item in self._each) // len(self._each)

    def solve(self, gain: Tensor, both: bool, world: World) -> Solution | None:
        """Return the updates of all experts, see `Regression.solve`; one with few rows may have none."""
        found = [
            item.solve(gain[number : number + 1], False, world) for number, item in enumerate(self._each)
        ]
        solved = [item for item in found if item is not None]
        if len(solved) < len(found):
            return None
        # Each expert counts as often as it is asked.
        shares = [item.samples for item in self._each]
        lost, left = (
            sum(share * getattr(item, name) for share, item in zip(shares, solved, strict=True))
            / max(sum(shares), 1)
            for name in ("lost", "left")
        )
        ridges = sorted(item.ridge for item in solved if item.ridge is not None)
        return Solution(
            torch.cat([item.update for item in solved]), torch.cat([item.intercept for item in solved]),
            lost, left, ridges[len(ridges) // 2] if ridges else None, False,
        )  # fmt: skip


def wide(item: Tensor) -> Tensor:
    """Return a tensor in float32 at least: sums and differences of short types lose too much."""
    return item if item.dtype is torch.float64 else item.float()
