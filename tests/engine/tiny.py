"""Tiny random models for engine tests, written by transformers and by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

VOCAB = 320


def longrope(head_dim: int, seed: int = 0) -> dict[str, Any]:
    """Short and long factor lists, non-decreasing as published ones are, and far apart."""
    rng = np.random.default_rng(seed)
    short = 1 + np.sort(rng.random(head_dim // 2)) * 0.5
    long = 1 + np.sort(rng.random(head_dim // 2)) * 20
    return {"type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}


def phi3_folder(folder: Path, *, seed: int = 0, **changes: Any) -> tuple[Path, Any]:
    """Save a random Phi-3 with transformers; returns the folder and the model, which is the judge."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "sliding_window": None,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Far from the default 0.02: attention patterns and logits must differ clearly between tokens.
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    shape.update(changes)
    torch.manual_seed(seed)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape)).eval().float()
    model.save_pretrained(folder)
    return folder, model


def llama_model(*, seed: int = 0, **changes: Any) -> Any:
    """A random Llama of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }
    shape.update(changes)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval().float()


def judge_logits(model: Any, ids: list[int]) -> np.ndarray:
    """The judge's logits [T, V] for one whole sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def random_ids(count: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


def llama_gguf(
    path: Path, model: Any, *, kind: str = "F32", skip: str = "", extra: str = "", **metadata: Any
) -> Path:
    """Write a transformers Llama as GGUF the way llama.cpp's converter does, q and k permuted."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), metadata.pop("arch", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if "tokens" in metadata:
        writer.add_token_list(metadata.pop("tokens"))
    for key, value in metadata.items():
        writer.add_uint32(f"llama.{key}", value)

    def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
        # convert_hf_to_gguf.py, LlamaModel.permute
        return (
            weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            .swapaxes(1, 2)
            .reshape(weight.shape)
        )

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        values = tensor.numpy()
        if stem in top:
            target = top[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{names[rest]}"
            if rest == "self_attn.q_proj":
                values = permuted(values, config.num_attention_heads)
            if rest == "self_attn.k_proj":
                values = permuted(values, config.num_key_value_heads)
        if target == skip:
            continue
        if values.ndim == 2 and kind != "F32":
            quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(f"{target}.weight", quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(f"{target}.weight", np.ascontiguousarray(values))
    if extra:
        writer.add_tensor(extra, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def phi3_gguf(path: Path, model: Any, *, attn_factor: float | None = None) -> Path:
    """Write a transformers Phi-3 as GGUF the way llama.cpp's converter does (fused, not permuted)."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "phi3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(config.sliding_window or 0)
    if attn_factor is not None:
        writer.add_rope_scaling_attn_factors(attn_factor)
    names = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in top:
            target = top[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{names[rest]}"
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(tensor.numpy()))
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    for kind in ("long", "short"):
        if scaling.get(f"{kind}_factor"):
            writer.add_tensor(
                f"rope_factors_{kind}.weight", np.asarray(scaling[f"{kind}_factor"], np.float32)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
