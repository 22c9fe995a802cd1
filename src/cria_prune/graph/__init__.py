"""Signals of neurons -> moments -> a graph of the neurons."""

from cria_prune.graph.accumulator import MomentAccumulator
from cria_prune.graph.graph import Graph
from cria_prune.graph.learn import learn_graph, refine_graph
from cria_prune.graph.moments import Moments, dead_units
from cria_prune.graph.neighbors import edge_distances, nearest_neighbors
from cria_prune.graph.sides import (
    DRAWN_UNITS,
    NeuronGraphs,
    choose_layer,
    keep_graphs,
    largest_piece,
    worth_keeping,
)

__all__ = [
    "DRAWN_UNITS",
    "Graph",
    "MomentAccumulator",
    "Moments",
    "NeuronGraphs",
    "choose_layer",
    "dead_units",
    "edge_distances",
    "keep_graphs",
    "largest_piece",
    "learn_graph",
    "nearest_neighbors",
    "refine_graph",
    "worth_keeping",
]
