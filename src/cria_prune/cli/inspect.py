"""`cria inspect`: the unit groups of a model from anywhere, as a table or along its modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from cria_prune.base.batches import Batch, model_inputs
from cria_prune.base.metrics import percent
from cria_prune.cli.output import Output
from cria_prune.cli.settings import Inspect
from cria_prune.cli.target import load_source, parse_shape
from cria_prune.config import OF
from cria_prune.planning.budget import Budget, count_macs, count_parameters, largest_reachable
from cria_prune.stages import discover
from cria_prune.structure.account import Entry
from cria_prune.structure.groups import UnitGroups, without_experts, without_residual
from cria_prune.structure.table import FLOW, FROZEN, LOOSE, Fold, Row, Status, flow, fold, merged, sections
from cria_prune.tasks.own import Own

if TYPE_CHECKING:
    from rich.tree import Tree

SHARES = ("parameters", "prunable", "macs")


def inspect(request: Inspect, out: Output) -> None:
    """The unit groups of a model from anywhere, what they cost and why some are frozen."""
    out.quiet |= request.as_json
    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        own = request.own()
        source = load_source(request.model, parse_shape(request.example), request.meta, own)
        groups = discover(source.model, source.example)
    found, kind = inventory(groups, request.plan.floor), type(source.model).__name__
    out.say(f"{kind}: {found.parameters:,} parameters, {found.macs:,.0f} MACs per example")
    out.say(f"example: {inputs(source.example)}")
    folds = [Fold(row) for row in found.rows] if request.all else fold(found.rows)
    loose, stuck = (
        sections([item for item in folds if (item.row.status == "frozen") == frozen])
        for frozen in (False, True)
    )
    if request.tree:
        out.tree(drawn(module_tree(source.model, found.rows, request.all)))
    elif loose:
        flows = [FLOW, *(flow(item, request.all) for item, _ in loose)]
        out.table(LOOSE, [cells for _, cells in loose], left=2, remarks=flows)
    if stuck:
        out.table(FROZEN, [cells for _, cells in stuck], left=3)
    shares(out, found)
    for note in groups.notes:
        out.say(note)
    if source.kind == "factory" or own.factory is not None:
        out.say(next_command(source.name, own))
    counts = {
        f"{status}_groups": sum(row.status == status for row in found.rows) for status in get_args(Status)
    }
    answer = {
        "target": source.name,
        "source": source.kind,
        "model": kind,
        "recipe": None if source.target is None else source.target.recipe,
        **found.to_dict(),
        **counts,
    }
    fates = {item.fate: 0.0 for item in found.account}
    for item in found.account:
        fates[item.fate] += item.share
    out.answer(answer if request.as_json else {**answer, "groups": len(found.rows), "account": fates})


def next_command(name: str, own: Own) -> str:
    """Return how a network of the user's own is pruned, as it would be typed."""
    package = (own.factory or name).partition(":")[0].partition(".")[0]
    made = "--weights FILE.safetensors" if own.factory is None else f"--factory {own.factory}"
    data = f"--loader {own.loader or f'{package}:LOADER'} --evaluate {package}:METRIC"
    return f"prune it with: cria prune {name} {made} {data}"


def inputs(example: Batch) -> str:
    """Return the shapes of a batch: `(2, 3, 32, 32)` or `input_ids (2, 16), attention_mask (2, 16)`."""
    args, named = model_inputs(example)
    shapes = [str(tuple(item.shape)) for item in args]
    shapes += [f"{name} {tuple(item.shape)}" for name, item in named.items() if hasattr(item, "shape")]
    return ", ".join(shapes)


