"""One fine-tune of the smaller model, optionally with soft targets from the dense one."""

from cria_prune.recover.fit import recover
from cria_prune.recover.loss import soft_targets
from cria_prune.recover.result import Epoch, RecoverResult

__all__ = ["Epoch", "RecoverResult", "recover", "soft_targets"]
