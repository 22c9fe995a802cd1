"""One fine-tune of the smaller model, optionally with soft targets from the dense one."""

from cria_prune.recover.fit import recover
from cria_prune.recover.loss import cross_entropy, logits_of, soft_targets
from cria_prune.recover.result import Epoch, RecoverResult

__all__ = ["Epoch", "RecoverResult", "cross_entropy", "logits_of", "recover", "soft_targets"]
