"""After surgery, what a module says of itself is true: sizes, head counts, fields of a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from cria_prune.attention import MultiheadAttention
from cria_prune.errors import StructureError
from cria_prune.plan.plan import Plan

# Instance norms derive from the same class and have no weight unless asked for.
CHANNEL_NORMS = (nn.modules.batchnorm._NormBase,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def restate(module: nn.Module, before: Mapping[str, tuple[int, ...]], depthwise: bool) -> None:
    """Make what a module says of its own tensors true again.

    Args:
        module: with its smaller tensors.
        before: local name -> shape of the cut tensors before.
        depthwise: the filters of the weight left with the channels they read.
    """
    if isinstance(module, CHANNEL_NORMS):
        statistics = module.weight if module.weight is not None else module.running_mean
        assert statistics is not None
        module.num_features = int(statistics.shape[0])
    elif isinstance(module, nn.MultiheadAttention):
        _restate_attention(module)
    elif "weight" not in before:
        return
    elif isinstance(module, nn.PReLU):
        module.num_parameters = int(module.weight.shape[0])
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = int(module.weight.shape[0])
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = map(int, module.weight.shape)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = map(int, module.weight.shape)
    elif isinstance(module, TRANSPOSED):
        module.in_channels, module.out_channels = int(module.weight.shape[0]), int(module.weight.shape[1])
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1 and depthwise:
            multiplier = before["weight"][0] // module.groups
            module.groups = int(module.weight.shape[0]) // multiplier
        module.in_channels = int(module.weight.shape[1]) * module.groups
        module.out_channels = int(module.weight.shape[0])
    elif {"nf", "nx"} <= vars(module).keys():  # the transposed linear of GPT-2
        weight = cast(Tensor, module.weight)
        for name, size in zip(("nx", "nf"), weight.shape, strict=True):
            setattr(module, name, int(size))


def _restate_attention(module: nn.MultiheadAttention) -> None:
    """Give a cut attention the class that reads its sizes off its parameters."""
    packed = module.in_proj_weight
    widths = (
        [packed] * 3
        if packed is not None
        else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    )
    module.embed_dim, module.kdim, module.vdim = (int(item.shape[1]) for item in widths)
    module._qkv_same_embed_dim = False  # what the fused kernels of the layers around it ask for
    if type(module) is nn.MultiheadAttention:
        module.__class__ = MultiheadAttention


def check_attributes(model: nn.Module, plan: Plan) -> None:
    """Check that the model says what the plan's edits start from.

    Raises:
        StructureError: a module or attribute is missing or says something else.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for edit in plan.attributes:
        found: Any = modules.get(edit.module)
        for name in edit.name.split("."):
            found = vars(found).get(name) if hasattr(found, "__dict__") else None
        found = found[0] if isinstance(found, tuple) and len(found) == 1 else found
        if found != edit.before or not isinstance(found, int):
            raise StructureError(
                f"A plan that restates {edit.name!r} of {edit.module!r} from {edit.before} to {edit.after}",
                f"the model says {found!r}",
                "Apply a plan to the model that it was made for",
            )


def restate_attributes(model: nn.Module, plan: Plan) -> None:
    """Set every attribute that the plan edits.

    A configuration that several modules share is set if all that say the number agree. Where they do
    not, each module that changes gets a copy of its own, and the shared one stays as it is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    edits = [(modules[edit.module], edit) for edit in plan.attributes]
    agreed: dict[tuple[int, str], set[int]] = {}
    for module, edit in edits:
        if edit.name.startswith("config."):
            agreed.setdefault((id(module.config), edit.name), set()).add(edit.after)
    own: dict[int, Any] = {}
    for module, edit in edits:
        if not edit.name.startswith("config."):
            as_tuple = isinstance(getattr(module, edit.name), tuple)  # the shape of a norm
            setattr(module, edit.name, (edit.after,) if as_tuple else edit.after)
            continue
        config: Any = own.get(id(module), module.config)
        if len(agreed.get((id(config), edit.name), ())) > 1 and edit.before != edit.after:
            config = own[id(module)] = copy.copy(config)
            module.config = config
        if edit.before != edit.after:
            setattr(config, edit.name.removeprefix("config."), edit.after)
