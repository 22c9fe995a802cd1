"""The groups of a model as a table: what can be removed, what stays and why, and how much that is."""

from __future__ import annotations

from collections.abc import Sequence

from cria_prune.cli.inventory import Inventory
from cria_prune.cli.talk import Talk, percent
from cria_prune.config import OF
from cria_prune.structure.fold import Fold, Row, fold
from cria_prune.structure.table import FLOW, FROZEN, LOOSE, flow, sections


def outline(talk: Talk, found: Inventory, everything: bool = False) -> None:
    """Print the groups that can be removed, the frozen ones with their reasons, and the largest shares.

    Args:
        talk: where to print.
        found: what to print.
        everything: one line per group and every name in full, in place of repeated layers said once.
    """
    folds = folded(found.rows, everything)
    loose = sections([item for item in folds if item.row.status != "frozen"])
    if loose:
        flows = [FLOW, *(flow(item, everything) for item, _ in loose)]
        talk.table(LOOSE, [cells for _, cells in loose], left=2, remarks=flows)
    frozen(talk, folds)
    shares(talk, found)


def folded(rows: Sequence[Row], everything: bool) -> list[Fold]:
    """Return the rows with repeated layers said once, or all of them one by one."""
    return [Fold(row) for row in rows] if everything else fold(rows)


def frozen(talk: Talk, folds: Sequence[Fold]) -> None:
    """Print the frozen groups with their reasons; nothing where there are none."""
    rows = sections([item for item in folds if item.row.status == "frozen"])
    if rows:
        talk.table(FROZEN, [cells for _, cells in rows], left=3)


def shares(talk: Talk, found: Inventory) -> None:
    """Print the largest share of each cost that can leave, without and with the residual widths."""
    rows = [["without residual width", *map(percent, found.removable.values())]]
    if any(row.status == "residual" for row in found.rows):
        rows.append(["with it (--residual)", *map(percent, found.removable_with_residual.values())])
    talk.table(["can be removed at most", *(OF.texts[of] for of in found.removable)], rows)
    talk.say(f"{found.floor * 100:g} % of the units of each group always stay (--floor)")
