"""Dense models that a recipe trained once, kept in a folder of the user for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

FORMAT = 1


def cache_root() -> Path:
    """Return the folder: CRIA_CACHE, or `cria` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("CRIA_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cria"


def cache_file(name: str, made_from: Mapping[str, Any]) -> Path:
    """Return where a model is kept that was made from all this: plain JSON, any change is another file."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True)
    return cache_root() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def fetch(model: nn.Module, path: Path) -> bool:
    """Read kept weights into the model and say whether it worked; the model is as it was if not.

    A missing, damaged or foreign file is no error: the model is then trained again.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_model(model, path)
    except (OSError, RuntimeError, SafetensorError):
        model.load_state_dict(before)
        return False
    return True


def keep(model: nn.Module, path: Path) -> None:
    """Write the model's weights; readers see the whole file or none. A folder that refuses is no error."""
    from safetensors.torch import save_model

    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as aside:
            save_model(model, str(Path(aside) / path.name))
            os.replace(Path(aside) / path.name, path)
