"""Cross-entropy of the head in pieces: all logits of a batch never exist at once.

Shapes: N tokens of the batch, C tokens of a piece, D model width, V vocabulary.

The gradient is computed in the forward pass, piece by piece, while a piece's logits are at hand; the
backward pass only scales it. Products are in the input's type, statistics and sums in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # targets that do not count, as everywhere in PyTorch


def _piece(
    logits_CV: Tensor, targets_C: Tensor, z_weight: float, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, squared log-partition and d/d logits of one piece.

    Written as whole-tensor expressions without temporaries that outlive it, so that a compiler makes
    two passes over the logits of it (statistics, then gradient).
    """
    wide_CV = logits_CV.float()
    lse_C = torch.logsumexp(wide_CV, dim=-1)
    counted_C = targets_C != IGNORE
    safe_C = torch.where(counted_C, targets_C, 0)
    picked_C = logits_CV.gather(1, safe_C[:, None])[:, 0].float()
    loss = torch.where(counted_C, lse_C - picked_C, 0.0).sum()
    z_loss = torch.where(counted_C, lse_C.square(), 0.0).sum()
    if not wants_grad:
        return loss, z_loss, None
    # d loss / d logits = softmax - onehot; d z / d logits = 2 lse softmax.
    scale_C = counted_C.float() * (1 + 2 * z_weight * lse_C)
    columns_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    hit_CV = (columns_V == targets_C[:, None]).float()
    grad_CV = torch.exp(wide_CV - lse_C[:, None]) * scale_C[:, None] - hit_CV
    return loss, z_loss, grad_CV.to(logits_CV.dtype)


def _piece_in_place(
    logits_CV: Tensor, targets_C: Tensor, z_weight: float, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same for a CPU, in five passes over one float32 buffer, the logits' own where it can be."""
    wide_CV = logits_CV.float()
    counted_C = targets_C != IGNORE
    safe_C1 = torch.where(counted_C, targets_C, 0)[:, None]
    top_C1 = wide_CV.amax(dim=-1, keepdim=True)
    wide_CV.sub_(top_C1)
    picked_C = wide_CV.gather(1, safe_C1)[:, 0]
    wide_CV.exp_()
    sum_C = wide_CV.sum(dim=-1)
    log_sum_C = sum_C.log()
    lse_C = log_sum_C + top_C1[:, 0]
    loss = torch.where(counted_C, log_sum_C - picked_C, 0.0).sum()
    z_loss = torch.where(counted_C, lse_C.square(), 0.0).sum()
    if not wants_grad:
        return loss, z_loss, None
    counted_float_C = counted_C.float()
    scale_C = counted_float_C * (1 + 2 * z_weight * lse_C) / sum_C
    wide_CV.mul_(scale_C[:, None]).scatter_add_(1, safe_C1, -counted_float_C[:, None])
    return loss, z_loss, wide_CV.to(logits_CV.dtype)


@functools.cache
def _compiled_piece() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    return torch.compile(_piece, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        z_weight: float,
        chunk: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        piece = _compiled_piece() if compiled else _piece if x_ND.is_cuda else _piece_in_place
        ctx.types = x_ND.dtype, weight_VD.dtype
        x_ND, weight = x_ND.to(_product_type(x_ND)), weight_VD.to(_product_type(x_ND))
        grad_x = torch.empty_like(x_ND) if wants_grad else None
        grad_weight: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        z_loss = torch.zeros_like(loss)
        for begin in range(0, x_ND.shape[0], chunk):
            x_CD, targets_C = x_ND[begin : begin + chunk], targets_N[begin : begin + chunk]
            loss_C, z_C, grad_CV = piece(x_CD @ weight.T, targets_C, z_weight, wants_grad)
            loss += loss_C
            z_loss += z_C
            if grad_x is None or grad_CV is None:
                continue
            torch.mm(grad_CV, weight, out=grad_x[begin : begin + chunk])
            part = grad_CV.T @ x_CD
            # Pieces are summed in float32: a sum of many bfloat16 pieces would lose the small ones.
            grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        type_x, type_weight = ctx.types
        grad_x = (grad_x * grad_loss).to(type_x)
        return grad_x, (grad_weight * grad_loss).to(type_weight), None, None, None, None


def _product_type(x: Tensor) -> torch.dtype:
    """The type of matrix products: that of autocast where it is on, x's own otherwise."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_weight: float = 0.0,
    chunk: int = 4096,
    compiled: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the negative log likelihoods [nats] and of the squared log-partitions.

    Both are float32 sums over the targets that are not IGNORE. The gradient of the first result
    includes `z_weight` times the second; the second has none. At most `chunk` x V logits exist at a
    time. `compiled` fuses the passes over them (None: on a GPU).
    """
    if compiled is None:
        compiled = x_ND.is_cuda
    return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, z_weight, chunk, compiled)


def plain_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The slow twin of `chunked_cross_entropy`, through autograd and all logits at once."""
    logits_NV = (x_ND @ weight_VD.T.to(x_ND.dtype)).float()
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    z_loss = (torch.logsumexp(logits_NV, dim=-1).square() * (targets_N != IGNORE)).sum()
    if z_weight:
        loss = loss + z_weight * (z_loss - z_loss.detach())
    return loss, z_loss.detach()
