"""What makes a model train fast on a GPU, each part by choice: compiled blocks, the attention kernel,
one-pass gradients of the gated activation, 8-bit products, recomputed activations.

`accelerate` changes a model in place; parameters keep their names and objects, so checkpoints and
optimizers do not notice. On a CPU all of it may stay off, and every part equals the plain model within
rounding (tests/train/test_acceleration.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pocketphi.core.errors import ConfigError
from pocketphi.model.attention import AttentionMask, make_mask, visible
from pocketphi.model.config import ModelConfig
from pocketphi.model.layers import gated_silu
from pocketphi.model.transformer import Block, PhiForCausalLM
from pocketphi.train.float8 import Float8Config, use_float8


@dataclass
class AccelerationConfig:
    """`compile`: each distinct block is compiled once and reused by all layers.
    `attention`: `sdpa` (cuDNN or FlashAttention; document masks and windows become dense masks, which
    are exact and slow), `flex` (FlexAttention: masks skip whole tiles; compiled), or `auto` (flex on a
    GPU where a mask is needed, sdpa otherwise). `float8`: off, tensorwise or rowwise; see float8.py.
    `checkpoint_layers`: how many layers recompute their activations in the backward pass.
    """

    compile: bool = True
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    float8_fused: bool = True
    checkpoint_layers: int = 0

    def __post_init__(self) -> None:
        if self.checkpoint_layers < 0:
            raise ConfigError(f"checkpoint_layers must not be negative, found {self.checkpoint_layers}")


def accelerate(model: PhiForCausalLM, config: AccelerationConfig) -> PhiForCausalLM:
    """Apply `config` to `model` in place and return it. Raises ConfigError where a part cannot work."""
    on_gpu = model.lm_head.weight.is_cuda
    model.checkpoint_layers = min(config.checkpoint_layers, model.config.num_hidden_layers)
    if config.float8 != "off":
        use_float8(model.model.layers, Float8Config(scaling=config.float8, fused=config.float8_fused))
    if config.attention == "flex" or (config.attention == "auto" and on_gpu):
        model.mask_builder = functools.partial(flex_mask, always=config.attention == "flex")
    if on_gpu:
        for layer in model.model.layers:
            cast(Block, layer).mlp.activation = fused_gated_silu
    if config.compile:
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
        model.model.norm.compile(fullgraph=True, dynamic=False)
    return model


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NG: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_NG)
        return gated_silu(x_NG)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> Tensor:  # type: ignore[override]
        (x_NG,) = ctx.saved_tensors
        if not x_NG.is_cuda:
            return gated_silu_gradient(x_NG, dy_NF)
        from pocketphi.train.activation_kernels import gated_silu_backward

        return gated_silu_backward(x_NG, dy_NF.contiguous())


def fused_gated_silu(gate_up: Tensor) -> Tensor:
    """`model.layers.gated_silu` whose gradient is made in one pass over memory."""
    flat_NG = gate_up.reshape(-1, gate_up.shape[-1])
    return _GatedSilu.apply(flat_NG).view(*gate_up.shape[:-1], -1)


def gated_silu_gradient(x_NG: Tensor, dy_NF: Tensor) -> Tensor:
    """Gradient [N, 2F] of the gated activation of x = [gate | up]."""
    gate_NF, up_NF = x_NG.chunk(2, dim=-1)
    sigmoid_NF = torch.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    return torch.cat((dy_NF * up_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF)), dy_NF * silu_NF), dim=-1)


@contextlib.contextmanager
def fastest_attention() -> Iterator[None]:
    """Prefer cuDNN's attention (about 1.5 times FlashAttention-2 on Hopper), then the others.

    Kernels are chosen while a block is compiled, so the first steps must run inside.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        yield


@contextlib.contextmanager
def unaccelerated(model: PhiForCausalLM) -> Iterator[None]:
    """Run `model` uncompiled and with plain masks inside the block.

    Evaluation and sampling come with another shape at almost every call, and each shape would be
    compiled anew (or, past the compiler's limit, refused).
    """
    builder, model.mask_builder = model.mask_builder, None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.mask_builder = builder


def flex_mask(
    config: ModelConfig,
    document_ids_BT: Tensor | None,
    num_tokens: int,
    device: torch.device,
    *,
    always: bool = False,
) -> AttentionMask:
    """A FlexAttention mask for documents and windows; the plain causal one where nothing is masked.

    `always` uses FlexAttention even then (tests). Same rule as dense masks: `attention.visible`.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    plain = make_mask(config, num_tokens, num_tokens, device) if document_ids_BT is None else None
    if plain is not None and plain.dense is None and not always:
        return plain
    window = config.visible_window
    window = None if window is None or num_tokens <= window else window

    if document_ids_BT is None:

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(query, key, window)
    else:
        documents = document_ids_BT

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(query, key, window, documents[b, query], documents[b, key])

    rows = None if document_ids_BT is None else document_ids_BT.shape[0]
    make = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    block_mask = make(sees, rows, None, num_tokens, num_tokens, device=device)
    return AttentionMask(kernel=_flex_kernel, kernel_data=block_mask)


@functools.cache
def _compiled_create_block_mask() -> Any:
    # Without compilation the mask is built element by element in memory: [B, T, T] booleans.
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)


def _flex_kernel(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, block_mask: Any, scale: float | None = None
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    # A compiled FlexAttention (PyTorch 2.13, CPU) ignores where a slice of a tensor made in the same
    # graph begins, and reads the wrong heads. Copies of their own are exact; see the tests.
    q_BHTE, k_BKSE, v_BKSE = q_BHTE.contiguous(), k_BKSE.contiguous(), v_BKSE.contiguous()
    return flex_attention(q_BHTE, k_BKSE, v_BKSE, block_mask=block_mask, enable_gqa=grouped, scale=scale)
