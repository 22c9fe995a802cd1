"""From a model and one example batch to its unit groups, and to the attributes that count their units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from cria_prune.base.batches import Batch, batch_size
from cria_prune.base.events import passed
from cria_prune.structure.account import UNREAD
from cria_prune.structure.axes import Resolved
from cria_prune.structure.calls import sized_calls
from cria_prune.structure.checked import checked_sizes, stored_sizes
from cria_prune.structure.groups import (
    ENDS,
    Count,
    ParameterSlice,
    Role,
    Site,
    Tap,
    UnitGroup,
    UnitGroups,
    end_of,
    site_of,
)
from cria_prune.structure.rules.core import EXPERTS, Context, Counted, WeightUse, operation_name
from cria_prune.structure.trace import Trace, trace

# Names that say what they count. Any other number that happens to be equal is a
# guess, and restated only where a trial cut fails without it (docs/decisions/0007).
HEADS = re.compile(r"(^|_)n?heads?$")
WIDTHS = {"all_head_size", "inner_dim", "attn_dim", "split_size", "attention_dim", "proj_size", "qkv_dim"}
CONFIG_WIDTHS = {
    "neuron": (
        *("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
        *("hidden_dim", "moe_intermediate_size"),
    ),
    "residual": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"),
}
EXPERT_COUNTS = {
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts", "num_expert"),
}


def held_numbers(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers that a module holds, those of its configuration as `config.<field>`."""
    found = {name: value for name, value in vars(module).items() if _is_number(value)}
    shape = vars(module).get("normalized_shape")
    if isinstance(shape, tuple) and len(shape) == 1 and _is_number(shape[0]):
        found["normalized_shape"] = shape[0]
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict") and hasattr(config, "model_type"):
        found.update({f"config.{name}": value for name, value in vars(config).items() if _is_number(value)})
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def with_counts(
    model: nn.Module, groups: Iterable[UnitGroup], atoms: Mapping[str, np.ndarray],
    counted: Iterable[Counted], classes: np.ndarray,
) -> list[UnitGroup]:  # fmt: skip
    """Return the groups with the attributes that count their units.

    Args:
        model: the live model; it is only looked at.
        groups: the groups; `atoms`: group name -> (units,) the class of each of its units.
        counted: numbers of the captured operations; `classes`: (atoms,) the class of each atom.
    """
    groups = list(groups)
    owner = _owners(groups, atoms)
    found: dict[str, dict[tuple[str, str, str], Count]] = {group.name: {} for group in groups}
    modules = dict(model.named_modules(remove_duplicate=False))
    for place, item in enumerate(counted):
        module = modules.get(item.module)
        names = {} if module is None else _names(module, item)
        if not names:
            continue
        # One number may count units of several groups, as that of a fused
        # projection does: each takes its share away. A group whose units are
        # not counted equally often has no such share, and the number is left.
        units, times = np.unique(classes[item.atoms], return_counts=True)
        widths: dict[str, set[int]] = {}
        for unit, count in zip(units.tolist(), times.tolist(), strict=True):
            widths.setdefault(owner.get(unit, ""), set()).add(count)
        for owned, width in widths.items():
            if owned and len(width) == 1:
                for name, sure in names.items():
                    for path in _holders(modules, item.module, name, item.value):
                        entry = Count(path, name, str(place), min(width), item.value, item.value, sure)
                        found[owned][path, name, entry.place] = entry
    for group in groups:
        for entry in (*_config_widths(modules, group), *_expert_counts(modules, group)):
            found[group.name][entry.module, entry.name, entry.place] = entry
    return [replace(group, counts=tuple(found[group.name].values())) for group in groups]


def _owners(groups: Iterable[UnitGroup], atoms: Mapping[str, np.ndarray]) -> dict[int, str]:
    """Return class -> name of the group whose unit it is."""
    return {int(unit): group.name for group in groups for unit in atoms[group.name]}


