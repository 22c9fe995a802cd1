"""Shares of the groups from measured losses: the least sum of losses for the cost that has to go.

Given d_b(k), the loss when only group b is cut to k units, and the exact cost of any combination of
numbers, minimise sum_b d_b(k_b) subject to cost gone >= target (docs/method.md, section 4). Over bins of
cost this is a knapsack, solved by dynamic programming: with V_b(g) the least loss of the first b stairs
that frees at least g bins,

    V_b(g) = min over k of V_{b-1}(g - price_b(k)) + d_b(k).

Costs are not additive: a weight between two groups costs the product of both. So prices are taken around a
solution, the others as they are there, and the sums are compared with what that solution frees exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cria_prune.base.errors import SignalError, StructureError, TargetError
from cria_prune.planning.budget import SLACK, Cost
from cria_prune.planning.stairs import Stair

Losses = Mapping[str, Mapping[int, float]]
"""Group name -> units kept -> loss when only this group is cut; 0 where nothing is."""

BINS = 2000  # or 32 for every stair, if that is more
CANDIDATES = 64  # numbers of units of a stair that a pass over the whole of it looks at
WIDE, PASSES = 2, 8  # passes over whole stairs, and all


def loss_curve(stair: Stair, losses: Losses) -> np.ndarray:
    """Return (steps + 1,) float64, the loss at every number of units of a stair, never falling.

    The losses of a class are added up. Measured ones are first made monotone (a smaller layer that
    measures better does so by chance), then joined by monotone cubics (Fritsch and Carlson 1980).

    Raises:
        StructureError: a group has no losses, or none for so few units.
        SignalError: a loss is negative, NaN or infinite.
    """
    # scipy.interpolate takes a third of a second to import, which a command without losses need not wait.
    from scipy.interpolate import PchipInterpolator

    total = np.zeros(len(stair.counts))
    if len(total) == 1:  # its number is given: there is nothing to choose by
        return total
    for group in stair.groups:
        points = {group.original_size: 0.0, **_checked(group.name, losses)}
        least = int(stair.counts[-1])
        if min(points) > least:
            raise StructureError(
                f"Sharing out by measured losses down to {least} units of group {group.name!r}",
                f"losses are known for {sorted(points)} units",
                "Measure the smallest number that may stay too, or raise the floor",
            )
        kept = np.array(sorted(points, reverse=True))
        values = np.maximum.accumulate([points[int(count)] for count in kept])
        removed, wanted = kept[0] - kept, kept[0] - stair.counts
        straight = len(kept) < 3
        total += (
            np.interp(wanted, removed, values) if straight else PchipInterpolator(removed, values)(wanted)
        )
    # The cubics are monotone but for rounding.
    return np.maximum.accumulate(np.maximum(total, 0.0))


def _checked(name: str, losses: Losses) -> dict[int, float]:
    if name not in losses:
        raise StructureError(
            f"Sharing out by measured losses with group {name!r}",
            f"found no losses for it, only for {sorted(losses)}",
            "Measure all prunable groups of this network",
        )
    found = {int(count): float(loss) for count, loss in losses[name].items()}
    wrong = {count: loss for count, loss in found.items() if not 0 <= loss < np.inf}
    if wrong:
        count, loss = next(iter(wrong.items()))
        raise SignalError(
            f"Sharing out by measured losses with group {name!r}",
            f"the loss at {count} units is {loss:g}",
            "Give losses that are finite and not negative",
        )
    return found


def allocate(
    made: Sequence[Stair], losses: Losses, cost: Cost, whole: float, target: float, *, bins: int = BINS
) -> dict[str, int]:
    """Return how many units every group keeps: the least sum of losses that frees the target.

    The least up to the resolution (the bins, and for stairs of more than 128 numbers the steps looked at)
    and, where costs are products, up to what passes around one solution after another find. The target is
    reached exactly, and no stair could go a step back up: the overshoot is less than the smallest last step.
    Nothing is drawn: equal losses are told apart the same way every time.

    Args:
        made: the stairs of the groups as they are now.
        losses: measured on any of the numbers, at least on the smallest of every stair.
        cost: counts what numbers of units cost.
        whole: cost of the dense network, which `target` is a share of.
        target: share to be gone, earlier cuts counted in.
        bins: resolution of the cost in the dynamic programming.

    Returns:
        Group name -> units to keep.

    Raises:
        TargetError: the feet of all stairs free less.
        StructureError, SignalError: see `loss_curve`.
    """
    bins = max(bins, 32 * len(made))
    search = _Search(made, [loss_curve(stair, losses) for stair in made], cost, (1 - target) * whole)
    feet = np.array([len(stair.counts) - 1 for stair in made])
    slack = SLACK * whole
    if (least := search.left(feet)) > search.most + slack:
        raise TargetError(
            f"Removing {target:.2%} by measured losses",
            f"at most {1 - least / whole:.2%} can be removed",
            f"Ask for {np.floor((1 - least / whole) * 1e4) / 1e4:g} or less, or lower the floor",
        )
    around, best = search.level(slack), (np.inf, 0.0, tuple[int, ...]())
    # The first passes see whole stairs. The later ones refine: a quarter of the
    # numbers, in a window around the last solution, and bins a quarter as wide.
    spans = np.array([len(stair.counts) for stair in made])
    for number in range(PASSES):
        wide = number < WIDE
        finer = 1 if wide else 4
        around = search.settled(search.cheapest(around, spans, bins * finer, CANDIDATES // finer), slack)
        found = (search.loss(around), -search.left(around), tuple(around.tolist()))
        gain, best = best[0] - found[0], min(best, found)
        if not wide and gain <= 1e-4 * best[0] and (spans <= CANDIDATES).all():
            break
        if number >= WIDE - 1:
            spans = np.minimum(spans, np.maximum(spans // 4, CANDIDATES // 4))
    return search.kept(best[2])


class _Search:
    """The numbers of one allocation. `most`: cost that may be left; `steps`: (stairs,) down each stair."""

    def __init__(self, made: Sequence[Stair], curves: Sequence[np.ndarray], cost: Cost, most: float) -> None:
        self.made, self.curves, self.cost, self.most = made, curves, cost, most

    def kept(self, steps: Sequence[int] | np.ndarray) -> dict[str, int]:
        """Return group name -> units."""
        pairs = zip(self.made, steps, strict=True)
        return {name: int(stair.counts[step]) for stair, step in pairs for name in stair.names}

    def left(self, steps: np.ndarray) -> float:
        """Return the exact cost."""
        return self.cost.count(self.kept(steps))

    def loss(self, steps: np.ndarray) -> float:
        """Return the sum of the losses."""
        return float(sum(curve[step] for curve, step in zip(self.curves, steps, strict=True)))

    def prices(self, number: int, steps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(positions,) what a stair frees down to each position, the others at their steps."""
        stair = self.made[number]
        counts = stair.counts[np.concatenate([[0], positions])]
        values = self.cost.along(stair.names, counts, self.kept(steps))
        return np.asarray(values[0] - values[1:])

    def level(self, slack: float) -> np.ndarray:
        """Return equal shares of all stairs that reach the target: where the first prices are taken."""
        ends = np.array([len(stair.counts) - 1 for stair in self.made])
        low, high = 0, 1024
        while low < high:
            middle = (low + high) // 2
            reached = self.left(-(-ends * middle // 1024)) <= self.most + slack
            low, high = (low, middle) if reached else (middle + 1, high)
        return -(-ends * low // 1024)

    def cheapest(self, around: np.ndarray, spans: np.ndarray, bins: int, most: int) -> np.ndarray:
        """Return the steps of the least loss with prices around a solution, by dynamic programming.

        Args:
            around: (stairs,) steps of that solution.
            spans: (stairs,) how wide a window of each stair is looked at.
            bins: resolution of the cost that has to go.
            most: numbers of units in a window, at most.
        """
        places = [_places(*item, most) for item in zip(self.made, around, spans, strict=True)]
        prices = [self.prices(number, around, place) for number, place in enumerate(places)]
        here = [price[place == step][0] for price, place, step in zip(prices, places, around, strict=True)]
        # The prices of this solution add up to another sum than it frees: what
        # is still to be freed is counted from what it leaves exactly.
        short = self.left(around) - self.most
        needed = max(sum(here) + short, 0.0)
        unit = needed / bins or 1.0
        # To the nearest bin; down would add up to a bin per stair, all on one side. The
        # rounding of this solution is known, so that from pass to pass it does not add up.
        rounded = [np.rint(price / unit).astype(np.int64) for price in prices]
        start = sum(int(np.rint(price / unit)) for price in here)
        goal = max(start + int(np.ceil(short / unit - 1e-9)), 0)
        chosen = _knapsack(rounded, [c[p] for c, p in zip(self.curves, places, strict=True)], goal)
        return np.array([place[index] for place, index in zip(places, chosen, strict=True)])

    def settled(self, steps: np.ndarray, slack: float) -> np.ndarray:
        """Return the steps, gone down where they fall short, then back up as far as the target allows.

        Always where it costs the least loss, or saves the most, for the same cost; a quarter of what is
        still to go at a time, so that not one stair has to bear all of it.
        """
        steps = steps.copy()
        while (short := self.left(steps) - self.most) > slack:
            moves = [self._move(number, steps, short / 4, 1) for number in range(len(steps))]
            # What is freed beyond what is short is worth nothing.
            worth = [loss / min(freed, short) if freed > 0 else np.inf for _, loss, freed in moves]
            steps[np.argmin(worth)] += moves[np.argmin(worth)][0]
        while True:
            spare = self.most - self.left(steps) + slack
            moves = [self._move(number, steps, spare / 4, -1, spare) for number in range(len(steps))]
            saved = [loss / max(-freed, slack) if move else np.inf for move, loss, freed in moves]
            if not np.isfinite(saved).any():
                return steps
            steps[np.argmin(saved)] += moves[np.argmin(saved)][0]

    def _move(
        self, number: int, steps: np.ndarray, amount: float, way: int, most: float = np.inf
    ) -> tuple[int, float, float]:
        """Return how far a stair can go down (way 1) or up (-1) within an amount of cost.

        Returns:
            Steps (0 for none), the change of the loss, and what is freed. If even the first step that
            changes the cost is beyond the amount, that step, as long as it is within `most`.
        """
        now, curve = int(steps[number]), self.curves[number]
        positions = np.arange(now, len(curve)) if way > 0 else np.arange(now, -1, -1)
        prices = self.prices(number, steps, positions)
        freed = prices - prices[0]
        sizes = np.abs(freed)
        far = int(np.searchsorted(sizes, amount, side="right")) - 1
        if sizes[far] == 0:  # a step may free nothing alone: seconds come in plateaus
            far = min(int(np.searchsorted(sizes, 0.0, side="right")), len(positions) - 1)
            if sizes[far] > most:
                far -= 1
        return way * far, float(curve[positions[far]] - curve[now]), float(freed[far])


def _places(stair: Stair, step: int, span: int, most: int) -> np.ndarray:
    """Return the positions of a stair that are looked at: evenly in a window, and the step itself."""
    last = len(stair.counts) - 1
    low, high = (0, last) if span > last else (max(step - span // 2, 0), min(step + span // 2, last))
    grid = np.rint(np.linspace(low, high, min(most + 1, high - low + 1))).astype(np.int64)
    return np.union1d(grid, [step])


def _knapsack(prices: Sequence[np.ndarray], losses: Sequence[np.ndarray], goal: int) -> list[int]:
    """Choose an item of every stair: the least sum of losses whose whole prices add up to the goal or more.

    Args:
        prices, losses: per stair (items,) int64 and float64.
        goal: bins to be freed.

    Returns:
        The item of each stair; the first of those that are equal, and the last where the goal is too far.
    """
    bins = np.arange(goal + 1)
    best = np.where(bins == 0, 0.0, np.inf)  # least loss of the stairs so far that frees at least so many
    taken = np.empty((len(prices), goal + 1), dtype=np.int64)
    for number, (price, loss) in enumerate(zip(prices, losses, strict=True)):
        totals = best[np.maximum(bins - price[:, None], 0)] + loss[:, None]
        taken[number] = np.argmin(totals, axis=0)
        best = totals[taken[number], bins]
    if not np.isfinite(best[goal]):
        return [len(price) - 1 for price in prices]
    chosen, rest = [0] * len(prices), goal
    for number in reversed(range(len(prices))):
        chosen[number] = int(taken[number, rest])
        rest = max(rest - int(prices[number][chosen[number]]), 0)
    return chosen
