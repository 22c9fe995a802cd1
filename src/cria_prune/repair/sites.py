"""Where a program can be refitted, and where what it writes is added to a stream.

A *site* is one call of a linear layer, of the experts of a layer or of a convolution whose weight is a
parameter. A *meeting* is the addition that its output goes into, with nothing in between that cannot be
undone: views, a batch norm with kept statistics, a scale or a bias that is a parameter. Both are read off
the captured operations, so no
architecture is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cria_prune.repair.program import Look, Program, Ref, Run, Step
from cria_prune.structure.rules.recurrent import GATES

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
RESHAPED = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
SAME = {"contiguous", "clone", "dropout", "to", "_to_copy", "alias", "detach", "identity"}
TURNED = {"permute", "transpose", "t", "numpy_T", "mT"}
ADDED, SCALED = {"add"}, {"mul", "div"}
RECURRENT = {*GATES, *(f"{name}_cell" for name in GATES), "recurrent_rows"}


@dataclass(frozen=True)
class Meeting:
    """The addition that a site's output goes into.

    Attributes:
        at: the addition.
        chain: the steps from the site's own to the operand, in order; all can be undone.
        operand: the step whose result is added, of the site's branch; other: what it is added to.
    """

    at: int
    chain: tuple[int, ...]
    operand: int
    other: int


@dataclass(frozen=True)
class Site:
    """A call that can be refitted.

    Attributes:
        step: the call; data: the step that gives what it reads.
        weight, bias: canonical names; no bias: None.
        path: the steps between the weight and the call, such as a transposition.
        outputs_first: the weight is (outputs, inputs ...), and not (inputs, outputs ...).
        spatial: dimensions of a convolution; 0 for a product.
        stride, padding, dilation, output_padding: of a convolution, one number per dimension; padding may be
            `same` or `valid`.
        transposed: of a transposed convolution.
        groups: of a convolution.
        norm: running mean of the batch norm that alone reads the output; None where there is none.
        meeting: None where the output meets no stream, or what stands between cannot be undone.
        experts: the step that says which expert each row goes to, where the weight is (experts, ...) of them.
        why: why there is no meeting.
    """

    step: int
    data: int
    weight: str
    bias: str | None
    path: tuple[int, ...]
    outputs_first: bool
    spatial: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1
    norm: str | None = None
    meeting: Meeting | None = None
    experts: int | None = None
    why: str = ""

    @property
    def output_dim(self) -> int:
        """The dimension of the weight that its outputs lie along."""
        return (0 if self.outputs_first else 1) + (self.experts is not None)

    @property
    def channel(self) -> int:
        """The dimension of the output that its features lie along."""
        return 1 if self.spatial else -1


def find_sites(
    program: Program,
    wanted: Collection[str] | None = None,
    fixed: Collection[str] = (),
    experts: Collection[str] = (),
) -> tuple[list[Site], dict[str, str]]:
    """Return the sites of a program in its order, and why other weights cannot be refitted.

    Args:
        program: the captured operations.
        wanted: canonical names of weights that are to be refitted if they can be; all by default.
        fixed: names of the buffers: what a network was not trained in, such as a filter bank, stays.
        experts: canonical names of weights of experts that are to be refitted.
    """
    uses: dict[str, int] = {}
    for step in program.steps:
        if step.kind == "weight":
            uses[step.name] = uses.get(step.name, 0) + len(program.readers.get(step.number, ()))
    found: list[Site] = []
    for step in program.steps:
        site = _site(program, step) if step.data and step.kind == "call" else None
        asked = wanted if site is None or site.experts is None else experts
        if site is not None and (asked is None or site.weight in asked):
            found.append(site)
    left = {site.weight: "is read more than once" for site in found if uses[site.weight] > 1}
    left |= {site.weight: "is a buffer, and no parameter" for site in found if site.weight in fixed}
    inside = [number for step in program.steps if step.name in RECURRENT for number in step.reads]
    left |= {
        program.steps[number].name: "is inside a recurrent layer, whose steps are one operation"
        for number in inside
        if program.steps[number].kind == "weight"
    }
    found = [site for site in found if site.weight not in left]
    # A bias or norm that others read too stays as it is.
    kept = [
        replace(
            site, bias=site.bias if site.bias is not None and uses[site.bias] == 1 else None,
            norm=_norm_behind(program, site, uses),
        )
        for site in found
    ]  # fmt: skip
    places = [site.step for site in kept]
    # The rows of experts are added up with weights of the data, which cannot be undone.
    met = [site if site.experts is not None else _with_meeting(program, site, places) for site in kept]
    for name in wanted or ():
        if name not in left and not any(site.weight == name for site in met):
            left[name] = why_no_site([program], name)
    return met, left


def why_no_site(programs: Iterable[Program], name: str) -> str:
    """Return why a weight has no site in some programs."""
    read = any(
        step.kind == "weight" and step.name == name and program.readers.get(step.number)
        for program in programs
        for step in program.steps
    )
    return "is read by an operation that cannot be refitted" if read else "is not read in evaluation"


def _site(program: Program, step: Step) -> Site | None:
    """Return the site of a call, without what comes after it; None where it is none."""

    def argument(place: int, name: str, default: Any = None) -> Any:
        return step.args[place] if len(step.args) > place else step.kwargs.get(name, default)

    name = step.name
    if name == "linear":
        data, weight, bias, first = argument(0, "input"), argument(1, "weight"), argument(2, "bias"), True
    elif name == "addmm":
        data, weight, bias, first = argument(1, "mat1"), argument(2, "mat2"), argument(0, "self"), False
        if step.kwargs.get("alpha", 1) != 1 or step.kwargs.get("beta", 1) != 1:
            return None
    elif name in ("mm", "matmul"):
        data, weight, bias, first = argument(0, "self"), argument(1, "other"), None, False
    elif name == "routed_mm":
        return _routed(program, step)
    elif name in CONVOLUTIONS or name in TRANSPOSED:
        return _convolution(program, step, argument, name)
    else:
        return None
    return _plain(program, step, data, weight, bias, first)


def _plain(program: Program, step: Step, data: Any, weight: Any, bias: Any, first: bool) -> Site | None:
    found = _weight(program, weight)
    if found is None or not isinstance(data, Ref) or not program.steps[data.number].data:
        return None
    source, path, turned = found
    if len(source.shape or ()) != 2 or (step.shape is not None and len(step.shape) < 2):
        return None
    added = _named(program, bias)
    if bias is not None and added is None:
        return None
    return Site(step.number, data.number, source.name, added, path, first != turned)


def _routed(program: Program, step: Step) -> Site | None:
    """Return the site of a product of rows with the weights of their experts; its bias stays."""
    data, weight, experts = step.args[:3]
    found = _weight(program, weight)
    refs = isinstance(data, Ref) and isinstance(experts, Ref)
    if found is None or not refs or not program.steps[data.number].data:
        return None
    source, path, turned = found
    return Site(step.number, data.number, source.name, None, path, turned, experts=experts.number)


def _convolution(program: Program, step: Step, argument: Callable[..., Any], name: str) -> Site | None:
    found, data = _weight(program, argument(1, "weight")), argument(0, "input")
    if found is None or found[2] or not isinstance(data, Ref) or not program.steps[data.number].data:
        return None
    spatial = CONVOLUTIONS.get(name) or TRANSPOSED[name]
    if step.shape is not None and len(step.shape) != spatial + 2:  # one example without a batch dimension
        return None
    bias = argument(2, "bias")
    added = _named(program, bias)
    if bias is not None and added is None:
        return None

    def each(value: Any) -> tuple[int, ...]:
        values = [value] if isinstance(value, int) else list(value)
        return tuple(values * spatial if len(values) == 1 else values)

    turned = name in TRANSPOSED
    padding = argument(4, "padding", 0)
    return Site(
        step.number, data.number, found[0].name, added, found[1], not turned, spatial,
        each(argument(3, "stride", 1)), padding if isinstance(padding, str) else each(padding),
        each(argument(7, "dilation", 1) if turned else argument(5, "dilation", 1)),
        each(argument(5, "output_padding", 0)) if turned else (), turned, argument(6, "groups", 1),
    )  # fmt: skip


def _weight(program: Program, item: Any) -> tuple[Step, tuple[int, ...], bool] | None:
    """Return the parameter behind an argument, the steps between, and whether they transpose it."""
    path: list[int] = []
    turned = False
    while isinstance(item, Ref):
        step = program.steps[item.number]
        if step.kind == "weight":
            return step, tuple(reversed(path)), turned
        name = step.name
        if step.kind != "call" or step.data or len(program.readers.get(step.number, ())) != 1:
            return None
        if name in TURNED and (len(step.shape or ()) == 2 or _turns_each(step)):
            turned = turned != _swaps(step)
        elif name not in SAME:
            return None
        path.append(step.number)
        item = step.args[0]
    return None


def _turns_each(step: Step) -> bool:
    """Say whether a step transposes each matrix of a stack of them."""
    return (
        step.name == "transpose"
        and len(step.shape or ()) == 3
        and {int(dim) % 3 for dim in step.args[1:3]} == {1, 2}
    )


def _swaps(step: Step) -> bool:
    if len(step.shape or ()) == 3:
        return True
    if step.name == "permute":
        return [int(dim) % 2 for dim in step.args[1]] == [1, 0]
    if step.name == "transpose":
        return int(step.args[1]) % 2 != int(step.args[2]) % 2
    return True


def _named(program: Program, item: Any) -> str | None:
    step = program.steps[item.number] if isinstance(item, Ref) else None
    return step.name if step is not None and step.kind == "weight" else None


def _norm_behind(program: Program, site: Site, uses: Mapping[str, int]) -> str | None:
    """Return the running mean of the batch norm that alone reads a site, if nothing else reads that mean."""
    number = site.step
    readers = program.readers.get(number, [])
    step = program.steps[readers[0]] if len(readers) == 1 and readers[0] < len(program.steps) else None
    if step is None or not _is_fixed_norm(step) or step.args[0] != Ref(number):
        return None
    if not site.spatial and len(step.shape or ()) != 2:  # of (N, T, C) a batch norm takes T for the channels
        return None
    name = _named(program, step.args[3])
    return name if name is not None and uses[name] == 1 else None


def _is_fixed_norm(step: Step) -> bool:
    """Say whether a step is a batch norm with kept statistics: an affine map of each channel."""
    return step.name == "batch_norm" and step.args[5] is False and step.args[3] is not None


def _with_meeting(program: Program, site: Site, places: Collection[int]) -> Site:
    """Return a site with the last addition that its output can be followed to."""
    chain: list[int] = []
    current, met, why = site.step, None, ""
    while True:
        readers = program.readers.get(current, [])
        if len(readers) != 1 or readers[0] >= len(program.steps):
            break
        step = program.steps[readers[0]]
        other = _other_operand(program, step, current)
        if other is not None:
            why = _blocked(program, site, step, places)
            if why:
                break
            met = Meeting(step.number, tuple(chain), current, other)
        elif not _undone(program, step, current):
            break
        chain.append(step.number)
        current = step.number
    return replace(site, meeting=met, why=why if met is None else "")


def _other_operand(program: Program, step: Step, current: int) -> int | None:
    """Return what a step adds to a result, if it adds two results of one shape."""
    if step.name not in ADDED or step.kwargs.get("alpha", 1) != 1 or len(step.args) < 2:
        return None
    one, other = step.args[:2]
    if not (isinstance(one, Ref) and isinstance(other, Ref)) or one == other:
        return None
    there = other.number if one.number == current else one.number
    steps = program.steps
    same = steps[there].data and steps[there].shape == steps[current].shape
    return there if same else None


def _blocked(program: Program, site: Site, step: Step, places: Collection[int]) -> str:
    """Say why the sum at an addition cannot be a site's target; empty if it can."""
    # What the shortcut holds is not settled while a layer between here and there is still to be refitted.
    if any(site.step < place < step.number for place in places):
        return "another layer is refitted before the sum"
    # Up to the sum all is run before the layer is refitted, and then what follows from it again. What was
    # written into meanwhile is no more what the layer read and gave, and would be changed twice.
    if any(item.writes for item in program.steps[site.step + 1 : step.number]):
        return "an operation in between writes into a tensor"
    return ""


