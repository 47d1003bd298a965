"""Matrix products in 8-bit floating point, forward and backward, with scaling of our own.

Every product of a linear layer, y = x W^T, dx = g W and dW = g^T x, takes operands of 8 bits and
accumulates in float32. Operands are scaled so that their largest magnitude becomes the largest
representable one (dynamic scaling, from the tensor itself):

- `tensorwise`: one scale per tensor. Each tensor is quantised once and used in two products.
- `rowwise`: one scale per row of each operand (per token, per output channel, ...). More accurate with
  outliers; every tensor is quantised twice, once along each axis.

Activations and weights are e4m3 (largest 448), gradients e5m2 (largest 57344) with tensorwise scaling
and e4m3 with rowwise scaling. Weights, gradients and the result of every product stay in the model's
type. The head, the embeddings and attention are not touched.

Shapes: N tokens, K inputs, M outputs. A product on this hardware wants its left operand row by row
and its right operand column by column, hence the transposed copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketphi.core.errors import ConfigError, UserError

Scaling = Literal["tensorwise", "rowwise"]
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@dataclass(frozen=True)
class Float8Config:
    """`fast_sum_*`: let the tensor cores keep partial sums at reduced precision (about 14 bits), which
    is faster on Hopper; for the result and the input's gradient by default, not for the weight's, whose
    sum runs over all tokens. `fused` quantises and transposes in one Triton kernel (GPU, tensorwise)."""

    scaling: Scaling = "tensorwise"
    fast_sum_output: bool = True
    fast_sum_grad_input: bool = True
    fast_sum_grad_weight: bool = False
    fused: bool = True


def scale_of(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """float32 factor that brings the largest magnitude (of all, or along `dim`) to the type's largest."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    return _LARGEST[dtype] / amax.float().clamp(min=1e-12)


