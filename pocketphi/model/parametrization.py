"""Maximal-update parametrisation: the learning rate found on a narrow model holds for a wide one.

Everything is stated relative to a base width D0, at which the model equals the standard one. With
m = D / D0 (hidden sizes; the MLP is taken to grow alike):

                    init deviation     AdamW rate   Muon rate      forward
embeddings          s                  1            -              -
block matrices      s / sqrt(m)        1 / m        1 / sqrt(m)    -
head, or tied table s                  1            -              final state times 1 / m
norms               1                  1            -              -
attention           -                  -            -              logits times sqrt(E0) / E, not E^-1/2

where s is `initializer_range` and E0 a base head size (the same head size at every width changes
nothing). Weight decay is per step: a group whose rate is divided has its decay multiplied, so that
rate times decay stays. Muon's orthogonal update has the same spectral norm at every width when its
AdamW-sized form is divided by sqrt(m).

The two forward factors are folded into weights on export (`folded`): the final norm takes 1 / m, the
rows of the queries take sqrt(E0 / E). The exported folder is a plain Phi-3.

Sources: Yang et al., Tensor Programs V (arXiv 2203.03466), table 8; Yang, Simon, Bernstein, A Spectral
Condition for Feature Learning (arXiv 2310.17813) for Muon. Phi-3-small's rates were found so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketphi.core.errors import ConfigError
from pocketphi.model.config import ModelConfig
from pocketphi.model.transformer import PhiForCausalLM


@dataclass(frozen=True)
class MaximalUpdate:
    """The factors of one shape against its base; `base_head_dim` 0 means the shape's own."""

    width: int
    head_dim: int
    base_width: int
    base_head_dim: int = 0

    def __post_init__(self) -> None:
        if self.base_width < 1 or self.base_head_dim < 0:
            raise ConfigError("mup_base_width must be positive, mup_base_head_dim not negative")

    @classmethod
    def of(cls, config: ModelConfig, base_width: int, base_head_dim: int = 0) -> MaximalUpdate:
        return cls(config.hidden_size, config.head_dim, base_width, base_head_dim)

    @property
    def multiplier(self) -> float:
        """m, how many times wider than the base."""
        return self.width / self.base_width

    @property
    def query_factor(self) -> float:
        """sqrt(E0 / E): the attention scale over the standard one."""
        return ((self.base_head_dim or self.head_dim) / self.head_dim) ** 0.5

    def rate_factor(self, group: str, kind: str) -> float:
        """Factor on the learning rate of an optimizer's group (`kind` adamw or muon)."""
        if group != "matrices":
            return 1.0
        return self.multiplier**-0.5 if kind == "muon" else 1 / self.multiplier

    @torch.no_grad()
    def start(self, model: PhiForCausalLM, *, redraw: bool = True) -> None:
        """Set the forward factors of a model. With `redraw` its weights are standard initial ones, and the
        block matrices get their deviation; without, they are a plain model's, whose function stays."""
        model.output_factor = 1 / self.multiplier
        for layer in model.model.layers:
            layer.self_attn.scale = self.query_factor * self.head_dim**-0.5  # type: ignore[union-attr]
        if redraw:
            for name, parameter in model.named_parameters():
                if ".layers." in name and parameter.dim() == 2:
                    parameter.mul_(self.multiplier**-0.5)
            return
        parameters = dict(model.named_parameters())
        for name, weight in folded(model, parameters.items(), inverse=True):
            parameters[name].copy_(weight)


def is_plain(model: PhiForCausalLM) -> bool:
    """Whether the model has no forward factor, so that its weights alone say what it computes."""
    return model.output_factor == 1.0 and all(f == 1.0 for f in _query_factors(model))


def folded(
    model: PhiForCausalLM, weights: Iterable[tuple[str, Tensor]], *, inverse: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) with the forward factors of `model` inside the weights.

    `inverse` takes them out again: a plain model's weights for training under these factors.
    """
    power = -1 if inverse else 1
    factors = _query_factors(model)
    for name, weight in weights:
        if name == "model.norm.weight" and model.output_factor != 1.0:
            weight = weight * model.output_factor**power
        if name.endswith("self_attn.qkv_proj.weight"):
            factor = factors[int(name.split(".")[2])]
            if factor != 1.0:
                weight = weight.clone()
                weight[: model.config.hidden_size] *= factor**power
        yield name, weight


def _query_factors(model: PhiForCausalLM) -> list[float]:
    standard = model.config.head_dim**-0.5
    return [
        1.0 if layer.self_attn.scale == standard else layer.self_attn.scale / standard  # type: ignore[union-attr,operator]
        for layer in model.model.layers
    ]
