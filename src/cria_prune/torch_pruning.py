"""Cria's scores as an importance for the pruners of Torch-Pruning (an optional extra, >= 1.6)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cria_prune.base.batches import Batch, again
from cria_prune.base.errors import SignalError, StructureError, needed, some
from cria_prune.base.kinds import plain
from cria_prune.base.metrics import Loss
from cria_prune.base.modules import named_tensors
from cria_prune.config import PruneConfig
from cria_prune.criteria.score import find_criterion
from cria_prune.spectrum.importance import Importance
from cria_prune.stages import prepare, rank
from cria_prune.structure.groups import UnitGroups

Place = tuple[int, int, int]
"""id of a weight, dimension, position: one line of parameters that leaves."""
Unit = tuple[str, int]
"""Name of a unit group, number of the unit."""


class UnscoredError(Exception):
    """A group has no score; `warn` where the two libraries disagree about it."""

    def __init__(self, reason: str, warn: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.warn = reason, warn


class Units:
    """Which unit of Cria owns which line of a weight.

    Args:
        model: the live model; groups: its unit groups.
    """

    def __init__(self, model: nn.Module, groups: UnitGroups) -> None:
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        sides = (cut_side(module, out) for module in model.modules() for out in (True, False))
        compared = {side for side in sides if side is not None}
        self.frozen: dict[str, str | None] = {}
        self.owners: dict[Place, Unit] = {}
        self.places: dict[Unit, set[Place]] = {}
        tensors = named_tensors(model)
        for group in groups:
            self.frozen[group.name] = group.frozen
            self.places |= {(group.name, unit): set() for unit in range(group.size)}
            for item in group.slices:
                side = (id(tensors[item.tensor]), item.dim)
                if side not in compared:
                    continue
                for unit, positions in enumerate(item.positions.tolist()):
                    for position in positions:
                        self.owners[*side, position] = (group.name, unit)
                        self.places[group.name, unit].add((*side, position))

    def owner_of(self, place: Place | None) -> Unit:
        """Return the unit that a line belongs to.

        Raises:
            UnscoredError: there is none, or it may not leave.
        """
        owner = None if place is None else self.owners.get(place)
        if owner is None:
            raise UnscoredError("Cria found no unit at these channels")
        if (reason := self.frozen[owner[0]]) is not None:
            raise UnscoredError(reason)
        return owner

    def difference(self, owner: Unit, theirs: set[Place]) -> str:
        """Say in what a cut of Torch-Pruning differs from the unit."""
        apart = sorted({self._names.get(tensor, "?") for tensor, _, _ in theirs ^ self.places[owner]})
        names = some(apart)
        return (
            f"Torch-Pruning cuts something else than unit {owner[1]} of {owner[0]!r}: they differ in {names}"
        )


def cut_side(module: Any, out: bool) -> tuple[int, int] | None:
    """Return (id of the weight, dimension) that a cut of a layer's outputs or inputs goes along.

    None for what follows other layers (norms, activations, depthwise convolutions), for layers of another
    kind, and for the side of a grouped convolution on which one position stands for several channels.
    """
    if isinstance(module, _ConvNd):
        if module.groups > 1 and (module.groups == module.out_channels or out == module.transposed):
            return None
        return id(module.weight), int(out == module.transposed)
    if isinstance(module, nn.Linear):
        return id(module.weight), int(not out)
    return (id(module.weight), 1) if isinstance(module, nn.Embedding) else None


def layer_cut(item: Any) -> tuple[Any, bool]:
    """Return the layer of an item of a group, and whether its outputs are cut."""
    return item.dep.target.module, item.dep.handler.__name__ == "prune_out_channels"


def places_of(item: Any) -> list[Place | None]:
    """Return the line that each index of an item of a group cuts; None where `cut_side` has none."""
    side = cut_side(*layer_cut(item))
    return [None if side is None else (*side, int(index)) for index in item.idxs]


def cut_places(group: Any) -> dict[int, set[Place]]:
    """Return root channel -> the lines that leave with it.

    Raises:
        UnscoredError: an index is of no root channel, so that what leaves with which is not known.
    """
    found: dict[int, set[Place]] = {}
    for number in range(len(group)):
        for place, channel in zip(places_of(group[number]), group[number].root_idxs, strict=True):
            if place is not None and channel is None:
                raise UnscoredError("Torch-Pruning does not say which channels leave together", warn=True)
            if place is not None:
                found.setdefault(channel, set()).add(place)
    return found


class SpectralImportance:
    """Importance of the channels of a Torch-Pruning group: Cria's score of the units that they belong to.

    An instance is called by the pruner with a group and returns a float64 tensor on the CPU, one value per
    channel of the group's root: the unit's score divided by the mean score of its unit group, as Cria's own
    global ranking does it, so that `global_pruning` compares groups on one scale. The order within a group is
    that of the score. A unit of several channels (an attention head, the channels that a grouped convolution
    needs alike) gives each of them its score; for heads set `prune_num_heads=True, prune_head_dims=False`.

    Scores belong to the network as it is. They are computed at the first call, and anew when a shape or a
    weight has changed: with `iterative_steps`, and a training in between, every step has scores of its own.

    **What is left alone.** For a group that Cria does not prune the result is None, which the pruners take as
    "leave this group": the outputs of the network, residual widths (unless `config.plan.residual`), layers
    that Cria froze or does not know, and groups where Torch-Pruning would cut something else than Cria found
    to belong to the units (with a warning: such a cut may compute the wrong function). The reasons are in
    `left_alone`. With `strict` each of these is a StructureError; name such layers in `ignored_layers` then.

    Args:
        model: the model that is given to the pruner. It is read, and run in evaluation mode; it is left as
            it was.
        batches: calibration batches: tensors, (inputs, target) pairs or mappings.
        criterion: name of a criterion, see `CRITERIA`; the configuration's by default.
        config: `record`, `score`, and of `plan` what may be cut: `residual` and `units`.
        loss: (model, batch) to a scalar, for `taylor`; cross-entropy by default.
        strict: raise instead of leaving a group alone.

    Attributes:
        scores: unit group -> importance, scores (units,) float64, of the last scoring; empty before it.
        left_alone: layer -> why its group has no score, since the last scoring.

    Raises:
        ConfigError: torch-pruning is not installed.
        CriterionError: no such criterion.
        DataError: the batches are not batches. When called: they do not suit the model.
        CaptureError, SignalError: when called, see `discover` and `score`.
        StructureError: when called, the group is not of this model; with `strict`, it has no score.

    Example::

        import torch, torch_pruning as tp
        from cria_prune.torch_pruning import SpectralImportance

        net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        batches = [torch.randn(64, 16) for _ in range(4)]
        importance = SpectralImportance(net, batches, "distortion-weighted")
        pruner = tp.pruner.BasePruner(net, batches[0][:2], importance=importance, pruning_ratio=0.5)
        pruner.step()
        assert net[0].out_features == 32
        print(importance.left_alone)  # {'2': "is part of the model's output"}
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        criterion: str | None = None,
        *,
        config: PruneConfig | None = None,
        loss: Loss | None = None,
        strict: bool = False,
    ) -> None:
        config = config or PruneConfig()
        if criterion is not None:
            config = config.model_copy(
                update={"score": config.score.model_copy(update={"criterion": criterion})}
            )
        find_criterion(config.score)
        with needed("torch-pruning", "An importance for Torch-Pruning"):
            import torch_pruning
        # Users ask isinstance; a base class would have to be imported with this file.
        torch_pruning.importance.Importance.register(type(self))
        self.model, self.batches, self.config = plain(model), again(batches), config
        self.loss, self.strict = loss, strict
        self.scores: dict[str, Importance] = {}
        self.left_alone: dict[str, str] = {}
        self._state: tuple[Any, ...] | None = None
        self._units: Units

    def __call__(self, group: Any) -> Tensor | None:
        """Return the importance of the group's root channels, (channels,) float64 on the CPU, or None.

        Args:
            group: of Torch-Pruning: items of a dependency (`dep.target.module`, `dep.handler`), `idxs` and
                `root_idxs`; the first one is the root.
        """
        self._refresh()
        layer = self._name(group[0].dep.target.module)
        try:
            return self._importance(group)
        except UnscoredError as error:
            self.left_alone[layer] = error.reason
            if self.strict:
                raise StructureError(
                    f"The importance of the Torch-Pruning group of {layer!r}", error.reason,
                    "Name its layers in ignored_layers, or leave out strict",
                ) from None  # fmt: skip
            if error.warn:
                warnings.warn(f"The group of {layer!r} is left alone: {error.reason}", stacklevel=2)
            return None

    def _importance(self, group: Any) -> Tensor:
        """Match the group's channels with units, check that both cut the same, and look the scores up."""
        channels, units = list(group[0].idxs), self._units
        side = cut_side(*layer_cut(group[0]))
        owners = [units.owner_of(place) for place in places_of(group[0])]
        cuts, members = cut_places(group), dict[Unit, list[int]]()
        for channel, owner in zip(channels, owners, strict=True):
            members.setdefault(owner, []).append(channel)
        for owner, own in members.items():
            # What leaves with a channel is compared before it is scored. Where
            # Torch-Pruning would cut other lines (on an option A shortcut it misses the
            # shift of the padding) the score would be right for a cut that is wrong.
            theirs = set().union(*(cuts.get(channel, ()) for channel in own))
            ours = units.places[owner]
            # Who asks for some channels of a head alone is told its score; they are a part of the unit.
            whole = len(own) == sum(place[:2] == side for place in ours)
            if not (theirs == ours if whole else theirs <= ours):
                raise UnscoredError(units.difference(owner, theirs), warn=True)
        relative = {name: _relative(name, self.scores[name].scores) for name in {name for name, _ in owners}}
        return torch.stack([relative[name][number] for name, number in owners])

    def _refresh(self) -> None:
        """Score the network anew if it is not the one that was scored."""
        if self._state == state_of(self.model):
            return
        plain = self.config.model_copy(update={"repair": "none"})  # the pruner repairs nothing
        prepared = prepare(self.model, self.batches, plain).without_reference()
        self.scores = dict(rank(prepared, loss=self.loss).importances)
        self._units, self.left_alone = Units(self.model, prepared.groups), {}
        self._state = state_of(self.model)

    def _name(self, layer: nn.Module) -> str:
        for name, module in self.model.named_modules():
            if module is layer:
                return name
        raise StructureError(
            f"The importance of a Torch-Pruning group with root {layer}",
            "the layer is not in the model that the importance was made for",
            "Give the pruner and SpectralImportance the same model",
        )


def state_of(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Return what changes with the tensors and shapes of a model, and when a weight is written to."""
    return tuple(
        (name, id(tensor), tuple(tensor.shape), 0 if tensor.is_inference() else tensor._version)
        for name, tensor in named_tensors(model).items()
    )


def _relative(name: str, scores: Tensor) -> Tensor:
    """Return scores relative to their group's mean, so that groups compare; all alike where all are 0.

    Raises:
        SignalError: one is negative: its share of a mean says nothing, as in the global ranking.
    """
    if bool((scores < 0).any()):
        raise SignalError(
            f"The importance of group {name!r} for Torch-Pruning",
            f"a score is negative, {float(scores.min()):g}",
            "Use a criterion whose scores are 0 or more, or prune with Cria's uniform ranking",
        )
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