def _names(module: nn.Module, item: Counted) -> dict[str, bool]:
    """Return attribute name -> whether its name says that it counts this."""
    held = {name for name, value in held_numbers(module).items() if value == item.value}
    if item.names:
        return {name: True for name in item.names if name in held}
    own = type(module).__module__.startswith("torch.nn.")  # these say what they mean
    names = {}
    for name in held:
        said = bool(HEADS.search(name.removeprefix("config."))) or name in WIDTHS
        if said or not (own or name.startswith("config.")):
            names[name] = said
    return names


def _holders(modules: Mapping[str, nn.Module], path: str, name: str, value: int) -> list[str]:
    """Return the modules that say this number: for a field of a configuration also those around."""
    if not name.startswith("config."):
        return [path]
    part = {"encoder": "decoder", "decoder": "encoder"}
    if any(f".{mine}." in f".{path}." and other in name for mine, other in part.items()):
        return []  # a field of the other half
    # A configuration is shared by the modules around, and each holds its own reference to it.
    paths = [path]
    while path:
        path = path.rpartition(".")[0]
        paths.append(path)
    return [item for item in paths if item in modules and held_numbers(modules[item]).get(name) == value]


def _config_widths(modules: Mapping[str, nn.Module], group: UnitGroup) -> Iterable[Count]:
    """Yield the configurations' fields that hold a group's width: feed-forward or residual."""
    kind = "neuron" if group.kind in ("neuron", "gated") else group.kind
    if kind not in CONFIG_WIDTHS or not group.producers:
        return
    width = group.slices[0].positions.shape[1]
    module, _, tensor = group.producers[0].tensor.rpartition(".")
    held: Any = getattr(modules.get(module), tensor, None)
    if kind == "neuron" and isinstance(held, Tensor) and held.ndim > 2:  # gate and up of experts are one
        width = min((item.positions.shape[1] for item in group.consumers), default=width)
    said = group.size * width
    for name in (f"config.{field}" for field in CONFIG_WIDTHS[kind]):
        for path in _holders(modules, module, name, said):
            yield Count(path, name, group.name, width, said, said, True)


def _expert_counts(modules: Mapping[str, nn.Module], group: UnitGroup) -> Iterable[Count]:
    """Yield the attributes that count whole experts, of the modules with their weights and all around."""
    if group.kind != EXPERTS:
        return
    width = group.producers[0].positions.shape[1]
    paths = {""}
    for item in group.slices:
        parts = item.tensor.split(".")[:-1]
        paths |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    for path in sorted(paths & modules.keys()):
        for name, value in held_numbers(modules[path]).items():
            if name.removeprefix("config.") in EXPERT_COUNTS and value == group.size * width:
                yield Count(path, name, group.name, width, value, value, True)


@dataclass(frozen=True)
class Place:
    """A dimension where units lie: a slice of a tensor, or a tap. `atoms` is (n,)."""

    tensor: str
    dim: int
    kind: Role | Site
    atoms: np.ndarray


