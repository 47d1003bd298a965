"""Random weights of a known shape, for measuring speed and memory without a model file.

Speed depends on shapes and formats, not on values; the values only have to stay finite through all layers,
so they get the spread that trained weights have. Bytes are made when they are asked for, so that no copy of
a large model stands in memory beside the one that the backend keeps.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from pocketphi.engine import formats
from pocketphi.engine.weights import Part, Shape, Weights
from pocketphi.model.config import ModelConfig, config_names

_SPREAD = 0.02
_TILE_BLOCKS = 1 << 15


def shape_named(name: str) -> ModelConfig:
    """Return a shipped configuration; "phi-3-mini" alone means its 4k variant. ConfigError otherwise."""
    return ModelConfig.named(f"{name}-4k" if f"{name}-4k" in config_names() else name)


def random_weights(config: ModelConfig, *, type: str = "Q4_0", name: str = "random") -> Weights:
    """Return weights of `config`'s shape in the given format (norms in F32).

    Raises EngineError for an unknown format or rows that do not fill its blocks.
    """
    format = formats.lookup(type)
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    weights = Weights(Path(name), "phi3", config, {})

    def matrix(source: str, rows: int, columns: int) -> tuple[Part, ...]:
        format.num_bytes(columns)
        return (
            Part(source, (rows, columns), format.name, functools.partial(_blocks, format, (rows, columns))),
        )

    def norm(source: str) -> tuple[Part, ...]:
        return (Part(source, (D,), "F32", lambda: np.ones(D, np.float32).tobytes()),)

    parts = weights.parts
    parts["embed"] = matrix("embed", V, D)
    parts["head"] = parts["embed"] if config.tie_word_embeddings else matrix("head", V, D)
    parts["norm"] = norm("norm")
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}."
        parts[at + "attention_norm"], parts[at + "mlp_norm"] = norm("attention_norm"), norm("mlp_norm")
        parts[at + "qkv"] = matrix("qkv", (H + 2 * K) * d, D)
        parts[at + "output"] = matrix("output", D, H * d)
        parts[at + "gate_up"] = matrix("gate_up", 2 * F, D)
        parts[at + "down"] = matrix("down", D, F)
    weights.file_bytes = sum(weights.types().values())
    return weights


def _blocks(format: formats.Format, shape: Shape) -> memoryview:
    count = format.num_bytes(int(np.prod(shape, dtype=np.int64))) // format.block_bytes
    tile = _tile(format.name)
    # One tile again and again: making fresh random numbers for gigabytes would take minutes.
    return np.tile(tile, -(-count // tile.size))[:count].view(np.uint8).data


@functools.cache
def _tile(name: str) -> np.ndarray:
    format = formats.lookup(name)
    rng = np.random.default_rng(0)
    if "v" in (format.layout.names or ()):
        values = (rng.standard_normal(_TILE_BLOCKS) * _SPREAD).astype(np.float32)
        blocks = np.zeros(_TILE_BLOCKS, format.layout)
        blocks["v"] = values.view(np.uint32) >> 16 if name == "BF16" else values
        return blocks
    raw = rng.integers(0, 256, _TILE_BLOCKS * format.block_bytes, dtype=np.uint8)
    blocks = raw.view(format.layout)
    # Scale a block so that its values have the spread; a minimum of half the range centres them.
    for field in ("d", "dmin", "m"):
        if field in (format.layout.names or ()):
            blocks[field] = 0
    blocks["d"] = 1
    spread = float(format.decode(blocks[:256]).std())
    blocks["d"] = _SPREAD / spread
    mean = float(format.decode(blocks[:256]).mean())
    if "m" in (format.layout.names or ()):
        blocks["m"] = -mean
    if "dmin" in (format.layout.names or ()):
        blocks["dmin"] = 1
        shift = -float((format.decode(blocks[:256]).mean()) - mean)
        blocks["dmin"] = mean / shift
    return blocks
