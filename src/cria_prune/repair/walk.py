"""The walk: layers refitted one after another in the order of the data, towards the dense network.

Two networks run over the same examples, step by step: the dense one, and the one that was cut. At each layer
that reads what a cut has changed, the walk looks at what the layer reads now, and at what it should give:
what the dense one gives there, plus the error that the stream it is added to has gathered. The weight is
then the best one for that, by least squares (`regress`), and the network goes on with it: the next layer
sees what was mended, and what was not (docs/method.md section 5). No gradient, no label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cria_prune.base.batches import Batch, batch_size, hold_out_every, limited
from cria_prune.base.errors import DataError, StructureError
from cria_prune.base.events import passed
from cria_prune.base.modules import copy_of, device_of, random_kept
from cria_prune.base.progress import QUIET, Progress
from cria_prune.base.ranks import World, world
from cria_prune.base.room import free_memory
from cria_prune.planning.plan import Plan
from cria_prune.repair.consumers import Repair
from cria_prune.repair.program import Look, Program, Run, programs_for
from cria_prune.repair.regress import HELD, Regression, add_update, at_places, regressors
from cria_prune.repair.sites import Site, find_sites, keeps_places, undo
from cria_prune.repair.spill import Storages, Waiting, noting
from cria_prune.structure.trace import canonical_tensors

SAMPLES, FEWEST = 64, 4096
"""Samples that are drawn of each layer for a regressor; and at least."""
ASKED = "Refitting layers"
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
        DataError: there are not two examples.
        ArtifactError: the system has no room for the temporary files.
    """
    passed("repair", plan=plan)
    model = copy_of(smaller)
    tensors = canonical_tensors(model)

    def put(name: str, value: Tensor) -> None:
        tensors[name].copy_(value)

    with torch.no_grad(), random_kept():
        walker = Walker(
            (dense, canonical_tensors(dense).__getitem__), (model, tensors.__getitem__, put), plan,
            [*limited(batches, examples)], device_of(dense), seed, parts or Parts(), progress or QUIET,
            memory, kept=kept,
        )  # fmt: skip
        repairs, left = walker.run()
    return Walked(model, tuple(repairs), left)


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
        sizes = [batch_size(batch) for batch in batches]
        self._examples = sum(sizes)
        if self._examples < 2:
            raise DataError(
                f"{ASKED} on calibration examples", f"found {self._examples}",
                "Pass two examples at least: one of them is held out from every fit",
            )  # fmt: skip
        every = hold_out_every(self._examples)
        mine = [number for number in range(len(batches)) if self._world.mine(number)]
        firsts = [sum(sizes[:number]) for number in mine]
        self._numbers = mine
        self._held = [
            (torch.arange(first, first + sizes[number]) % every) == every - 1
            for number, first in zip(mine, firsts, strict=True)
        ]
        self._batches = [batches[number] for number in mine]
        shapes = self._batches or [batches[0]]  # to know the layers, even where there is nothing to run
        programs = [programs_for(model, shapes) for model in (dense[0], smaller[0])]
        self._sites, self.left = self._paired(programs)
        fixed = Storages()
        self._dense, self._smaller = (
            Network(found[: len(self._batches)], self._batches, device, noting(look, fixed))
            for found, look in zip(programs, (dense[1], smaller[1]), strict=True)
        )
        if memory is None and (free := free_memory(device)) is not None:
            memory = free // 2 // self._world.size
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
                sites, missing = find_sites(program, wanted)
                left |= {name: why for name, why in missing.items() if name in self._cut}
                kept[program] = {site.weight: site for site in sites}
                orders.append(list(kept[program]))
            self._found.append(kept)
        left |= {
            name: "is read by an operation that cannot be refitted"
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
        regression = self._gather(number, name)
        repair, changes = (None, Changes()) if regression is None else self._solve(name, *regression)
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
        for step in (*site.path, site.step, *chain):
            run.call(run.program.steps[step], self._smaller.look)

    def _gather(self, number: int, name: str) -> tuple[Regression, bool, Tensor] | None:
        """Bring all batches to a layer and add their samples up; None where nothing is missing.

        Returns:
            The sums, whether there is a meeting, and what a unit of each output is there: (G, o).
        """
        site = self._found[1][next(iter(self._found[1]))][name]
        size = layer_size(site, self._smaller.look(name), self._parts.patches)
        meets = self._parts.shortcut and self._all_meet(name)
        regression = Regression(
            size, site.bias is not None or site.norm is not None, self._device,
            ceil(HELD / self._world.size), self._seed + number,
        )  # fmt: skip
        gain: Tensor | None = None
        some, added = False, 0

        def add(index: int) -> None:
            nonlocal some, added, gain
            if meets and gain is None:
                gain = self._gain(index, name)
            places, owner = self._draw(number, index, name)
            targets = self._targets(index, name, places, gain)
            some = some or any(item is not None and bool(item.any()) for item in targets)
            # Products of samples that lack nothing are worth making only beside such that do.
            # Batches are added in one order, so the first ones may be due once more below.
            if some and added == index:
                self._add(regression, index, name, places, owner, targets)
                added += 1

        # What one process cannot do alone, as to write a file, the others hear of before the next sum.
        with self._world.together(ASKED):
            for index in range(len(self._batches)):
                with self._waiting.turn(index):
                    self._bring(index, name)
                    if not some or added == index:
                        add(index)
        some = bool(self._world.total(torch.tensor([float(some)])))
        with self._world.together(ASKED):
            for index in range(added, len(self._batches)) if some else ():
                with self._waiting.turn(index):
                    add(index)
        ones = torch.ones(size[0], size[2], dtype=torch.float64, device=self._device)
        gains = ones if gain is None else gain.double().reshape(size[0], size[2])
        return (regression, meets, gains) if some else None

    def _solve(self, name: str, regression: Regression, meets: bool, gains: Tensor) -> tuple[Repair, Changes]:
        """Return what became of a layer, and the tensors to change."""
        site, look = self._found[1][next(iter(self._found[1]))][name], self._smaller.look
        weight = look(name)
        regression.pool(self._world)
        solution = regression.solve(gains, meets, self._world)
        update = _whole(site, weight, solution.update, self._parts.patches)
        changes = [] if solution.ridge is None else self._changes(site, weight, update, solution.intercept)
        self._world.spread(value for _, value in changes)
        repair = Repair(
            name, 1 - solution.left / solution.lost if solution.lost else 0.0, site.bias is not None,
            cut=name in self._cut, samples=regression.samples,
            regressors=layer_size(site, weight, self._parts.patches)[1],
            ridge=solution.ridge, shortcut=solution.shortcut,
        )  # fmt: skip
        return repair, changes

    def _all_meet(self, name: str) -> bool:
        """Say whether a layer's output is followed to a sum for every batch, on all processes."""
        met = [self._met(run, name) for run in self._smaller.runs]
        found = self._world.total(torch.tensor([float(sum(met)), float(len(met))]))
        return 0 < float(found[0]) == float(found[1])

    def _met(self, run: Run, name: str) -> bool:
        """Say whether both networks follow a layer's output to a sum by the same operations."""
        index = self._smaller.runs.index(run)
        sides = ((self._dense.runs[index], self._found[0]), (run, self._found[1]))
        paths = []
        for item, found in sides:
            site = found[item.program][name]
            if site.meeting is None:
                return False
            paths.append([item.program.steps[step].name for step in (*site.meeting.chain, site.meeting.at)])
        return paths[0] == paths[1]

    def _targets(
        self, index: int, name: str, places: Tensor, gain: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a layer's outputs lack at some places of a batch, of their own and for the sum.

        Each is (M, G, o); without a gain there is no sum.
        """
        runs = (self._dense.runs[index], self._smaller.runs[index])
        looks = (self._dense.look, self._smaller.look)
        sites = [found[run.program][name] for run, found in zip(runs, self._found, strict=True)]
        rows = self._kept_rows(name, sites[1])

        def missing(sides: Sequence[Tensor]) -> Tensor:
            dense, now = (item.flatten(1) for item in sides)
            return (dense if rows is None else dense.index_select(1, rows)) - now

        own = missing([at_places(s, run.values[s.step], places) for run, s in zip(runs, sites, strict=True)])
        groups = sites[1].groups
        if gain is None:
            return own.unflatten(1, (groups, -1)), None
        # What the layer would have to give alone for the sum to be as it is: the shortcut's share of
        # it comes in. The difference of the two networks is what is missing at the sum.
        undone = [
            self._at_sum(run, site, look, places) for run, site, look in zip(runs, sites, looks, strict=True)
        ]
        both = missing(undone)
        rare = (gain * GAIN < gain.median()) | ~gain.isfinite()
        if bool(rare.any()):
            both = torch.where(rare, own, both)
        return own.unflatten(1, (groups, -1)), both.unflatten(1, (groups, -1))

    def _at_sum(self, run: Run, site: Site, look: Look, places: Tensor) -> Tensor:
        """Return the sum at some places, undone down to the layer: (M, G, o)."""
        assert site.meeting is not None
        operands = (run.values[site.meeting.operand], run.values[site.meeting.other])
        if not keeps_places(run.program, site):
            return at_places(site, undo(run, site, operands[0] + operands[1], look), places)
        # Most of a large map is not drawn: the places come first where the chain leaves them in theirs.
        one, other = (at_places(site, item, places) for item in operands)
        total = one.add_(other)
        return undo(run, site, total.flatten(1), look).reshape(total.shape)

    def _gain(self, index: int, name: str) -> Tensor:
        """Return (outputs,) what a unit of each channel is at the sum; alike for all batches."""
        run = self._smaller.runs[index]
        site = self._found[1][run.program][name]
        assert site.meeting is not None
        operand = run.values[site.meeting.operand][:1]
        if not keeps_places(run.program, site):
            operand = run.values[site.meeting.operand]
        undone = [
            undo(run, site, operand.new_full((), value).expand(operand.shape), self._smaller.look)
            for value in (1, 0)
        ]
        apart = (undone[0] - undone[1]).movedim(site.channel, 0).flatten(1)[:, 0]
        return 1 / apart.abs()

    def _kept_rows(self, name: str, site: Site) -> Tensor | None:
        """Return which of the dense layer's outputs stay; None where all do."""
        dim = 0 if site.outputs_first else 1
        if site.transposed and site.groups > 1:
            return None
        kept = self._rows.get((name, dim))
        return None if kept is None else torch.as_tensor(kept, device=self._device)

    def _draw(self, number: int, index: int, name: str) -> tuple[Tensor, Tensor]:
        """Return the places that are drawn of a batch, and the example in it that each sample belongs to."""
        run = self._smaller.runs[index]
        site = self._found[1][run.program][name]
        output, examples = run.values[site.step], len(self._held[index])
        seed = (self._seed * 1_000_003 + number) * 1_009 + self._numbers[index]
        wanted = self._wanted(site, self._smaller.look(name))
        places, owner = drawn(site, tuple(output.shape), self._batches[index], examples, wanted, seed)
        return places.to(self._device), owner

    def _add(
        self,
        regression: Regression,
        index: int,
        name: str,
        places: Tensor,
        owner: Tensor,
        targets: tuple[Tensor, Tensor | None],
    ) -> None:
        """Add the samples of one batch."""
        run = self._smaller.runs[index]
        site = self._found[1][run.program][name]
        weight = self._smaller.look(name)
        P = regressors(site, run.values[site.data], weight, places)
        if not self._parts.patches and site.spatial:
            P = _middle(P, weight)
        regression.add(P, *targets, self._held[index][owner].to(self._device))

    def _wanted(self, site: Site, weight: Tensor) -> int:
        """Return how many places are drawn of each example."""
        if not self._parts.samples:
            return 2**31
        regressors = layer_size(site, weight, self._parts.patches)[1]
        return places_each(regressors, self._parts.samples, self._examples)

    def _changes(self, site: Site, weight: Tensor, update: Tensor, shift: Tensor) -> Changes:
        """Return the new weight, and the new bias or running mean, by name."""
        changes = [(site.weight, add_update(site, weight, update))]
        look = self._smaller.look
        if site.bias is not None:
            before = look(site.bias)
            changes.append((site.bias, (before.double() + shift.reshape(-1).to(before.device)).to(before)))
        elif site.norm is not None:
            before = look(site.norm)
            changes.append((site.norm, (before.double() - shift.reshape(-1).to(before.device)).to(before)))
        return changes


def places_each(regressors: int, samples: int, examples: int) -> int:
    """Return how many places are drawn of each example, for so many samples of a layer for a regressor."""
    return max(1, ceil(max(samples * regressors, FEWEST) / examples))


def drawn(
    site: Site, shape: tuple[int, ...], batch: Batch, examples: int, wanted: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw places of a layer's output, and return them with the example in the batch that each belongs to.

    Args:
        site: the layer.
        shape: of its output.
        batch: its padding is left out.
        examples: in the batch.
        wanted: places of each example.
        seed: of the draw.

    Returns:
        Flat positions of a convolution's output, drawn alike for all examples, or rows of a product's; and
        (M,) the example of each sample.
    """
    generator = torch.Generator().manual_seed(seed)
    if site.spatial:
        places = torch.randperm(prod(shape[2:]), generator=generator)[:wanted].sort()[0]
        owner = torch.arange(shape[0]).div(max(shape[0] // examples, 1), rounding_mode="floor")
        return places, owner.clamp(max=examples - 1).repeat_interleave(len(places))
    rows, valid = torch.arange(prod(shape[:-1])), _valid(batch, shape)
    rows = rows if valid is None else rows[valid]
    places = rows[torch.randperm(len(rows), generator=generator)[: wanted * examples]].sort()[0]
    return places, _owners(shape, examples)[places]


def layer_size(site: Site, weight: Tensor, patches: bool = True) -> tuple[int, int, int]:
    """Return (G, n, o) of a layer, see `regress`; of the middle of its kernel alone without `patches`."""
    shape = tuple(weight.shape)
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
    if shape[0] % examples == 0:
        return rows // (len(rows) // examples)
    if len(shape) > 2 and shape[1] == examples:
        return rows // prod(shape[2:-1]) % examples
    return rows % examples


def _valid(batch: Batch, shape: tuple[int, ...]) -> Tensor | None:
    """Return which rows of a product's output are no padding; None where that is not said."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if (shape[:2] == tuple(mask.shape) and len(shape) == 3) or prod(shape[:-1]) == mask.numel():
        if len(shape) == 3 and shape[0] == mask.shape[1] != mask.shape[0]:
            mask = mask.T
        return mask.reshape(-1).bool().cpu()
    return None
