"""The groups of a model as rows of a table, repeated layers said once; the table as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from cria_prune.base.screen import screenful
from cria_prune.structure.fold import Fold, Row, braced, fold, merged

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
