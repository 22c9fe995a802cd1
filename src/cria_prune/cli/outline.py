"""The groups of a model as a table: what can be removed, what stays and why, and how much that is."""

from __future__ import annotations

from collections.abc import Sequence

from cria_prune.cli.fold import Fold, braced, fold, merged
from cria_prune.cli.inventory import Inventory, Row
from cria_prune.cli.talk import Talk, percent
from cria_prune.config import OF

SHOWN_NAMES = 4


def outline(talk: Talk, found: Inventory, everything: bool = False) -> None:
    """Print the groups that can be removed, the frozen ones with their reasons, and the largest shares.

    Args:
        talk: where to print.
        found: what to print.
        everything: one line per group and every name in full, in place of repeated layers said once.
    """
    folds = folded(found.rows, everything)
    loose = _sections([item for item in folds if item.row.status != "frozen"])
    if loose:
        columns = ["group", "kind", "units", "params/unit", "MACs/unit"]
        flows = ["producers → consumers", *(_flow(item, everything) for item, _ in loose)]
        talk.table(columns, [cells for _, cells in loose], left=2, remarks=flows)
    frozen(talk, folds)
    shares(talk, found)


def folded(rows: Sequence[Row], everything: bool) -> list[Fold]:
    """Return the rows with repeated layers said once, or all of them one by one."""
    return [Fold(row) for row in rows] if everything else fold(rows)


def frozen(talk: Talk, folds: Sequence[Fold]) -> None:
    """Print the frozen groups with their reasons; nothing where there are none."""
    rows = _sections([item for item in folds if item.row.status == "frozen"])
    if rows:
        talk.table(["frozen", "kind", "why", "units"], [cells for _, cells in rows], left=3)


def shares(talk: Talk, found: Inventory) -> None:
    """Print the largest share of each cost that can leave, without and with the residual widths."""
    rows = [["without residual width", *map(percent, found.removable.values())]]
    if any(row.status == "residual" for row in found.rows):
        rows.append(["with it (--residual)", *map(percent, found.removable_with_residual.values())])
    talk.table(["can be removed at most", *(OF.texts[of] for of in found.removable)], rows)
    talk.say(f"{found.floor * 100:g} % of the units of each group always stay (--floor)")


def _sections(folds: Sequence[Fold]) -> list[tuple[Fold | None, list[str]]]:
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


def _flow(item: Fold | None, everything: bool) -> str:
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