def _undone(program: Program, step: Step, current: int) -> bool:
    """Say whether a step can be undone on its result: it moves values, or maps each channel by itself."""
    name = step.name
    if name in RESHAPED | SAME | TURNED:
        return step.args[0] == Ref(current)
    if _is_fixed_norm(step):
        return step.args[0] == Ref(current)
    if name in SCALED | ADDED and len(step.args) >= 2 and step.args[0] != step.args[1]:
        others = [item for item in step.args[:2] if item != Ref(current)]
        if len(others) != 1 or (name.startswith("div") and step.args[0] != Ref(current)):
            return False
        other = others[0]
        fixed = not isinstance(other, Ref) or not program.steps[other.number].data
        return fixed and step.shape == program.steps[current].shape and not step.kwargs
    return False


def keeps_places(program: Program, site: Site) -> bool:
    """Say whether what stands between a site and its sum maps every value by itself, in its place.

    Then it can be undone on some places alone: (M, channels) rows of them.
    """
    assert site.meeting is not None
    steps = [program.steps[number] for number in site.meeting.chain]
    # A batch norm takes the second dimension for the channels, which are the last of a product.
    first = bool(site.spatial) or len(program.steps[site.step].shape or ()) == 2
    return all((first and _is_fixed_norm(step)) or step.name in SAME for step in steps)


