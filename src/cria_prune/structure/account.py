"""What becomes of every parameter: it can leave, or why it stays and what would let it leave.

Legend: an entry is one number of a parameter. Each position of each of its dimensions has a fate; fates are
counted by dimension and multiplied, so that no array of the size of a weight is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from cria_prune.base.errors import some
from cria_prune.base.metrics import percent
from cria_prune.structure.table import merged

Fate = Literal["prunable", "floor", "frozen", "not followed"]
FLOOR = "always stays: the floor of its group"
UNREAD = "no operation of the captured forward reads it"
LOOSE = "belongs to no layer"
LAST = "has one unit, and one always stays"
NO_RULE = "no rule for the operation"

# Reason -> way out, in the order in which they help: where several reasons keep an entry, it is counted
# under the first of them, since that is what would free it. What never goes comes last.
WAYS = (
    (r"^residual width is pruned only", "cut it too: residual=True (--residual)"),
    (r"^the plan cuts .* alone", "cut all kinds of units: units='all'"),
    (r"^a vanilla .* cannot hold", "leave out vanilla: the layers may then differ (per-layer)"),
    (r"^whole experts are", "cut them too: experts=True (--experts)"),
    (r"^the plan (leaves|protects|keeps)", "leave out what the brackets name"),
    (r"^has (one unit|\d+ units, and)", "nothing, the last units of a group always stay"),
    (rf"^{NO_RULE}", "write this operation with ones that are followed (docs/method), or report it"),
    (r"(is computed, not a parameter|^the weight of .* is a constant)",
     "make it a parameter, or fold what computes it before pruning (remove_parametrizations)"),
    (r"^a trial cut failed.*the relative difference is",
     "store what the forward works out of this width, such as a scale, when the module is made"),
    (r"^a trial cut failed", "let this code take its sizes from its input or from attributes of its module"),
    (r"^(is mixed by|shares its positions)", "reshape along whole channels or heads"),
    (r"(meets a (tensor of )?fixed|is a fixed part)", "take what it meets from a layer or a parameter"),
    (r"^is (reordered|sliced|split|picked|padded|taken apart|cut to|an index)",
     "write it without numbered positions, or with sizes that are read from the input"),
    (r"(is reduced over|has a statistic that meets)", "sum it up by a layer with weights"),
    (r"forwards and transposed", "use two weights"),
    (rf"^({UNREAD}|no layer with weights reads it)",
     "remove what the forward does not use, or give an example that runs it"),
    ("", "report it if you expect these to be followed"),
    (r"^(is summed over|is a sequence|is a spatial|is a window|is one of several|is the single)",
     "nothing, sizes of heads, windows and pictures are fixed"),
    (rf"^({LOOSE}|picks rows|are the rows)", "nothing, these are no units"),
    (r"^is part of the model's output",
     "nothing where the caller needs it; else wrap the model to return less, such as its logits alone"),
    (r"^is part of the model's input", "nothing, its size is the caller's"),
)  # fmt: skip
MEANT = {pattern: place for place, (pattern, _) in enumerate(WAYS)}


@dataclass(frozen=True)
class Held:
    """What a group holds: `places` are (tensor, dimension, (units, width) positions).

    `reason` says why all of it stays; where it is None, `least` of the `size` units always stay.
    """

    name: str
    size: int
    reason: str | None
    least: int
    places: tuple[tuple[str, int, np.ndarray], ...]


@dataclass(frozen=True)
class Entry:
    """Parameters of one fate.

    Attributes:
        fate: `prunable` (can leave), `floor` (belongs to units that can leave, of which some always stay),
            `frozen` (stays for the reason), or `not followed` (no rule, or no operation that reads it).
        reason: why it stays; empty where it can leave.
        parameters: how many; `share`: of all parameters of the model.
        where: the groups, or the parameters that are in none.
        way_out: what would let them leave.
    """

    fate: Fate
    reason: str
    parameters: int
    share: float
    where: tuple[str, ...]
    way_out: str

    def __str__(self) -> str:
        where = f" ({some(merged(self.where), 2)})" if self.where else ""
        out = f"; way out: {self.way_out}" if self.way_out else ""
        return f"{percent(self.share)} {self.fate}{': ' if self.reason else ''}{self.reason}{where}{out}"


@dataclass(frozen=True, repr=False)
class Account:
    """Every parameter of a model once, as entries whose numbers add up to it; prints one entry a line.

    Attributes:
        entries: what can leave, then what stays, the most first.
        total: parameters of the model, tied ones once.
    """

    entries: tuple[Entry, ...]
    total: int

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries))

    def __repr__(self) -> str:
        return f"Account({len(self.entries)} entries of {self.total:,} parameters)"

    def largest(self, most: int = 3) -> tuple[Entry, ...]:
        """Return the entries that keep the most parameters in place."""
        return tuple(item for item in self.entries if item.fate != "prunable")[:most]


def way_out(reason: str) -> tuple[int, str]:
    """Return how early a reason is counted, and what would lift it."""
    for pattern, text in WAYS:
        if pattern and re.search(pattern, reason):
            return MEANT[pattern], text
    return MEANT[""], dict(WAYS)[""]


def account(
    groups: Sequence[Held],
    shapes: Mapping[str, tuple[int, ...]],
    parameters: Sequence[str],
    loose: Mapping[str, Mapping[int, str]],
) -> Account:
    """Count every entry of every parameter under what becomes of it.

    An entry lies at one position of each dimension of its parameter. It can leave if one of these positions
    belongs to a unit that can. Else it is counted under the reason that could be lifted the easiest (the
    order of `WAYS`), for this is what would free it.

    Args:
        groups: all of a model.
        shapes: of every parameter.
        parameters: their names, each once.
        loose: parameter -> dimension that no group touches -> why it has no units; -1 is the parameter.
    """
    bare = [
        Held(name, 0, reason, 0, ((name, dim, np.arange(shapes[name][dim])),))
        for name in parameters
        for dim, reason in loose.get(name, {}).items()
        if dim >= 0
    ]
    fates = _Fates([*groups, *bare])
    found: dict[tuple[Fate, str], tuple[int, dict[str, None]]] = {}

    def add(fate: Fate, reason: str, count: int, where: str = "") -> None:
        so_far, names = found.get((fate, reason), (0, {}))
        found[fate, reason] = so_far + count, names | dict.fromkeys([where] if where else [])

    left = {name: list(shapes[name]) for name in parameters}
    for group in groups:
        for (tensor, dim), width in _widths(group).items() if group.reason is None else ():
            if tensor in left:
                left[tensor][dim] -= (group.size - group.least) * width
    for name in parameters:
        movable = 0
        for number, count in fates.of(name, shapes[name]).items():
            if number < 0:
                movable += count
            else:
                known = number < len(fates.named)
                reason, where = fates.named[number] if known else (loose.get(name, {}).get(-1, LOOSE), name)
                lost = reason.startswith((NO_RULE, UNREAD))
                add("not followed" if lost else "frozen", reason, count, where)
        goes = math.prod(shapes[name]) - math.prod(left[name])
        add("prunable", "", goes)
        add("floor", FLOOR, movable - goes)
    total = sum(math.prod(shapes[name]) for name in parameters)
    return Account(_folded(found, total), total)


class _Fates:
    """The reasons of the frozen groups, numbered in the order in which they are counted.

    The numbers around them: -1 is a unit that can leave, and one beyond the last belongs to no group.
    """

    def __init__(self, groups: Sequence[Held]) -> None:
        frozen = [(group.reason, group) for group in groups if group.reason is not None]
        frozen.sort(key=lambda item: way_out(item[0])[0])
        self.named = [(reason, group.name) for reason, group in frozen]
        self.held: dict[str, list[tuple[int, int, np.ndarray]]] = {}
        # A position of two groups counts as the better fate, so the worst is written first.
        numbered = [*reversed([(number, group) for number, (_, group) in enumerate(frozen)])]
        numbered += [(-1, group) for group in groups if group.reason is None]
        for number, group in numbered:
            for tensor, dim, positions in group.places:
                self.held.setdefault(tensor, []).append((number, dim, positions.ravel()))

    def of(self, name: str, shape: tuple[int, ...]) -> dict[int, int]:
        """Return number -> entries of a parameter; an entry has the least number of its positions."""
        dims = [np.full(size, len(self.named)) for size in shape]
        for number, dim, positions in self.held.get(name, ()):
            dims[dim][positions] = number
        counts = [zip(*np.unique(item, return_counts=True), strict=True) for item in dims]
        found: dict[int, int] = {}
        for chosen in product(*counts):
            number = min((int(key) for key, _ in chosen), default=len(self.named))
            found[number] = found.get(number, 0) + math.prod(int(count) for _, count in chosen)
        return found


def _widths(group: Held) -> dict[tuple[str, int], int]:
    """Return (tensor, dimension) -> positions of one unit of a group there."""
    # A weight that is used twice may bring the same slice twice. The positions
    # tell it from a group that lies at two places, as the halves of a gate do.
    once = {(tensor, dim, positions.tobytes()): positions for tensor, dim, positions in group.places}
    widths: dict[tuple[str, int], int] = {}
    for (tensor, dim, _), positions in once.items():
        widths[tensor, dim] = widths.get((tensor, dim), 0) + positions.shape[1]
    return widths


def _folded(
    found: Mapping[tuple[Fate, str], tuple[int, Mapping[str, None]]], total: int
) -> tuple[Entry, ...]:
    """Return the entries, those of repeated layers as one: what can leave, then the most first."""
    alike: dict[tuple[Fate, str], list[tuple[str, int, list[str]]]] = {}
    for (fate, reason), (count, where) in found.items():
        if count or fate == "prunable":
            same = re.sub(r"\d+", "*", reason.partition(": ")[0])
            alike.setdefault((fate, same), []).append((reason, count, list(where)))
    entries = []
    for (fate, _), items in alike.items():
        texts = merged([reason for reason, _, _ in items])
        count = sum(count for _, count, _ in items)
        places = tuple(dict.fromkeys(name for _, _, names in items for name in names))
        text = "lower the floor" if fate == "floor" else way_out(texts[0])[1] if texts[0] else ""
        entries.append(Entry(fate, texts[0], count, count / max(total, 1), places, text))
    return tuple(sorted(entries, key=lambda item: (item.fate != "prunable", -item.parameters)))
