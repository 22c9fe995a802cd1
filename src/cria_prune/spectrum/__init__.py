"""Two graphs of the same neurons -> the pencil -> one score per neuron."""

from cria_prune.spectrum.embedding import laplacian_embedding
from cria_prune.spectrum.importance import Diagnosis, Importance, rank_correlation
from cria_prune.spectrum.nuclear import channel_independence
from cria_prune.spectrum.pcg import distortion_embedding, pcg
from cria_prune.spectrum.pencil import Eigenpairs, count_pairs, solve_pencil
from cria_prune.spectrum.scoring import distortion, grounded_distortion, innovation

__all__ = [
    "Diagnosis",
    "Eigenpairs",
    "Importance",
    "channel_independence",
    "count_pairs",
    "distortion",
    "distortion_embedding",
    "grounded_distortion",
    "innovation",
    "laplacian_embedding",
    "pcg",
    "rank_correlation",
    "solve_pencil",
]
