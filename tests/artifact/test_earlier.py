"""What transformers 4 reads under other names: on 4.57.6 by hand, 23 of 29 tiny models equal in each bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.artifact.test_pretrained import DECODER, LLAMA3

from cria_prune.artifact.earlier import earlier_of, write_for_earlier

transformers = pytest.importorskip("transformers")

PLAIN = {"rope_type": "default", "rope_theta": 3e5}
LONG = {"rope_type": "longrope", "rope_theta": 3e5, "short_factor": [1.0], "long_factor": [2.0]}
LINEAR = {"rope_type": "linear", "factor": 8.0}
BOTH = {"full_attention": {**PLAIN, **LINEAR}, "sliding_attention": {**PLAIN, "rope_theta": 2e4}}
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no positions": ({"model_type": "bert", "dtype": "float16"}, {"torch_dtype": "float16"}),
    "a theta": ({"model_type": "qwen3", "rope_parameters": PLAIN}, {"rope_theta": 3e5}),
    "scaled": (
        {"model_type": "llama", "rope_parameters": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ),
    "a part": (
        {"model_type": "phi", "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {"rope_theta": 3e5, "partial_rotary_factor": 0.5},
    ),
    "neox": (
        {"model_type": "gpt_neox", "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}},
        {"rotary_emb_base": 3e5, "rotary_pct": 0.25},
    ),
    "long": (
        {"model_type": "phi3", "rope_parameters": {**LONG, "original_max_position_embeddings": 32}},
        {
            "rope_theta": 3e5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
    ),
    "two kinds of layers": (
        {"model_type": "gemma3_text", "rope_parameters": BOTH},
        {"rope_theta": 3e5, "rope_scaling": LINEAR, "rope_local_base_freq": 2e4},
    ),
    "two thetas": (
        {"model_type": "modernbert", "rope_parameters": BOTH},
        {"global_rope_theta": 3e5, "local_rope_theta": 2e4},
    ),
    "of a kind to come": ({"model_type": "new", "rope_parameters": {"odd": PLAIN}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_version_4_finds_its_own_names(name: str) -> None:
    said, expected = SAID[name]
    assert earlier_of(said) == expected


def test_version_5_reads_the_same_as_before(tmp_path: Path) -> None:
    """Also of a configuration within another one; and what is there already stays."""
    text = transformers.LlamaConfig(**DECODER, rope_parameters=LLAMA3)
    whole = {"model_type": "outer", "text": {**text.to_dict(), "rope_theta": 7.0}, "dtype": None}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert write_for_earlier(tmp_path) == ("torch_dtype", "rope_scaling") or text.dtype is None
    assert json.loads((tmp_path / "config.json").read_text())["text"]["rope_theta"] == 7.0
    text.save_pretrained(tmp_path)
    added = write_for_earlier(tmp_path)
    assert {"rope_theta", "rope_scaling"} <= set(added) and write_for_earlier(tmp_path) == ()
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == text.rope_parameters
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(config).eval() for config in (text, again)]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.arange(3, 99)[None]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
