"""A model with its loss, one module that a trainer (and FSDP) wraps.

Shapes: B rows, T tokens of a row, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pocketphi.model.transformer import PhiForCausalLM
from pocketphi.train.cross_entropy import chunked_cross_entropy


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
