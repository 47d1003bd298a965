"""One Triton kernel: the gradient of the gated activation, both halves in one pass.

A compiler that builds the gradient of [gate | up] as one matrix evaluates both halves' expressions for
every element and reads each input twice; here every input is read once and every output written once
(measured on an H200 at phi-3-mini's width: docs/experiments.md). Slow twin: `acceleration.gated_silu_gradient`.
Imported on GPUs only (Triton is part of PyTorch's GPU builds).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gated_silu_backward_kernel(x_pointer, dy_pointer, dx_pointer, width, BLOCK: tl.constexpr):
    # 64-bit offsets: 131072 tokens times 16384 channels is past 2^31.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(x_pointer + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_pointer + at + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_pointer + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dx_pointer + at, dy * up * (sigmoid + silu * (1.0 - sigmoid)), mask=inside)
    tl.store(dx_pointer + at + width, dy * silu, mask=inside)


@torch.library.triton_op("pocketphi::gated_silu_backward", mutates_args={})
def gated_silu_backward(x_NG: Tensor, dy_NF: Tensor) -> Tensor:
    """Gradient [N, 2F] of `silu(gate) * up` for x = [gate | up] [N, 2F]; all contiguous."""
    dx_NG = torch.empty_like(x_NG)
    rows, width = dy_NF.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    torch.library.wrap_triton(_gated_silu_backward_kernel)[grid](x_NG, dy_NF, dx_NG, width, BLOCK=_BLOCK)
    return dx_NG
