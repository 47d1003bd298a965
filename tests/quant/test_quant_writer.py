"""GGUF files as written: read by the `gguf` package and by our own reader, and repeatable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketphi.core.errors import EngineError, UserError
from pocketphi.core.gguf import GgufFile
from pocketphi.quant.gguf_writer import TensorPlan, write_gguf

METADATA = {
    "general.architecture": "phi3",
    "a.small": 7,
    "a.large": 2**40,
    "a.negative": -3,
    "a.float": 0.25,
    "a.true": True,
    "a.text": "Grüße",
    "a.texts": ["x", "", "é"],
    "a.ints": [1, -2, 3],
    "a.floats": [0.5, 1.0],
    "a.flags": [True, False],
}


def test_both_readers_agree(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    arrays = {
        "odd": rng.normal(size=(3, 5)).astype(np.float32),
        "row": rng.normal(size=7).astype(np.float32),
        "blocks": rng.integers(0, 255, size=(4, 2 * 34), dtype=np.uint8),
    }
    plans = [
        TensorPlan("odd", (3, 5), "F32"),
        TensorPlan("row", (7,), "F32"),
        TensorPlan("blocks", (4, 64), "Q8_0"),
    ]
    size = write_gguf(tmp_path / "m.gguf", METADATA, plans, lambda p: arrays[p.name])
    assert size == (tmp_path / "m.gguf").stat().st_size
    ours, judge = GgufFile(tmp_path / "m.gguf"), gguf.GGUFReader(str(tmp_path / "m.gguf"))
    assert ours.metadata == METADATA
    for key, value in METADATA.items():
        assert judge.get_field(key).contents() == value
    for tensor in judge.tensors:
        assert tensor.data.tobytes() == arrays[tensor.name].tobytes() == bytes(ours.raw(tensor.name))
        assert tuple(reversed(tensor.shape.tolist())) == ours.tensors[tensor.name].shape
    again = tmp_path / "n.gguf"
    write_gguf(again, METADATA, plans, lambda p: arrays[p.name])
    assert again.read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_refuses(tmp_path: Path) -> None:
    plan = TensorPlan("w", (2, 32), "Q4_0")
    with pytest.raises(EngineError, match="35 bytes to write, the plan says 36"):
        write_gguf(tmp_path / "m.gguf", {}, [plan], lambda p: bytes(35))
    assert not (tmp_path / "m.gguf").exists()
    with pytest.raises(UserError, match="no GGUF type"):
        write_gguf(tmp_path / "m.gguf", {"x": {"a": 1}}, [], lambda p: b"")
    with pytest.raises(EngineError, match="do not fill Q4_K blocks"):
        _ = TensorPlan("w", (2, 32), "Q4_K").num_bytes
