"""Cross-entropy of the head in pieces: all logits of a batch never exist at once.

Shapes: N tokens of the batch, C tokens of a piece, D model width, V vocabulary.

The gradient is computed in the forward pass, piece by piece, while a piece's logits are in the
cache; the backward pass only scales it. Products are in the input's type, sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocketphi.model.transformer import PhiForCausalLM
from pocketphi.train.data import IGNORE


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        weight = weight_VD.to(x_ND.dtype)
        grad_x = torch.empty_like(x_ND) if wants_grad else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        z_loss = torch.zeros_like(loss)
        for begin in range(0, x_ND.shape[0], chunk):
            x_CD, targets_C = x_ND[begin : begin + chunk], targets_N[begin : begin + chunk]
            counted_C = targets_C != IGNORE
            safe_C1 = targets_C.clamp(min=0)[:, None]
            logits_CV = (x_CD @ weight.T).float()
            lse_C = torch.logsumexp(logits_CV, dim=-1)
            loss += ((lse_C - logits_CV.gather(1, safe_C1)[:, 0]) * counted_C).sum()
            z_loss += (lse_C.square() * counted_C).sum()
            if grad_x is None or grad_weight is None:
                continue
            # d loss / d logits = softmax - onehot; d z / d logits = 2 lse softmax.
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_()
            if z_weight:
                grad_CV *= (1 + 2 * z_weight * lse_C)[:, None]
            grad_CV.scatter_add_(1, safe_C1, torch.full_like(lse_C, -1.0)[:, None])
            grad_CV *= counted_C[:, None]
            grad_CV = grad_CV.to(x_ND.dtype)
            torch.mm(grad_CV, weight, out=grad_x[begin : begin + chunk])
            if weight_VD.dtype == x_ND.dtype:
                grad_weight.addmm_(grad_CV.T, x_CD)
            else:
                grad_weight += grad_CV.T @ x_CD
        if grad_x is not None and grad_weight is not None:
            ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        return (
            grad_x * grad_loss.to(grad_x.dtype),
            (grad_weight * grad_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, z_weight: float = 0.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Sum of the negative log likelihoods [nats] and of the squared log-partitions, over the targets
    that are not IGNORE. The gradient of the first result includes `z_weight` times the second."""
    return _ChunkedCrossEntropy.apply(x_ND, weight_VD, targets_N, z_weight, chunk)


class TokenLoss(nn.Module):
    """A model with its loss, so that a forward pass gives one number (and FSDP wraps one module)."""

    def __init__(self, model: PhiForCausalLM, *, z_weight: float = 0.0, chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.z_weight, self.chunk = z_weight, chunk

    def forward(
        self, ids_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss [nats] and the summed squared log-partition; see above."""
        x_BTD = self.model.hidden(ids_BT, document_ids_BT=documents_BT)
        return chunked_cross_entropy(
            x_BTD.flatten(0, 1),
            self.model.lm_head.weight,
            targets_BT.flatten(),
            z_weight=self.z_weight,
            chunk=self.chunk,
        )
