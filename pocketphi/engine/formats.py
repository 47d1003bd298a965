"""Number formats of GGUF tensors: block layouts, and how a block becomes float32.

A quantised row is a sequence of blocks of 32 or 256 weights, each with its own scale. Layouts follow
ggml (`ggml-common.h` of llama.cpp, as documented in its gguf-py package); the arithmetic below is done in
float32 in the same order as there, so that the values agree bit for bit.

Legend: B blocks, G groups (sub-blocks with a scale of their own) of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pocketphi.core.errors import EngineError, did_you_mean

K_BLOCK = 256
"""Weights of one block of the K formats."""

# How many blocks are turned to float32 at a time: intermediate arrays stay in the cache.
_CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Format:
    """One number format.

    code: the number that stands for it in a GGUF file.
    layout: numpy dtype of one block, fields in file order.
    """

    name: str
    code: int
    block_weights: int
    layout: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]

    @property
    def block_bytes(self) -> int:
        return self.layout.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_weights

    def num_bytes(self, num_weights: int) -> int:
        """Bytes of `num_weights` weights; EngineError unless they fill whole blocks."""
        if num_weights % self.block_weights:
            raise EngineError(f"{num_weights} weights do not fill {self.name} blocks of {self.block_weights}")
        return num_weights // self.block_weights * self.block_bytes


def _plain(blocks: np.ndarray) -> np.ndarray:
    return blocks["v"].astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    # A bfloat16 is the upper half of a float32.
    return (blocks["v"].astype(np.uint32) << 16).view(np.float32)


def _low_then_high(packed: np.ndarray) -> np.ndarray:
    """Split bytes into 4-bit values: all low halves of a group first, then all high halves (last axis)."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["d"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    values = _low_then_high(blocks["q"]).astype(np.float32) - np.float32(8)
    return blocks["d"].astype(np.float32)[:, None] * values


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    d = blocks["d"].astype(np.float32)[:, None]
    m = blocks["m"].astype(np.float32)[:, None]
    return d * _low_then_high(blocks["q"]).astype(np.float32) + m


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the 12 bytes of Q4_K and Q5_K into 8 scales and 8 minima of 6 bits: [B, 8], [B, 8].

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low 6 bits; the upper 2 bits are those of
    scales and minima 4-7, whose low 4 bits are the halves of bytes 8-11.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_affine(blocks: np.ndarray, values_BGW: np.ndarray) -> np.ndarray:
    """Scale and shift the 8 groups of 32 of a Q4_K or Q5_K block: d·scale·value − dmin·minimum."""
    scales, minima = _k_scales(blocks["scales"])
    d_BG1 = (blocks["d"].astype(np.float32)[:, None] * scales)[:, :, None]
    m_BG1 = (blocks["dmin"].astype(np.float32)[:, None] * minima)[:, :, None]
    return (d_BG1 * values_BGW.astype(np.float32) - m_BG1).reshape(-1, K_BLOCK)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    # 4 runs of 32 bytes; a run's low halves are one group, its high halves the next.
    return _k_affine(blocks, _low_then_high(blocks["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = _low_then_high(blocks["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of byte i is the fifth bit of weight i of group g.
    high = (blocks["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _k_affine(blocks, low | (high << 4))


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    # Two halves of 128 weights: 64 bytes of low nibbles, and 32 bytes whose bit pairs are the high parts.
    low = _low_then_high(blocks["q"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = (blocks["high"].reshape(-1, 2, 1, 32) >> pairs) & 3
    values = (low | (high << 4)).astype(np.float32) - np.float32(32)
    scale_BG1 = (blocks["d"].astype(np.float32)[:, None] * blocks["scales"].astype(np.float32))[:, :, None]
    return (scale_BG1 * values.reshape(-1, 16, 16)).reshape(-1, K_BLOCK)


def _make(name: str, code: int, weights: int, fields: list[tuple], decode: Callable) -> Format:
    return Format(name, code, weights, np.dtype(fields), decode)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _make("F32", 0, 1, [("v", "<f4")], _plain),
        _make("F16", 1, 1, [("v", "<f2")], _plain),
        _make("BF16", 30, 1, [("v", "<u2")], _bf16),
        _make("Q8_0", 8, 32, [("d", "<f2"), ("q", "i1", 32)], _q8_0),
        _make("Q4_0", 2, 32, [("d", "<f2"), ("q", "u1", 16)], _q4_0),
        _make("Q4_1", 3, 32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], _q4_1),
        _make(
            "Q4_K", 12, 256, [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)], _q4_k
        ),
        _make(
            "Q5_K",
            13,
            256,
            [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)],
            _q5_k,
        ),
        _make(
            "Q6_K", 14, 256, [("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")], _q6_k
        ),
    )
}
"""Every format that the engine reads, by name."""


def lookup(name: str) -> Format:
    """Return the format called `name`; EngineError that lists the known ones otherwise."""
    try:
        return FORMATS[name]
    except KeyError:
        raise EngineError(
            f"tensor type '{name}' is not supported{did_you_mean(name, FORMATS)}",
            hint=f"supported: {', '.join(FORMATS)}; convert the file to one of these",
        ) from None


def dequantise(raw: np.ndarray | bytes | memoryview, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Turn the bytes of a tensor into a new float32 array of `shape` (row-major, as in NumPy).

    Raises EngineError when the type is unknown, a row does not fill whole blocks, or the bytes are not
    exactly those of the shape.
    """
    format = lookup(name)
    num_weights = 1
    for size in shape:
        num_weights *= int(size)
    if shape and shape[-1] % format.block_weights:
        raise EngineError(
            f"rows of {shape[-1]} weights do not fill {format.name} blocks of {format.block_weights}"
        )
    data = np.frombuffer(raw, dtype=np.uint8)
    if data.size != format.num_bytes(num_weights):
        raise EngineError(
            f"{format.name} tensor of shape {tuple(shape)}: {data.size} bytes, "
            f"expected {format.num_bytes(num_weights)}"
        )
    blocks = data.view(format.layout)
    out = np.empty((blocks.size, format.block_weights), dtype=np.float32)
    step = max(1, _CHUNK_WEIGHTS // format.block_weights)
    for start in range(0, blocks.size, step):
        part = blocks[start : start + step]
        out[start : start + step] = format.decode(part).reshape(-1, format.block_weights)
    return out.reshape(shape)
