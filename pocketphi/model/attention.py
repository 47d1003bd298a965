"""Grouped-query attention with a fused projection, masks for windows and packed documents, and the
key/value cache.

Shape legend: B batch, T queries, S keys, H query heads, K key/value heads, E head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketphi.core.errors import UserError
from pocketphi.model.config import ModelConfig
from pocketphi.model.rope import rotate


@dataclass
class AttentionMask:
    """Which keys each query sees, made once per forward pass and shared by all layers.

    Exactly one of three forms: `causal` (plain lower triangle), `dense` (boolean [B or 1, 1, T, S],
    True where visible), or `kernel`, a function (q, k, v, kernel_data, scale) for a special attention such as
    FlexAttention. The function stays the same object from step to step and the data changes, so that
    compiled blocks are not compiled anew. All empty means every key is visible, which is right for
    the single newest token.
    """

    causal: bool = False
    dense: Tensor | None = None
    kernel: Callable[[Tensor, Tensor, Tensor, Any, float | None], Tensor] | None = None
    kernel_data: Any = None


def visible(
    query_T: Tensor, key_S: Tensor, window: int | None, query_documents: Any = None, key_documents: Any = None
) -> Tensor:
    """The one rule of who sees whom, on broadcastable indices (and document ids).

    A key is visible when it is not later than the query, fewer than `window` tokens before it, and in
    the same document. Used for dense masks and inside FlexAttention alike.
    """
    allowed = key_S <= query_T
    if window is not None:
        allowed = allowed & (query_T - key_S < window)
    if query_documents is not None:
        allowed = allowed & (query_documents == key_documents)
    return allowed


def make_mask(
    config: ModelConfig,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
) -> AttentionMask:
    """Return the cheapest mask that is exact; queries are the last `num_queries` of the keys."""
    window = config.visible_window
    if window is not None and num_keys <= window:
        window = None
    if window is None and query_documents_BT is None:
        if num_queries == 1:
            return AttentionMask()
        if num_queries == num_keys:
            return AttentionMask(causal=True)
    query_T = torch.arange(num_keys - num_queries, num_keys, device=device)
    key_S = torch.arange(num_keys, device=device)
    query_documents = None if query_documents_BT is None else query_documents_BT[:, None, :, None]
    key_documents = None if key_documents_BS is None else key_documents_BS[:, None, None, :]
    allowed = visible(query_T[:, None], key_S[None, :], window, query_documents, key_documents)
    return AttentionMask(dense=allowed if allowed.dim() == 4 else allowed[None, None])


def attend(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: AttentionMask, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention -> [B, H, T, E]; the scale is E^-0.5 unless given."""
    if mask.kernel is not None:
        return mask.kernel(q_BHTE, k_BKSE, v_BKSE, mask.kernel_data, scale)
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSE, attn_mask=mask.dense, is_causal=mask.causal, enable_gqa=grouped, scale=scale
    )


class LayerCache:
    """Keys and values of one layer, grown by doubling so that a step does not copy all of it."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = 0

    def append(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values; return all of them [B, K, S, E]."""
        needed = self.length + k_BKTE.shape[2]
        if self._keys is None or self._values is None or needed > self._keys.shape[2]:
            capacity = max(64, 2 * needed)
            self._keys = _grown(self._keys, k_BKTE, self.length, capacity)
            self._values = _grown(self._values, v_BKTE, self.length, capacity)
        self._keys[:, :, self.length : needed] = k_BKTE
        self._values[:, :, self.length : needed] = v_BKTE
        self.length = needed
        return self._keys[:, :, :needed], self._values[:, :, :needed]

    def clear(self) -> None:
        self.length = 0


def _grown(old: Tensor | None, like_BKTE: Tensor, used: int, capacity: int) -> Tensor:
    batch, heads, _, width = like_BKTE.shape
    new = like_BKTE.new_empty(batch, heads, capacity, width)
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


class KVCache:
    """Keys, values and the token ids behind them, for feeding a sequence in pieces.

    The ids are kept because LongRoPE turns *all* keys by other angles once the sequence grows past
    the original context: the model then empties the cache and reads every token again
    (`num_recomputed` counts these tokens), as the published implementation does. Without that, old
    keys and new queries disagree and the text degenerates.

    The reference keeps all keys, also those that a sliding window hides.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.layers = [LayerCache() for _ in range(config.num_hidden_layers)]
        self.ids_BS: Tensor | None = None
        self.long = False
        self.num_recomputed = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length

    def remember(self, ids_BT: Tensor) -> Tensor:
        """Add ids; return all ids of the sequence [B, S]. Raises UserError on another batch size."""
        if self.ids_BS is None:
            self.ids_BS = ids_BT
        elif self.ids_BS.shape[0] != ids_BT.shape[0]:
            raise UserError(
                f"the cache holds {self.ids_BS.shape[0]} sequences, the new tokens are for {ids_BT.shape[0]}"
            )
        else:
            self.ids_BS = torch.cat((self.ids_BS, ids_BT), dim=1)
        return self.ids_BS

    def clear_keys(self) -> None:
        """Forget keys and values, keep the ids."""
        for layer in self.layers:
            layer.clear()


class Attention(nn.Module):
    """Self-attention; `qkv_proj` holds all query heads, then all key heads, then all value heads.

    `scale` multiplies the logits: E^-0.5, unless a parametrisation sets another.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BT1P: Tensor,
        sin_BT1P: Tensor,
        mask: AttentionMask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        batch, tokens, _ = x_BTD.shape
        qkv_BTAE = self.qkv_proj(x_BTD).view(batch, tokens, -1, self.head_dim)
        # Queries and keys are turned together: one pass over memory instead of two.
        turned = rotate(qkv_BTAE[:, :, : self.num_heads + self.num_kv_heads], cos_BT1P, sin_BT1P)
        q_BHTE = turned[:, :, : self.num_heads].transpose(1, 2)
        k_BKSE = turned[:, :, self.num_heads :].transpose(1, 2)
        v_BKSE = qkv_BTAE[:, :, self.num_heads + self.num_kv_heads :].transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.append(k_BKSE, v_BKSE)
        y_BHTE = attend(q_BHTE, k_BKSE, v_BKSE, mask, self.scale)
        return self.o_proj(y_BHTE.transpose(1, 2).reshape(batch, tokens, -1))