def discover(
    model: nn.Module, example: Batch, traced: Trace | None = None, examples: Sequence[Batch] = ()
) -> UnitGroups:
    """Find the unit groups of a model.

    Args:
        model: any module that torch.export can follow; it is left as it was.
        example: one batch of inputs, as the model's forward takes it.
        traced: its trace, if there is one already.
        examples: further batches, for other ways through its code.

    Raises:
        CaptureError: the operations cannot be captured.
        DataError: the forward does not accept the example.
    """
    passed("discover", model=model)
    traced = traced or trace(model, example, examples)
    context, tensors = traced.context, traced.tensors
    roles: dict[tuple[str, int], set[Role]] = {}
    kinds: dict[str, str] = {}
    positions: dict[str, float] = {}
    for number, use in enumerate(context.uses):
        kind = "channel" if operation_name(use.node).startswith("conv") else "neuron"
        kinds[use.weight] = kind
        sides: tuple[tuple[Role, tuple[tuple[str, int], ...]], ...]
        sides = (("produces", use.produced), ("consumes", use.consumed))
        for role, places in sides:
            for name, dim in places:
                roles.setdefault((name, dim), set()).add(role)
                kinds.setdefault(name, kind)
        if number < traced.uses:  # what an example costs is what its evaluation does
            positions[use.weight] = positions.get(use.weight, 0.0) + use.per_element / batch_size(example)
    for place in context.picks:
        roles.setdefault(place, set()).add("picks")
    for name, source in traced.same.items():
        if source in kinds:
            kinds.setdefault(name, kinds[source])
        for dim in range(tensors[name].ndim):
            if (source, dim) in roles:
                roles.setdefault((name, dim), roles[source, dim])
    slices = [
        Place(name, dim, kind, atoms)
        for name, dims in context.labels.items()
        for dim, atoms in enumerate(dims)
        for kind in sorted(roles.get((name, dim), {"follows"}), reverse=True)
    ]
    resolved = traced.resolved
    taps = _taps(context, context.uses[: traced.uses])
    least = dict[int, int]()
    for units, count in context.ranked:
        for unit in np.unique(resolved.classes[units]).tolist():
            least[unit] = max(least.get(unit, 1), count)
    groups, atoms = _groups([*slices, *taps.values()], resolved, kinds, least)
    groups = with_counts(model, groups, atoms, context.counted, resolved.classes)
    checked = checked_sizes(model, context, resolved.classes, _owners(groups, atoms))
    groups = [replace(item, counts=(*item.counts, *checked.get(item.name, ()))) for item in groups]
    return UnitGroups(
        groups=tuple(_counted_in_copies(model, _evaluated(groups, positions), traced.copies)),
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=tuple(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)),
        positions=positions,
        embeddings=_embeddings(traced),
        loose=_loose(traced, atoms.values()),
        calls=sized_calls(context.sized, resolved.classes, _owners(groups, atoms)),
        notes=traced.notes,
    )


def _loose(traced: Trace, grouped: Iterable[np.ndarray]) -> dict[str, dict[int, str]]:
    """Return why dimensions of parameters that no group touches have no units; see `UnitGroups.loose`."""
    resolved, context = traced.resolved, traced.context
    owned = np.zeros(int(resolved.classes.max(initial=-1)) + 1, dtype=bool)
    for units in grouped:
        owned[units] = True
    found: dict[str, dict[int, str]] = {}
    for name, tensor in traced.tensors.items():
        if not isinstance(tensor, nn.Parameter):
            continue
        dims = [np.unique(resolved.classes[atoms]) for atoms in context.labels[name]]
        free = {dim: units for dim, units in enumerate(dims) if not owned[units].any()}
        said = {
            dim: next((resolved.frozen[unit] for unit in units.tolist() if unit in resolved.frozen), "")
            for dim, units in free.items()
        }
        known = {dim: text for dim, text in said.items() if text}
        found[name] = known if name in traced.read else dict.fromkeys([-1, *free], UNREAD)
    return {name: reasons for name, reasons in found.items() if reasons}


def _evaluated(groups: Iterable[UnitGroup], positions: Mapping[str, float]) -> list[UnitGroup]:
    """Return the groups, those frozen whose units no evaluation of the first example makes and reads.

    Args:
        groups: of all forwards.
        positions: its keys are the weights that this evaluation uses.
    """
    # What is never recorded cannot be ranked beside what is.
    reason = "runs only in training, or only on a further example: its units cannot be ranked"

    def stays(side: tuple[ParameterSlice, ...]) -> bool:
        return bool(side) and all(item.tensor not in positions for item in side)

    return [
        replace(group, frozen=reason)
        if group.frozen is None and (stays(group.producers) or stays(group.consumers))
        else group
        for group in groups
    ]


def _counted_in_copies(
    model: nn.Module, groups: Iterable[UnitGroup], copies: Mapping[str, str]
) -> list[UnitGroup]:
    """Return the groups with the attributes of copies that count what those of their originals do."""
    modules, result = dict(model.named_modules(remove_duplicate=False)), []
    for group in groups:
        counts = list(group.counts)
        for path, source in copies.items():
            for item in group.counts:
                own = path + item.module.removeprefix(source)
                inside = f"{item.module}.".startswith(f"{source}.") and own in modules
                held = {**stored_sizes(modules[own]), **held_numbers(modules[own])} if inside else {}
                if held.get(item.name) == item.said:
                    counts.append(replace(item, module=own))
        result.append(replace(group, counts=tuple(counts)))
    return result


