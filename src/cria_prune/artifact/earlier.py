"""Settings that transformers 4 reads under other names than version 5 writes; both stand in config.json.

    ==============================================  ==================================================
    version 5                                       version 4
    ==============================================  ==================================================
    dtype                                           torch_dtype (before 4.56)
    rope_parameters, of all layers                  rope_theta, partial_rotary_factor, and the rest as
                                                    rope_scaling where it is not the default
    the same, of a GPT-NeoX                         rotary_emb_base, rotary_pct
    rope_parameters, full and sliding attention     rope_theta and rope_local_base_freq (Gemma 3),
                                                    global_rope_theta and local_rope_theta (ModernBERT)
    the tokenizer TokenizersBackend                 PreTrainedTokenizerFast, which is the same
    ==============================================  ==================================================

Without them version 4 takes its defaults, without a word: a Qwen3 whose theta is 1e6 computes with 1e4. What
is written is read by version 5 too, so the certificate is made after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cria_prune.base.files import write_text
from cria_prune.tasks.loading import CONFIG

ROPE, FULL, SLIDING = "rope_parameters", "full_attention", "sliding_attention"
THETA, PART, KIND = "rope_theta", "partial_rotary_factor", "rope_type"
NEOX = ("gpt_neox", "gpt_neox_japanese")
LONG = ("short_factor", "long_factor")
"""What a long-context Phi-3 of version 4 takes beside the type, and nothing else."""


def write_for_earlier(folder: Path) -> tuple[str, ...]:
    """Add what version 4 reads to a folder's config.json; return the names of the settings."""
    path = folder / CONFIG
    said = json.loads(path.read_text(encoding="utf-8"))
    added: dict[str, None] = {}
    _add(said, added)
    if added:
        write_text(path, json.dumps(said, indent=2, sort_keys=True) + "\n")
    return (*added, *_tokenizer(folder / "tokenizer_config.json"))


def _tokenizer(path: Path) -> tuple[str, ...]:
    """Give the class of version 5 that is any tokenizer the name that both versions know."""
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(said, dict) or said.get("tokenizer_class") != "TokenizersBackend":
        return ()
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_text(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    return ("tokenizer_class",)


def _add(said: dict[str, Any], added: dict[str, None]) -> None:
    """Add to a configuration, and to those that are in it; what it says already stays."""
    for value in said.values():
        if isinstance(value, dict) and "model_type" in value:
            _add(value, added)
    for name, value in earlier_of(said).items():
        if value is not None and name not in said:
            said[name] = value
            added[name] = None


def earlier_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what version 4 reads in place of what a configuration of version 5 says.

    >>> earlier_of({"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
    {'torch_dtype': 'bfloat16', 'rope_theta': 1000000.0}
    """
    found = {"torch_dtype": said["dtype"]} if isinstance(said.get("dtype"), str) else {}
    rope, kind = said.get(ROPE), str(said.get("model_type"))
    if not isinstance(rope, Mapping) or not rope:
        return found
    if THETA in rope:
        names = ("rotary_emb_base", "rotary_pct") if kind in NEOX else (THETA, PART)
        return found | _flat(rope, kind, *names)
    full, sliding = rope.get(FULL), rope.get(SLIDING)
    if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        return found
    if kind.startswith("modernbert"):
        return found | {"global_rope_theta": full.get(THETA), "local_rope_theta": sliding.get(THETA)}
    return found | _flat(full, kind, THETA, PART) | {"rope_local_base_freq": sliding.get(THETA)}


def _flat(rope: Mapping[str, Any], kind: str, theta: str, part: str) -> dict[str, Any]:
    found = {theta: rope.get(THETA)} | ({part: rope[PART]} if PART in rope else {})
    if rope.get(KIND, "default") == "default":
        return found
    rest = {name: value for name, value in rope.items() if name not in (THETA, PART, "type")}
    if kind.startswith("phi") and all(name in rope for name in LONG):
        rest = {"type": rope[KIND], **{name: rope[name] for name in LONG}}
    return found | {"rope_scaling": rest}
