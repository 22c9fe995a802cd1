"""Slow float64 twins in plain loops: what the fast code must agree with."""

from __future__ import annotations

import numpy as np


def knn_edges(X, k):
    """Edges p < q where one is among the k nearest of the other; ties to the lower index."""
    d = len(X)
    edges = set()
    for p in range(d):
        order = sorted((float(((X[p] - X[q]) ** 2).sum()), q) for q in range(d) if q != p)
        edges |= {(min(p, q), max(p, q)) for _, q in order[:k]}
    return sorted(edges)


def graph(X, k, ridge, grounded=False, complete=64):
    """Edges, weights and L of docs/method.md section 2, from the signals themselves."""
    X = X - X.mean(axis=1, keepdims=True)
    d, M = X.shape
    edges = knn_edges(X, d - 1 if d <= complete else k)
    squared = [((X[p] - X[q]) ** 2).sum() / M for p, q in edges]
    med = np.median(squared)
    weights = [1 / (s / med + 1e-3) for s in squared]
    L = np.zeros((d, d))
    for (p, q), w in zip(edges, weights, strict=True):
        L[p, p] += w
        L[q, q] += w
        L[p, q] -= w
        L[q, p] -= w
    e = ridge * np.trace(L) / d
    for p in range(d):
        L[p, p] += e
        if grounded:
            L[p, p] += 1 / ((X[p] ** 2).mean() / med + 1e-3)
    return edges, np.array(weights), L


def pencil(L_in, L_out):
    """All z descending, and v with v' L_out v = 1, by the symmetric square root of L_out."""
    values, U = np.linalg.eigh(L_out)
    root = U @ np.diag(values**-0.5) @ U.T
    z, W = np.linalg.eigh(root @ L_in @ root)
    return z[::-1], (root @ W)[:, ::-1]


def distortion(X, Y, k, ridge, s=None, complete=64):
    """Mean over input neighbours of ‖V_s'(e_p − e_q)‖², edge by edge, pair by pair."""
    edges, _, L_in = graph(X, k, ridge, complete=complete)
    _, _, L_out = graph(Y, k, ridge, complete=complete)
    z, V = pencil(L_in, L_out)
    found = [[] for _ in X]
    for p, q in edges:
        total = sum(z[i] * (V[p, i] - V[q, i]) ** 2 for i in range(s or len(z)))
        found[p].append(total)
        found[q].append(total)
    return np.array([np.mean(values) for values in found])


def grounded(X, Y, k):
    """‖V'e_p‖² on the grounded Laplacians, without ridge."""
    z, V = pencil(graph(X, k, 0.0, True)[2], graph(Y, k, 0.0, True)[2])
    return np.array([sum(z[i] * V[p, i] ** 2 for i in range(len(z))) for p in range(len(X))])


def innovation(Y):
    """Mean squared residual of each centred row after least squares on all other rows."""
    Y = Y - Y.mean(axis=1, keepdims=True)
    out = []
    for p in range(len(Y)):
        others = np.delete(Y, p, axis=0).T
        coefficients = np.linalg.lstsq(others, Y[p], rcond=None)[0]
        out.append(((Y[p] - others @ coefficients) ** 2).mean())
    return np.array(out)
