"""What recording and scoring will take, before they run."""

from cria_prune.memory.live import LiveBytes, storages
from cria_prune.memory.observe import batch_bytes, largest_batch
from cria_prune.memory.predict import predict_memory
from cria_prune.memory.prediction import MemoryPrediction, Stage, amount

__all__ = [
    "LiveBytes",
    "MemoryPrediction",
    "Stage",
    "amount",
    "batch_bytes",
    "largest_batch",
    "predict_memory",
    "storages",
]
