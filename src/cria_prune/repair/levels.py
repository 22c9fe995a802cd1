"""What a group's cut costs alone, at several levels: one pass of the dense network, and its rest per level.

For every group the dense network is run up to the layers that read it. There the second moments S of what
they read give, in closed form, the best weights W'_K = W_K + W_R S_RK (S_KK + λI)⁻¹ for any units K that
stay. With them in place, and zeros for the units R that leave, only the network behind these layers runs
again, on examples of its own: masked equals pruned (docs/method.md section 9). Batches for which the memory
does not suffice wait in files, as in the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch
from cria_prune.base.events import passed
from cria_prune.base.modules import buffers_kept, device_of, unchanged
from cria_prune.base.ranks import world
from cria_prune.repair.fidelity import Fidelity, add_outputs, begin_sums, named_outputs
from cria_prune.repair.program import Look, Run, programs_for
from cria_prune.repair.regress import changes_of, regressors, wide
from cria_prune.repair.sites import Site, find_sites
from cria_prune.repair.spill import Storages, Waiting, room_for
from cria_prune.repair.walk import SAMPLES, drawn, layer_size, places_each, share_of
from cria_prune.structure.groups import ParameterSlice, UnitGroup
from cria_prune.structure.trace import canonical_tensors

RIDGE = 1e-2
"""λ in mean diagonals of S_KK: what the walk chooses most often."""
ASKED = "Measuring what cuts cost"
EXAMPLES = 512
"""Calibration examples that losses are measured on, at most."""
WIDEST = 4608
"""Regressors of which S is kept here; a wider layer is measured with its weights as they are."""


@dataclass(frozen=True)
class Reads:
    """What a layer reads, in the dense network.

    Attributes:
        site: the layer.
        moments: (G, n, n) float64, without the means where the layer has a place for them; mean: (G, n).
    """

    site: Site
    moments: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Level:
    """What a cut of one group alone costs.

    Attributes:
        group: its name; count: units that stay.
        error: E‖change‖² / E‖output‖² of the layers that read it, without their means, added up; None where
            no moments were taken.
        loss: of the network; None where it was not measured.
    """

    group: str
    count: int
    error: float | None
    loss: float | None


Chosen = Callable[[UnitGroup, int], np.ndarray]
"""(group, number of units that stay) -> which."""


def losses_of(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    counts: Mapping[str, Sequence[int]],
    chosen: Chosen,
    batches: Sequence[Batch],
    held: Sequence[Batch],
    seed: int,
    repaired: bool = True,
    measured: Callable[[str, int], bool] = lambda _name, _count: True,
    memory: int | None = None,
) -> Iterator[Level]:
    """Yield the levels of the groups of a dense model, in the order of the data.

    Groups are passed over that a normalisation takes its statistics over, whose others change when some
    leave, and those whose layers cannot be found in the captured operations: the caller measures these.

    Args:
        model: the dense model; it is left as it was.
        groups: those to be measured.
        counts: group name -> numbers of units to measure.
        chosen: which units stay.
        batches: calibration batches, of whose examples those that are held out are left out.
        held: the held-out examples.
        seed: of the draw of positions.
        repaired: with the best weights for the units that stay; else with those that are there.
        measured: (group, number) -> whether the loss is measured, and not only the error of the layers.
        memory: bytes that the batches may hold between their turns; see `walk`.

    Raises:
        ArtifactError: the system has no room for the temporary files.
    """
    with torch.no_grad():
        levels = _Levels(model, groups, counts, chosen, batches, held, seed, repaired, memory)
        try:
            yield from levels.run(measured)
        finally:
            levels.waiting.close()


class _Levels:
    def __init__(
        self, model: nn.Module, groups: Sequence[UnitGroup], counts: Mapping[str, Sequence[int]],
        chosen: Chosen, batches: Sequence[Batch], held: Sequence[Batch], seed: int, repaired: bool,
        memory: int | None,
    ) -> None:  # fmt: skip
        self._world, self._device, self._seed = world(), device_of(model), seed
        self._counts, self._chosen, self._repaired = counts, chosen, repaired
        tensors, weights = canonical_tensors(model), Storages()
        self._look: Look = tensors.__getitem__
        self._held_batches = [batch for number, batch in enumerate(held) if self._world.mine(number)]
        self._share = share_of(batches, self._world)
        own = self._share.batches
        programs = programs_for(model, [*own, *(self._held_batches or held[:1])])
        self._runs = [Run(p, b, self._device) for p, b in zip(programs[: len(own)], own, strict=True)]
        there = programs[len(own) :]
        self._base = [Run(p, b, self._device) for p, b in zip(there, self._held_batches, strict=False)]
        fixed = {name for name, _ in model.named_buffers()}
        self._sites = {
            program: {site.weight: site for site in find_sites(program, fixed=fixed)[0]}
            for program in dict.fromkeys(programs)
        }
        self._program = there[0]
        self._order = list(self._sites[self._program])
        self._groups = [group for group in groups if self._followed(group)]
        first = held[0]
        with unchanged(model), buffers_kept(model):
            model.eval()
            # Copies, for an output may be a weight, and no weight may be emptied.
            self._dense = [
                {name: value.clone() for name, value in named_outputs(model, batch).items()}
                for batch in self._held_batches
            ]
            self._kinds = first, named_outputs(model, first)
        for value in tensors.values():
            weights.add(value)
        beside = [*([] for _ in self._runs), *(list(item.values()) for item in self._dense)]
        memory = room_for(self._device, self._world) if memory is None else memory
        self.waiting = Waiting([[*self._runs, *self._base]], weights, memory, beside=beside)

    def _followed(self, group: UnitGroup) -> bool:
        """Say whether every layer that reads a group is a site, alike in every program."""
        return not group.normed and all(
            item.tensor in sites and _input_dim(sites[item.tensor]) == item.dim
            for item in group.consumers
            for sites in self._sites.values()
        )

    def run(self, measured: Callable[[str, int], bool]) -> Iterator[Level]:
        """Go through the network; see `losses_of`."""
        place = {name: number for number, name in enumerate(self._order)}
        ends = {
            group.name: max(place[item.tensor] for item in group.consumers)
            for group in self._groups if group.consumers
        }  # fmt: skip
        waiting = sorted((group for group in self._groups if group.name in ends), key=lambda g: ends[g.name])
        reads: dict[str, Reads] = {}
        consumers = {item.tensor for group in waiting for item in group.consumers}
        unread = sorted(consumers if self._repaired else (), key=lambda name: place[name], reverse=True)
        for index, group in enumerate(waiting):
            # In the order of the data, also those of later groups: a run has no way back.
            while unread and place[unread[-1]] <= ends[group.name]:
                found = self._read(unread.pop())
                if found is not None:
                    reads[found.site.weight] = found
            first = min(place[item.tensor] for later in waiting[index:] for item in later.consumers)
            self._advance(self._order[first])
            for count in self._counts[group.name]:
                changed, error = self._cut(group, count, reads)
                # Without an error nothing else would say what the level costs.
                loss = self._loss(changed) if error is None or measured(group.name, count) else None
                level = Level(group.name, count, error, loss)
                passed("level", level=level)
                yield level
            needed = {item.tensor for later in waiting[index + 1 :] for item in later.consumers}
            reads = {name: item for name, item in reads.items() if name in needed}

    def _advance(self, name: str) -> None:
        """Bring the examples that losses are measured on to a layer."""
        # What one process cannot do alone, as to write a file, the others hear of before the next sum.
        with self._world.together(ASKED):
            for number, run in enumerate(self._base, len(self._runs)):
                site = self._sites[run.program][name]
                until = min([site.step, *site.path])
                if run.at < until:
                    with self.waiting.turn(number):
                        run.advance(until, self._look)

    def _read(self, name: str) -> Reads | None:
        """Bring the examples that are fitted on to a layer, and return the moments of what it reads."""
        weight, site = self._look(name), self._sites[self._program][name]
        _, n, _ = layer_size(site, weight)
        if site.transposed or n > WIDEST:
            return None
        gram = torch.zeros(site.groups, n, n, dtype=torch.float64, device=self._device)
        total, samples = gram.new_zeros(site.groups, n), gram.new_zeros(1)
        with self._world.together(ASKED):
            for index in range(len(self._runs)):
                with self.waiting.turn(index):
                    P = self._drawn(index, name, weight, n)
                    gram += P.transpose(1, 2) @ P
                    total += P.sum(1)
                    samples += P.shape[1]
                    self._runs[index].release()
        if self._world.size > 1:
            gram, total, samples = (
                self._world.total(item).to(self._device) for item in (gram, total, samples)
            )
        if not samples:
            return None
        # All levels read the same moments, so they are made once: (n, n) is the largest thing here.
        S, mean = gram / samples, total / samples
        if site.bias is not None or site.norm is not None:
            S -= mean[:, :, None] * mean[:, None, :]
        return Reads(site, S, mean)

    def _drawn(self, index: int, name: str, weight: Tensor, n: int) -> Tensor:
        """Bring a batch that is fitted to a layer; return samples of what it reads: (G, M, n) float64."""
        run, batch, held = self._runs[index], self._share.batches[index], self._share.held[index]
        site = self._sites[run.program][name]
        run.advance(site.step + 1, self._look, free=False)
        data, output = run.values[site.data], run.values[site.step]
        seed = self._seed * 1_000_003 + self._share.numbers[index]
        wanted = places_each(n, SAMPLES, self._share.examples)
        draw = drawn(site, tuple(output.shape), batch, len(held), wanted, seed).on(self._device)
        P = regressors(site, data, weight, draw.places)
        chosen = ~held[draw.owner] if draw.valid is None else ~held[draw.owner] & draw.valid
        # Products in a short type overflow, or are no moments of anything.
        return wide(P[chosen.to(self._device)]).transpose(0, 1)

    def _cut(
        self, group: UnitGroup, count: int, reads: Mapping[str, Reads]
    ) -> tuple[dict[str, Tensor], float | None]:
        """Return the tensors of the layers that read only some units of a group, and their error."""
        stays, changed, total = self._chosen(group, count), dict[str, Tensor](), 0.0
        for item in group.consumers:
            site = self._sites[self._program][item.tensor]
            found, error = _masked(_over(self._look, changed), site, item, stays, reads.get(item.tensor))
            changed |= found
            total = float("nan") if error is None else total + error
        return changed, None if total != total else total

    def _loss(self, changed: Mapping[str, Tensor]) -> float:
        """Return the loss with some tensors changed and nothing else."""
        look = _over(self._look, changed)
        batch, dense = self._kinds
        sums = begin_sums(dense, dense, batch, True)
        with self._world.together(ASKED):
            for index, base in enumerate(self._base):
                # The fork goes on alone, and copies what it would write into.
                with self.waiting.turn(len(self._runs) + index, reading=True):
                    given = [item for item in base.fork().outputs(look) if item.is_floating_point()]
                    found = zip(self._dense[index], (item for item in given if item.numel()), strict=True)
                    add_outputs(sums, self._dense[index], dict(found), self._held_batches[index], True)
        distances = tuple(item.distance(name) for name, item in sums.items())
        return Fidelity(self._share.examples, distances).loss


def _over(look: Look, changed: Mapping[str, Tensor]) -> Look:
    """Return a look that finds the tensors that were changed."""
    return lambda name: changed[name] if name in changed else look(name)


def _input_dim(site: Site) -> int:
    return 0 if site.transposed or not site.outputs_first else 1


def _masked(
    look: Look, site: Site, item: ParameterSlice, stays: np.ndarray, reads: Reads | None
) -> tuple[dict[str, Tensor], float | None]:  # fmt: skip
    """Return the tensors of a layer that reads only units that stay, and its error, as its moments say.

    Without moments it is not repaired, and there is no error.
    """
    weight = look(site.weight)
    gone = np.setdiff1d(np.arange(item.positions.shape[0]), stays)
    positions = torch.from_numpy(item.positions[gone].ravel()).to(weight.device)
    if reads is None:
        return {site.weight: weight.index_fill(item.dim, positions, 0)}, None
    matrix = weight.flatten(1) if site.outputs_first else weight.T
    kernel = prod(weight.shape[2:]) if site.outputs_first else 1
    features = (positions[:, None] * kernel + torch.arange(kernel, device=weight.device)).ravel()
    leaves = torch.zeros(matrix.shape[1], dtype=torch.bool, device=weight.device)
    leaves[features] = True
    K, R = (~leaves).nonzero()[:, 0], features
    W = matrix.double().unflatten(0, (site.groups, -1))  # (G, o, n)
    S = reads.moments
    SKK = S[:, K][:, :, K]
    size = SKK.diagonal(dim1=1, dim2=2).mean(1) if len(K) else S.new_zeros(len(S))
    SKK.diagonal(dim1=1, dim2=2).add_((RIDGE * size + (size <= 0) * 1.0)[:, None])
    moved = torch.linalg.solve(SKK, S[:, K][:, :, R] @ W[:, :, R].transpose(1, 2)).transpose(1, 2)
    update = torch.zeros_like(W)
    update[:, :, K] = moved
    update[:, :, R] = -W[:, :, R]
    # What the layer gives changes by U P: the second moments say how much, as a share of what it gives.
    apart, whole = (torch.einsum("gon,gnm,gom->", item, S, item) for item in (update, W))
    # By rounding both may come out below 0 where the inputs hardly move.
    error = max(float(apart / whole), 0.0) if not whole <= 0 else 0.0
    shift = -torch.einsum("gon,gn->go", update, reads.mean)
    return dict(changes_of(site, look, update, shift)), error
