"""model + Plan -> smaller model: every check first, every change after."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from cria_prune.base.attention import MultiheadAttention
from cria_prune.base.computed import computed_shapes, recomputed
from cria_prune.base.errors import StructureError
from cria_prune.base.events import passed
from cria_prune.base.kinds import unwrap
from cria_prune.base.modules import copy_of, named_tensors, shared_copy
from cria_prune.base.sizes import restate_calls
from cria_prune.planning.plan import AttributeEdit, Plan


def slice_tensor(tensor: Tensor, cuts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return a contiguous copy of `tensor` that keeps the given positions of each named dimension.

    A parameter stays a parameter with the same `requires_grad`; its gradient is dropped. Works on
    the meta device too.

    >>> slice_tensor(torch.arange(6).reshape(2, 3), [(1, [0, 2])])
    tensor([[0, 2],
            [3, 5]])
    """
    smaller = tensor.detach()
    for dim, kept in cuts:
        smaller = smaller.index_select(dim, torch.as_tensor(kept, dtype=torch.long, device=tensor.device))
    smaller = smaller.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def ranks(order: Tensor) -> Tensor:
    """Return the positions that are left of an order (n,), counted anew.

    >>> ranks(torch.tensor([5, 0, 3]))
    tensor([2, 0, 1])
    """
    if order.device.type == "meta":
        return order
    return order.unique(return_inverse=True)[1].to(order.dtype)


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
    elif isinstance(module, nn.RNNBase):
        _restate_sizes(module, cast(Tensor, module.weight_ih_l0))
        if module.proj_size:
            module.proj_size = int(cast(Tensor, module.weight_hh_l0).shape[1])
        module.flatten_parameters()  # assigned one by one, they no longer lie in one piece of a GPU's memory
    elif isinstance(module, nn.RNNCellBase):
        _restate_sizes(module, module.weight_ih)
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
        if module.groups > 1 and depthwise:
            module.groups = int(module.weight.shape[0])
        module.in_channels = int(module.weight.shape[0])
        module.out_channels = int(module.weight.shape[1]) * module.groups
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


def _restate_sizes(module: nn.RNNBase | nn.RNNCellBase, weight: Tensor) -> None:
    """Set the sizes of a recurrent layer by those of its weights; a unit has a row for each gate."""
    gates = (
        4
        if isinstance(module, (nn.LSTM, nn.LSTMCell))
        else 3
        if isinstance(module, (nn.GRU, nn.GRUCell))
        else 1
    )
    module.hidden_size, module.input_size = int(weight.shape[0]) // gates, int(weight.shape[1])


def check_attributes(model: nn.Module, plan: Plan) -> None:
    """Check that the model says what the plan's edits start from, and has the modules that it restates.

    Raises:
        StructureError: a module or attribute is missing or says something else.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for edit in plan.attributes:
        found: Any = modules.get(edit.module)
        for name in edit.name.split("."):
            if isinstance(found, (list, tuple)):
                found = dict(enumerate(found)).get(int(name)) if name.isdigit() else None
            else:
                found = vars(found).get(name) if hasattr(found, "__dict__") else None
        found = found[0] if isinstance(found, tuple) and len(found) == 1 else found
        if found != edit.before or not isinstance(found, int):
            raise StructureError(
                f"A plan that restates {edit.name!r} of {edit.module!r} from {edit.before} to {edit.after}",
                f"the model says {found!r}",
                "Apply a plan to the model that it was made for",
            )
    for path in dict.fromkeys(call.module for call in plan.calls):
        if path not in modules:
            raise StructureError(
                f"A plan that restates calls of {path!r}", "the model has no such module",
                "Apply a plan to the model that it was made for",
            )  # fmt: skip


def restate_attributes(model: nn.Module, plan: Plan) -> None:
    """Set every attribute that the plan edits.

    A configuration that several modules share is set if all that say the number agree. Where they do
    not, each module that changes gets a copy of its own, and the shared one stays as it is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    edits = [(modules[edit.module], edit) for edit in plan.attributes]
    sizes = _head_sizes(modules.values())
    agreed: dict[tuple[int, str], set[int]] = {}
    for module, edit in edits:
        if edit.name.startswith("config."):
            agreed.setdefault((id(module.config), edit.name), set()).add(edit.after)
    own: dict[int, Any] = {}
    for module, edit in edits:
        if not edit.name.startswith("config."):
            _restate_attribute(module, edit)
            continue
        config: Any = own.get(id(module), module.config)
        if len(agreed.get((id(config), edit.name), ())) > 1 and edit.before != edit.after:
            # Layers that now differ cannot say so in one configuration.
            config = own[id(module)] = copy.copy(config)
            module.config = config
        if edit.before != edit.after:
            setattr(config, edit.name.removeprefix("config."), edit.after)
    for config, size in sizes:
        if _head_size(config) != size:
            with suppress(AttributeError):  # a property that works it out
                config.head_dim = size


def _restate_attribute(module: nn.Module, edit: AttributeEdit) -> None:
    """Set an attribute, or one place of a list or tuple (`name.place`)."""
    name, _, place = edit.name.partition(".")
    held = getattr(module, name)
    if place:
        held = [edit.after if number == int(place) else item for number, item in enumerate(held)]
        setattr(module, name, type(getattr(module, name))(held))
    else:
        setattr(module, name, (edit.after,) if isinstance(held, tuple) else edit.after)  # the shape of a norm


