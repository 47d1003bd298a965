"""Rotary position embedding in NeoX form, with LongRoPE's two factor sets.

Angles, cosines and sines are float32 whatever the model's type: in bfloat16 neighbouring positions
past a few hundred become the same angle. The tables live outside the module's buffers so that
`model.to(torch.bfloat16)` cannot cast them.

Shape legend: B batch, T tokens, H heads, E head size, P rotary pairs (E / 2).
Source: arXiv 2402.13753 (LongRoPE); transformers `_compute_longrope_parameters` for the constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketphi.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, *, long: bool) -> Tensor:
    """Angle per position of each rotary pair, float32 [P]: 1 / (factor_i * theta^(2i / E)).

    `long` picks LongRoPE's long factors; without LongRoPE all factors are 1.
    """
    # The device is named because models are also built under `torch.device("meta")`.
    exponent_P = (
        torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    )
    base_P = config.rope_theta**exponent_P
    if config.rope_scaling is None:
        return 1.0 / base_P
    config.require_factors()
    factors = config.rope_scaling["long_factor" if long else "short_factor"]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * base_P)


class RotaryEmbedding:
    """Makes the cos and sin tables of a batch of positions, for short and long sequences."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._frequencies: dict[tuple[torch.device, bool], Tensor] = {}

    @property
    def switches(self) -> bool:
        """Whether sequences past `switch_length` use other angles than shorter ones."""
        return self.config.rope_scaling is not None

    @property
    def switch_length(self) -> int:
        """Longest sequence, in tokens, that uses the short factors."""
        return self.config.original_max_position_embeddings or self.config.max_position_embeddings

    def frequencies(self, device: torch.device, *, long: bool) -> Tensor:
        """`inverse_frequencies` on `device`, kept for the next call."""
        key = (device, long)
        if key not in self._frequencies:
            self._frequencies[key] = inverse_frequencies(self.config, long=long).to(device)
        return self._frequencies[key]

    def tables(self, positions_BT: Tensor, long: bool | Tensor = False) -> tuple[Tensor, Tensor]:
        """Return float32 cos and sin [B, T, 1, P], times LongRoPE's magnitude factor.

        `long` is one choice for all tokens or a boolean [B, T] (documents packed into one row, each
        long or short on its own).
        """
        if isinstance(long, Tensor):
            cos_long, sin_long = self.tables(positions_BT, long=True)
            cos_short, sin_short = self.tables(positions_BT, long=False)
            choice = long[..., None, None]
            return torch.where(choice, cos_long, cos_short), torch.where(choice, sin_long, sin_short)
        frequencies_P = self.frequencies(positions_BT.device, long=long)
        angles_BT1P = positions_BT[..., None, None].float() * frequencies_P
        magnitude = self.config.magnitude(long=long)
        return angles_BT1P.cos() * magnitude, angles_BT1P.sin() * magnitude


def rotate(x_BTHE: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor) -> Tensor:
    """Turn pair (i, i + P) of every head by its angle, in float32; the result has x's type."""
    first, second = x_BTHE.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P), dim=-1)
    return turned.to(x_BTHE.dtype)
