"""The same weights under the name of another architecture, where the model's own cannot say its sizes.

A Llama whose hidden size is no multiple of its head count is refused by `LlamaConfig`. Mistral computes the
same from the same tensors, with a free head size and no biases, once its sliding window is off.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

CLASSES = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
DROPPED = {"model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "sliding_window"}


def container(model: nn.Module) -> nn.Module:
    """Return a model that transformers can save and load, with the very tensors of `model`.

    Returns:
        `model` itself, or for a Llama without biases whose hidden size its heads do not divide the same
        network as a Mistral. Their outputs are equal bit for bit.
    """
    config: Any = model.config
    kind = type(model).__name__.removeprefix("Llama")
    needed = config.model_type == "llama" and config.hidden_size % config.num_attention_heads
    if not needed or kind not in CLASSES or config.attention_bias or config.mlp_bias:
        return model
    import transformers

    said = {key: value for key, value in config.to_dict().items() if key not in DROPPED}
    held = transformers.MistralConfig(**said, sliding_window=None)
    held._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        mistral: Any = getattr(transformers, f"Mistral{kind}")(held)
    mistral.load_state_dict(model.state_dict(), strict=True, assign=True)
    mistral.tie_weights()
    for name, buffer in model.named_buffers():  # the frequencies of the positions are in no state
        owner, _, local = name.rpartition(".")
        mistral.get_submodule(owner)._buffers[local] = buffer
    if model.can_generate():  # type: ignore[operator]
        mistral.generation_config = copy.deepcopy(model.generation_config)
    return mistral.train(model.training)
