"""Pruning of a model in a folder that is larger than the memory: layer by layer, shard by shard."""

from cria_prune.offload.prune import Offloaded, prune_offloaded
from cria_prune.offload.rounds import OffloadedRound

__all__ = ["Offloaded", "OffloadedRound", "prune_offloaded"]
