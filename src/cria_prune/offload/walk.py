"""The walk over folders: both networks run from disk, a layer at a time, and the smaller one is mended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cria_prune.base.batches import SMALLER, limited, named_shortage
from cria_prune.base.dispatched import Weights, first_names
from cria_prune.base.events import passed
from cria_prune.base.files import refused
from cria_prune.base.modules import give_back, random_kept
from cria_prune.base.progress import Progress
from cria_prune.offload.write import Repaired, load_dispatched
from cria_prune.planning.plan import Plan
from cria_prune.repair.walk import Layers, Parts, Walked, Walker
from cria_prune.stages import Prepared

ASKED = "Writing the refitted layers"


class Held:
    """The weights of a model on disk, held from when they are first read until all batches have passed.

    Args:
        own: of the model.
        device: where they go.
        weights: the same, some of them refitted.
    """

    def __init__(
        self, own: Weights, device: torch.device, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self._own, self._device = own, device
        self._weights = own if weights is None else weights
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Return a weight."""
        if name not in self._held:
            # Copied: a file's tensors lie anywhere, and some processors then multiply to other bits.
            self._held[name] = self._weights[name].detach().to(self._device, copy=True)
            self._own.forget()
        return self._held[name]

    def drop(self, name: str) -> None:
        """Let go of one that has changed."""
        self._held.pop(name, None)

    def forget(self) -> None:
        """Let go of all."""
        self._held.clear()
        give_back()


@dataclass(frozen=True)
class Folders:
    """Where a walk finds its two networks, and what it needs.

    Attributes:
        dense: folder of the first model.
        smaller: of the one that was cut; it is rewritten.
        scratch: for refitted layers, what batches hold, and the files as they were cut; of one file system
            with `smaller`.
        memory: bytes that batches may hold between their turns.
        device: where the layers run.
    """

    dense: Path
    smaller: Path
    scratch: Path
    memory: int
    device: torch.device

    def walk(
        self, prepared: Prepared, plan: Plan, structure: nn.Module, progress: Progress, kept: Layers | None
    ) -> Walked:
        """Refit the layers of the smaller model, and rewrite the files that hold them; see `repair.walk`.

        Args:
            prepared: with the first model's structure, and the batches.
            plan: what was removed of it.
            structure: of the smaller model, on the meta device.
            progress: where to show how far it is.
            kept: keeps the layers as they are refitted.

        Raises:
            ArtifactError: a folder cannot be read or written.
            CriaError: as in `repair.walk.walk`.
        """
        passed("repair", plan=plan)
        record, scratch = prepared.config.record, self.scratch
        own = [
            Weights(load_dispatched(path, scratch / name, self.device))
            for path, name in ((self.dense, "first"), (self.smaller, "last"))
        ]
        repaired = Repaired(own[1], scratch)
        looks = Held(own[0], self.device), Held(own[1], self.device, repaired)

        def put(name: str, value: Tensor) -> None:
            repaired.put(name, value)
            looks[1].drop(name)

        def forget() -> None:
            for look in looks:
                look.forget()

        with torch.no_grad(), random_kept(), named_shortage("Refitting layers", SMALLER):
            walker = Walker(
                (prepared.structure, looks[0]), (structure, looks[1], put), plan,
                [*limited(prepared.batches, record.examples)], self.device, record.seed, Parts(), progress,
                self.memory, scratch, forget, kept,
            )  # fmt: skip
            repairs, left = walker.run()
        forget()
        self._rewrite(structure, repaired)
        return Walked(structure, tuple(repairs), left)

    @property
    def _aside(self) -> Path:
        return self.scratch / "as-cut"

    def _rewrite(self, structure: nn.Module, repaired: Repaired) -> None:
        """Put the refitted tensors into the files of the smaller model; those as cut stay aside."""
        first = first_names(structure)
        try:
            self._aside.mkdir(exist_ok=True)
            for path in sorted(self.smaller.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if first.get(name) in repaired.paths]  # noqa: SIM118
                if not names:
                    continue
                aside = self._aside / path.name
                os.replace(path, aside)
                shard = load_file(aside) | {name: repaired[first[name]] for name in names}
                passed("shard", path=path)
                save_file(shard, path, metadata={"format": "pt"})
                del shard  # not two at a time
                give_back()
        except (OSError, SafetensorError) as error:
            raise refused(ASKED, error) from error

    def back(self) -> None:
        """Put the files back as they were cut."""
        try:
            for path in sorted(self._aside.glob("*.safetensors")):
                os.replace(path, self.smaller / path.name)
        except OSError as error:
            raise refused(ASKED, error) from error
