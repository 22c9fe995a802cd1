"""model + Plan -> smaller model; every check first, every change after."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cria_prune.base.events import passed
from cria_prune.errors import StructureError
from cria_prune.modules import copy_of, named_tensors, shared_copy
from cria_prune.plan.plan import Plan
from cria_prune.surgery.restate import check_attributes, restate, restate_attributes
from cria_prune.surgery.slicing import slice_tensor


def apply(model: nn.Module, plan: Plan, *, inplace: bool = False, share: bool = False) -> nn.Module:
    """Remove the units that the plan does not keep.

    Args:
        model: the model that the plan was made for.
        plan: what stays.
        inplace: cut `model` itself; otherwise it is untouched and a copy is returned, made
            without first copying what is cut away.
        share: the copy shares the tensors that are not cut with `model`.

    Returns:
        The smaller model. Parameters that shared a tensor still share it, and modules say their
        new sizes (`out_channels`, `in_features`, `groups`, `num_features`).

    Raises:
        StructureError: the plan names a tensor or size that the model does not have; nothing is changed.
    """
    passed("cut", model=model, plan=plan)
    tensors = named_tensors(model)
    cuts = check(tensors, plan)
    check_attributes(model, plan)
    smaller = {name: slice_tensor(tensors[name], items) for name, items in cuts.items()}
    replaced = {id(tensors[name]): tensor for name, tensor in smaller.items()}
    before = {id(tensors[name]): tuple(tensors[name].shape) for name in cuts}
    # A depthwise filter follows its channel; the outputs of a grouped convolution are produced.
    following = {id(tensors[cut.tensor]) for cut in plan.cuts if cut.role == "follows" and cut.dim == 0}
    owners = _owners(model, before)
    target = model
    if not inplace:
        target = (shared_copy if share else copy_of)(model, replaced)
        names = {path: shapes for path, (_, shapes) in owners.items()}
        owners = {path: (target.get_submodule(path), shapes) for path, shapes in names.items()}
    for module, shapes in owners.values():
        for local, (key, _) in shapes.items():
            setattr(module, local, replaced[key])
        depthwise = shapes.get("weight", (0, ()))[0] in following
        restate(module, {local: shape for local, (_, shape) in shapes.items()}, depthwise)
    restate_attributes(target, plan)
    return target


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
