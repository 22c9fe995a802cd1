"""Unit groups as a table that fits a screen: repeated layers said once."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

from cria_prune.base.progress import screenful

NUMBER = re.compile(r"(?:(?<=[._])|^)\d+(?=\.|$)")
"""The number of a layer in its name: `layers.0.mlp`, `encoder_layer_0.mlp`; not that of `conv1`."""
MEASURED = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)|\d+\.\d+")
HOLE = "\0"
Status = Literal["prunable", "residual", "experts", "frozen"]


@dataclass(frozen=True)
class Row:
    """A unit group as `inspect --json` prints it; the attributes are the keys.

    Attributes:
        name: of the group: the module that makes its first slice.
        kind: channel, neuron, gated, head, kv group, experts or residual.
        units: how many there are.
        status: `prunable`; `residual` and `experts`, which are pruned only with --residual and --experts; or
            `frozen`.
        frozen: why it cannot be pruned, or None.
        parameters_per_unit: parameters that leave when one unit leaves and nothing else; None if frozen.
        macs_per_unit: multiply-accumulates per example that leave with it; None if frozen.
        producers: parameters whose output dimension the units are.
        consumers: parameters that sum over the units; of whole experts those that are theirs.
    """

    name: str
    kind: str
    units: int
    status: Status
    frozen: str | None
    parameters_per_unit: int | None
    macs_per_unit: float | None
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """Groups that are alike in consecutive copies of a layer.

    Attributes:
        row: the group, with a range in place of the number in all of its names.
        layer: the name of the repeated layer with that range, such as `model.layers.0-31`; `` for one group.
        count: how many groups it stands for.
    """

    row: Row
    layer: str = ""
    count: int = 1


def fold(rows: Sequence[Row]) -> list[Fold]:
    """Return the rows with repeated ones folded, in the order of their first; each row is in one fold."""
    alike: dict[Hashable, list[tuple[str, int]]] = {}
    for index, row in enumerate(rows):
        for found in NUMBER.finditer(row.name):
            layer = row.name[: found.end()]
            same = _renamed(row, layer, row.name[: found.start()] + HOLE)
            same = replace(same, frozen=MEASURED.sub(HOLE, same.frozen or ""))
            alike.setdefault(astuple(same), []).append((layer, index))
    folds: dict[int, Fold] = {}
    taken: set[int] = set()
    for members in sorted(alike.values(), key=len, reverse=True):
        left = [(layer, index) for layer, index in members if index not in taken]
        if len(left) > 1:
            layer, first = left[0]
            span = merged([item for item, _ in left])[0]
            one = replace(rows[first], frozen=_spread([rows[index].frozen for _, index in left]))
            folds[first] = Fold(_renamed(one, layer, span), span, len(left))
            taken |= {index for _, index in left}
    singles = {index: Fold(row) for index, row in enumerate(rows) if index not in taken}
    return [item for _, item in sorted({**folds, **singles}.items())]


def merged(names: Iterable[str]) -> list[str]:
    """Return the names with those that differ in one number written as one.

    >>> merged(["embed", "layers.0.mlp", "layers.1.mlp", "layers.3.mlp"])
    ['embed', 'layers.0-1,3.mlp']
    """
    names = list(dict.fromkeys(names))
    alike: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        for found in NUMBER.finditer(name):
            alike.setdefault((name[: found.start()], name[found.end() :]), {})[int(found[0])] = name
    replaced: dict[str, str] = {}
    for (start, end), numbered in sorted(alike.items(), key=lambda item: len(item[1]), reverse=True):
        left = {number: name for number, name in numbered.items() if name not in replaced}
        if len(left) > 1:
            replaced |= dict.fromkeys(left.values(), f"{start}{ranges(left)}{end}")
    return list(dict.fromkeys(replaced.get(name, name) for name in names))


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def braced(names: Sequence[str]) -> list[str]:
    """Return the names with those of one parent written as one.

    >>> braced(["attn.q", "attn.k", "mlp.up", "head"])
    ['attn.{q, k}', 'mlp.up', 'head']
    """
    children: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        children.setdefault(parent or name, []).append(last if parent else "")
    found = []
    for parent, items in children.items():
        inside = [item for item in items if item]
        own = [parent] if len(inside) < len(items) else []
        below = [f"{{{', '.join(inside)}}}"] if len(inside) > 1 else inside
        found.append(", ".join([*own, *(f"{parent}.{item}" for item in below)]))
    return found


def _spread(reasons: Sequence[str | None]) -> str | None:
    """Return the first reason, each measured number in it as the range of all."""
    first = reasons[0]
    if first is None:
        return None
    columns = zip(*(MEASURED.findall(reason or "") for reason in reasons), strict=True)
    texts = iter([sorted(set(column), key=float) for column in columns])

    def span(_: re.Match[str]) -> str:
        numbers = next(texts)
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    return MEASURED.sub(span, first)


def _renamed(row: Row, layer: str, new: str) -> Row:
    """Return the row with `layer` renamed wherever it begins a module's name."""
    pattern = re.compile(rf"(?<![\w.]){re.escape(layer)}(?!\w)")

    def rename(text: str) -> str:
        return pattern.sub(lambda _: new, text)

    return replace(
        row,
        name=rename(row.name),
        frozen=None if row.frozen is None else rename(row.frozen),
        producers=tuple(map(rename, row.producers)),
        consumers=tuple(map(rename, row.consumers)),
    )


