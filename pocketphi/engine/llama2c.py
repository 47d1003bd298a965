"""Weights in the first format of llama2.c (version 0), in which the tiny stories models are published.

Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocab_size
says that the head has a matrix of its own), then float32 tensors in the order below, layer by layer within
each. Source: https://github.com/karpathy/llama2.c, `legacy_export` in export.py. The file is untrusted:
its size must be exactly what the header implies.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from pocketphi.core.errors import CheckpointError, ConfigError
from pocketphi.engine.weights import Part, Shape, Weights, constant
from pocketphi.model.config import ModelConfig


def open_llama2c(path: Path | str) -> Weights:
    """Open a llama2.c version 0 file. Raises CheckpointError when header and size disagree."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 28:
                raise CheckpointError(f"{path}: {size} bytes are too few for a llama2.c header")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    D, F, layers, H, K, vocabulary, context = struct.unpack_from("<7i", data)
    try:
        config = ModelConfig(
            vocab_size=abs(vocabulary),
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=layers,
            num_attention_heads=H,
            num_key_value_heads=K,
            max_position_embeddings=context,
            tie_word_embeddings=vocabulary > 0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
    except (ConfigError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not a llama2.c file of version 0: {error}") from None
    d = config.head_dim
    tensors: list[tuple[str, Shape]] = [
        ("embed", (config.vocab_size, D)),
        ("attention_norm", (layers, D)),
        ("q", (layers, H * d, D)),
        ("k", (layers, K * d, D)),
        ("v", (layers, K * d, D)),
        ("output", (layers, D, H * d)),
        ("mlp_norm", (layers, D)),
        ("gate", (layers, F, D)),
        ("down", (layers, D, F)),
        ("up", (layers, F, D)),
        ("norm", (D,)),
        ("rotary tables", (2, context, d // 2)),
    ]
    if vocabulary < 0:
        tensors.append(("head", (config.vocab_size, D)))
    places: dict[str, tuple[int, Shape]] = {}
    at = 28
    for name, shape in tensors:
        places[name] = (at, shape)
        at += 4 * _count(shape)
    if at != size:
        raise CheckpointError(
            f"{path}: {size} bytes, its header implies {at}",
            hint="the file is cut short, or not a llama2.c file of version 0",
        )

    def part(name: str, layer: int | None = None, heads: int = 0) -> Part:
        start, shape = places[name]
        if layer is not None:
            shape = shape[1:]
            start += 4 * layer * _count(shape)
        view = data[start : start + 4 * _count(shape)]
        source = name if layer is None else f"{name} of layer {layer}"
        return Part(source, shape, "F32", constant(view), heads)

    parts: dict[str, tuple[Part, ...]] = {"embed": (part("embed"),), "norm": (part("norm"),)}
    parts["head"] = parts["embed"] if vocabulary > 0 else (part("head"),)
    for n in range(layers):
        for name in ("attention_norm", "output", "mlp_norm", "down"):
            parts[f"layers.{n}.{name}"] = (part(name, n),)
        parts[f"layers.{n}.qkv"] = (part("q", n, H), part("k", n, K), part("v", n))
        parts[f"layers.{n}.gate_up"] = (part("gate", n), part("up", n))
    weights = Weights(path, "llama", config, parts, file_bytes=size)
    weights.keep(data)
    return weights


def _count(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