def _head_sizes(modules: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return the configurations that rotary positions are worked out from, with the size of a head.

    Some work it out anew in a forward (Phi-MoE in each, others once a text is long), as the width divided by
    the number of heads unless the configuration says it. Neither is what it was after a cut.
    """
    found = {id(item.config): item.config for item in modules if hasattr(item, "rope_init_fn")}
    sizes = ((config, _head_size(config)) for config in found.values())
    return [(config, size) for config, size in sizes if size is not None]


def _head_size(config: Any) -> int | None:
    """Return what transformers takes for the size of a head."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if getattr(config, "head_dim", None) is not None:
        return int(config.head_dim)
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def apply(model: nn.Module, plan: Plan, *, inplace: bool = False, share: bool = False) -> nn.Module:
    """Remove the units that the plan does not keep.

    Args:
        model: the model that the plan was made for.
        plan: what stays.
        inplace: cut `model` itself; otherwise it is untouched and a copy is returned, made
            without first copying what is cut away.
        share: the copy shares the tensors that are not cut with `model`.

    Returns:
        The smaller model, in the wrapping of `model` (see `base.kinds`). Parameters that shared a tensor
        still share it, and modules say their new sizes (`out_channels`, `in_features`,
        `groups`, `num_features`).

    Raises:
        StructureError: the plan names a tensor or size that the model does not have; nothing is changed.
    """
    given, (model, wrap, _) = model, unwrap(model)
    passed("cut", model=model, plan=plan)
    # All that can fail comes before the first change, so that no model is left half cut.
    tensors = named_tensors(model)
    cuts = check(tensors, plan)
    check_attributes(model, plan)
    smaller = {name: slice_tensor(tensors[name], items) for name, items in cuts.items()}
    order = {cut.tensor for cut in plan.cuts if cut.role == "picks"} & smaller.keys()
    smaller |= {name: ranks(smaller[name]) for name in order}
    # By identity: a tensor of several names is cut once and stays one.
    replaced = {id(tensors[name]): tensor for name, tensor in smaller.items()}
    before = {id(tensors[name]): tuple(tensors[name].shape) for name in cuts}
    # A depthwise filter follows its channel; the outputs of a grouped convolution are produced.
    following = {id(tensors[cut.tensor]) for cut in plan.cuts if cut.role == "follows" and cut.dim == 0}
    owners = _owners(model, before)
    computed = {path: whole for path in owners if (whole := computed_shapes(model, path))}
    if inplace and computed:
        apply(model, plan, share=True)  # what is computed of the smaller tensors may fail
    target = model
    if not inplace:
        # The copy takes the cut tensors in place of the whole ones, so what is cut away is never copied.
        target = (shared_copy if share else copy_of)(model, replaced)
        names = {path: shapes for path, (_, shapes) in owners.items()}
        owners = {path: (target.get_submodule(path), shapes) for path, shapes in names.items()}
    for module, shapes in owners.values():
        for local, (key, _) in shapes.items():
            setattr(module, local, replaced[key])
        depthwise = shapes.get("weight", (0, ()))[0] in following
        restate(module, {local: shape for local, (_, shape) in shapes.items()}, depthwise)
    for path, whole in computed.items():
        module = recomputed(target, path)
        largest = max(owners[path][1].values(), key=lambda item: math.prod(item[1]))[0]
        restate(module, whole, largest in following)
    restate_attributes(target, plan)
    for path in dict.fromkeys(edit.module for edit in plan.calls):
        restate_calls(target.get_submodule(path), [edit.sizing for edit in plan.calls if edit.module == path])
    if wrap is None:
        return target
    return given if inplace else wrap(target)


def check(tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Return tensor name -> (dim, kept) cuts that remove something, all valid for these tensors."""
    cuts: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for cut in plan.cuts:
        tensor = tensors.get(cut.tensor)
        found = None if tensor is None else tuple(tensor.shape)
        if found is None or cut.dim >= len(found) or found[cut.dim] != cut.size:
            raise StructureError(
                f"A plan that cuts {cut.tensor!r} along dimension {cut.dim} of size {cut.size}",
                "the model has no such tensor" if found is None else f"the model's tensor has shape {found}",
                "Apply a plan to the model that it was made for",
            )
        if len(cut.kept) < cut.size:
            cuts.setdefault(cut.tensor, []).append((cut.dim, cut.kept))
    return cuts


def _owners(
    model: nn.Module, cut: Mapping[int, tuple[int, ...]]
) -> dict[str, tuple[nn.Module, dict[str, tuple[int, tuple[int, ...]]]]]:
    """Return module path -> (module, local name -> (tensor id, shape before)) for each cut tensor."""
    owners: dict[str, tuple[nn.Module, dict[str, tuple[int, tuple[int, ...]]]]] = {}
    for path, module in model.named_modules():
        local = {**module._parameters, **module._buffers}
        shapes = {name: (id(item), cut[id(item)]) for name, item in local.items() if id(item) in cut}
        if shapes:
            owners[path] = (module, shapes)
    return owners
