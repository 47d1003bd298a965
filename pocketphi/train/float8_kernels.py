"""One Triton kernel: quantise a matrix to 8 bits and write it in both layouts.

Reading the input once for two outputs moves 4 bytes per element where a cast and a transpose move 5,
and the transposed writes are coalesced. Slow twin: `float8.to_float8` and `.t().contiguous()`.
Imported on GPUs only (Triton is part of PyTorch's GPU builds).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS, _BLOCK_COLUMNS = 128, 64


@triton.jit
def _quantize_both_kernel(
    x_pointer,
    scale_pointer,
    straight_pointer,
    turned_pointer,
    num_rows,
    num_columns,
    LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    scale = tl.load(scale_pointer)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    # 64-bit offsets: 32768 tokens times 16384 channels is past 2^31 / 4 already.
    straight = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    x = tl.load(x_pointer + straight, mask=inside, other=0.0).to(tl.float32) * scale
    small = tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(straight_pointer.dtype.element_ty)
    tl.store(straight_pointer + straight, small, mask=inside)
    turned = columns[:, None].to(tl.int64) * num_rows + rows[None, :]
    tl.store(turned_pointer + turned, tl.trans(small), mask=tl.trans(inside))


@torch.library.triton_op("pocketphi::quantize_both", mutates_args={})
def _quantize_both(x: Tensor, scale: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    num_rows, num_columns = x.shape
    straight = torch.empty((num_rows, num_columns), dtype=dtype, device=x.device)
    turned = torch.empty((num_columns, num_rows), dtype=dtype, device=x.device)
    grid = (triton.cdiv(num_rows, _BLOCK_ROWS), triton.cdiv(num_columns, _BLOCK_COLUMNS))
    torch.library.wrap_triton(_quantize_both_kernel)[grid](
        x,
        scale,
        straight,
        turned,
        num_rows,
        num_columns,
        LARGEST=57344.0 if e5m2 else 448.0,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_COLUMNS=_BLOCK_COLUMNS,
    )
    return straight, turned


def quantize_both(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x * scale in 8 bits [N, K], and its transpose [K, N], both row by row."""
    return _quantize_both(x.contiguous(), scale, dtype == torch.float8_e5m2)