LOOSE = ("group", "kind", "units", "params/unit", "MACs/unit")
FLOW = "producers → consumers"
FROZEN = ("frozen", "kind", "why", "units")
SHOWN_NAMES = 4


def plain(rows: Sequence[Row]) -> str:
    """Return the groups that can be removed, then the frozen ones with their reasons, on one screen."""
    folds = fold(rows)
    loose = sections([item for item in folds if item.row.status != "frozen"])
    stuck = [(None, list(FROZEN)), *sections([item for item in folds if item.row.status == "frozen"])]
    blocks: list[list[tuple[Fold | None, list[str]]]] = [
        [(None, [*LOOSE, FLOW]), *((item, [*cells, flow(item)]) for item, cells in loose)],
        [(item, [name, kind, units, why]) for item, (name, kind, why, units) in stuck],
    ]
    shown = [block for block in blocks if len(block) > 1]
    lines = [line for block in shown for line in _aligned([cells for _, cells in block])]
    counts = [0 if item is None else item.count for block in shown for item, _ in block]
    return "\n".join(screenful(lines, counts))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines; counts are flush right."""
    columns = []
    for head, *cells in zip(*rows, strict=True):
        width = max(map(len, (head, *cells)))
        flush = str.rjust if head in ("units", *LOOSE[3:]) else str.ljust
        columns.append([flush(cell, width) for cell in (head, *cells)])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def sections(folds: Sequence[Fold]) -> list[tuple[Fold | None, list[str]]]:
    """Rows of a table, each with its fold: a heading (None) for every repeated layer, then what is in it."""
    rows: list[tuple[Fold | None, list[str]]] = []
    for key in dict.fromkeys((item.layer, item.count) if item.layer else item.row.name for item in folds):
        inside = [item for item in folds if key in ((item.layer, item.count), item.row.name)]
        cells = [_cells(item) for item in inside]
        if inside[0].layer:
            heading = [inside[0].layer, *[""] * (len(cells[0]) - 1)]
            heading[3 if inside[0].row.status == "frozen" else 2] = f"{inside[0].count} ×"
            rows.append((None, heading))
        rows += zip(inside, cells, strict=True)
    return rows


def _cells(item: Fold) -> list[str]:
    row, units = item.row, f"{item.row.units:,}"
    name = f"  {_inside(row.name, item.layer)}" if item.layer else row.name
    if row.status == "frozen":
        return [name, row.kind, _inside(row.frozen or "", item.layer), units]
    return [name, row.kind, units, _count(row.parameters_per_unit), _count(row.macs_per_unit)]


def flow(item: Fold | None, everything: bool = False) -> str:
    """Return producers and consumers of a fold in few words, or all of them; nothing for a heading."""
    if item is None:
        return ""
    sides = (_names(names, item.layer, everything) for names in (item.row.producers, item.row.consumers))
    return ("  " if item.layer else "") + " → ".join(sides)


def _names(tensors: Sequence[str], layer: str, everything: bool) -> str:
    """Return the modules of some weights in few words; those of a repeated layer as in that layer."""
    names = [tensor.removesuffix(".weight") for tensor in tensors]
    if everything:
        return ", ".join(names)
    short = braced([_inside(name, layer) for name in merged(names)])
    if len(short) <= SHOWN_NAMES:
        return ", ".join(short)
    few = short[: SHOWN_NAMES - 1]
    return f"{', '.join(few)} and {len(short) - len(few)} more"


def _inside(text: str, layer: str) -> str:
    return text.replace(f"{layer}.", "") if layer else text


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"
