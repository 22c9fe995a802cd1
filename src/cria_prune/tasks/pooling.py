"""From the states of an encoder to the embedding of a text, as the modules of its folder say.

This file is also a part of the certificate's program, like `artifact.reload`: it is handed as a text to a
fresh process that has no Cria. So nothing of Cria is imported. It is a second way to what
sentence-transformers computes, and is compared with it wherever that is installed.

Legend: N = texts, T = tokens, D = width of the encoder, E = width of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Setting of before -> way to pool, in the order in which several are joined."""
SENTENCE = "sentence_embedding"
Stage = Callable[[Tensor], Tensor]


class Behind:
    """What stands behind the encoder of a folder.

    Args:
        folder: of sentence-transformers; without a modules.json the mean is taken, as that library does.
        width: D, of the encoder.

    Attributes:
        modes: how tokens are pooled, joined in this order.
        stages: what is done to the pooled vector then.
        width: E.

    Raises:
        ValueError: a setting is not known, or a width does not fit the one before.
    """

    def __init__(self, folder: Path, width: int) -> None:
        path = folder / "modules.json"
        modules = json.loads(path.read_text(encoding="utf-8"))[1:] if path.is_file() else []
        self.modes: tuple[str, ...] = ("mean",)
        self.stages: list[Stage] = []
        self.width = width
        for item in modules:
            kind, place = str(item["type"]).rpartition(".")[2], folder / str(item["path"])
            said = {}
            if (place / "config.json").is_file() and item["path"]:
                said = json.loads((place / "config.json").read_text(encoding="utf-8"))
            if kind == "Pooling":
                self._pool(said, width)
            elif said.get("module_input_name", SENTENCE) != SENTENCE or (
                said.get("module_output_name") not in (None, SENTENCE)
            ):
                raise ValueError(f"its {kind} does not read and write the {SENTENCE}")
            elif kind == "Dense":
                self._dense(said, place)
            elif kind == "LayerNorm":
                self._norm(place)
            elif kind == "Normalize":
                self.stages.append(_normalise)
            elif kind != "Dropout":  # it does nothing where nothing is trained
                raise ValueError(f"its module {kind} is not known")

    def _pool(self, said: Mapping[str, Any], width: int) -> None:
        modes = said.get("pooling_mode")
        if modes is None:
            modes = [mode for name, mode in MODES.items() if said.get(name)] or ["mean"]
        self.modes = (modes,) if isinstance(modes, str) else tuple(modes)
        for mode in self.modes:
            if mode not in MODES.values():
                raise ValueError(f"its Pooling is by {mode!r}, which is not known")
        reads = said.get("embedding_dimension", said.get("word_embedding_dimension", width))
        if reads != width:
            raise ValueError(f"its Pooling reads {reads} features, and the encoder has {width}")
        self.width = width * len(self.modes)

    def _dense(self, said: Mapping[str, Any], place: Path) -> None:
        state = load_file(place / "model.safetensors")
        weight, bias, skip = (
            state.get(f"{name}") for name in ("linear.weight", "linear.bias", "residual.weight")
        )
        if weight is None or weight.shape[1] != self.width:
            found = None if weight is None else weight.shape[1]
            raise ValueError(f"its Dense reads {found} features, and gets {self.width}")
        name = str(said.get("activation_function", "torch.nn.modules.activation.Tanh"))
        kind = getattr(nn, name.rpartition(".")[2], None)
        if not (name.startswith("torch.nn.") and isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"its Dense has the activation {name}, which is none of torch.nn")
        activation, residual = kind(), bool(said.get("use_residual"))

        def dense(x: Tensor) -> Tensor:
            out = activation(functional.linear(x, weight.to(x), None if bias is None else bias.to(x)))
            return out + (x if skip is None else functional.linear(x, skip.to(x))) if residual else out

        self.stages.append(dense)
        self.width = weight.shape[0]

    def _norm(self, place: Path) -> None:
        state = load_file(place / "model.safetensors")
        weight, bias = state["norm.weight"], state["norm.bias"]
        if len(weight) != self.width:
            raise ValueError(f"its LayerNorm reads {len(weight)} features, and gets {self.width}")
        self.stages.append(lambda x: functional.layer_norm(x, weight.shape, weight.to(x), bias.to(x)))

    def __call__(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, E) embeddings of (N, T, D) states; `mask` (N, T) is 0 for what is no token."""
        mask = states.new_ones(states.shape[:2]) if mask is None else mask
        found = torch.cat([pooled(states, mask, mode) for mode in self.modes], dim=-1)
        for stage in self.stages:
            found = stage(found)
        return found

    def of(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return (N, E), the embeddings by an encoder of its inputs, with gradients where they are on."""
        output = model(**inputs)
        states = getattr(output, "last_hidden_state", None)
        states = output[0] if states is None else states
        return self(states, inputs.get("attention_mask"))


def pooled(states: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Return (N, D), the tokens of each text as one vector.

    Args:
        states: (N, T, D); mask: (N, T), 0 for what is no token.
        mode: one of `MODES`.

    >>> states, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
    >>> [pooled(states, mask, mode).item() for mode in ("mean", "cls", "lasttoken", "max")]
    [2.0, 1.0, 3.0, 3.0]
    """
    inside, rows = mask.unsqueeze(-1).to(states.dtype), torch.arange(len(states), device=states.device)
    first = mask.int().argmax(1)
    if mode == "cls":
        return states[rows, first]
    if mode == "lasttoken":
        return states[rows, mask.shape[1] - 1 - mask.int().flip(1).argmax(1)]
    if mode == "max":
        return states.masked_fill(inside == 0, float("-inf")).amax(1)
    if mode == "weightedmean":
        places = torch.arange(1, states.shape[1] + 1, device=states.device)[None] - first[:, None]
        inside = inside * places.unsqueeze(-1).to(states.dtype)
    exact = torch.float32 if states.dtype in (torch.float16, torch.bfloat16) else states.dtype
    count = inside.sum(1, dtype=exact).clamp(min=1e-9)
    total = (states * inside).sum(1, dtype=exact)
    return (total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)).to(states.dtype)


def _normalise(x: Tensor) -> Tensor:
    return functional.normalize(x, p=2, dim=-1)


def tokens_of(tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return texts as sentence-transformers gives them to the encoder: stripped, padded, cut to its length.

    Args:
        tokenizer: of the folder.
        texts: any.
        settings: of the folder's `sentence_bert_config.json`.
    """
    stripped = [text.strip().lower() if settings.get("do_lower_case") else text.strip() for text in texts]
    most = settings.get("max_seq_length") or min(int(tokenizer.model_max_length), 1 << 16)
    found = tokenizer(
        stripped, padding=True, truncation="longest_first", max_length=most, return_tensors="pt"
    )
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
