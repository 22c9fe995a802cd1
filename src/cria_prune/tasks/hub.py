"""A folder or a hub name -> the folder of a model; only JSON, safetensors and tokenizer files are fetched."""

from __future__ import annotations

import re
from pathlib import Path

from cria_prune.base.optional import needed
from cria_prune.errors import ArtifactError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
    "sentencepiece.bpe.model",
)
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md")


def find_folder(name: str) -> Path:
    """Return the folder of a model: the folder of that name, or a snapshot of the hub's repository.

    Raises:
        ArtifactError: it is neither, or the hub cannot be reached.
        PackageError: huggingface_hub is not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    asked = f"The model {name}"
    if not HUB_NAME.fullmatch(name):
        raise ArtifactError(
            asked, "there is no such folder", "Give a folder, or a name of the hub like organisation/model"
        )
    with needed("hf", asked):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # whatever a server can make another library raise
        text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        raise ArtifactError(
            asked,
            f"there is no such folder, and the hub gives {type(error).__name__}: {text}",
            f"Fetch it where there is a network (hf download {name} --local-dir FOLDER) and give that folder",
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)
