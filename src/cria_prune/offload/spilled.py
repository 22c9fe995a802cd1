"""Moments that wait on disk until the consumers that they are of are repaired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cria_prune.errors import ArtifactError
from cria_prune.graph import Moments

PARTS = ("mean", "variance", "covariance", "sketch")


class Spilled:
    """Moments that wait on disk until a consumer is repaired.

    Args:
        folder: where they are.
        device: where they go when they are read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._samples: dict[tuple[str, str], tuple[Path, int]] = {}

    def add(self, group: str, consumed: Mapping[str, Moments]) -> None:
        """Write the moments of what a group's consumers read: consumer's weight -> moments."""
        for tensor, moments in consumed.items():
            path = self._folder / f"moments-{len(self._samples)}.safetensors"
            parts = {name: value for name in PARTS if (value := getattr(moments, name)) is not None}
            save_file({name: value.cpu().contiguous() for name, value in parts.items()}, path)
            self._samples[group, tensor] = path, moments.samples

    def get(self, group: str, tensor: str) -> Moments | None:
        """Return the moments of what one consumer reads of a group; None where there are none."""
        path, samples = self._samples.get((group, tensor), (None, 0))
        if path is None:
            return None
        try:
            held = load_file(path)
        except (OSError, SafetensorError) as error:
            todo = "Remove the state to start anew"
            raise ArtifactError(f"Reading the moments of {group!r}", str(error), todo) from error
        return Moments(samples, **{name: value.to(self._device) for name, value in held.items()})

    def said(self) -> list[tuple[str, str, str, int]]:
        """Return which files there are: group, consumer's weight, name of the file, samples."""
        return [(*key, path.name, samples) for key, (path, samples) in self._samples.items()]

    def take(self, said: Iterable[tuple[str, str, str, int]]) -> None:
        """Take the files for this one's that another said.

        Raises:
            LookupError: one of them is not in the folder.
        """
        for group, tensor, name, samples in said:
            path = self._folder / Path(name).name
            if not path.is_file():
                raise LookupError(f"{path.name} is not there")
            self._samples[group, tensor] = path, samples
