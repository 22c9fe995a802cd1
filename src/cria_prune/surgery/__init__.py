"""Removing units for real, and proving that it was done right."""

from cria_prune.surgery.apply import apply
from cria_prune.surgery.compensate import Repair, compensate
from cria_prune.surgery.slicing import slice_tensor
from cria_prune.surgery.trial import settle
from cria_prune.surgery.verify import Reference, Verification, mask, verify

__all__ = [
    "Reference",
    "Repair",
    "Verification",
    "apply",
    "compensate",
    "mask",
    "settle",
    "slice_tensor",
    "verify",
]
