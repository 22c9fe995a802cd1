"""What a fresh process found that loaded a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cria_prune.artifact import reload


@dataclass(frozen=True)
class Certificate:
    """What a fresh process found that loaded the folder, with transformers alone unless Cria is the loader.

    Attributes:
        loader: the class that loaded it, `AutoModelForCausalLM`, or `cria_prune.load`; architecture: the
            class that came of it.
        container: the `model_type` that holds the weights in place of the model's own, or None.
        outputs: names of the outputs that were compared.
        equal: they are equal bit for bit.
        difference: largest absolute difference; relative: the same over the largest value of its output.
        tolerance: relative difference that was allowed.
        tokens: tokens generated with the cache; None where the model writes no text.
        same_tokens: how many of them, from the first on, are the same on both sides. Less than all is an
            error, unless half types differ in their last bits.
        dtype, device, attention: how both sides computed.
        versions: of `python`, `torch`, `transformers` and `safetensors` in the fresh process.
        sha256: file name -> hash, of the weights and the configuration.
        seconds: loading and running in the fresh process.
        left_out: files of the source folder that were not copied, and why.
        parameters: of the model that was saved; stored: in the folder, with zeros where it is padded.
        notes: what else a reader of the folder has to know.
    """

    loader: str
    architecture: str
    container: str | None
    outputs: tuple[str, ...]
    equal: bool
    difference: float
    relative: float
    tolerance: float
    tokens: int | None
    same_tokens: int | None
    dtype: str
    device: str
    attention: str | None
    versions: Mapping[str, str]
    sha256: Mapping[str, str]
    seconds: float
    left_out: tuple[str, ...] = ()
    parameters: int = 0
    stored: int = 0
    notes: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether transformers loads the folder without Cria."""
        return self.loader != reload.LOAD

    @property
    def zeros(self) -> str | None:
        """What padding costs, `stores 120 parameters for 90 (25.0% are zeros that pad)`; None without any."""
        if self.stored <= self.parameters:
            return None
        share = 1 - self.parameters / self.stored
        return f"stores {self.stored:,} parameters for {self.parameters:,} ({share:.1%} are zeros that pad)"

    def __str__(self) -> str:
        same = (
            "outputs equal bit for bit"
            if self.equal
            else f"outputs within {self.relative:.1e} (relative; allowed {self.tolerance:g})"
        )
        version = self.versions["transformers"]
        where = f"of transformers {version} alone" if self.alone else f"with transformers {version}"
        parts = [
            f"{self.loader} {where}: {same}",
            f"{self.same_tokens} of {self.tokens} generated tokens equal" if self.tokens else "",
            f"stored as {self.container}" if self.container else "",
            self.zeros or "",
            *self.notes,
            f"not copied: {', '.join(self.left_out)}" if self.left_out else "",
            f"{self.seconds:.1f} s",
        ]
        return ", ".join(part for part in parts if part)

    def to_json(self) -> str:
        """Return the certificate as indented JSON."""
        return json.dumps({"format": "cria-certificate", "version": 1, **asdict(self)}, indent=2)
