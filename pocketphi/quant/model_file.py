"""A model as a GGUF file of architecture `phi3`: names, metadata, order of the tensors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from pocketphi.engine.weights import Weights
from pocketphi.model.config import ModelConfig
from pocketphi.quant.config import SCHEMES, QuantConfig
from pocketphi.quant.gguf_writer import TensorPlan
from pocketphi.tokenizer import Tokenizer

_LAYER = {
    "attn_norm": "attention_norm",
    "attn_qkv": "qkv",
    "attn_output": "output",
    "ffn_norm": "mlp_norm",
    "ffn_up": "gate_up",
    "ffn_down": "down",
}


def tensor_plans(model: ModelConfig, types: dict[str, str]) -> list[TensorPlan]:
    """Return every tensor of the file in order; norms and rotary factors are F32."""
    D, F, d = model.hidden_size, model.intermediate_size, model.head_dim
    qkv = (model.num_attention_heads + 2 * model.num_key_value_heads) * d
    plans = [TensorPlan("token_embd.weight", (model.vocab_size, D), types["token_embd.weight"])]
    if model.rope_scaling is not None:
        plans += [TensorPlan(f"rope_factors_{k}.weight", (d // 2,), "F32") for k in ("long", "short")]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (D,),
        "attn_qkv": (qkv, D),
        "attn_output": (D, D),
        "ffn_norm": (D,),
        "ffn_up": (2 * F, D),
        "ffn_down": (D, F),
    }
    for n in range(model.num_hidden_layers):
        for part, shape in shapes.items():
            name = f"blk.{n}.{part}.weight"
            plans.append(TensorPlan(name, shape, types.get(name, "F32")))
    plans.append(TensorPlan("output_norm.weight", (D,), "F32"))
    if not model.tie_word_embeddings:
        plans.append(TensorPlan("output.weight", (model.vocab_size, D), types["output.weight"]))
    return plans


def source_array(weights: Weights, name: str) -> np.ndarray:
    """Return the float32 values of the tensor that the file calls `name`."""
    if name.startswith("rope_factors_"):
        assert weights.config.rope_scaling is not None
        kind = name.removeprefix("rope_factors_").removesuffix(".weight")
        return np.array(weights.config.rope_scaling[f"{kind}_factor"], dtype=np.float32)
    return weights.array(source_name(name))


def source_name(name: str) -> str:
    """GGUF's name of a tensor -> the engine's."""
    whole = {"token_embd.weight": "embed", "output_norm.weight": "norm", "output.weight": "head"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    return f"layers.{layer}.{_LAYER[part]}"


_PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")


def metadata(
    config: QuantConfig, model: ModelConfig, tokenizer: Tokenizer | None, lineage: dict[str, str]
) -> dict[str, Any]:
    """Return the metadata of the file: shape, tokenizer, and where it came from.

    The name contains "phi3": llama.cpp knows by it that role tokens swallow the blanks after them. Files
    with that name it refuses to load when one of `_PHI3_TOKENS` is missing; theirs must not contain it.
    """
    has_tokens = tokenizer is None or all(tokenizer.token_id(t) is not None for t in _PHI3_TOKENS)
    name = f"{config.name} phi3" if has_tokens else re.sub("(?i)phi-?3", "phi 3", config.name)
    original = model.original_max_position_embeddings or model.max_position_embeddings
    keys: dict[str, Any] = {
        "general.architecture": "phi3",
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        "general.file_type": SCHEMES[config.type].file_type,
        "phi3.vocab_size": model.vocab_size,
        "phi3.context_length": model.max_position_embeddings,
        "phi3.rope.scaling.original_context_length": original,
        "phi3.embedding_length": model.hidden_size,
        "phi3.feed_forward_length": model.intermediate_size,
        "phi3.block_count": model.num_hidden_layers,
        "phi3.attention.head_count": model.num_attention_heads,
        "phi3.attention.head_count_kv": model.num_key_value_heads,
        "phi3.attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "phi3.attention.sliding_window": model.sliding_window or 0,
        "phi3.rope.dimension_count": model.head_dim,
        "phi3.rope.freq_base": float(model.rope_theta),
    }
    if model.rope_scaling is not None:
        keys["phi3.rope.scaling.attn_factor"] = float(model.attention_factor)
    if tokenizer is not None:
        keys.update(tokenizer.gguf_metadata(num_rows=model.vocab_size))
    keys.update({f"pocketphi.{name}": value for name, value in lineage.items()})
    return keys
