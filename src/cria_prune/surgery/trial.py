"""Trial cuts: does the forward adapt where the captured operations cannot tell?

A reshape or split in a captured graph holds numbers. Whether the model's code reads them from its
input or has them written down decides whether its units can leave. So some of them are removed on
a copy, and masked must equal pruned; groups for which it does not are frozen with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import numpy as np
from torch import nn

from cria_prune.base.batches import Batch, batch_size, map_tensors, named_shortage, outputs, rows_of
from cria_prune.base.errors import CriaError, ResourceError, said
from cria_prune.base.experts import plain_experts
from cria_prune.base.modules import device_of, meta_copy, shared_copy
from cria_prune.planning.plan import Plan, make_plan
from cria_prune.structure.groups import Count, UnitGroup, UnitGroups, alike
from cria_prune.surgery.removal import apply
from cria_prune.surgery.training import training_outputs
from cria_prune.surgery.verify import LESS, Reference


def settle(model: nn.Module, groups: UnitGroups, example: Batch, reference: Reference) -> UnitGroups:
    """Return the groups with every assumption tried: true ones are dropped, false ones freeze their group.

    All prunable groups are cut together, those without an assumption too, for a forward can depend on a
    size without a trace (a division by a width). If that fails, the groups that fail are looked for:
    alike ones (the same layer of another block) together, then by halves. First by the shapes of the
    outputs on the meta device, where a forward computes nothing, then by their values. A model that is
    on the meta device itself has no values: there the shapes decide alone. At last in training mode: code
    that only this runs may count on a width that the evaluation does not show.
    """
    trials, values = _Trials(model, groups), device_of(model).type != "meta"
    shapes = None
    for batch in (example,) if values else reference.batches:
        shapes = _Shapes.of(model, batch)
        if shapes is not None:
            trials.run(shapes.failure, apart=True, by_shapes=True)
    if not values:
        shapes = _Shapes.of(model, example, training=True)
        if shapes is not None:
            trials.run(shapes.failure)
        return trials.settled()
    trials.run(_Values(reference).failure, apart=shapes is None)
    settled = trials.settled()
    if not settled.prunable:
        return settled
    if reference.dense_training().batch is None:
        return replace(settled, notes=(*settled.notes, untrained_said(reference.dense_training().reason)))
    trials.run(_Values(reference, training=True).failure)
    return trials.settled()


def untrained_said(reason: str) -> str:
    """Return the line that says why no training-mode forward was tried, and how it would be."""
    return (
        f"training mode is not tried, for its forward fails ({reason}): give what it needs, such as targets, "
        "in a further example that maps its arguments (examples=[{...}])"
    )


Test = Callable[[Plan], str | None]
Key = tuple[str, str]
"""Name of an attribute, and how its module sees the units (see `groups.Count`)."""
DRAWS = 3
"""Cuts of all groups by which shapes are tried at least."""
CHOSEN = 6
"""Names of attributes of which every choice is tried, where neither all nor one of them will do."""


class _Trials:
    """Trial cuts of one model; a test says what failed when a plan is carried out on it."""

    def __init__(self, model: nn.Module, groups: UnitGroups) -> None:
        self.groups = {group.name: group for group in groups}
        self.all = groups
        self.frozen: dict[str, str] = {}
        self.test: Test = lambda plan: None
        self.shapes = False

    def run(self, test: Test, apart: bool = False, by_shapes: bool = False) -> None:
        """Freeze the groups that fail a test, among those that are not frozen yet.

        Args:
            test: says what failed when a plan is carried out.
            apart: heads and residual widths are tried without each other too. A width by a number of heads
                can be the size of a head by chance when both are cut.
            by_shapes: a trial costs next to nothing. More of them are made: where layers share a
                configuration all are cut to one size too, for only then does it say so to whoever else reads
                it; and of attributes that hold a number every choice is tried.
        """
        self.test, self.shapes = test, by_shapes
        chosen = [group.name for group in self.all.prunable if group.name not in self.frozen]
        # Where all groups pass together, one trial is all that it takes.
        tried = [chosen, *(self.parts(chosen) if apart else [])]
        # Shapes fit by chance: a split of 18 by 6 still gives three parts. One draw for all is too few.
        draws = DRAWS if by_shapes else 1
        if chosen and any(self.failure(names, draws) is not None for names in tried):
            itself = self.failure([])
            if itself is not None:  # NaN, chance: it says nothing, so what is only assumed is not offered
                why = f"and the model differs from itself: {itself}"
                self.frozen |= {name: self.reason(name, why) for name in chosen if self.groups[name].assumes}
                return
            self.find(chosen)
        for names in self.alike(chosen):
            if self.has_bounds(names):  # numbers can fit a cut of everything, and not of one group
                self.blame(names)

    def parts(self, chosen: Sequence[str]) -> list[list[str]]:
        """Return the residual widths, and the rest, where there are heads beside a residual width."""
        residual = [name for name in chosen if self.groups[name].kind == "residual"]
        rest = [name for name in chosen if name not in residual]
        heads = any(self.groups[name].kind in ("head", "kv group") for name in rest)
        return [rest, residual] if heads and residual else []

    def alike(self, chosen: Sequence[str]) -> list[list[str]]:
        """Return those of the groups that are not frozen, alike ones together."""
        return [*map(list, alike(self.groups[name] for name in chosen if name not in self.frozen))]

    def has_bounds(self, names: Sequence[str]) -> bool:
        """Say whether any of the groups was cut at numbered positions."""
        return any("bounds" in text for name in names for text in self.groups[name].assumes)

    def settled(self) -> UnitGroups:
        """Return the groups, those that failed frozen."""
        return replace(
            self.all,
            groups=tuple(
                replace(
                    group,
                    frozen=group.frozen or self.frozen.get(group.name),
                    assumes=(),
                    counts=tuple(item for item in group.counts if item.sure or not item.sight),
                )
                for group in self.groups.values()
            ),
        )

    def find(self, chosen: list[str]) -> None:
        """Freeze the groups that fail alone; if the rest fails together, the assumed ones, then all."""
        failing = self.failing(chosen)
        # What mends one class most often mends all that fail, such as the attentions of all stages. Residual
        # widths are apart: they lie in every block, and more of what a forward does depends on them.
        for residual in (False, True):
            classes = [item for item in failing if (self.groups[item[0]].kind == "residual") is residual]
            if len(classes) > 1 and self.mended([name for names in classes for name in names]):
                # A width and the heads that are cut out of it may fit each other by chance, and not alone.
                classes = [names for names in classes if self.failure(names) is not None]
            for names in classes:
                if not self.mended([*names]):
                    self.halve([*names], failing[names])
        for assumed in (True, False):
            left = [name for name in chosen if name not in self.frozen]
            text = self.failure(left) if left else None
            if text is None:
                return
            # Each passes alone and all fail: those under an assumption
            # are the likelier cause, then nobody is spared.
            blamed = [name for name in left if self.groups[name].assumes or not assumed]
            self.frozen |= {name: self.reason(name, text) for name in blamed}

    def failing(self, chosen: list[str]) -> dict[tuple[str, ...], str]:
        """Return the classes of alike groups that fail alone, with what they gave."""
        classes = [tuple(names) for names in self.alike(chosen)]
        sound = [names for names in classes if not any(self.groups[name].assumes for name in names)]
        # Most of what is under no assumption passes, and then one trial says so.
        if len(sound) > 1 and self.failure([name for names in sound for name in names]) is None:
            classes = [names for names in classes if names not in sound]
        found = {names: self.failure(names) for names in classes}
        return {names: text for names, text in found.items() if text is not None}

    def blame(self, names: list[str]) -> None:
        """Freeze those of some alike groups that fail and cannot be mended."""
        text = self.failure(names)
        if text is not None and not self.mended(names):
            self.halve(names, text)

    def mended(self, names: list[str]) -> bool:
        """Restate attributes or the sizes of calls, if the trial passes with them."""
        return self.restated(names) or self.resized(names) or self.chosen(names) or self.noticed(names)

    def restated(self, names: list[str]) -> bool:
        """Take the attributes that hold the same numbers too, if the trial passes with them."""
        # All guesses are tried together, then each alone. Of those that help each is left out once:
        # an attribute that need not be changed may count something else, and be equal by chance.
        before = {name: self.groups[name] for name in names}
        return self.guessed(before, _keys(before.values(), lambda item: not item.sure and not item.sight))

    def noticed(self, names: list[str]) -> bool:
        """Take numbers of the modules around that no operation names, if the trial passes with them."""
        before = {name: self.groups[name] for name in names}
        keys = _keys(before.values(), lambda item: not item.sure and bool(item.sight))
        return self.guessed(before, keys, _choices(keys) if self.shapes else ())

    def guessed(
        self, before: Mapping[str, UnitGroup], guesses: set[Key], further: Iterable[tuple[Key, ...]] = ()
    ) -> bool:
        """Take as few of the attributes as it takes for the trial to pass, if it does.

        Args:
            before: the groups; guesses: what may be taken, all or one of it.
            further: other choices, tried after these.
        """
        if not guesses:
            return False

        def passes(taken: set[Key]) -> bool:
            return self.passes(before, taken, keep=True)

        single = [{key} for key in sorted(guesses)] if len(guesses) > 1 else []
        choices = chain((guesses, *single), map(set, further))
        taken = next((item for item in choices if passes(item)), None)
        if taken is None:
            self.groups.update(before)
            return False
        guesses = set(taken)
        for key in sorted(guesses):  # no more of them than it takes
            if passes(guesses - {key}):
                guesses.discard(key)
        # The last trial also leaves the groups with the guesses that were kept.
        return passes(guesses)

    def passes(self, before: Mapping[str, UnitGroup], taken: Collection[Key], keep: bool = False) -> bool:
        """Take attributes, beside those that are sure or without them; say whether the trial passes then."""
        for name, group in before.items():
            counts = (
                replace(item, sure=(keep and item.sure) or (item.name, item.sight) in taken)
                for item in group.counts
            )
            self.groups[name] = replace(group, counts=tuple(counts))
        return self.failure([*before]) is None

    def chosen(self, names: list[str]) -> bool:
        """Take the fewest of the attributes, those whose names say what they count too, that let it pass.

        A layer may hold the same number for its heads, their size and its state, and need several of them.
        """
        before = {name: self.groups[name] for name in names}
        held = _keys(before.values(), lambda item: not item.sight)
        if self.shapes and any(self.passes(before, taken) for taken in _choices(held)):
            return True
        self.groups.update(before)
        return False

    def resized(self, names: list[str]) -> bool:
        """Restate the sizes that calls around the groups ask for, if the trial passes with them."""
        before = {name: self.groups[name] for name in names}
        tried = [_mends(before.values())]
        for wide in (False, True):
            modules = {name: self.callers(name, wide) for name in names}
            every = set().union(*modules.values())
            # What the code works out from a count, such as the factor of an attention's scores, may be right
            # with the count of now only. So the counts of these modules are restated or left.
            for counted in (True, False):
                for name, group in before.items():
                    counts = (
                        replace(item, sure=item.sure and (counted or item.module not in every))
                        for item in group.counts
                    )
                    self.groups[name] = replace(group, restated=modules[name], counts=tuple(counts))
                now = _mends(self.groups[name] for name in names)
                if now not in tried:
                    tried.append(now)
                    if self.failure(names) is None:
                        return True
        self.groups.update(before)
        return False

    def callers(self, name: str, wide: bool) -> tuple[str, ...]:
        """Return the modules whose calls take or give units of a group; or all around its tensors as well."""
        group, calls = self.groups[name], self.all.calls
        found = {call.module for call in calls if name in call.groups}
        # A residual width is what the code of every block around reads off its input.
        if wide or group.kind == "residual":
            tensors = {item.tensor for item in group.slices}
            ends = {name: [0, *(at for at, char in enumerate(name) if char == ".")] for name in tensors}
            around = {name[:end] for name, places in ends.items() for end in places}
            found |= around & {call.module for call in calls}
        return tuple(sorted(found))

    def halve(self, names: list[str], failure: str) -> None:
        """Freeze those of the groups that fail; `failure` is what all of them gave."""
        ends = [self.failure([name]) for name in {names[0], names[-1]}] if len(names) > 1 else [failure]
        if all(ends):  # alike groups: what fails for the first and the last is not tried for each between
            self.frozen |= {name: self.reason(name, str(ends[0])) for name in names}
            return
        middle = len(names) // 2
        for half in (names[:middle], names[middle:]):
            self.blame(half)

    def reason(self, name: str, failure: str) -> str:
        """Say why a group is frozen."""
        assumes = self.groups[name].assumes
        if assumes:
            return f"a trial cut failed although {assumes[0]}: {failure}"
        return f"a trial cut failed, its forward depends on how many units there are: {failure}"

    def failure(self, names: Sequence[str], least: int = 1) -> str | None:
        """Remove some units of the named groups on a copy; None if the test passes.

        Numbered bounds can fit one cut by chance, so where they are assumed several cuts are tried.
        """
        # A cut that happens to keep the numbered positions passes: a class of alike groups is tried
        # twelve times, all groups together four times. One cut is enough where there are no such numbers.
        draws = 1 if not self.has_bounds(names) else 12 if len(self.alike(names)) == 1 else 4
        draws = max(draws, least)
        if any(item.sure and item.sight for name in names for item in self.groups[name].counts):
            draws = max(draws, 4)  # a stored number can fit the width of another layer by chance
        cuts = [self.cut(names, seed) for seed in range(draws)]
        if self.shapes and self.share_config(names):
            cuts.append(self.cut(names, 0, equal=True))
        for kept in cuts:
            try:
                groups = replace(self.all, groups=tuple(self.groups.values()))
                text = self.test(make_plan(groups, kept))
            except ResourceError:  # of the machine, not of the cut
                raise
            except CriaError as error:
                text = error.found
            if text is not None:
                return text
        return None

    def share_config(self, names: Sequence[str]) -> bool:
        """Say whether several of the groups are counted by a field of a configuration."""
        said = [item.name for name in names for item in self.groups[name].counts if item.sure]
        return any(name.startswith("config.") and said.count(name) > 1 for name in said)

    def cut(self, names: Sequence[str], seed: int, equal: bool = False) -> dict[str, np.ndarray]:
        """Draw what stays, about half at first; shares differ, so that equal sizes do not pass by chance.

        With `equal` they differ between sizes of groups alone.
        """
        # Groups lose different shares, so that a number of one that fits another by chance is found out.
        # For the same reason groups of one size keep different numbers, as long as there are such.
        generator = np.random.default_rng(seed)
        kept, shares, taken = {}, dict[int, float](), set[tuple[int, int]]()
        for name in names:
            size, least = self.groups[name].size, self.groups[name].least
            share = generator.uniform(0.35, 0.65) if seed == 0 else generator.uniform()
            share = shares.setdefault(size, share) if equal else share
            stays = max(least, min(size - 1, round(size * share)))
            if not equal:
                free = [count for count in range(least, size) if (size, count) not in taken]
                stays = min(free, key=lambda count: abs(count - stays)) if free else stays
                taken.add((size, stays))
            kept[name] = np.sort(generator.permutation(size)[:stays])
        return kept


def _keys(groups: Iterable[UnitGroup], of: Callable[[Count], bool]) -> set[Key]:
    return {(item.name, item.sight) for group in groups for item in group.counts if of(item)}


def _choices(keys: Collection[Key]) -> Iterator[tuple[Key, ...]]:
    """Yield every choice of more than one of some attributes, the smallest first; of many none."""
    # Each is tried by shapes alone, which cost next to nothing.
    for count in range(2, len(keys)) if len(keys) <= CHOSEN else ():
        yield from combinations(sorted(keys), count)


def _mends(groups: Iterable[UnitGroup]) -> list[Any]:
    """Return what a trial of these groups restates."""
    return [(group.restated, group.counts) for group in groups]


class _Values:
    """Masked against pruned."""

    def __init__(self, reference: Reference, training: bool = False) -> None:
        self.reference, self.training = reference, training

    def failure(self, plan: Plan) -> str | None:
        """Cut a copy; an error says how it differs from the masked model."""
        # Only what is cut is copied: a trial of the whole model
        # in float64 each time made the search take minutes.
        with named_shortage("A trial cut of the model", LESS):
            smaller = apply(self.reference.model, plan, share=True)
        if self.training:
            self.reference.compare_training(plan, smaller)
        else:
            self.reference.compare(plan, smaller, training=False, spare=True)
        return None


class _Shapes:
    """The model on the meta device, and the shapes of its outputs."""

    def __init__(self, model: nn.Module, example: Batch, training: bool = False) -> None:
        # A forward on the meta device costs next to nothing,
        # so wrong shapes are found there before values are.
        self.model = meta_copy(model)
        self.example = map_tensors(example, lambda item: item.to("meta"))
        self.training = training
        self.expected = self._outputs(self.model, self.example)
        self.more: tuple[Batch, list[tuple[int, ...]]] | None = None

    @classmethod
    def of(cls, model: nn.Module, example: Batch, training: bool = False) -> _Shapes | None:
        """Return the model on the meta device; None where its forward needs values."""
        try:
            return cls(model, example, training)
        except Exception:  # whatever the model's code raises without values
            return None

    def failure(self, plan: Plan) -> str | None:
        """Cut the meta model and run it; None if the outputs have the shapes of the dense model's."""
        smaller = apply(self.model, plan, share=True)
        batches = [(self.example, self.expected)]
        # A size that is restated must be none of the batch's, and the example alone cannot tell.
        batches += [self._one_more()] if plan.calls else []
        for batch, expected in batches:
            try:
                found = self._outputs(smaller, batch)
            except Exception as error:
                return said(error)
            if found != expected:
                return f"outputs of shape {found}, dense {expected}"
        return None

    def _one_more(self) -> tuple[Batch, list[tuple[int, ...]]]:
        """Return the batch with one more example and the dense shapes; as it is where that will not run."""
        if self.more is None:
            self.more = self.example, self.expected
            with suppress(Exception):  # whatever the model's code raises: it may take this number only
                batch = rows_of(self.example, [0, *range(batch_size(self.example))])
                self.more = batch, self._outputs(self.model, batch)
        return self.more

    def _outputs(self, model: nn.Module, example: Batch) -> list[tuple[int, ...]]:
        model, found = shared_copy(model), training_outputs if self.training else outputs
        with plain_experts(model):
            return [tuple(item.shape) for item in found(model, example)]
