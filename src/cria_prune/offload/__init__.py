"""Pruning of a model in a folder that is larger than the memory: layer by layer, shard by shard."""

from cria_prune.offload.prune import Offloaded, prune_offloaded

__all__ = ["Offloaded", "prune_offloaded"]