def to_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale, clamped and rounded to 8 bits."""
    largest = _LARGEST[dtype]
    return (x.float() * scale).clamp(-largest, largest).to(dtype)


def scaled_matmul(
    a_NK: Tensor, b_KM: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast_sum: bool
) -> Tensor:
    """(a / scale_a) @ (b / scale_b) in `dtype`. On a CPU the same numbers by a float32 product."""
    inverse_a, inverse_b = scale_a.reciprocal(), scale_b.reciprocal()
    if not a_NK.is_cuda:
        return ((a_NK.float() * inverse_a) @ (b_KM.float() * inverse_b)).to(dtype)
    return torch._scaled_mm(
        a_NK, b_KM, scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=fast_sum
    )


def _both_layouts(x: Tensor, scale: Tensor, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor]:
    """x in 8 bits, row by row, and its transpose, row by row."""
    if fused and x.is_cuda:
        from pocketphi.train.float8_kernels import quantize_both

        return quantize_both(x, scale, dtype)
    small = to_float8(x, scale, dtype)
    return small, small.t().contiguous()


class _Tensorwise(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_NK: Tensor, w_MK: Tensor, fast_y: bool, fast_dx: bool, fast_dw: bool, fused: bool
    ) -> Tensor:
        e4m3 = torch.float8_e4m3fn
        scale_x, scale_w = scale_of(x_NK, e4m3, None), scale_of(w_MK, e4m3, None)
        x8_NK, x8_KN = _both_layouts(x_NK, scale_x, e4m3, fused)
        w8_MK, w8_KM = _both_layouts(w_MK, scale_w, e4m3, fused)
        ctx.save_for_backward(x8_KN, w8_KM, scale_x, scale_w)
        ctx.fast_dx, ctx.fast_dw, ctx.fused, ctx.weight_type = fast_dx, fast_dw, fused, w_MK.dtype
        return scaled_matmul(x8_NK, w8_MK.t(), scale_x, scale_w, x_NK.dtype, fast_y)

    @staticmethod
    def backward(ctx: Any, g_NM: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x8_KN, w8_KM, scale_x, scale_w = ctx.saved_tensors
        e5m2 = torch.float8_e5m2
        g_NM = g_NM.contiguous()
        scale_g = scale_of(g_NM, e5m2, None)
        g8_NM, g8_MN = _both_layouts(g_NM, scale_g, e5m2, ctx.fused)
        dtype = g_NM.dtype
        grad_x = scaled_matmul(g8_NM, w8_KM.t(), scale_g, scale_w, dtype, ctx.fast_dx)
        grad_w = scaled_matmul(g8_MN, x8_KN.t(), scale_g, scale_x, dtype, ctx.fast_dw)
        return grad_x, grad_w.to(ctx.weight_type), None, None, None, None


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_NK: Tensor, w_MK: Tensor, fast_y: bool, fast_dx: bool, fast_dw: bool, fused: bool
    ) -> Tensor:
        e4m3 = torch.float8_e4m3fn
        scale_x, scale_w = scale_of(x_NK, e4m3, 1), scale_of(w_MK, e4m3, 1)
        x8_NK, w8_MK = to_float8(x_NK, scale_x, e4m3), to_float8(w_MK, scale_w, e4m3)
        ctx.save_for_backward(x_NK, w_MK)
        ctx.fast_dx, ctx.fast_dw = fast_dx, fast_dw
        return scaled_matmul(x8_NK, w8_MK.t(), scale_x, scale_w.t(), x_NK.dtype, fast_y)

    @staticmethod
    def backward(ctx: Any, g_NM: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_NK, w_MK = ctx.saved_tensors
        e4m3 = torch.float8_e4m3fn
        dtype = g_NM.dtype
        # dx = g W: sums over M, so g is scaled per token and W per input channel.
        scale_g, scale_w = scale_of(g_NM, e4m3, 1), scale_of(w_MK, e4m3, 0)
        g8_NM = to_float8(g_NM, scale_g, e4m3)
        w8_KM = to_float8(w_MK, scale_w, e4m3).t().contiguous()
        grad_x = scaled_matmul(g8_NM, w8_KM.t(), scale_g, scale_w, dtype, ctx.fast_dx)
        # dW = g^T x: sums over tokens, so g is scaled per output channel and x per input channel.
        scale_g, scale_x = scale_of(g_NM, e4m3, 0), scale_of(x_NK, e4m3, 0)
        g8_MN = to_float8(g_NM, scale_g, e4m3).t().contiguous()
        x8_KN = to_float8(x_NK, scale_x, e4m3).t().contiguous()
        grad_w = scaled_matmul(g8_MN, x8_KN.t(), scale_g.t().contiguous(), scale_x, dtype, ctx.fast_dw)
        return grad_x, grad_w.to(w_MK.dtype), None, None, None, None


class Float8Linear(nn.Linear):
    """A bias-free linear layer whose three products are in 8 bits; its weight keeps its type and name."""

    config: Float8Config

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat_NK = x.reshape(-1, x.shape[-1])
        product = _Tensorwise if self.config.scaling == "tensorwise" else _Rowwise
        config = self.config
        y_NM = product.apply(
            flat_NK,
            self.weight,
            config.fast_sum_output,
            config.fast_sum_grad_input,
            config.fast_sum_grad_weight,
            config.fused,
        )
        return y_NM.view(*x.shape[:-1], -1)


def supports_float8(device: torch.device | str) -> bool:
    """Whether the device multiplies 8-bit floats (compute capability 8.9 and later)."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def use_float8(module: nn.Module, config: Float8Config) -> int:
    """Turn every linear layer inside `module` into a Float8Linear, in place; return how many.

    Parameters stay the same objects, so optimizers and checkpoints do not notice. Raises ConfigError
    for a width that is no multiple of 16, UserError on a GPU without 8-bit products.
    """
    count = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or isinstance(layer, Float8Linear):
            continue
        if layer.bias is not None:
            raise ConfigError(f"'{name}' has a bias, which 8-bit products do not take")
        if layer.weight.is_cuda and not supports_float8(layer.weight.device):
            raise UserError(f"{torch.cuda.get_device_name(layer.weight.device)} has no 8-bit float products")
        if layer.in_features % 16 or layer.out_features % 16:
            raise ConfigError(
                f"8-bit products need widths that are multiples of 16: '{name}' is "
                f"{layer.out_features} x {layer.in_features}"
            )
        layer.__class__ = Float8Linear
        layer.config = config  # type: ignore[assignment]
        count += 1
    return count
