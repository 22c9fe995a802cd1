"""The walk: layers refitted one after another in the order of the data, towards the dense network.

Two networks run over the same examples, step by step: the dense one, and the one that was cut. At each layer
that reads what a cut has changed, the walk looks at what the layer reads now, and at what it should give:
what the dense one gives there, plus the error that the stream it is added to has gathered. The weight is
then the best one for that, by least squares (`regress`), and the network goes on with it: the next layer
sees what was mended, and what was not (docs/method.md section 5). No gradient, no label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cria_prune.base.batches import (
    SMALLER,
    Batch,
    batch_size,
    by_name,
    hold_out_every,
    is_held,
    limited,
    model_inputs,
    named_shortage,
)
from cria_prune.base.computed import Computed, folded, set_weight, settable
from cria_prune.base.errors import DataError, StructureError
from cria_prune.base.events import passed
from cria_prune.base.modules import copy_of, device_of, random_kept
from cria_prune.base.progress import QUIET, Progress
from cria_prune.base.ranks import World, world
from cria_prune.planning.plan import Plan
from cria_prune.repair.consumers import Repair
from cria_prune.repair.program import Look, Program, Run, programs_for
from cria_prune.repair.regress import (
    HELD,
    ExpertRegressions,
    Regression,
    at_places,
    changes_of,
    regressors,
    wide,
)
from cria_prune.repair.sites import Site, find_sites, keeps_places, undo, why_no_site
from cria_prune.repair.spill import Storages, Waiting, noting, room_for
from cria_prune.structure.trace import canonical_tensors

SAMPLES, FEWEST = 64, 4096
"""Samples that are drawn of each layer for a regressor; and at least."""
ASKED = "Refitting layers"
ENOUGH = 4
"""Effective samples for a regressor that a fit should have at least."""
GAIN = 50.0
"""A channel that is scaled so much less than the usual one on its way to the sum takes its own target."""


@dataclass(frozen=True)
class Parts:
    """What the walk does; each part can be left out, for the ablation of the method.

    Attributes:
        order: a layer sees those before it mended.
        shortcut: the target holds the error that the stream has gathered, where that is better.
        drifted: layers whose own inputs were not cut are refitted too.
        patches: a convolution is refitted at all places of its kernel, not at the middle alone.
        samples: drawn of each layer for each regressor; 0 for all there are.
    """

    order: bool = True
    shortcut: bool = True
    drifted: bool = True
    patches: bool = True
    samples: int = SAMPLES


Changes = list[tuple[str, Tensor]]
"""Name -> the new value, of the tensors that refitting a layer has changed."""


class Layers(Protocol):
    """Where the layers of a walk are kept as they are refitted; see `resume.layers`."""

    def write(self, number: int, weight: str, repair: Repair | None, changes: Changes) -> None:
        """Keep the layer of this number, from 0."""

    def read(self, weights: Sequence[str]) -> Iterator[tuple[Repair | None, Changes]]:
        """Yield what is kept, from the first layer on."""


@dataclass(frozen=True)
class Walked:
    """What the walk did.

    Attributes:
        model: a copy of the smaller model, refitted.
        repairs: what became of each layer, in the order of the data.
        left: weight that reads what was cut -> why it stayed as it is.
    """

    model: nn.Module = field(repr=False)
    repairs: tuple[Repair, ...]
    left: Mapping[str, str]


class Network:
    """One of the two networks on its way.

    Args:
        programs: of each batch.
        batches: on which it runs.
        device: where.
        look: name of a weight to its value.
    """

    def __init__(
        self, programs: Sequence[Program], batches: Sequence[Batch], device: torch.device, look: Look
    ) -> None:
        self.runs = [Run(program, batch, device) for program, batch in zip(programs, batches, strict=True)]
        self.look = look


def walk(
    dense: nn.Module,
    smaller: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    examples: int,
    seed: int = 0,
    parts: Parts | None = None,
    progress: Progress | None = None,
    memory: int | None = None,
    kept: Layers | None = None,
) -> Walked:
    """Refit the layers of a smaller model towards the dense one.

    Args:
        dense: the network that was trained; it is left as it was, as the smaller one is.
        smaller: what `apply` made of it, or of what it had become in the rounds before.
        plan: what was removed, relative to the dense one.
        batches: calibration batches; at most `examples` examples are used, some of them held out.
        seed: of the draw of positions.
        parts: all of them by default.
        progress: where to show how far it is.
        memory: bytes that the batches of both networks may hold between their turns; what they hold beyond
            waits in temporary files. Half of what is free by default.
        kept: keeps the layers as they are refitted; those that it has are taken as they are.

    Raises:
        CaptureError: the operations of one of the two cannot be captured.
        StructureError: their operations differ.
        DataError: there are not two examples that differ.
        ArtifactError: the system has no room for the temporary files.
        ResourceError: the memory does not suffice.
        RankError: another process failed, or is gone.
    """
    passed("repair", plan=plan)
    # A layer under a weight norm is refitted as the plain layer that it is between two trainings.
    computed = settable(dense)
    if computed:
        names = {item.source: item.weight for item in computed}
        cuts = tuple(replace(cut, tensor=names.get(cut.tensor, cut.tensor)) for cut in plan.cuts)
        walked = walk(
            folded(dense, computed), folded(smaller, computed), replace(plan, cuts=cuts), batches,
            examples=examples, seed=seed, parts=parts, progress=progress, memory=memory, kept=kept,
        )  # fmt: skip
        return _unfolded(walked, smaller, computed)
    model = copy_of(smaller)
    tensors = canonical_tensors(model)

    def put(name: str, value: Tensor) -> None:
        tensors[name].copy_(value)

    with torch.no_grad(), random_kept(), named_shortage("Refitting layers", SMALLER):
        walker = Walker(
            (dense, canonical_tensors(dense).__getitem__), (model, tensors.__getitem__, put), plan,
            [*limited(batches, examples)], device_of(dense), seed, parts or Parts(), progress or QUIET,
            memory, kept=kept,
        )  # fmt: skip
        repairs, left = walker.run()
    return Walked(model, tuple(repairs), left)


def _unfolded(walked: Walked, smaller: nn.Module, computed: Sequence[Computed]) -> Walked:
    """Return what a walk did to a model some of whose weights are computed."""
    model = copy_of(smaller)
    plain, refitted = canonical_tensors(walked.model), {item.tensor for item in walked.repairs}
    with torch.no_grad():
        for name, tensor in canonical_tensors(model).items():
            if name in plain and not torch.equal(tensor, plain[name]):
                tensor.copy_(plain[name])
        for item in computed:
            if item.weight in refitted:
                set_weight(model, item, plain[item.weight].detach())
    names = {item.weight: item.source for item in computed}
    repairs = tuple(replace(item, tensor=names.get(item.tensor, item.tensor)) for item in walked.repairs)
    left = {names.get(name, name): why for name, why in walked.left.items()}
    return Walked(model, repairs, left)


class Walker:
    """The two networks, and how far they are.

    Args:
        dense: the dense model's structure, and its weights by name.
        smaller: the same of the smaller one, and how a weight is changed.
        plan: what was removed.
        batches: all of them; each process runs its share.
        device: where the networks run.
        seed, parts, progress, memory, kept: see `walk`.
        folder: for what waits in files; a temporary one by default.
        forget: called when all batches have passed a layer, for looks that hold what they have loaded.
    """

    def __init__(
        self,
        dense: tuple[nn.Module, Look],
        smaller: tuple[nn.Module, Look, Callable[[str, Tensor], None]],
        plan: Plan,
        batches: Sequence[Batch],
        device: torch.device,
        seed: int,
        parts: Parts,
        progress: Progress,
        memory: int | None = None,
        folder: Path | None = None,
        forget: Callable[[], None] = lambda: None,
        kept: Layers | None = None,
    ) -> None:
        self._world: World = world()
        self._device, self._seed, self._parts, self._progress = device, seed, parts, progress
        self._put, self._forget, self._kept = smaller[2], forget, kept
        self._rows = {(cut.tensor, cut.dim): cut.kept for cut in plan.cuts}
        self._cut = {cut.tensor for cut in plan.cuts if cut.role == "consumes" and len(cut.kept) < cut.size}
        self._distinct = check_distinct(batches)
        self._examples, self._numbers, self._batches, self._held = share_of(batches, self._world)
        # Each batch gives as many of its held-out samples, whatever process runs it.
        self._room = ceil(HELD / len(batches))
        shapes = self._batches or [batches[0]]  # to know the layers, even where there is nothing to run
        self._buffers = {name for name, _ in smaller[0].named_buffers()}
        programs = [programs_for(model, shapes) for model in (dense[0], smaller[0])]
        self._sites, self.left = self._paired(programs)
        fixed = Storages()
        self._dense, self._smaller = (
            Network(found[: len(self._batches)], self._batches, device, noting(look, fixed))
            for found, look in zip(programs, (dense[1], smaller[1]), strict=True)
        )
        memory = room_for(device, self._world) if memory is None else memory
        self._waiting = Waiting((self._dense.runs, self._smaller.runs), fixed, memory, folder)
        self._refitted: str | None = None  # the layer that batches have still to be run through again

    def _paired(self, programs: list[list[Program]]) -> tuple[list[str], dict[str, str]]:
        """Find the layers in every program, the same in all; return their weights in order."""
        wanted = None if self._parts.drifted else self._cut
        self._found: list[dict[Program, dict[str, Site]]] = []
        orders, left = list[list[str]](), dict[str, str]()
        for side in programs:
            kept = dict[Program, dict[str, Site]]()
            for program in dict.fromkeys(side):
                sites, missing = find_sites(program, wanted, self._buffers, self._cut)
                left |= {name: why for name, why in missing.items() if name in self._cut}
                kept[program] = {site.weight: site for site in sites}
                orders.append(list(kept[program]))
            self._found.append(kept)
        left |= {
            name: why_no_site(programs[1], name)
            for name in sorted(self._cut)
            if name not in left and not any(name in order for order in orders)
        }
        if any(order != orders[0] for order in orders):
            raise StructureError(
                "Running the dense and the smaller network side by side",
                "their layers come in another order", "Use repair=once, and please report the network",
            )  # fmt: skip
        return orders[0], left

    def run(self) -> tuple[list[Repair], dict[str, str]]:
        """Walk; return what became of the layers, and why some that read what was cut stayed."""
        repairs, self._after = list[Repair](), Changes()
        try:
            with self._progress.bar("repair", len(self._sites)) as bar:
                done = self._resumed(repairs)
                bar.update(done)
                for number, name in enumerate(self._sites[done:], done):
                    found = self._refit(number, name)
                    if found is not None:
                        repairs.append(found)
                    passed("refitted", number=number + 1, layers=len(self._sites))
                    bar.update(layer=name)
        finally:
            self._waiting.close()
        for name, value in self._after:
            self._put(name, value)
        return repairs, self.left

    def _resumed(self, repairs: list[Repair]) -> int:
        """Take the layers that are kept, and return how many there are."""
        done = 0
        if self._kept is None:
            return done
        for repair, changes in self._kept.read(self._sites):
            if repair is not None:
                repairs.append(repair)
            self._change(changes)
            done += 1
        # One process may not see the folder, and would begin anew while the others go on.
        self._world.meet("The layers that are kept", lambda: str(done))
        return done

    def _change(self, changes: Changes) -> None:
        for name, value in changes:
            if self._parts.order:
                self._put(name, value)
            else:
                self._after.append((name, value))

    def _refit(self, number: int, name: str) -> Repair | None:
        """Bring both networks to a layer and refit it."""
        sums = self._gather(number, name)
        found = None if sums is None else self._solve(name, *sums)
        repair, changes = (None, Changes()) if found is None else found
        self._change(changes)
        self._refitted = None if repair is None else name
        self._forget()
        if self._kept is not None:
            kept = self._kept
            self._world.lead("Keeping a layer", lambda: kept.write(number, name, repair, changes))
        return repair

    def _bring(self, index: int, name: str) -> None:
        """Bring a batch to a layer in both networks, through what was refitted since its last turn."""
        for side, network in enumerate((self._dense, self._smaller)):
            run, look = network.runs[index], network.look
            if side and self._refitted is not None:
                self._again(run, self._refitted)
            run.release()
            site = self._found[side][run.program][name]
            run.advance(min([site.step, *site.path]), look)
            run.advance(site.step + 1 if site.meeting is None else site.meeting.at, look, free=False)

    def _again(self, run: Run, name: str) -> None:
        """Run a layer of the smaller network, and what stands between it and its sum, again."""
        site = self._found[1][run.program][name]
        chain = () if site.meeting is None else site.meeting.chain
        for number in (*site.path, site.step, *chain):
            step = run.program.steps[number]
            run.forget(step)
            run.call(step, self._smaller.look)

    def _gather(self, number: int, name: str) -> tuple[Regression | ExpertRegressions, bool, Tensor] | None:
        """Bring all batches to a layer and add their samples up; None where nothing is missing.

        Returns:
            The sums, whether there is a meeting, and what a unit of each output is there: (G, o).
        """
        site = self._found[1][next(iter(self._found[1]))][name]
        size = layer_size(site, self._smaller.look(name), self._parts.patches)
        meets = self._parts.shortcut and self._all_meet(name)
        regression = (
            Regression(
                size, site.bias is not None or site.norm is not None, self._device, self._room,
                self._seed + number,
            ) if site.experts is None
            else ExpertRegressions(size, self._device, self._room, self._seed + number)
        )  # fmt: skip
        gain: Tensor | None = None
        some, alike, added = False, True, 0

        def add(index: int) -> None:
            nonlocal some, alike, added, gain
            alike = alike and self._alike(index, name)
            if not alike:
                return
            draw = self._draw(number, index, name)
            own, both, found = self._targets(index, name, draw.places, meets)
            gain = found if gain is None else gain
            some = some or _any(own) or _any(both)
            # Products of samples that lack nothing are worth making only beside such that do.
            # Batches are added in one order, so the first ones may be due once more below.
            if some and added == index:
                self._add(regression, index, name, draw, own, both)
                added += 1

        # What one process cannot do alone, as to write a file, the others hear of before the next sum.
        with self._world.together(ASKED):
            for index in range(len(self._batches)):
                with self._waiting.turn(index):
                    self._bring(index, name)
                    if not some or added == index:
                        add(index)
        apart, lacking = self._everywhere([[not alike, some]], 2)
        if apart:
            self.left[name] = "what it gives lies otherwise in the dense network"
        some = bool(lacking) and not apart
        with self._world.together(ASKED):
            for index in range(added, len(self._batches)) if some else ():
                with self._waiting.turn(index):
                    add(index)
        ones = torch.ones(size[0], size[2], dtype=torch.float64, device=self._device)
        gains = ones if gain is None else gain.double().reshape(size[0], size[2])
        return (regression, meets, gains) if some else None

    def _solve(
        self, name: str, regression: Regression | ExpertRegressions, meets: bool, gains: Tensor
    ) -> tuple[Repair, Changes] | None:
        """Return what became of a layer, and the tensors to change; None where its sums are no numbers."""
        site, look = self._found[1][next(iter(self._found[1]))][name], self._smaller.look
        weight = look(name)
        size = layer_size(site, weight, self._parts.patches)
        regression.pool(self._world)
        solution = regression.solve(gains, meets, self._world)
        if solution is None:
            self.left[name] = "NaN or infinity is met there"
            return None
        update = _whole(site, weight, solution.update, self._parts.patches)
        changes = [] if solution.ridge is None else changes_of(site, look, update, solution.intercept)
        self._world.spread(value for _, value in changes)
        # Examples that came twice say nothing new.
        effective = regression.samples * self._distinct // self._examples
        lacking = ceil(self._distinct * (ENOUGH * size[1] / effective - 1)) if effective else 0
        repair = Repair(
            name, 1 - solution.left / solution.lost if solution.lost else 0.0, site.bias is not None,
            cut=name in self._cut, samples=regression.samples, regressors=size[1],
            ridge=solution.ridge, shortcut=solution.shortcut, effective=effective, lacking=max(0, lacking),
        )  # fmt: skip
        return repair, changes

    def _all_meet(self, name: str) -> bool:
        """Say whether a layer's output is followed to a sum for every batch, on all processes."""
        met = [self._met(index, name) for index in range(len(self._smaller.runs))]
        found, apart = self._everywhere([[item, not item] for item in met], 2)
        return found > 0 and not apart

    def _everywhere(self, said: Sequence[Sequence[bool]], count: int) -> list[int]:
        """Return how often each of `count` answers was yes, over all batches of all processes."""
        counts = torch.zeros(count, dtype=torch.float64)
        for item in said:
            counts += torch.tensor(item, dtype=torch.float64)
        return [int(value) for value in self._world.total(counts)]

    def _alike(self, index: int, name: str) -> bool:
        """Say whether both networks' outputs of a layer have one shape, apart from the outputs that left."""
        dense, now = (
            tuple(run.values[found[run.program][name].step].shape)
            for run, found in zip(
                (self._dense.runs[index], self._smaller.runs[index]), self._found, strict=True
            )
        )
        site = self._found[1][self._smaller.runs[index].program][name]
        rows = self._kept_rows(name, site)
        if rows is None:
            return dense == now
        channel = site.channel % len(now)
        return len(dense) == len(now) and (*dense[:channel], len(rows), *dense[channel + 1 :]) == now

    def _met(self, index: int, name: str) -> bool:
        """Say whether both networks follow a layer's output to a sum by the same operations."""
        paths = []
        for run, found in zip((self._dense.runs[index], self._smaller.runs[index]), self._found, strict=True):
            site = found[run.program][name]
            if site.meeting is None:
                return False
            paths.append([run.program.steps[step].name for step in (*site.meeting.chain, site.meeting.at)])
        return paths[0] == paths[1]

    def _targets(
        self, index: int, name: str, places: Tensor, meets: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what a layer's outputs lack at some places of a batch, of their own and for the sum.

        Both are (M, G, o); and (outputs,) what a unit of each is at the sum. Without a meeting, the first.
        """
        runs = (self._dense.runs[index], self._smaller.runs[index])
        looks = (self._dense.look, self._smaller.look)
        sites = [found[run.program][name] for run, found in zip(runs, self._found, strict=True)]
        rows = self._kept_rows(name, sites[1])

        def missing(sides: Sequence[Tensor]) -> Tensor:
            dense, now = (wide(item.flatten(1)) for item in sides)
            return (dense if rows is None else dense.index_select(1, rows)) - now

        where = (places if sites[1].experts is None else self._same_rows(index, name)[places], places)
        own = missing(
            [at_places(s, run.values[s.step], at) for run, s, at in zip(runs, sites, where, strict=True)]
        )
        groups = sites[1].groups
        if not meets:
            return own.unflatten(1, (groups, -1)), None, None
        # The layer has to give so much more that the sums are the same. What else is added on the way is
        # in the smaller network's sum already, and need not be what it was in the dense one.
        sums = [
            self._at_sum(run, site, look, places) for run, site, look in zip(runs, sites, looks, strict=True)
        ]
        one = self._scales(index, name, places)
        both = missing(sums) * one
        # A channel that counts for next to nothing at the sum would be asked for anything.
        gain = 1 / one[0].abs()
        rare = gain * GAIN <= gain.median()
        if bool(rare.any()):
            both = torch.where(rare, own, both)
        return own.unflatten(1, (groups, -1)), both.unflatten(1, (groups, -1)), gain

    def _at_sum(self, run: Run, site: Site, look: Look, places: Tensor) -> Tensor:
        """Return the sum where a layer's outputs at some places go to: (M, G, o)."""
        assert site.meeting is not None
        operands = (run.values[site.meeting.operand], run.values[site.meeting.other])
        if not keeps_places(run.program, site):
            total = wide(operands[0]) + wide(operands[1])
            return at_places(site, undo(run, site, total, look, scales=False), places)
        # Most of a large map is not drawn: the places come first where the chain leaves them in theirs.
        one, other = (wide(at_places(site, item, places)) for item in operands)
        return one + other

    def _scales(self, index: int, name: str, places: Tensor) -> Tensor:
        """Return what a unit of the sum is at a layer's outputs: (1 or M, outputs)."""
        run = self._smaller.runs[index]
        site, look = self._found[1][run.program][name], self._smaller.look
        assert site.meeting is not None
        operand = wide(run.values[site.meeting.operand][:0])
        if keeps_places(run.program, site):
            ones = operand.new_ones(1, run.values[site.step].shape[site.channel])
            return undo(run, site, ones, look, scales=True)
        ones = operand.new_ones(()).expand(run.values[site.meeting.operand].shape)
        return at_places(site, undo(run, site, ones, look, scales=True), places).flatten(1)

    def _kept_rows(self, name: str, site: Site) -> Tensor | None:
        """Return which of the dense layer's outputs stay; None where all do."""
        dim = site.output_dim
        if site.transposed and site.groups > 1:  # its second dimension counts the outputs of a group
            return None
        kept = self._rows.get((name, dim))
        return None if kept is None else torch.as_tensor(kept, device=self._device)

    def _draw(self, number: int, index: int, name: str) -> Draw:
        """Return where a layer's output is looked at in a batch."""
        run = self._smaller.runs[index]
        site = self._found[1][run.program][name]
        output, examples = run.values[site.step], len(self._held[index])
        seed = (self._seed * 1_000_003 + number) * 1_009 + self._numbers[index]
        wanted = self._wanted(site, self._smaller.look(name))
        found = drawn(site, tuple(output.shape), self._batches[index], examples, wanted, seed)
        found = found.on(self._device)
        if site.experts is None:
            return found
        there = (self._same_rows(index, name)[found.places] >= 0).nonzero()[:, 0]
        return Draw(found.places[there], found.owner[there.cpu()], None)

    def _same_rows(self, index: int, name: str) -> Tensor:
        """Return, for each row of a layer's experts now, the row of the same token and expert in the dense
        network: (tokens · k,), -1 where its router sends the token elsewhere."""
        chosen = []
        for run, found in zip((self._dense.runs[index], self._smaller.runs[index]), self._found, strict=True):
            at = found[run.program][name].experts
            assert at is not None
            chosen.append(run.values[at])
        dense, now = chosen
        kept = self._rows.get((name, 0))
        if kept is not None:
            now = torch.as_tensor(kept, device=now.device)[now]
        same = now[:, :, None] == dense[:, None, :]
        rows = torch.arange(len(now), device=now.device)[:, None] * now.shape[1] + same.int().argmax(dim=2)
        return rows.masked_fill(~same.any(dim=2), -1).reshape(-1)

    def _add(
        self,
        regression: Regression | ExpertRegressions,
        index: int,
        name: str,
        draw: Draw,
        own: Tensor,
        both: Tensor | None,
    ) -> None:
        """Add the samples of one batch."""
        run = self._smaller.runs[index]
        site = self._found[1][run.program][name]
        weight = self._smaller.look(name)
        places, owner, valid = draw
        P = regressors(site, run.values[site.data], weight, places)
        if not self._parts.patches and site.spatial:
            P = _middle(P, weight)
        held = self._held[index][owner].to(self._device)
        if valid is not None:
            rows = valid.nonzero()[:, 0].to(self._device)
            P, own, held = P[rows], own[rows], held[rows]
            both = None if both is None else both[rows]
        if isinstance(regression, Regression):
            regression.add(P, own, both, held)
        elif site.experts is not None:
            regression.add(P, own, held, run.values[site.experts].reshape(-1)[places])

    def _wanted(self, site: Site, weight: Tensor) -> int:
        """Return how many places are drawn of each example."""
        if not self._parts.samples:
            return 2**31
        groups, regressors, _ = layer_size(site, weight, self._parts.patches)
        wanted = places_each(regressors, self._parts.samples, self._examples)
        return wanted if site.experts is None else groups * wanted  # a row goes to one of the experts


class Share(NamedTuple):
    """The calibration batches of this process.

    Attributes:
        examples: of all processes.
        numbers: of its batches among all.
        batches: themselves.
        held: (examples,) bool of each, those that nothing is fitted to.
    """

    examples: int
    numbers: list[int]
    batches: list[Batch]
    held: list[Tensor]


def share_of(batches: Sequence[Batch], here: World) -> Share:
    """Return the batches that a process runs, of those that all know.

    Raises:
        DataError: there is one example, or none.
    """
    ends = [0, *accumulate(batch_size(batch) for batch in batches)]
    every = hold_out_every(ends[-1])
    numbers = [number for number in range(len(batches)) if here.mine(number)]
    held = [is_held(torch.arange(ends[number], ends[number + 1]), every) for number in numbers]
    return Share(ends[-1], numbers, [batches[number] for number in numbers], held)


def places_each(regressors: int, samples: int, examples: int) -> int:
    """Return how many places are drawn of each example, for so many samples of a layer for a regressor."""
    return max(1, ceil(max(samples * regressors, FEWEST) / examples))


class Draw(NamedTuple):
    """Where a layer's output is looked at.

    Attributes:
        places: flat positions of a convolution, drawn alike for all examples, or rows of a product.
        owner: (M,) the example in the batch that each sample belongs to.
        valid: (M,) bool, which samples are no padding; None where all are.
    """

    places: Tensor
    owner: Tensor
    valid: Tensor | None

    def on(self, device: torch.device) -> Draw:
        """Return it with the places where the outputs are."""
        return self._replace(places=self.places.to(device))


def drawn(site: Site, shape: tuple[int, ...], batch: Batch, examples: int, wanted: int, seed: int) -> Draw:
    """Draw places of a layer's output, without padding.

    Args:
        site: the layer.
        shape: of its output.
        batch: its padding is left out.
        examples: in the batch.
        wanted: places of each example.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if site.spatial:
        places = torch.randperm(prod(shape[2:]), generator=generator)[:wanted].sort()[0]
        owner = torch.arange(shape[0]).div(max(shape[0] // examples, 1), rounding_mode="floor")
        owner = owner.clamp(max=examples - 1).repeat_interleave(len(places))
        valid = _valid(batch, (shape[0], *shape[2:])) if site.spatial == 1 else None
        return Draw(places, owner, None if valid is None else valid.reshape(shape[0], -1)[:, places].ravel())
    rows, valid = torch.arange(prod(shape[:-1])), _valid(batch, shape[:-1])
    rows = rows if valid is None else rows[valid]
    places = rows[torch.randperm(len(rows), generator=generator)[: wanted * examples]].sort()[0]
    return Draw(places, _owners(shape, examples)[places], None)


def layer_size(site: Site, weight: Tensor, patches: bool = True) -> tuple[int, int, int]:
    """Return (G, n, o) of a layer, see `regress`; of the middle of its kernel alone without `patches`."""
    shape = tuple(weight.shape)
    if site.experts is not None:
        return (shape[0], shape[2], shape[1]) if site.outputs_first else (shape[0], shape[1], shape[2])
    if not site.spatial:
        n, o = (shape[1], shape[0]) if site.outputs_first else shape
        return 1, n, o
    places = prod(shape[2:]) if patches else 1
    if site.transposed:
        return site.groups, shape[0] // site.groups * places, shape[1]
    return site.groups, shape[1] * places, shape[0] // site.groups


def _middle(P: Tensor, weight: Tensor) -> Tensor:
    """Return the regressors of the middle of the kernel alone."""
    places = prod(weight.shape[2:])
    return P.unflatten(2, (-1, places))[..., places // 2]


def _whole(site: Site, weight: Tensor, update: Tensor, patches: bool) -> Tensor:
    """Return an update at all places of the kernel, zero where it was not fitted."""
    if patches or not site.spatial:
        return update
    places = prod(weight.shape[2:])
    whole = update.new_zeros(*update.shape, places)
    whole[..., places // 2] = update
    return whole.flatten(2)


def _owners(shape: tuple[int, ...], examples: int) -> Tensor:
    """Return (rows,) the example that each row of a product's output belongs to.

    The examples lie along the first dimension, or the second where a model keeps time first; where neither
    can be, rows are taken one by one, as if each were an example.
    """
    rows = torch.arange(prod(shape[:-1]))
    if shape[0] != examples and len(shape) > 2 and shape[1] == examples:
        return rows // prod(shape[2:-1]) % examples
    if shape[0] % examples == 0:
        return rows // (len(rows) // examples)
    return rows % examples


def _valid(batch: Batch, places: tuple[int, ...]) -> Tensor | None:
    """Return which rows of an output (..., features) are no padding; None where that is not said."""
    found, named = None, by_name(batch)
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = named.get(key)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            continue
        valid = mask.cpu() != 0
        if len(places) > 1 and places[:2] != valid.shape and places[:2] == valid.T.shape:
            valid = valid.T
        if len(places) > 1 and places[:2] == valid.shape:
            valid = valid.reshape(-1).repeat_interleave(prod(places[2:]))
        elif len(places) == 2 and places[0] == valid.numel():  # the rows of each token's experts
            valid = valid.reshape(-1).repeat_interleave(places[1])
        elif prod(places) != valid.numel():
            continue
        # Of an encoder's and a decoder's mask of one shape it cannot be told which is meant.
        found = valid.reshape(-1) if found is None else found & valid.reshape(-1)
    return found


def check_distinct(batches: Iterable[Batch]) -> int:
    """Return how many examples differ.

    Raises:
        DataError: they are all alike.
    """
    told = [item for batch in batches for item in _told(batch)]
    distinct = len(set(told))
    if distinct < 2:
        raise DataError(
            f"{ASKED} on calibration examples",
            f"found {len(told)} examples, {distinct} distinct",
            "Pass some hundreds that differ: layers are fitted to some, and judged on others",
        )
    return distinct


def _told(batch: Batch) -> list[bytes]:
    """Return of each example of a batch a digest of its inputs."""
    size = batch_size(batch)
    rows = [
        item.detach().cpu().contiguous().reshape(size, -1)
        for item in tree_leaves(model_inputs(batch))
        if isinstance(item, Tensor) and item.ndim and (size == 1 or len(item) == size) and item.numel()
    ]
    seen = [hashlib.blake2b(digest_size=16) for _ in range(size)]
    for item in rows:
        for number, found in enumerate(seen):
            found.update(item[number].view(torch.uint8).numpy().tobytes())
    return [found.digest() for found in seen]


def _any(missing: Tensor | None) -> bool:
    return missing is not None and bool(missing.any())
