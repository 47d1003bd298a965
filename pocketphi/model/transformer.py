"""The dense Phi-3 decoder. Parameter names are those of Hugging Face's Phi-3 checkpoints.

Shape legend: B batch, T new tokens, S all tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from pocketphi.core.errors import UserError
from pocketphi.model.attention import Attention, AttentionMask, KVCache, LayerCache, make_mask
from pocketphi.model.config import ModelConfig
from pocketphi.model.layers import GatedMLP, RMSNorm
from pocketphi.model.rope import RotaryEmbedding

# (config, document_ids_BT or None, num_tokens, device) -> mask, for whole sequences without a cache.
MaskBuilder = Callable[[ModelConfig, "Tensor | None", int, torch.device], AttentionMask]


@dataclass(frozen=True)
class ForwardPlan:
    """What all layers share in one forward pass: rotary tables and the mask."""

    cos_BT1P: Tensor
    sin_BT1P: Tensor
    mask: AttentionMask


class Block(nn.Module):
    """Pre-norm decoder layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        cos_BT1P: Tensor,
        sin_BT1P: Tensor,
        mask: AttentionMask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BT1P, sin_BT1P, mask, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class PhiDecoder(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class PhiForCausalLM(nn.Module):
    """A decoder with its language-model head: `model(ids_BT) -> logits_BTV`.

    `stop_ids` are the ids that end a turn, read from and written to `generation_config.json`.
    `mask_builder` may be set to use another attention for whole sequences (training with
    FlexAttention); `checkpoint_layers` recomputes the first so many layers in the backward pass.
    `output_factor` multiplies the final states (see parametrization.py; 1 in every saved model).
    Initial weights come from torch's default generator; see `reset_parameters`.

    Raises ConfigError when the configuration's LongRoPE lists are not known in full.
    """

    def __init__(self, config: ModelConfig, *, scale_residual: bool = False) -> None:
        super().__init__()
        config.require_factors()
        self.config = config
        self.model = PhiDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config)
        self.mask_builder: MaskBuilder | None = None
        self.checkpoint_layers = 0
        self.output_factor = 1.0
        self.stop_ids: tuple[int, ...] = default_stop_ids(config)
        self.tie_weights()
        if self.lm_head.weight.device.type != "meta":
            self.reset_parameters(scale_residual=scale_residual)

    def tie_weights(self) -> None:
        """Make the head share the embedding table when the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self, *, scale_residual: bool = False, seed: int | None = None) -> None:
        """Draw new weights: normal with deviation `initializer_range` (0.02), norms 1.

        `scale_residual` divides the deviation of the two projections that write into the residual
        stream (o_proj, down_proj) by sqrt(2 * layers), so that the stream's variance at the start
        does not grow with depth (GPT-2; Phi-3-small does the same). `seed` makes the draw repeatable
        without touching torch's default generator; the numbers are drawn on the CPU in float32, so
        they do not depend on device or type.
        """
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        residual = (2 * self.config.num_hidden_layers) ** -0.5 if scale_residual else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= residual
            if generator is None and parameter.device.type != "cpu":
                parameter.normal_(0.0, std)
            else:
                draw = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(draw.normal_(0.0, std, generator=generator))

    @property
    def num_parameters(self) -> int:
        """Parameters held; tied embeddings are counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the logits [B, T, V] of the token that follows each token. See `hidden`."""
        return self.lm_head(
            self.hidden(ids_BT, document_ids_BT=document_ids_BT, positions_BT=positions_BT, cache=cache)
        )

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        document_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final hidden states [B, T, D], before the head.

        `document_ids_BT` (equal ids must be adjacent) keeps packed documents apart: no token sees
        another document, positions restart at each document, and LongRoPE's factor set is chosen per
        document; the result equals running the documents separately. Otherwise the set is chosen by
        the longest position of the batch, as transformers does.
        `positions_BT` overrides positions (default: counted on from the cache).
        `cache` continues a sequence and is updated.

        Raises UserError for a cache together with documents or positions, and for an empty input.
        """
        if ids_BT.dim() != 2 or ids_BT.shape[1] == 0:
            raise UserError(f"expected token ids of shape [batch, tokens], found {tuple(ids_BT.shape)}")
        if cache is not None and (document_ids_BT is not None or positions_BT is not None):
            raise UserError("a cache counts positions itself: give no documents and no positions with it")
        num_new = ids_BT.shape[1]
        if cache is not None:
            all_ids_BS = cache.remember(ids_BT)
            long = self.rotary.switches and all_ids_BS.shape[1] > self.rotary.switch_length
            if long != cache.long and cache.length:
                cache.num_recomputed += cache.length
                cache.clear_keys()
                ids_BT = all_ids_BS
            cache.long = long
        plan = self.plan(
            ids_BT.shape[1],
            ids_BT.device,
            past=cache.length if cache is not None else 0,
            document_ids_BT=document_ids_BT,
            positions_BT=positions_BT,
        )
        x_BTD = self.model.embed_tokens(ids_BT)
        for index, layer in enumerate(self.model.layers):
            layer_cache = cache.layers[index] if cache is not None else None
            arguments = (x_BTD, plan.cos_BT1P, plan.sin_BT1P, plan.mask)
            if index < self.checkpoint_layers and torch.is_grad_enabled() and cache is None:
                x_BTD = torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BTD = layer(*arguments, layer_cache)
        # After a recomputation only the new tokens were asked for.
        x_BTD = self.model.norm(x_BTD[:, -num_new:])
        return x_BTD if self.output_factor == 1.0 else x_BTD * self.output_factor

    def plan(
        self,
        num_tokens: int,
        device: torch.device,
        *,
        past: int = 0,
        document_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> ForwardPlan:
        """Return the rotary tables and the mask of a pass over `num_tokens` after `past` tokens."""
        long: bool | Tensor = False
        limit = self.rotary.switch_length
        if document_ids_BT is not None:
            starts_BT, lengths_BT = document_extents(document_ids_BT)
            if positions_BT is None:
                positions_BT = torch.arange(num_tokens, device=device)[None] - starts_BT
            if self.rotary.switches and num_tokens > limit:
                long = lengths_BT > limit
        elif positions_BT is None:
            positions_BT = torch.arange(past, past + num_tokens, device=device)[None]
            long = self.rotary.switches and past + num_tokens > limit
        elif self.rotary.switches:
            long = int(positions_BT.max()) + 1 > limit
        cos_BT1P, sin_BT1P = self.rotary.tables(positions_BT, long)
        if past == 0 and self.mask_builder is not None:
            mask = self.mask_builder(self.config, document_ids_BT, num_tokens, device)
        else:
            mask = make_mask(
                self.config, num_tokens, past + num_tokens, device, document_ids_BT, document_ids_BT
            )
        return ForwardPlan(cos_BT1P, sin_BT1P, mask)


def document_extents(document_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """First index and length of the document that each token belongs to, both [B, T]."""
    num_tokens = document_ids_BT.shape[1]
    index_T = torch.arange(num_tokens, device=document_ids_BT.device)
    changes_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    changes_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts_BT = torch.where(changes_BT, index_T, 0).cummax(dim=1).values
    ends_BT = torch.ones_like(changes_BT)
    ends_BT[:, :-1] = changes_BT[:, 1:]
    # The nearest end at or after each token: a running minimum from the right.
    last_BT = torch.where(ends_BT, index_T, num_tokens).flip(1).cummin(dim=1).values.flip(1)
    return starts_BT, last_BT - starts_BT + 1


def default_stop_ids(config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a turn when no generation_config says it.

    Phi-3's vocabulary ends with 64 added slots, of which the first is <|endoftext|>, the second
    <|assistant|> and the eighth <|end|>; registering only the first is the best-known bug of Phi-3
    ports. Other vocabularies have what the configuration names.
    """
    eos = config.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if config.vocab_size == 32064 and 32000 in ids:
        ids = [*ids, *(i for i in (32001, 32007) if i not in ids)]
    return tuple(ids)
