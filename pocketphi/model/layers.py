"""The parts of a block that look at one token at a time: RMSNorm and the gated MLP.

Shape legend: B batch, T tokens, D model width, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketphi.model.config import ModelConfig


class RMSNorm(nn.Module):
    """Scale a vector to unit root mean square, then by a learned weight.

    The statistics are float32 whatever the input's type; the result is cast back before the weight
    is applied, in the order of the published implementation, so that bfloat16 rounds alike.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_BTD * scale_BT1).to(x_BTD.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate | up]: [..., 2F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


class GatedMLP(nn.Module):
    """down(silu(gate) * up), with gate and up in one product: rows [gate | up].

    `activation` may be set to another form of the same function (training on a GPU does).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation: Callable[[Tensor], Tensor] = gated_silu

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x_BTD)))
