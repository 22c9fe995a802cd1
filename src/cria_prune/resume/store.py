"""A state on disk: one safetensors file with JSON in its header, replaced whole, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cria_prune.base.errors import ArtifactError, some
from cria_prune.base.files import flush
from cria_prune.base.modules import digest

ANOTHER = "Pass another folder, or remove this one to start anew"

State = dict[str, Tensor]


class Facts(BaseModel):
    """What a state says beside its tensors: its fields, which are plain JSON.

    Attributes:
        identity: what makes the work this one; a state of another identity is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, Any]


Known = TypeVar("Known", bound=Facts)


class Store:
    """Keeps the state of one piece of work in a folder, as one file.

    Args:
        folder: made when the first state is written.
        name: of the file in it.
        layout: name and version of what the file holds; a file of another is refused.
        work: what the state is of, for errors: "recovery".
    """

    def __init__(self, folder: str | Path, name: str, layout: str, work: str) -> None:
        self.folder, self.path = Path(folder), Path(folder) / name
        self.layout, self.work = layout, work

    def write(self, facts: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace the state, whole or not at all.

        Args:
            facts: plain JSON; floats come back bit for bit.
            parts: tensors by part and name.

        Raises:
            ArtifactError: the system refuses, or safetensors has no such dtype.
        """
        asked = f"Keeping the state of the {self.work} in {self.folder}"
        tensors = {
            f"{part}/{name}": value.detach().cpu().contiguous()
            for part, state in parts.items()
            for name, value in state.items()
        }
        text = json.dumps(facts)
        # safetensors checks its lengths and no values. The hash is
        # of text and tensors, so a flipped bit is found in both.
        said = {"format": self.layout, "state": text, "sha256": digest(text, tensors)}
        # In a folder of its own, for what a killed process leaves there is then known to be nobody else's.
        unfinished = self.folder / ".unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(tensors, unfinished / self.path.name, metadata=said)
            # First the contents, then the name: after a power failure a renamed file could be empty
            # otherwise. The rename is whole or not at all, and the state before is there until then.
            flush(unfinished / self.path.name)
            os.replace(unfinished / self.path.name, self.path)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                asked,
                f"the system refused, {error}",
                "Check that you may write there and that the disk has room; the same call then goes on from "
                "the state before",
            ) from error
        except KeyError as error:
            raise ArtifactError(
                asked, f"safetensors knows no {error}", f"Do the {self.work} without a state"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def read(self) -> tuple[Any, dict[str, State]] | None:
        """Return the facts, and the tensors by part, on the CPU; None where there is no state.

        Raises:
            ArtifactError: it cannot be read, or is not as it was written.
        """
        try:
            with safe_open(self.path, "pt") as file:
                said, names = file.metadata() or {}, file.keys()
                # copies, so that nothing hangs on the file once it is replaced
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            raise self.damaged(str(error)) from error
        if said.get("format") != self.layout:
            raise self.damaged(f"its format is {said.get('format')!r}, not {self.layout!r}")
        text = said.get("state", "")
        if said.get("sha256") != digest(text, tensors):
            raise self.damaged("its contents do not have the hash that was written with them")
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged(str(error)) from error
        parts: dict[str, State] = {}
        for name, value in tensors.items():
            part, _, local = name.partition("/")
            parts.setdefault(part, {})[local] = value
        return facts, parts

    def check(self, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        """Compare what a state says that it is of with what is asked for.

        Raises:
            ArtifactError: it is another one's; says what differs.
        """
        differing = list(_differences(dict(found), dict(asked)))
        if differing:
            raise ArtifactError(
                f"Going on with the {self.work} in {self.folder}",
                f"its state is of another one: {some(differing, 3, '; ')}",
                ANOTHER,
            )

    def damaged(self, found: str) -> ArtifactError:
        """Return the error for a state that cannot be used."""
        return ArtifactError(f"Reading the state of a {self.work}, {self.path}", found, ANOTHER)


class TypedStore(Generic[Known]):
    """A store whose states are all of one form, and of one piece of work.

    Args:
        store: where they are.
        form: of what a state says.
        identity: what makes the work this one, plain JSON.
    """

    def __init__(self, store: Store, form: type[Known], identity: Mapping[str, Any]) -> None:
        self.store, self.form, self.identity = store, form, dict(identity)

    def write(self, parts: Mapping[str, Mapping[str, Tensor]], **facts: Any) -> None:
        """Replace the state: tensors by part and name, the fields of `form`; errors as in `Store.write`."""
        said = self.form(**{"identity": self.identity, **facts})
        self.store.write(said.model_dump(mode="json"), parts)

    def read(self, late: Callable[[], Mapping[str, Any]] = dict) -> tuple[Known, dict[str, State]] | None:
        """Return what the state says and its tensors by part, on the CPU; None where there is none.

        Args:
            late: what belongs to the identity too, but is dear to know; only asked where there is a state.

        Raises:
            ArtifactError: it is damaged, or of another work.
        """
        found = self.store.read()
        if found is None:
            return None
        try:
            facts = self.form.model_validate(found[0])
        except ValidationError as error:
            raise self.store.damaged(str(error)) from error
        self.store.check(facts.identity, {**self.identity, **late()})
        return facts, found[1]

    def damaged(self, error: Exception) -> ArtifactError:
        """Return the error for a state whose parts do not fit together."""
        return self.store.damaged(str(error))


def weights_of(networks: Mapping[str, nn.Module], work: str) -> dict[str, Any]:
    """Return what makes networks these ones: dtypes and shapes of the first one, hashes of all weights.

    Args:
        networks: role -> network, the one that is worked on first.
        work: what a state would be kept of, for the error.

    Raises:
        ArtifactError: the state of a network holds something else than tensors.
    """
    held = {role: network.state_dict() for role, network in networks.items()}
    for role, state in held.items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                found = f"{name} of the {role} is no tensor"
                raise ArtifactError(f"Keeping the state of a {work}", found, f"Do the {work} without a state")
    first = next(iter(held.values()))
    return {
        "tensors": {name: f"{value.dtype} {tuple(value.shape)}" for name, value in first.items()},
        "weights at the start": {role: digest("", state) for role, state in held.items()},
    }


@cache
def code_version() -> str:
    """Return a hash of the package's own source: another version may round otherwise."""
    total = hashlib.sha256()
    root = Path(__file__).parents[1]
    # Any edit counts. Which of them change a bit is not known,
    # and bit for bit is the promise (docs/decisions/0016).
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\n" + path.read_bytes())
    return total.hexdigest()


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
