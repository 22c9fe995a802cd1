"""What a plan says of single groups, by patterns of their names: leave alone, cut by a share, keep a number.

A pattern is a glob over the names of unit groups and of the modules that make their units, as `cria inspect`
prints them: `*` stands for anything, `{a, b}` for either, `0-31` for each of the numbers. A module's name
stands for all groups that it, or a module in it, makes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import translate

from cria_prune.base.errors import ConfigError, TargetError, some
from cria_prune.config import PlanConfig
from cria_prune.planning.budget import Budget, count_macs, count_parameters
from cria_prune.planning.stairs import Allowed, permitted
from cria_prune.structure.account import LAST
from cria_prune.structure.groups import UnitGroup, UnitGroups, counted_together, freeze, least_kept

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)-(\d+)")
MODULE = "Name it as cria inspect does; * stands for anything"


def spelled_out(pattern: str) -> Iterator[str]:
    """Yield the globs that a pattern stands for.

    >>> list(spelled_out("layers.0-1.{q_proj, k_proj}"))
    ['layers.0.q_proj', 'layers.1.q_proj', 'layers.0.k_proj', 'layers.1.k_proj']
    """
    found = BRACES.search(pattern)
    if found:
        for word in found[1].split(","):
            yield from spelled_out(pattern[: found.start()] + word.strip() + pattern[found.end() :])
        return
    parts = pattern.split(".")
    for place, part in enumerate(parts):
        numbers = NUMBERS.fullmatch(part)
        if numbers:
            for number in range(int(numbers[1]), int(numbers[2]) + 1):
                yield from spelled_out(".".join([*parts[:place], str(number), *parts[place + 1 :]]))
            return
    yield pattern


def names_of(group: UnitGroup) -> list[str]:
    """Return what a pattern may call a group: its name, the modules that make its units, those around all.

    A residual width, which modules of many blocks make, has its own name alone.
    """
    base = group.name.partition("#")[0]
    if group.kind == "residual":
        return list(dict.fromkeys([group.name, base]))
    made = [base, *(item.tensor.rpartition(".")[0] for item in group.producers)]
    around = [".".join(base.split(".")[:length]) for length in range(1, base.count(".") + 1)]
    common = [path for path in around if all(name.startswith(f"{path}.") for name in made)]
    return list(dict.fromkeys([group.name, *made, *common]))


def matched(groups: UnitGroups, pattern: str) -> list[UnitGroup]:
    """Return the groups that a pattern names.

    Raises:
        ConfigError: it names none; the nearest names are shown.
    """
    globs = [re.compile(translate(item)) for item in spelled_out(pattern)]
    found = [group for group in groups if any(item.match(name) for item in globs for name in names_of(group))]
    if found:
        return found
    known = list(dict.fromkeys(name for group in groups for name in names_of(group)))
    plain = pattern.replace("*", "").strip(".")
    near = [name for name in known if plain and plain in name] or get_close_matches(plain, known, 3, 0.3)
    raise ConfigError(
        f"The groups that {pattern!r} names", "there is none"
        + (f"; the nearest names are {some(near)}" if near else f"; there are {some(known, 4)}"), MODULE,
    )  # fmt: skip


def block(name: str) -> str:
    """Return the numbered block that a group lies in; the group itself where there is none.

    >>> block("model.layers.0.mlp.gate_proj"), block("stages.1.blocks.2.conv1"), block("fc")
    ('model.layers.0', 'stages.1.blocks.2', 'fc')
    """
    parts = name.partition("#")[0].split(".")
    least = parts.index("experts") if "experts" in parts else len(parts)  # an expert is no block
    last = max((place for place, part in enumerate(parts[:least]) if part.isdecimal()), default=-1)
    return name if last < 0 else ".".join(parts[: last + 1])


def left_alone(groups: UnitGroups, config: PlanConfig) -> UnitGroups:
    """Return the groups with those frozen that a plan leaves alone: by name, and the first and last layers.

    Raises:
        ConfigError: a pattern names no group.
    """
    reasons: dict[str, str] = {}
    if config.protect != "none":
        inner = [group.name for group in groups.prunable if group.kind != "residual"]
        ends = {"first": inner[:1], "last": inner[-1:], "ends": [*inner[:1], *inner[-1:]]}[config.protect]
        around = {block(name) for name in ends}
        where = f"the plan protects its {config.protect} (protect)"
        reasons |= {name: where for name in inner if block(name) in around}
    for pattern in config.ignore:
        reason = f"the plan leaves it alone (ignore {pattern!r})"
        reasons |= {group.name: reason for group in matched(groups, pattern)}
    return freeze(groups, lambda group: reasons.get(group.name))


def check_alike(before: UnitGroups, after: UnitGroups) -> None:
    """Check that of groups which one configuration counts together all are left alone, or none.

    Args:
        before, after: the groups without and with those frozen that the plan leaves alone.

    Raises:
        ConfigError: some of them are, so that none could be cut.
    """
    cut = {group.name for group in after.prunable}
    for names in counted_together(before.prunable):
        alone, others = [name for name in names if name not in cut], [name for name in names if name in cut]
        if alone and others:
            raise ConfigError(
                f"Group {alone[0]!r}: {after[alone[0]].frozen}",
                f"one plain configuration describes it and {others[0]!r}, so that neither could be cut",
                "Let layers differ (vanilla=False; --policy per-layer), or name all of them",
            )  # fmt: skip


def fixed_sizes(groups: UnitGroups, config: PlanConfig, allowed: Allowed | None = None) -> dict[str, int]:
    """Return group name -> how many units stay of it, where the plan says that.

    A share is rounded to the nearest number that may stay, and never to fewer than the floor keeps.

    Args:
        groups: with what is left alone frozen.
        config: `share` and `keep`, and what numbers may stay: `floor`, `multiple`, `uniform`.
        allowed: group name -> numbers of units that may stay.

    Raises:
        ConfigError: a pattern names no group, or none that can be cut, or two say different numbers of one.
        TargetError: so many units cannot stay.
    """
    prunable = {group.name: group for group in groups.prunable}
    said: dict[str, tuple[int, str]] = {}
    asked: list[tuple[str, str, float]] = [("share", *item) for item in config.share.items()]
    asked += [("keep", *item) for item in config.keep.items()]
    for option, pattern, value in asked:
        words = f"{option} {pattern}={value:g}"
        found = matched(groups, pattern)
        cut = [group for group in found if group.name in prunable]
        if not cut:
            why = some([f"{group.name}: {group.frozen or LAST}" for group in found], 2, "; ")
            raise ConfigError(f"The sizes of {words}", f"none of its groups can be cut ({why})", MODULE)
        for group in cut:
            numbers = permitted(group, config, (allowed or {}).get(group.name))
            count = _kept(group, value, words, numbers, config) if option == "keep" else _left(
                group, value, words, numbers)  # fmt: skip
            other = said.setdefault(group.name, (count, words))
            if other[0] != count:
                raise ConfigError(
                    f"The size of group {group.name!r}", f"{other[1]} leaves {other[0]} of its units, and "
                    f"{words} leaves {count}", "Write patterns that do not name the same group",
                )  # fmt: skip
    sizes = {name: count for name, (count, _) in said.items()}
    if config.uniform:
        _check_classes(prunable, sizes, {name: words for name, (_, words) in said.items()})
    return sizes


def _left(group: UnitGroup, share: float, words: str, numbers: Sequence[int]) -> int:
    """Return the permitted number nearest to what a share leaves; of two as near the larger."""
    wanted = group.original_size * (1 - share)
    if share > 0 and len(numbers) == 1:
        raise TargetError(
            f"The sizes of {words}", f"of group {group.name!r} all {numbers[0]} units always stay",
            "Lower the floor or the multiple, or leave the group out of the pattern",
        )  # fmt: skip
    return min(numbers, key=lambda count: (abs(count - wanted), -count))


def _kept(group: UnitGroup, value: float, words: str, numbers: Sequence[int], config: PlanConfig) -> int:
    """Return the number that is to stay, where it may.

    Raises:
        TargetError: it may not; the nearest that may are shown.
    """
    count = int(value)
    if count in numbers:
        return count
    near = sorted(sorted(numbers, key=lambda item: abs(item - count))[:2])
    least = least_kept(group, config.floor)
    reasons = [
        f"it has {group.size} units" if count > group.size else "",
        f"a floor of {config.floor:g} keeps {least} at least" if count < least else "",
        "numbers are in steps" if least <= count <= group.size else "",
    ]
    raise TargetError(
        f"The sizes of {words}",
        f"group {group.name!r} cannot keep {count} units, {', '.join(filter(None, reasons))}",
        f"The nearest that it can keep: {', '.join(map(str, near))}" + (
            "; or lower the floor" if count < least else ""),
    )  # fmt: skip


def _check_classes(
    prunable: Mapping[str, UnitGroup], sizes: Mapping[str, int], words: Mapping[str, str]
) -> None:
    """Check that groups which keep equal numbers are given equal ones.

    Raises:
        ConfigError: some of them are given none, or another one.
    """
    for names in counted_together(prunable.values()):
        given = {sizes.get(name) for name in names}
        if len(given) > 1:
            one = next(name for name in names if name in sizes)
            other = next(name for name in names if sizes.get(name) != sizes[one])
            raise ConfigError(
                f"The size of group {one!r}, {words[one]}",
                f"alike groups keep the same number of units, and {other!r} is not given it",
                "Name all of them in the pattern (with * or a range), or let layers differ (--policy "
                "per-layer, or --no-uniform)",
            )  # fmt: skip


def on_the_way(
    groups: UnitGroups, sizes: Mapping[str, int], config: PlanConfig, progress: float
) -> dict[str, list[int]]:
    """Return group name -> the number of units that stay of it after a part of the rounds.

    Args:
        groups: now.
        sizes: what stays of them after the last round.
        config: what numbers may stay.
        progress: share of the rounds that are done then, 1 after the last.
    """
    found: dict[str, list[int]] = {}
    for name, last in sizes.items():
        group = groups[name]
        now = last if progress >= 1 else group.original_size - (group.original_size - last) * progress
        numbers = [count for count in permitted(group, config) if count >= max(now, last) - 1e-9]
        found[name] = [last if progress >= 1 else min(numbers, default=group.size)]
    return found


def settled(config: PlanConfig, groups: UnitGroups, sizes: Mapping[str, int]) -> PlanConfig:
    """Return the plan with its target as a share of what the network costs now.

    Args:
        config: with a target in parameters or MACs, or none beside the sizes of single groups.
        groups: the dense structure.
        sizes: what the plan says of single groups.

    Raises:
        TargetError: the network is as small already, or nothing would leave.
    """
    for of, wanted, count in (
        ("parameters", config.to_parameters, count_parameters), ("macs", config.to_macs, count_macs),
    ):  # fmt: skip
        if wanted is None:
            continue
        total = count(groups)
        if wanted >= total:
            raise TargetError(f"A network of {wanted:,.0f} {of}", f"it has {total:,.0f}", "Ask for fewer")
        # Down to a whole number: shares are quotients, and one more unit must not stay for their rounding.
        share = 1 - math.floor(wanted) / total
        return config.model_copy(
            update={"reduction": share, "of": of, "to_parameters": None, "to_macs": None}
        )
    if config.reduction or not (config.share or config.keep):
        return config
    if config.of == "latency":
        raise TargetError(
            "A cut of the latency by the sizes of single groups", "nothing says how fast it is to be",
            "Give a speed-up, or count parameters",
        )  # fmt: skip
    share = Budget(groups, config.of).reduction(groups, sizes)
    if share <= 0:
        raise TargetError("A cut by the sizes of single groups", "they are those of now", "Ask for fewer")
    return config.model_copy(update={"reduction": share})


def without_control(config: PlanConfig) -> PlanConfig:
    """Return a plan without what it says of single groups, once that is in the groups and in `allowed`."""
    if not (config.ignore or config.share or config.keep or config.protect != "none"):
        return config
    return config.model_copy(update={"ignore": (), "share": {}, "keep": {}, "protect": "none"})


def kept_whole(groups: UnitGroups, sizes: Mapping[str, int]) -> UnitGroups:
    """Return the groups with those frozen whose size is what it is now."""
    reason = "the plan keeps all its units (keep, share)"
    whole = {group.name for group in groups if sizes.get(group.name) == group.size}
    return freeze(groups, lambda group: reason if group.name in whole else None)
