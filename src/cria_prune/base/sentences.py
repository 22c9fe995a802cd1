"""What makes a folder one of sentence-transformers: `modules.json`, and the modules that it names.

==============  ====================================================================================
module          what is kept of it
==============  ====================================================================================
Transformer     the encoder, the first one: its weights are pruned, all else is copied
Pooling         its config.json
Dense           its config.json and model.safetensors; it reads the encoder's width, which stays
LayerNorm       the same
Normalize       its config.json, where it has one
Dropout         the same
others          refused by name: nothing here could tell whether the embeddings are right
==============  ====================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cria_prune.base.errors import ArtifactError

MODULES = "modules.json"
SETTINGS = (
    "config_sentence_transformers.json",
    *(
        f"sentence_{kind}_config.json"
        for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
"""What lies beside modules.json: prompts and similarity, and how texts are cut."""
HELD = ("config.json", "model.safetensors")
"""What a module behind the encoder may hold; its pickles are not read."""
ENCODER, POOLING = "Transformer", "Pooling"
BEHIND = ("Dense", "LayerNorm", "Normalize", "Dropout")
LIBRARY = "sentence_transformers"
TODO = "Load it with SentenceTransformer(FOLDER), and give the encoder alone, model[0].auto_model, to prune()"


@dataclass(frozen=True)
class Module:
    """One module of a sentence-transformers folder.

    Attributes:
        kind: the last word of its class, `Pooling`.
        path: its folder within the folder; empty for the folder itself.
        library: its class is one of sentence-transformers, and no code of the folder.
    """

    kind: str
    path: str
    library: bool


def modules_of(folder: Path) -> tuple[Module, ...]:
    """Return the modules that `modules.json` names, in their order; none where there is no such file.

    Raises:
        ArtifactError: it is damaged, or names a place outside of the folder.
    """
    path, asked = folder / MODULES, f"Reading {folder / MODULES}"
    if not path.is_file():
        return ()
    found = []
    try:
        for item in json.loads(path.read_text(encoding="utf-8")):
            kind, place = str(item["type"]), str(item["path"])
            found.append(Module(kind.rpartition(".")[2], place, kind.startswith(f"{LIBRARY}.")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(asked, f"it cannot be read, {error!r}", "Copy the folder again") from error
    for item in found:
        if item.path and (not re.fullmatch(r"[\w.-]+", item.path) or set(item.path) == {"."}):
            raise ArtifactError(
                asked, f"it names the place {item.path!r}", "Give a folder whose modules lie in it"
            )
    return tuple(found)


def encoder_folder(folder: Path) -> Path:
    """Return where the encoder's config.json and weights are: the folder itself but in old ones."""
    modules = modules_of(folder)
    first = modules[0].path if modules and modules[0].kind == ENCODER else ""
    return folder / first if first else folder


def check_modules(folder: Path) -> None:
    """Check that all that makes the embeddings of a folder can be kept; nothing where it has no modules.

    Raises:
        ArtifactError: a module is of a kind that cannot, named; or a file of one is missing or a pickle.
    """
    modules, asked = modules_of(folder), f"The sentence encoder in {folder}"
    if not modules:
        return
    kinds = ", ".join(item.kind for item in modules)
    for item in modules:
        if not item.library:
            raise ArtifactError(asked, f"its module {item.kind} is code of its own, which is not run", TODO)
        if item.kind not in (ENCODER, POOLING, *BEHIND):
            raise ArtifactError(asked, f"its module {item.kind} cannot be kept", TODO)
    _check_settings(folder, asked)
    places = [item.kind for item in modules]
    if places[:2] != [ENCODER, POOLING] or places.count(ENCODER) + places.count(POOLING) != 2:
        raise ArtifactError(
            asked, f"its modules are {kinds}; kept are a {ENCODER}, a {POOLING} and what is behind them", TODO
        )
    for item in modules[1:]:
        for name in HELD[: 2 if item.kind in ("Dense", "LayerNorm") else 1]:
            needed = item.kind in (POOLING, "Dense", "LayerNorm")
            if needed and not (folder / item.path / name).is_file():
                pickles = any((folder / item.path).glob("*.bin"))
                raise ArtifactError(
                    asked,
                    f"its module {item.kind} has {'pickled weights' if pickles else 'no'} "
                    f"{'in place of ' if pickles else ''}{item.path}/{name}",
                    "Load it with SentenceTransformer(FOLDER); its save_pretrained(NEW) writes safetensors",
                )


def _check_settings(folder: Path, asked: str) -> None:
    """Check that the encoder reads texts and gives the states of its tokens."""
    said = settings_of(encoder_folder(folder)) or settings_of(folder)
    task = said.get("transformer_task", "feature-extraction")
    text = (said.get("modality_config") or {"text": {}}).get("text")
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    if task != "feature-extraction" or text is None or any(text.get(k, v) != v for k, v in plain.items()):
        found = f"its {ENCODER} is for {task}, and reads {json.dumps(said.get('modality_config'))}"
        raise ArtifactError(asked, found, TODO)


def settings_of(folder: Path) -> dict[str, Any]:
    """Return what `sentence_bert_config.json` (or another of its names) says; empty without one."""
    for name in SETTINGS[1:]:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(
                f"Reading {folder / name}", f"it cannot be read, {error!r}", "Copy the folder again"
            ) from error
        if isinstance(found, dict) and found:
            return found
    return {}


def module_files(folder: Path) -> Iterator[str]:
    """Yield the names of the files that make a folder one of sentence-transformers, as far as they are there.

    `1_Pooling/config.json` where they lie deeper; those of an encoder in a folder of its own are not here.
    """
    modules = modules_of(folder)
    names = [MODULES, *SETTINGS] if modules else []
    names += [f"{item.path}/{name}" for item in modules[1:] if item.path for name in HELD]
    yield from (name for name in names if (folder / name).exists())


def at_the_top(folder: Path) -> None:
    """Say in `modules.json` that the encoder lies in the folder itself, as it does after it was saved."""
    path = folder / MODULES
    known = json.loads(path.read_text(encoding="utf-8"))
    if known[0]["path"]:
        known[0]["path"] = ""
        path.write_text(json.dumps(known, indent=2), encoding="utf-8")