def undo(run: Run, site: Site, value: Tensor, look: Look, *, scales: bool) -> Tensor:
    """Return what a difference at a site's meeting is at the site's output.

    The steps of the chain are undone from the last to the first. What they add is left out, for it is in
    both of the values that differ. A channel that one of them scales by nothing comes out infinite.

    Args:
        run: that has run the chain, none of whose results was let go.
        site: with a meeting.
        value: of the operand's shape; or rows of it, see `keeps_places`.
        look: name of a weight to its value.
        scales: undo the scales too, and not only where each value lies.
    """
    assert site.meeting is not None
    steps, chain = run.program.steps, site.meeting.chain
    for number, before in reversed([*zip(chain, (site.step, *chain), strict=False)]):
        value = _undo(run, steps[number], before, value, look, scales)
    return value


def _undo(run: Run, step: Step, before: int, value: Tensor, look: Look, scales: bool) -> Tensor:
    name = step.name
    if name in RESHAPED:
        return value.reshape(run.values[before].shape)
    if name == "permute":
        order = [int(dim) % value.ndim for dim in step.args[1]]
        return value.permute([order.index(dim) for dim in range(value.ndim)])
    if name in TURNED:
        dims = step.args[1:3] if name == "transpose" else (-1, -2)
        return value.transpose(*dims)
    if not scales or name in SAME | ADDED:
        return value
    if name == "batch_norm":
        weight, variance = run.of(step.args[1], look), run.of(step.args[4], look)
        scale = torch.rsqrt(variance.to(value) + step.args[7])
        scale = scale if weight is None else scale * weight
        return value / scale.reshape(1, -1, *[1] * (value.ndim - 2))
    other = next(run.of(item, look) for item in step.args[:2] if item != Ref(before))
    return value * other if name == "div" else value / other
