"""The repair of the consumers of a dispatched model, one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cria_prune.modules import give_back, named_tensors
from cria_prune.resume.turns import Spilled
from cria_prune.structure import UnitGroups
from cria_prune.surgery import Repair, compensate


class Repaired(Mapping[str, Tensor]):
    """The weights of a model by name, some of them repaired; those are read from disk.

    Args:
        weights: as they were.
        folder: for the repaired ones.
    """

    def __init__(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        self._weights, self._folder = weights, folder
        self.paths: dict[str, Path] = {}
        self._files = 0

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self.paths[name])["value"] if name in self.paths else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def put(self, name: str, value: Tensor) -> None:
        """Keep a repaired weight, under a new file: the one before may still be read."""
        self._files += 1
        path = self._folder / f"repaired-{self._files}.safetensors"
        save_file({"value": value.detach().cpu().contiguous()}, path)
        self.paths[name] = path


def repair(
    structure: nn.Module,
    groups: UnitGroups,
    kept: Mapping[str, Sequence[int]],
    spilled: Spilled,
    weights: Mapping[str, Tensor],
    folder: Path,
) -> tuple[Repaired, tuple[Repair, ...]]:
    """Repair every consumer of units that leave, in the order and by the arithmetic of `compensate`.

    Args:
        structure: the model on the meta device; groups: its unit groups.
        kept: group name -> units that stay.
        spilled: moments of what the consumers read.
        weights: of the dense model, by name.
        folder: for the repaired weights.

    Returns:
        The weights, in dense shapes (the removed units are still there), and what became of each consumer.
    """
    found, repairs = Repaired(weights, folder), list[Repair]()
    for group in groups.prunable:
        if len(kept.get(group.name, range(group.size))) == group.size:
            continue
        for item in group.consumers:
            moments = spilled.get(group.name, item.tensor)
            if moments is None:
                continue
            with _filled(structure, item.tensor, found) as names:
                alone, one = replace(groups, groups=(group,)), {group.name: {item.tensor: moments}}
                after, done = compensate(structure, alone, kept, one)
            tensors = named_tensors(after)
            for name in names if done else ():
                found.put(name, tensors[name])
            repairs += done
            del moments, one, after, tensors  # not two consumers at a time
            give_back()
    return found, tuple(repairs)


@contextmanager
def _filled(structure: nn.Module, weight: str, values: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Inside, the layer of a weight has its values, all else is on the meta device; gives their names."""
    path, _, _ = weight.rpartition(".")
    layer = structure.get_submodule(path)
    before = dict(layer._parameters)
    names = [name for name in (weight, f"{path}.bias".strip(".")) if name.rpartition(".")[2] in before]
    names = [name for name in names if before[name.rpartition(".")[2]] is not None]
    try:
        for name in names:
            layer._parameters[name.rpartition(".")[2]] = nn.Parameter(values[name], requires_grad=False)
        yield names
    finally:
        layer._parameters.update(before)
