"""nn.MultiheadAttention whose head size does not follow from its width, so that heads can leave.

PyTorch's own forward divides the width by the number of heads, checks the width of the query against it,
and may take a fused kernel; none of that survives the removal of a head. This class computes the same from
the shapes of the parameters, with plain operations. It takes the place of the original class while a model is
captured or recorded, and for good once its parameters are cut. Names and parameters stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.MultiheadAttention):
    """Same call and results as `torch.nn.MultiheadAttention`; see there for the arguments."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output, and the weights if they are asked for."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        projected = self._projected(query, key, value)
        if not batched:
            projected = tuple(item.unsqueeze(0) for item in projected)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            projected = tuple(item.transpose(0, 1) for item in projected)
        # The number of heads is worked out from the width: −1 is what a cut can change. The head size stays.
        q, k, v = (
            item.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for item in self._extended(*projected)
        )
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            shares = (scores if mask is None else scores + mask).softmax(-1)
            shares = F.dropout(shares, dropout)
            mixed = shares @ v
            weights = shares.mean(1) if average_attn_weights else shares
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = F.linear(mixed.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(F.linear(*item) for item in zip((query, key, value), weights, biases, strict=True))

    def _extended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the learned key and value, and the zero ones, where the module has them."""
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([item, torch.zeros_like(item[:, :1])], 1) for item in (k, v))
        return q, k, v

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Return one additive mask that broadcasts to (examples, heads, queries, keys)."""
        parts = []
        if mask is not None:
            parts.append(mask.unflatten(0, (len(q), -1)) if mask.dim() == 3 else mask)
        if padding is not None:
            parts.append(padding[:, None, None, :])
        total: Tensor | None = None
        for part in parts:
            if part.dtype == torch.bool:
                part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, float("-inf"))
            missing = k.shape[-2] - part.shape[-1]  # the appended keys are always seen
            part = F.pad(part, (0, missing)) if missing else part
            total = part if total is None else total + part
        return total


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Let every nn.MultiheadAttention of a model run as the class above, and put the original back."""
    found: list[Any] = [item for item in model.modules() if type(item) is nn.MultiheadAttention]
    try:
        for module in found:
            module.__class__ = MultiheadAttention
        yield
    finally:
        for module in found:
            module.__class__ = nn.MultiheadAttention