def _embeddings(traced: Trace) -> tuple[str, ...]:
    """Name the parameters that rows are picked from, and an output layer as large as the longest of them."""
    context, tensors, frozen = traced.context, traced.tensors, traced.resolved.frozen
    picked = {use.weight for use in context.uses if operation_name(use.node) == "embedding"}
    tokens = max((tuple(tensors[name].shape) for name in picked), default=())
    made = [place for use in context.uses for place in use.produced]
    for name, dim in made:
        if tuple(tensors[name].shape) == tokens:
            units = traced.resolved.classes[context.labels[name][dim]]
            if all(int(unit) in frozen for unit in units):
                picked.add(name)
    return tuple(name for name in tensors if name in picked and isinstance(tensors[name], nn.Parameter))


def _taps(context: Context, uses: Iterable[WeightUse]) -> dict[tuple[str, Site, int], Place]:
    """Input-side signals leave a producer (or its batch norm); output-side ones enter a consumer."""
    taps: dict[tuple[str, Site, int], Place] = {}
    for use in uses:
        # The signal before the activation is what the batch norm gives, if the layer has one to itself.
        norm = _own_batch_norm(use.node)
        statistics = next((context.names[item] for item in norm if item in context.names), None)
        name, made = statistics or use.weight, "rows" if operation_name(use.node) == "embedding" else "output"
        left = site_of(made, 0 if statistics or made == "rows" else use.view)
        read = site_of("input", use.view)
        if use.produced:
            for item in use.leaving:
                taps.setdefault((name, left, item.dim), Place(name, item.dim, left, item.atoms))
        if use.consumed:
            for item in use.entering:
                taps.setdefault((use.weight, read, item.dim), Place(use.weight, item.dim, read, item.atoms))
    return taps


def _own_batch_norm(node: Node) -> tuple[Node, ...]:
    """Return weight and running mean of the batch norm that alone reads this output."""
    # Where anything else reads the output too, the norm is not a part of the layer.
    users = list(node.users)
    if len(users) == 1 and operation_name(users[0]) == "batch_norm" and users[0].args[0] is node:
        return tuple(item for item in (users[0].args[1], users[0].args[3]) if isinstance(item, Node))
    return ()


def _signatures(places: list[Place], classes: np.ndarray, units: int) -> np.ndarray:
    """Return (units,) hashes: equal where units touch the same places with the same multiplicity."""
    # Sums of salted counts are equal where places and multiplicities are. 63
    # bits make a chance hit unlikely, and the fixed seed gives the same groups
    # every time. The sums may overflow: they are taken modulo 2⁶⁴ on both sides.
    random = np.random.default_rng(0)
    signature = np.zeros(units, dtype=np.uint64)
    for place in places:
        members, counts = np.unique(classes[place.atoms], return_counts=True)
        salt = random.integers(1, 2**63, dtype=np.uint64)
        signature[members] += salt * counts.astype(np.uint64)
    return signature


@dataclass(frozen=True)
class Touched:
    """Where one group's units lie at one place: `units` (k,) ascending, `positions` (k, width)."""

    place: Place
    units: np.ndarray
    positions: np.ndarray


def _groups(
    places: list[Place], resolved: Resolved, kinds: dict[str, str], least: Mapping[int, int]
) -> tuple[list[UnitGroup], dict[str, np.ndarray]]:
    """Collect units of equal signature into groups, in the order of the network; and their classes."""
    classes = resolved.classes
    signature = _signatures(places, classes, int(classes.max(initial=-1)) + 1)
    # A group is frozen as a whole, so units that stay, and each
    # reason for it, are groups apart from units that may leave.
    reasons = list(dict.fromkeys(resolved.frozen.values()))
    drawn = np.random.default_rng(1).integers(1, 2**63, size=len(reasons), dtype=np.uint64)
    salts = dict(zip(reasons, drawn, strict=True))
    for unit, reason in resolved.frozen.items():
        signature[[unit]] += salts[reason]
    touched: dict[int, list[Touched]] = {}
    for place in places:
        units = classes[place.atoms]
        for key in np.unique(signature[units]).tolist():
            positions = np.flatnonzero(signature[units] == key)
            order = np.argsort(units[positions], kind="stable")
            members = np.unique(units[positions])
            # Equal signatures are equal counts here, so the positions of the units form a rectangle.
            rows = positions[order].reshape(len(members), -1).astype(np.int64)
            touched.setdefault(key, []).append(Touched(place, members, rows))
    rank = {weight: index for index, weight in enumerate(kinds)}
    found = [_group(items, resolved, rank, kinds, least) for items in touched.values()]
    ranked = [item for item in found if item is not None]
    ranked.sort(key=lambda item: (rank[item[0].producers[0].tensor], item[0].frozen is not None))
    groups = _unique_names([group for group, _ in ranked])
    return groups, {group.name: units for group, (_, units) in zip(groups, ranked, strict=True)}


