"""Pruning of a model in a folder that is larger than the memory: layer by layer, shard by shard."""
