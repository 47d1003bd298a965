"""Model files: equal logits whatever the container, and a clear refusal of everything else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi import engine
from pocketphi.core import machine
from pocketphi.core.errors import CheckpointError, DataError, EngineError, PocketPhiError, UserError
from pocketphi.engine.weights import open_weights

from .tiny import judge_logits, llama_gguf, llama_model, longrope, phi3_folder, phi3_gguf, random_ids

IDS = random_ids(30)


def _logits(path: Path) -> np.ndarray:
    with engine.load(path, backend="numpy") as model:
        return model.logits(IDS)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_gguf_with_interleaved_rows(tied: bool, tmp_path: Path) -> None:
    model = llama_model(tie_word_embeddings=tied)
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
        model.state_dict = lambda: state  # type: ignore[method-assign]
    path = llama_gguf(tmp_path / "m.gguf", model)
    np.testing.assert_allclose(_logits(path), judge_logits(model, IDS), atol=1e-5, rtol=1e-5)
    assert open_weights(path).tied == tied


def test_llama_folder_with_split_projections(tmp_path: Path) -> None:
    model = llama_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1, "the shards are part of the test"
    np.testing.assert_allclose(_logits(tmp_path / "m"), judge_logits(model, IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [10, 30])
def test_phi3_gguf_with_rope_factors(length: int, tmp_path: Path) -> None:
    _, model = phi3_folder(
        tmp_path / "m", rope_scaling=longrope(8), original_max_position_embeddings=16, sliding_window=9
    )
    path = phi3_gguf(tmp_path / "m.gguf", model)
    with engine.load(path, backend="numpy") as ours:
        np.testing.assert_allclose(
            ours.logits(IDS[:length]), judge_logits(model, IDS[:length]), atol=1e-5, rtol=1e-5
        )


def test_attn_factor_of_the_file_wins(tmp_path: Path) -> None:
    _, model = phi3_folder(tmp_path / "m", rope_scaling=longrope(8), original_max_position_embeddings=16)
    weights = open_weights(phi3_gguf(tmp_path / "m.gguf", model, attn_factor=1.25))
    assert weights.config.magnitude(long=True) == weights.config.magnitude(long=False) == 1.25


def test_bfloat16_folder(tmp_path: Path) -> None:
    import torch

    folder, model = phi3_folder(tmp_path / "m")
    model.to(torch.bfloat16).save_pretrained(folder)
    # Loaded again, because the cast rounds the rotary frequencies in memory too.
    judge = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_allclose(_logits(folder), judge_logits(judge, IDS), atol=1e-5, rtol=1e-5)


def test_quantised_gguf_is_its_dequantised_self(tmp_path: Path) -> None:
    """Q8_0 q and k rows are permuted as blocks; the judge gets the same rounded values."""
    import torch

    gguf = pytest.importorskip("gguf")
    model = llama_model(hidden_size=64)
    path = llama_gguf(tmp_path / "m.gguf", model, kind="Q8_0")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            tensor.copy_(
                torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
            )
            assert "weight" in name
    np.testing.assert_allclose(_logits(path), judge_logits(model, IDS), atol=1e-5, rtol=1e-5)


# Refusals


def test_missing_tensor_and_wrong_shape(tmp_path: Path) -> None:
    model = llama_model()
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_k\.weight' is missing"):
        open_weights(_without_k1(tmp_path / "a.gguf", model))
    folder, _ = phi3_folder(tmp_path / "m")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"down_proj.*\[32, 48\].*needs \[32, 40\]"):
        open_weights(folder)
    (folder / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* is missing"):
        open_weights(folder)


def _without_k1(path: Path, model: Any) -> Path:
    return llama_gguf(path, model, skip="blk.1.attn_k")


def test_what_would_change_the_function_is_refused(tmp_path: Path) -> None:
    model = llama_model()
    path = llama_gguf(tmp_path / "bias.gguf", model, extra="blk.0.attn_q.bias")
    with pytest.raises(EngineError, match=r"1 tensors are not part.*attn_q\.bias"):
        open_weights(path)
    path = llama_gguf(tmp_path / "moe.gguf", model, expert_count=8)
    with pytest.raises(EngineError, match="mixture-of-experts"):
        open_weights(path)
    path = llama_gguf(tmp_path / "freqs.gguf", model, extra="rope_freqs.weight")
    with pytest.raises(EngineError, match="rope scaling"):
        open_weights(path)
    folder, _ = phi3_folder(tmp_path / "m", num_hidden_layers=3)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": 2}))
    with pytest.raises(EngineError, match="tensors are not part"):
        open_weights(folder)


def test_unknown_architecture_type_and_vocabulary(tmp_path: Path) -> None:
    model = llama_model()
    with pytest.raises(EngineError, match="architecture 'gemma2' is not supported"):
        open_weights(llama_gguf(tmp_path / "a.gguf", model, arch="gemma2"))
    with pytest.raises(EngineError, match="type Q5_1, which is not supported"):
        open_weights(llama_gguf(tmp_path / "b.gguf", model, kind="Q5_1"))
    with pytest.raises(CheckpointError, match=r"vocabulary mismatch.*3 tokens.*320 rows"):
        open_weights(llama_gguf(tmp_path / "c.gguf", model, tokens=["a", "b", "c"]))


def test_truncated_files(tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "m.gguf", llama_model())
    whole = path.read_bytes()
    for size in (0, 3, 30, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            open_weights(path)
    folder, _ = phi3_folder(tmp_path / "m")
    (shard,) = folder.glob("*.safetensors")
    whole = shard.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_weights(folder)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_safetensors_headers_never_crash(seed: int, tmp_path: Path) -> None:
    folder, _ = _damaged_source(tmp_path)
    (shard,) = folder.glob("*.safetensors")
    raw = bytearray(shard.read_bytes())
    rng = np.random.default_rng(seed)
    for _ in range(3):
        raw[rng.integers(0, 600)] = rng.integers(0, 256)
    shard.write_bytes(raw)
    with contextlib.suppress(PocketPhiError):
        _logits(folder)


_SOURCE: list[bytes] = []


def _damaged_source(tmp_path: Path) -> tuple[Path, Any]:
    """One model, written once, copied for every seed."""
    folder = tmp_path / "m"
    if not _SOURCE:
        phi3_folder(folder)
        _SOURCE.extend([(folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(_SOURCE[0])
    (folder / "model.safetensors").write_bytes(_SOURCE[1])
    return folder, None


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    import torch

    folder, model = phi3_folder(tmp_path / "m")
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"1 values of tensor model\.norm\.weight are not finite"):
        engine.load(folder, backend="numpy")


def test_context_and_memory_are_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = phi3_folder(tmp_path / "m", max_position_embeddings=100_000)
    with pytest.raises(EngineError, match=r"context of 100001 tokens was asked for.*1 to 100000"):
        engine.load(folder, backend="numpy", context_length=100_001)
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: 1 << 20)
    with pytest.raises(EngineError, match=r"needs .* of memory \(weights .* cache of 100000 tokens"):
        engine.load(folder, backend="numpy", context_length=100_000)


def test_context_shrinks_to_memory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = phi3_folder(tmp_path / "m", max_position_embeddings=100_000)
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: 4 << 20)
    with engine.load(folder, backend="numpy") as model:
        assert 256 <= model.context_length < 20_000
        assert (
            f"the context is {model.context_length} tokens, not the model's 100000" in capsys.readouterr().err
        )


def test_a_backend_must_exist(tmp_path: Path) -> None:
    folder, _ = phi3_folder(tmp_path / "m")
    with pytest.raises(EngineError, match=r"unknown backend 'nunpy'.*did you mean 'numpy'"):
        engine.load(folder, backend="nunpy")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="num_threads"):
        engine.load(folder, num_threads=0)
    with pytest.raises(EngineError, match="f32, not q8_0"):
        engine.load(folder, backend="numpy", cache_type="q8_0")
    with pytest.raises(CheckpointError, match="no such model"):
        engine.load(tmp_path / "absent.gguf")
