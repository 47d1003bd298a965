"""What is watched beside loss and gradient norm, every `monitor_every_steps` steps.

- *update ratio*, overall and by group: norm of a step's change over the norm of the weights, on a fixed
  sample of at most 512 rows of each parameter. Healthy is about 1e-3 to 1e-2 at the peak rate.
- *attention logit maximum*: the largest scaled product of a query with a key it sees, over all layers
  and heads, on the first tokens of a row. Growth past about 100 announces the divergence that QK
  normalisation and lower rates are used against (arXiv 2302.05442, 2309.14322).
- *log-partition* (the z of the z-loss): mean square of log sum exp of the logits.

All are cheap: a pass without gradients over one short row, and copies of a few rows.

Shapes: B rows, T tokens, D width, H query heads, K key heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pocketphi.model.attention import Attention
from pocketphi.model.rope import rotate
from pocketphi.model.transformer import PhiForCausalLM
from pocketphi.train.acceleration import unaccelerated
from pocketphi.train.loss import TokenLoss
from pocketphi.train.parallel import World

_ROWS = 512
_TOKENS = 256


class UpdateRatio:
    """Compares the weights around one optimizer step: `before()`, the step, `after()`."""

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self._groups.setdefault(group_of(name, parameter), []).append(parameter)
        self._before: dict[str, list[Tensor]] = {}

    def before(self) -> None:
        self._before = {g: [_sample(p).clone() for p in members] for g, members in self._groups.items()}

    def after(self, world: World) -> dict[str, float]:
        """Ratio of each group, and of the 2-D weights together (`all`)."""
        sums: dict[str, list[float]] = {}
        for group, members in self._groups.items():
            change = size = 0.0
            for parameter, old in zip(members, self._before[group]):
                change += float((_sample(parameter) - old).double().square().sum())
                size += float(old.double().square().sum())
            sums[group] = world.total(change, size)
        self._before = {}
        matrices = [pair for group, pair in sums.items() if group != "norms"]
        sums["all"] = [sum(p[0] for p in matrices), sum(p[1] for p in matrices)]
        return {g: math.sqrt(change / size) if size else 0.0 for g, (change, size) in sums.items()}


def group_of(name: str, parameter: Tensor) -> str:
    """The monitor's group of a parameter, by its name."""
    if parameter.dim() < 2:
        return "norms"
    for part, group in (
        ("embed_tokens", "table"),
        ("lm_head", "head"),
        ("self_attn", "attention"),
        ("mlp", "mlp"),
    ):
        if part in name:
            return group
    return "other"


def _sample(parameter: nn.Parameter) -> Tensor:
    """Evenly spaced rows of what this rank holds."""
    local = parameter.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    return local[:: max(1, -(-local.shape[0] // _ROWS))] if local.shape[0] else local


def attention_logit_max(model: TokenLoss, ids_BT: Tensor, world: World) -> float:
    """Largest attention logit on the first tokens of the first row.

    A collective call where the model is sharded: it goes through the module that gathers the weights,
    and must come before a step's own forward pass (weights gathered here would be stale after its update).
    """
    found: list[Tensor] = []
    ids_BT = ids_BT[:1, :_TOKENS]
    with torch.no_grad(), unaccelerated(model.model), _watching(model.model, found):
        model(ids_BT, ids_BT, None)
    return world.largest(float(torch.stack(found).max()))


@contextmanager
def _watching(model: PhiForCausalLM, found: list[Tensor]) -> Iterator[None]:
    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        found.append(_largest_logit(module, *arguments[:3]))

    handles = [layer.self_attn.register_forward_pre_hook(look) for layer in model.model.layers]  # type: ignore[union-attr,operator]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _largest_logit(module: Attention, x_BTD: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor) -> Tensor:
    batch, tokens, _ = x_BTD.shape
    heads, kv_heads = module.num_heads, module.num_kv_heads
    qkv_BTAE = module.qkv_proj(x_BTD).view(batch, tokens, -1, module.head_dim)
    turned = rotate(qkv_BTAE[:, :, : heads + kv_heads], cos_BT1P, sin_BT1P).float()
    q_BHTE = turned[:, :, :heads].transpose(1, 2)
    k_BHTE = turned[:, :, heads:].transpose(1, 2).repeat_interleave(heads // kv_heads, dim=1)
    logits_BHTT = q_BHTE @ k_BHTE.transpose(2, 3) * module.scale
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=x_BTD.device).triu(1)
    return logits_BHTT.masked_fill(later, -math.inf).max()
