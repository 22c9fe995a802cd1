"""Where to draw the neurons of a graph: its own smooth directions as coordinates."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from cria_prune.graph.graph import Graph, largest_piece


def laplacian_embedding(graph: Graph, dimensions: int = 2) -> Tensor:
    """Return a place for every unit: the first eigenvectors after the constant one of L v = λ D v.

    The Laplacian is taken without ridge, which turns no eigenvector, and against the degrees D: the plain
    one puts a single weakly joined neuron far out and all others on one spot. In a graph of several pieces
    the eigenvectors would only tell the pieces apart, so the largest piece is embedded and the other units
    have no place. Dense; for d up to about 2,048.

    Args:
        graph: d units.
        dimensions: of the places.

    Returns:
        (d, dimensions) float64; NaN for units outside the largest piece, 0 in dimensions that it has not.
        The entry of largest size of each eigenvector is positive.
    """
    places = torch.full((graph.units, dimensions), torch.nan, dtype=torch.float64)
    if not graph.units:
        return places
    piece = largest_piece(graph)
    places[piece] = 0.0
    count = min(dimensions, len(piece) - 1)
    if count < 1:
        return places
    W = -graph.dense_laplacian()[piece][:, piece].numpy()
    np.fill_diagonal(W, 0.0)
    degrees = W.sum(axis=1)
    root = 1 / np.sqrt(degrees)
    N = np.eye(len(piece)) - root[:, None] * W * root[None, :]
    _, vectors = scipy.linalg.eigh(N, subset_by_index=[1, count])
    V = vectors * root[:, None]
    V = V * np.where(V[np.abs(V).argmax(axis=0), np.arange(count)] < 0, -1.0, 1.0)
    places[piece, :count] = torch.from_numpy(V)
    return places