def _group(
    items: list[Touched],
    resolved: Resolved,
    rank: dict[str, int],
    kinds: dict[str, str],
    least: Mapping[int, int],
) -> tuple[UnitGroup, np.ndarray] | None:
    """Build a group; its units are ordered by their position in the first producer. None without one."""
    made = [item for item in items if item.place.kind == "produces"]
    # Dimensions that no layer produces (windows, inputs) are no units of their own.
    if not made:
        return None
    made.sort(key=lambda item: rank[item.place.tensor])
    # Unit i is then the i-th output of the layer that gives the group its name.
    order = np.argsort(made[0].positions[:, 0], kind="stable")
    units = made[0].units[order].tolist()
    slices = [
        ParameterSlice(item.place.tensor, item.place.dim, item.positions[order], cast(Role, item.place.kind))
        for item in [*made, *(item for item in items if item.place.kind in ("consumes", "follows", "picks"))]
    ]
    taps = {
        end: tuple(
            Tap(item.place.tensor, item.place.kind, item.place.dim, item.positions[order])
            for item in items
            if end_of(item.place.kind) == end
        )
        for end in ENDS
    }
    first = made[0].place.tensor
    kind = _kind(kinds[first], units, made, resolved)
    reason = resolved.frozen.get(units[0])
    if reason is None and kind != EXPERTS and not any(item.role == "consumes" for item in slices):
        reason = "no layer with weights reads it"
    group = UnitGroup(
        name=first.rsplit(".", 1)[0] if "." in first else first,
        kind=kind,
        size=len(units),
        original_size=len(units),
        slices=tuple(slices),
        inputs=(*taps["output"], *taps["rows"]),
        outputs=taps["input"],
        frozen=reason,
        assumes=tuple(dict.fromkeys(text for unit in units for text in resolved.assumed.get(unit, ()))),
        normed=resolved.marked(units, "normed"),
        multiple=_multiple(len(units)) if resolved.marked(units, "aligned") else 1,
        least=max(least.get(unit, 1) for unit in units) if kind == EXPERTS else 1,
    )
    return group, np.asarray(units)


def _multiple(size: int) -> int:
    """Return what divides the widths of a kernel whose rows are aligned to 16 bytes, in 2 or 4 bytes each."""
    return next((step for step in (8, 4) if size % step == 0), 1)


def _kind(kind: str, units: list[int], made: list[Touched], resolved: Resolved) -> str:
    """Say what a group's units are, from the kind of its first producer and the marks of the rules."""
    if resolved.marked(units, EXPERTS):
        return EXPERTS
    if resolved.marked(units, "head"):
        return "kv group" if resolved.marked(units, "grouped") else "head"
    if resolved.marked(units, "residual"):
        return "residual"
    # A product makes a gate only of two projections, or of two
    # halves of one: a neuron scaled by something else is a neuron.
    gated = resolved.marked(units, "gated") and kind == "neuron"
    return "gated" if gated and (len(made) > 1 or made[0].positions.shape[1] > 1) else kind


def _unique_names(groups: list[UnitGroup]) -> list[UnitGroup]:
    seen: dict[str, int] = {}
    result = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        number = seen[group.name]
        result.append(group if number == 1 else replace(group, name=f"{group.name}#{number}"))
    return result
