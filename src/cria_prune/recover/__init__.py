"""One fine-tune of the smaller model, optionally with soft targets from the dense one."""

from cria_prune.recover.fit import Epoch, RecoverResult, recover
from cria_prune.recover.loss import cross_entropy, logits_of, soft_targets

__all__ = ["Epoch", "RecoverResult", "cross_entropy", "logits_of", "recover", "soft_targets"]
