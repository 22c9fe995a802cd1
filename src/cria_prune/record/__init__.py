"""What the neurons do: the signals of every unit group over calibration batches."""

from cria_prune.record.collect import record
from cria_prune.record.states import GroupStates, States
from cria_prune.record.taps import Taps

__all__ = ["GroupStates", "States", "Taps", "record"]
