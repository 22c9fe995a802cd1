"""The state of a fine-tune on disk: one file, replaced as a whole and checked when it is read."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cria_prune.errors import ArtifactError
from cria_prune.modules import digest
from cria_prune.recover.guard import State
from cria_prune.recover.result import Epoch

FORMAT = "cria-recovery-1"
NAME = "recovery.safetensors"
BATCHES = "batches per epoch"
ANOTHER = "Pass another folder, or remove this one to start anew"


class Facts(BaseModel):
    """What a state says beside its tensors.

    Attributes:
        identity: what makes the fine-tune this one (`identity`), and its number of batches per epoch.
        history: the epochs that are over, the first for the model as it came.
        best_epoch: epoch of the weights `best`.
        step: optimizer steps taken.
        finished: nothing is left to do, and only `best` is kept of the tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, Any]
    history: list[Epoch]
    best_epoch: int
    step: int
    finished: bool


class Keeper:
    """Keeps the state of one fine-tune in a folder, as one safetensors file with JSON in its header.

    Args:
        folder: made when the first state is written.
        identity: what makes the fine-tune this one.
        every: seconds between two states within an epoch.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], every: float) -> None:
        self.folder, self.identity, self.every = Path(folder), identity, every
        self._last = time.monotonic()

    def due(self) -> bool:
        """Say whether the last state is older than it may become."""
        return time.monotonic() - self._last >= self.every

    def write(self, facts: Facts, parts: Mapping[str, State]) -> None:
        """Replace the state, whole or not at all.

        Raises:
            ArtifactError: the system refuses, or safetensors has no such dtype.
        """
        asked = f"Keeping the state of the recovery in {self.folder}"
        tensors = {
            f"{part}/{name}": value.detach().cpu().contiguous()
            for part, state in parts.items()
            for name, value in state.items()
        }
        text = json.dumps(facts.model_dump(mode="json"))
        said = {"format": FORMAT, "state": text, "sha256": digest(text, tensors)}
        # In a folder of its own, for what a killed process leaves there is then known to be nobody else's.
        unfinished = self.folder / ".unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(tensors, unfinished / NAME, metadata=said)
            _flush(unfinished / NAME)
            os.replace(unfinished / NAME, self.folder / NAME)
            with suppress(OSError):  # some file systems cannot flush a folder
                _flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                asked,
                f"the system refused, {error}",
                "Check that you may write there and that the disk has room; the same call then goes on from "
                "the state before",
            ) from error
        except KeyError as error:
            raise ArtifactError(asked, f"safetensors knows no {error}", "Recover without a state") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._last = time.monotonic()

    def read(self) -> tuple[Facts, dict[str, State]] | None:
        """Return the state and its tensors by part, on the CPU; None where there is none.

        Raises:
            ArtifactError: it cannot be read, or is not as it was written.
        """
        try:
            with safe_open(self.folder / NAME, "pt") as file:
                said, names = file.metadata() or {}, file.keys()
                # copies, so that nothing hangs on the file once it is replaced
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            raise self.damaged(str(error)) from error
        if said.get("format") != FORMAT:
            raise self.damaged(f"its format is {said.get('format')!r}, not {FORMAT!r}")
        text = said.get("state", "")
        if said.get("sha256") != digest(text, tensors):
            raise self.damaged("its contents do not have the hash that was written with them")
        try:
            facts = Facts.model_validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            raise self.damaged(str(error)) from error
        parts: dict[str, State] = {}
        for name, value in tensors.items():
            part, _, local = name.partition("/")
            parts.setdefault(part, {})[local] = value
        return facts, parts

    def check(self, facts: Facts, batches: int) -> None:
        """Compare a state with the fine-tune that was asked for.

        Raises:
            ArtifactError: it is another one's; says what differs.
        """
        found = list(_differences(facts.identity, {**self.identity, BATCHES: batches}))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ArtifactError(
                f"Going on with the recovery in {self.folder}",
                f"its state is of another one: {'; '.join(found[:3])}{more}",
                ANOTHER,
            )

    def damaged(self, found: str) -> ArtifactError:
        """Return the error for a state that cannot be used."""
        return ArtifactError(f"Reading the state of a recovery, {self.folder / NAME}", found, ANOTHER)


def identity(model: nn.Module, teacher: nn.Module | None, **said: Any) -> dict[str, Any]:
    """Return what makes a fine-tune this one: what is `said`, the state's names, dtypes and shapes, and
    hashes of the weights.

    Raises:
        ArtifactError: the state of the model or the teacher holds something else than tensors.
    """
    networks = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    held = {role: network.state_dict() for role, network in networks.items()}
    for role, state in held.items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                found = f"{name} of the {role} is no tensor"
                raise ArtifactError("Keeping the state of a recovery", found, "Recover without a state")
    return {
        **said,
        "tensors": {name: f"{value.dtype} {tuple(value.shape)}" for name, value in held["model"].items()},
        "weights at the start": {role: digest("", state) for role, state in held.items()},
    }


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yield what differs between two identities, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _differences(old.get(key), new.get(key), f"{name}, {key}" if name else key)
    elif old != new:
        yield f"{name}: there {_short(old)}, here {_short(new)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
