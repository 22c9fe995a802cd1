"""The two graphs of a layer, kept so that they can be looked at later: within a bound.

Legend: d = units, live = units that are not dead on the output side, m = edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from cria_prune.graph.graph import Graph, learn_graph, most_edges
from cria_prune.graph.moments import Moments, dead_units

KEPT_UNITS = 2048
"""A layer of more units keeps no graph: it would be a blot."""
KEPT_EDGES = 500_000
"""Edges of all graphs of a run together, both sides: 6 MB in a file."""
DRAWN_UNITS = 256
"""Up to here a picture shows single neurons."""


@dataclass(frozen=True, eq=False)
class NeuronGraphs:
    """The graphs of one layer's neurons before and after the activation.

    Attributes:
        units: (live,) int64, which units of the layer the nodes are, ascending.
        input, output: of `live` nodes each.
    """

    units: Tensor
    input: Graph
    output: Graph


def keep_graphs(
    sides: Mapping[str, tuple[Moments, Moments]],
    neighbors: int = 32,
    ridge: float = 1e-2,
    edges: int = KEPT_EDGES,
) -> dict[str, NeuronGraphs]:
    """Return both graphs of as many layers as the bounds allow, those first that can be drawn best.

    That is: the widest of at most 256 units, then the wider ones from the smallest up. A layer of more than
    2,048 live units, or without two live ones, or one that does not fit into what is left, is left out.

    Args:
        sides: group name -> moments of the input side and the output side, of the same d units.
        neighbors: k of the graphs above 64 units.
        ridge: in mean degrees, of both.
        edges: of all graphs together, at most.

    Returns:
        group name -> its graphs, in the order of `sides`.

    Raises:
        SignalError: as in `learn_graph`.
    """
    kept: dict[str, NeuronGraphs] = {}
    for name in sorted(sides, key=lambda name: _fitness(sides[name][1].units)):
        before, after = sides[name]
        live = (~dead_units(after)).nonzero()[:, 0].cpu()
        if not 2 <= len(live) <= KEPT_UNITS or 2 * most_edges(len(live), neighbors) > edges:
            continue
        kept[name] = NeuronGraphs(
            live, *(learn_graph(part.select(live), neighbors, ridge) for part in (before, after))
        )
        edges -= len(kept[name].input.rows) + len(kept[name].output.rows)
    return {name: kept[name] for name in sides if name in kept}


def worth_keeping(widths: Mapping[str, int], neighbors: int = 32, edges: int = KEPT_EDGES) -> frozenset[str]:
    """Return the layers whose graphs `keep_graphs` has room for, by their units alone; no other is recorded.

    Args:
        widths: name -> units.
        neighbors, edges: as there.
    """
    chosen = set()
    for name in sorted(widths, key=lambda name: _fitness(widths[name])):
        most = 2 * most_edges(widths[name], neighbors)
        if 2 <= widths[name] <= KEPT_UNITS and most <= edges:
            chosen.add(name)
            edges -= most
    return frozenset(chosen)


def choose_layer(widths: Mapping[str, int]) -> str | None:
    """Return the layer of which a picture says most: the widest of at most 256 units, else the smallest.

    Args:
        widths: name -> units; of equals the first is taken. None if there is none.

    Examples:
        >>> choose_layer({"narrow": 16, "right": 200, "wide": 4096})
        'right'
    """
    return min(widths, key=lambda name: _fitness(widths[name]), default=None)


def largest_piece(graph: Graph) -> Tensor:
    """Return the units (n,) int64 of the largest connected component, ascending; of equals the first."""
    where = (graph.rows.numpy(), graph.cols.numpy())
    W = sp.csr_matrix((np.ones(len(graph.rows)), where), shape=(graph.units, graph.units))
    _, labels = connected_components(W, directed=False)
    return torch.from_numpy(np.flatnonzero(labels == np.bincount(labels).argmax()))


def _fitness(units: int) -> tuple[int, int]:
    return (0, -units) if units <= DRAWN_UNITS else (1, units)
