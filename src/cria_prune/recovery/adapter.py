"""LoRA: adapters of low rank, trained beside the linear layers and then added to their weights."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cria_prune.base.errors import ConfigError, needed

SCALE = 2
"""An adapter adds SCALE B A to a weight, peft's `lora_alpha` = SCALE * rank: with the scale fixed, a good
learning rate of one rank is about as good for another."""


@contextmanager
def adapters(model: nn.Module, rank: int) -> Iterator[None]:
    """Put adapters beside the linear layers, and freeze all else; on leaving merge them and take them out.

    The weights change in place. An adapter that adds nothing, as each does at first, leaves its weight as it
    is, bit for bit. Modules, parameters and what requires a gradient are on leaving what they were.

    Raises:
        ConfigError: peft refuses the model or adapts it already, or no layer can be adapted.
        PackageError: peft is not installed.
    """
    asked = f"LoRA of rank {rank}"
    with needed("lora", asked):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    if hasattr(model, "peft_config"):
        raise ConfigError(asked, "the model has adapters already", "Merge them first (merge_and_unload)")
    names = linear_layers(model)
    if not names:
        raise ConfigError(
            asked,
            "the model has no linear layer besides its head that is trained and not shared",
            "Unfreeze some, or set lora to 0",
        )
    # peft puts its layers in the place of ours and freezes the rest. What stood where, and what was
    # trained, is kept before it is called, so that nothing of it is left after an error either.
    homes = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights of layers that it does not call
        try:
            _inject(inject_adapter_in_model, LoraConfig, model, rank, names)
        except (TypeError, ValueError) as error:  # peft knows kinds of models that it cannot adapt
            found = f"peft refuses the model, {error}".rstrip(".")
            raise ConfigError(asked, found, "Set lora to 0") from error
        _everywhere(homes, [layer for layer in model.modules() if isinstance(layer, LoraLayer)])
        yield
    finally:
        layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        for layer in layers:
            if any(up.weight.any() for up in layer.lora_B.values()):  # adding zeros would turn -0 into 0
                layer.merge()
        for parent, name, child in homes:
            parent._modules[name] = child
        for parameter, trained in flags:
            parameter.requires_grad_(trained)
        if hasattr(model, "peft_config"):
            del model.peft_config
        torch.backends.mha.set_fastpath_enabled(fast)


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers to adapt: linear, trained, neither shared nor the model's head.

    The head is what `get_output_embeddings` returns, or else the linear layer that was registered last. A
    weight that another module holds too (a tied embedding) would change there as well, one that none holds
    is computed, and an attention of torch reads its output projection without calling it.
    """
    found: list[tuple[str, Any]] = [(name, item) for name, item in model.named_modules() if _is_linear(item)]
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = (ask() if ask else None) or (found[-1][1] if found else None)
    holders = Counter(id(weight) for item in model.modules() for weight in item._parameters.values())
    uncalled = {id(item.out_proj) for item in model.modules() if isinstance(item, nn.MultiheadAttention)}
    return [
        name
        for name, item in found
        if item is not head
        and id(item) not in uncalled
        and item.weight.requires_grad
        and holders[id(item.weight)] == 1
    ]


def _is_linear(module: nn.Module) -> bool:
    """Say whether a module computes a product with its `weight`, and no more."""
    kind = type(module)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return conv1d or (isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward)


def _inject(inject: Any, kind: Any, model: nn.Module, rank: int, names: list[str]) -> None:
    """Have peft wrap the named layers: zero adapters, the first factor drawn from torch's generator."""
    pattern = "|".join(map(re.escape, names))  # of a list peft would take the ends of names as well
    config = kind(r=rank, lora_alpha=SCALE * rank, target_modules=pattern)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)  # Conv1D, set right
        inject(config, model)


def _everywhere(homes: list[tuple[nn.Module, str, Any]], layers: list[Any]) -> None:
    """Put each wrapped layer wherever the layer stood: peft finds a module under its first name only."""
    wrapped = {id(layer.get_base_layer()): layer for layer in layers}
    for parent, name, child in homes:
        if id(child) in wrapped:
            parent._modules[name] = wrapped[id(child)]
