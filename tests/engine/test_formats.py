"""Dequantisation against the gguf package: every value equal bit for bit, for any bytes."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.core.errors import EngineError
from pocketphi.engine import formats

gguf = pytest.importorskip("gguf")


def _random_bytes(format: formats.Format, num_blocks: int, seed: int) -> np.ndarray:
    """Random blocks: every quant pattern, float16 scales of every magnitude incl. subnormal, but finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, num_blocks * format.block_bytes, dtype=np.uint8)
    blocks = raw.view(format.layout)
    for field in ("d", "dmin", "m", "v"):
        if field in (format.layout.names or ()) and format.layout[field] == np.dtype("<f2"):
            bits = rng.integers(0, 0x7C00, num_blocks, dtype=np.uint16)
            sign = rng.integers(0, 2, num_blocks, dtype=np.uint16) << 15
            blocks[field] = (bits | sign).view(np.float16)
    if format.name in ("F32", "BF16"):
        blocks["v"] = rng.standard_normal(num_blocks).astype(np.float32).view(np.uint32) >> (
            16 if format.name == "BF16" else 0
        )
    return raw


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_every_value_equals_the_gguf_package(name: str) -> None:
    format = formats.lookup(name)
    rows, row_blocks = 7, 3 * (1 if format.block_weights > 1 else 64)
    raw = _random_bytes(format, rows * row_blocks, seed=1)
    shape = (rows, row_blocks * format.block_weights)
    ours = formats.dequantise(raw, name, shape)
    kind = gguf.GGMLQuantizationType[name]
    view = {"F32": np.float32, "F16": np.float16}.get(name, np.uint8)
    theirs = gguf.quants.dequantize(raw.view(view).reshape(rows, -1), kind)
    assert ours.dtype == np.float32 and ours.shape == shape
    np.testing.assert_array_equal(
        ours.view(np.uint32), np.ascontiguousarray(theirs, np.float32).view(np.uint32)
    )


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_codes_and_sizes_are_those_of_ggml(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    format = formats.lookup(name)
    assert (format.block_weights, format.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert format.code == int(kind)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = _random_bytes(formats.lookup("Q6_K"), 40, seed=2)
    whole = formats.dequantise(raw, "Q6_K", (40, 256))
    monkeypatch.setattr(formats, "_CHUNK_WEIGHTS", 3 * 256)
    np.testing.assert_array_equal(whole, formats.dequantise(raw, "Q6_K", (40, 256)))


def test_bad_input_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"IQ2_XS.*not supported"):
        formats.dequantise(b"", "IQ2_XS", (1, 256))
    with pytest.raises(EngineError, match="33 bytes, expected 34"):
        formats.dequantise(bytes(33), "Q8_0", (1, 32))
    with pytest.raises(EngineError, match="rows of 48"):
        formats.dequantise(bytes(102), "Q8_0", (2, 48))