@dataclass(frozen=True)
class Inventory:
    """Everything that `inspect` prints about the structure of a model.

    Attributes:
        rows: one per group, in the order of the network.
        parameters: of the model, tied ones once.
        macs: multiply-accumulates of its weights per example.
        floor: share of each group's units that always stays.
        removable: cost (parameters, prunable, macs) -> largest share that can leave, without the
            residual widths and whole experts.
        removable_with_residual, removable_with_experts: the same with the one or the other.
        account: every parameter once under what becomes of it, without the residual widths and whole
            experts; the shares add up to one.
    """

    rows: tuple[Row, ...]
    parameters: int
    macs: float
    floor: float
    removable: Mapping[str, float]
    removable_with_residual: Mapping[str, float]
    removable_with_experts: Mapping[str, float]
    account: tuple[Entry, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, `rows` under the key `groups`."""
        plain = asdict(self)
        return {"groups": plain.pop("rows"), **plain}


def inventory(groups: UnitGroups, floor: float) -> Inventory:
    """Return what `inspect` prints of the groups of a model.

    Args:
        groups: as `discover` found them, with their residual widths and whole experts.
        floor: share of each group's units that always stays.
    """
    inner = without_experts(without_residual(groups))
    return Inventory(
        rows=groups.rows(),
        parameters=count_parameters(groups),
        macs=count_macs(groups),
        floor=floor,
        removable=_shares(inner, floor),
        removable_with_residual=_shares(without_experts(groups), floor),
        removable_with_experts=_shares(without_residual(groups), floor),
        account=inner.account(floor).entries,
    )


def _shares(groups: UnitGroups, floor: float) -> dict[str, float]:
    """Return cost -> largest share that can leave; a cost of which the model has none is left at 0."""
    return {
        of: largest_reachable(groups, floor, of) if Budget(groups, of).total > 0 else 0.0 for of in SHARES
    }


def shares(out: Output, found: Inventory) -> None:
    """Print the largest share of each cost that can leave: by default, and with what is asked for."""
    rows = [["without residual width", *map(percent, found.removable.values())]]
    if any(row.status == "residual" for row in found.rows):
        rows.append(["with it (--residual)", *map(percent, found.removable_with_residual.values())])
    if any(row.status == "experts" for row in found.rows):
        rows.append(["with whole experts (--experts)", *map(percent, found.removable_with_experts.values())])
    out.table(["can be removed at most", *(OF.texts[of] for of in found.removable)], rows)
    out.say(f"{found.floor * 100:g} % of the units of each group always stay (--floor)")
    accounted = [[percent(item.share), item.fate, item.reason, item.way_out] for item in found.account]
    out.table(["parameters", "fate", "why", "way out"], accounted, left=4)


PLURALS = {"channel": "channels", "neuron": "neurons", "gated": "gated neurons", "head": "heads"}
PLURALS |= {"kv group": "kv groups", "residual": "residual width"}
STYLES = {"prunable": "green", "residual": "yellow", "experts": "yellow", "frozen": "dim"}


@dataclass(frozen=True)
class Made:
    """A group that a module makes: `text` names it, `status` is as in `Row`."""

    text: str
    status: str


@dataclass(frozen=True)
class Node:
    """A module with parameters.

    Attributes:
        name: in its parent, a range where equal ones are folded; `` for the model.
        kind: its class.
        parameters: in it and below it; one that several modules share counts for the first alone.
        makes: groups whose units it makes.
        children: modules below it that have parameters.
        count: how many equal ones it stands for.
    """

    name: str
    kind: str
    parameters: int
    makes: tuple[Made, ...] = ()
    children: tuple[Node, ...] = field(default=(), repr=False)
    count: int = 1


def module_tree(model: nn.Module, rows: Sequence[Row], everything: bool = False) -> Node:
    """Return the modules of a model that have parameters, with the groups that they make.

    Args:
        model: the model.
        rows: its groups.
        everything: show every one of equal neighbours in place of one for all.
    """
    made: dict[str, list[Made]] = {}
    streams = sum(row.kind == "residual" for row in rows)
    for row in rows:
        for path in dict.fromkeys(tensor.rpartition(".")[0] for tensor in row.producers):
            made.setdefault(path, []).append(_made(row, path, streams > 1))
    sizes: dict[str, int] = {}
    for tensor, parameter in model.named_parameters():
        parts = tensor.split(".")[:-1]
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            sizes[path] = sizes.get(path, 0) + parameter.numel()

    def node(module: nn.Module, path: str, name: str) -> Node:
        children = tuple(
            node(child, f"{path}.{key}" if path else key, key)
            for key, child in module.named_children()
            if any(True for _ in child.parameters())
        )
        inside = children if everything else _folded(children)
        return Node(name, type(module).__name__, sizes.get(path, 0), tuple(made.get(path, ())), inside)

    return node(model, "", "")


def drawn(node: Node) -> Tree:
    """Return the tree as rich draws it."""
    from rich.text import Text
    from rich.tree import Tree

    def label(item: Node) -> Text:
        text = Text.assemble((item.name, "bold"), "  " if item.name else "", item.kind)
        text.append(f" × {item.count}" if item.count > 1 else "")
        text.append(f"  {item.parameters:,}" if item.parameters else "  shared")
        text.append(" each" if item.count > 1 else "")
        if len(item.makes) == 1:
            text.append("  ").append_text(arrow(item.makes[0]))
        return text

    def arrow(made: Made) -> Text:
        return Text(f"→ {made.text}", STYLES[made.status])

    def grow(item: Node, tree: Tree) -> Tree:
        for made in item.makes if len(item.makes) > 1 else ():
            tree.add(arrow(made))
        for child in item.children:
            grow(child, tree.add(label(child)))
        return tree

    return grow(node, Tree(label(node)))


def _made(row: Row, path: str, several_streams: bool) -> Made:
    text = f"{row.units:,} {PLURALS.get(row.kind, row.kind)}"
    if row.kind == "residual":
        text = f"{PLURALS[row.kind]} {row.units:,}" + (f" of {row.name}" if several_streams else "")
    elif row.name.partition("#")[0] != path:
        text += f" of {_relative(row.name, path)}"
    return Made(f"{text}, frozen" if row.status == "frozen" else text, row.status)


def _relative(name: str, path: str) -> str:
    """Return a name without the modules that it shares with a path, if the rest has no layer's number."""
    own, other = name.split("."), path.split(".")
    shared = takewhile(lambda both: both[0] == both[1], zip(own[:-1], other[:-1], strict=False))
    rest = own[len(list(shared)) :]
    return name if any(part.isdecimal() for part in rest) else ".".join(rest)


def _folded(children: Sequence[Node]) -> tuple[Node, ...]:
    """Equal neighbours as one, if their names differ in a number alone."""
    result: list[Node] = []
    for _, equal in groupby(children, key=lambda node: replace(node, name="")):
        run = list(equal)
        names = merged([child.name for child in run])
        if len(run) > 1 and len(names) == 1:
            result.append(replace(run[0], name=names[0], count=len(run)))
        else:
            result += run
    return tuple(result)
