"""Whether a configuration of transformers says the sizes that a pruned model has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from cria_prune.errors import CertificateError
from cria_prune.plan.plan import Plan

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]]

WIDTHS = ("n_inner", "intermediate_size")
"""Feed-forward widths; a configuration may leave its own to a rule: for GPT-2, four times the hidden size."""


def check_sizes(model: nn.Module, plan: Plan, asked: str) -> None:
    """Check that the model's class builds the same shapes from its configuration alone.

    A size that the configuration left to a rule is written into it first, where that helps: the head size of
    Qwen2 and ViT (hidden size by heads), the feed-forward width of GPT-2 (four times the hidden size).

    Raises:
        CertificateError: the configuration refuses its numbers, or the shapes differ.
    """
    apart = _apart(model, asked)
    for rule in (_head_size, _width):
        said = rule(model, apart) if apart else None
        if said:
            before = dict(vars(model.config))
            setattr(model.config, *said)
            after = _apart(model, asked)
            if len(after) < len(apart):
                apart = after
            elif said[0] in before:
                setattr(model.config, said[0], before[said[0]])
            else:  # None would not be the same: Phi-3 computes a head size that is not there
                delattr(model.config, said[0])
    if not apart:
        return
    kind, uneven = type(model.config).__name__, _uneven(plan, apart)
    name, (found, held) = next(iter(apart.items()))
    if uneven:
        more = f"; and {len(uneven) - 4} more" if len(uneven) > 4 else ""
        raise CertificateError(
            asked,
            f"{'; '.join(uneven[:4])}{more}",
            f"One {kind} describes all layers: prune with uniform=True, so that each keeps the same number",
        )
    raise CertificateError(
        asked,
        f"{name!r} is {found}, a model of its {kind} has {held} there",
        f"{kind} has no field for this: leave such groups whole, or use cria_prune.save",
    )


def _apart(model: nn.Module, asked: str) -> Shapes:
    """Return tensor name -> (shape in the model, shape by its configuration) where they differ."""
    config: Any = model.config
    try:
        with torch.device("meta"):
            plain = type(model)(type(config).from_dict(config.to_dict()))
    except Exception as error:  # the validators of configurations raise many kinds
        raise CertificateError(
            asked,
            f"{type(config).__name__} refuses what is left: {' '.join(str(error).split())[:300].rstrip('.')}",
            "Keep a number of units that it takes",
        ) from error
    held = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return {name: (shape, held.get(name)) for name, shape in found.items() if shape != held.get(name)}


def _head_size(model: nn.Module, apart: Shapes) -> tuple[str, int] | None:
    """The head size in which all attention modules agree, if the configuration does not say it."""
    sizes = {vars(module).get("head_dim") for module in model.modules()} - {None}
    size = sizes.pop() if len(sizes) == 1 else None
    return (
        ("head_dim", size) if isinstance(size, int) and vars(model.config).get("head_dim") is None else None
    )


def _width(model: nn.Module, apart: Shapes) -> tuple[str, int] | None:
    """The feed-forward width that explains all lengths that differ, if the configuration has a field for it.

    A field that says nothing takes the one length in which all shapes differ. A field that still says the
    width of before (Phi-3, whose gate and up projections are one tensor) shrinks as these lengths did.
    """
    lengths = {
        (size, other)
        for found, held in apart.values()
        for size, other in zip(found, held or (), strict=False)
        if size != other
    }
    for name in WIDTHS:
        said = vars(model.config).get(name, 0)
        if said is None:
            wanted = {float(size) for size, _ in lengths}
        elif isinstance(said, int) and said and not any(other % said for _, other in lengths):
            wanted = {size * said / other for size, other in lengths}
        else:
            continue
        if len(wanted) == 1 and (width := wanted.pop()) == int(width):
            return name, int(width)
    return None


def _uneven(plan: Plan, apart: Shapes) -> list[str]:
    """Say which groups of numbered layers keep different numbers, among those whose shapes differ."""
    alike: dict[tuple[str, int], dict[int, str]] = {}
    for name, stays in plan.kept.items():
        alike.setdefault((re.sub(r"\d+", "*", name), plan.sizes[name]), {}).setdefault(len(stays), name)
    patterns = {re.sub(r"\d+", "*", name.rpartition(".")[0]) for name in apart}
    return [
        ", ".join(f"{name!r} keeps {count} units" for count, name in sorted(counts.items())[:3])
        for (pattern, _), counts in alike.items()
        if len(counts) > 1 and pattern in patterns
    ]
