"""The native core against transformers and against its slow twin, and its own promises, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi.core.errors import CheckpointError, EngineError
from pocketphi.engine import native, numpy_runtime
from pocketphi.engine.backend import BackendOptions
from pocketphi.engine.weights import open_weights
from tests.engine.tiny import judge_logits, llama_gguf, llama_model, longrope, phi3_folder, random_ids

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(bool(native.available()), reason=f"native core: {native.available()}")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("POCKETPHI_KERNELS", "POCKETPHI_ACTIVATIONS", "POCKETPHI_PIN"):
        monkeypatch.delenv(name, raising=False)
    yield


def _load(path: Path, **options: Any) -> native.NativeBackend:
    return native.load(
        open_weights(path), BackendOptions(**{"num_threads": 2, "cache_type": "f32", **options})
    )


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "grouped heads": ({}, "plain"),
    "one key head": ({"num_key_value_heads": 1}, "plain"),
    "tied": ({"tie_word_embeddings": True}, "plain"),
    "window": ({"sliding_window": 7}, "plain"),
    "longrope short": ({"rope_scaling": longrope(8), "original_max_position_embeddings": 64}, "short"),
    "longrope long": ({"rope_scaling": longrope(8), "original_max_position_embeddings": 16}, "long"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_float_weights_equal_transformers(case: str, tmp_path: Path) -> None:
    changes, rope_set = CASES[case]
    folder, model = phi3_folder(tmp_path / "m", **changes)
    ids = random_ids(40)
    backend = _load(folder)
    ours = backend.forward(backend.new_session(64, rope_set), ids, "all")
    expected = judge_logits(model, ids)
    assert ours is not None
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("length", [2047, 2048, 2049, 2300])
def test_window_across_chunks(length: int, tmp_path: Path) -> None:
    """A window that begins inside a 256-position chunk of the cache, in one go and token by token."""
    folder, _ = phi3_folder(
        tmp_path / "m", hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        max_position_embeddings=4096, original_max_position_embeddings=4096, sliding_window=2047,
    )  # fmt: skip
    weights, ids = open_weights(folder), random_ids(length)
    slow = numpy_runtime.load(weights, BackendOptions())
    expected = slow.forward(slow.new_session(4096, "plain"), ids, "last")
    backend = _load(folder)
    session = backend.new_session(4096, "plain")
    backend.forward(session, ids[:-1], "none")
    ours = backend.forward(session, ids[-1:], "last")
    whole = backend.forward(backend.new_session(4096, "plain"), ids, "last")
    assert ours is not None and expected is not None
    np.testing.assert_array_equal(ours, whole)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


# Of the root mean square of the logits. Rounding activations to 8 bits costs 1 to 3 %, to 16 bits 1 to
# 3 in 10,000; without it what is left is the order of additions.
BOUND = {"f32": 1e-4, "int8": 6e-2, "int16": 5e-4}


@pytest.mark.parametrize("activations", ["f32", "int8", "int16"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_llama_files_equal_the_dequantised_twin(
    kind: str, activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama_gguf(tmp_path / "m.gguf", llama_model(), kind=kind)
    weights, ids = open_weights(path), random_ids(50)
    slow = numpy_runtime.load(weights, BackendOptions())
    expected = slow.forward(slow.new_session(64, "plain"), ids, "all")
    monkeypatch.setenv("POCKETPHI_ACTIVATIONS", activations)
    backend = _load(path)
    ours = backend.forward(backend.new_session(64, "plain"), ids, "all")
    assert ours is not None and expected is not None
    bound = BOUND["f32" if kind in ("F16", "BF16") else activations]
    assert np.sqrt(np.mean((ours - expected) ** 2)) < bound * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_formats_equal_the_dequantised_twin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks of the K formats, handed over tensor by tensor; the twin dequantises them in NumPy."""
    from pocketphi.engine.formats import dequantise, lookup
    from pocketphi.model.config import ModelConfig

    monkeypatch.setenv("POCKETPHI_ACTIVATIONS", "f32")
    config = ModelConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    backend = native.NativeBackend(
        config, BackendOptions(num_threads=1, cache_type="f32"), interleaved=False, tied=False
    )
    rng = np.random.default_rng(3)
    dense: dict[str, np.ndarray] = {}
    shapes = {
        "blk.0.attn_qkv.weight": (512, 256), "blk.0.attn_output.weight": (256, 256),
        "blk.0.ffn_up.weight": (512, 256), "blk.0.ffn_down.weight": (256, 256), "output.weight": (64, 256),
    }  # fmt: skip
    for name, shape in shapes.items():
        blocks = rng.integers(0, 256, (shape[0], lookup(kind).block_bytes), np.uint8)
        layout = blocks.view(lookup(kind).layout)
        for scale in ("d", "dmin"):
            if scale in (layout.dtype.names or ()):
                layout[scale] = rng.uniform(0.2, 1, layout.shape).astype(np.float16) * 1e-3
        dense[name] = dequantise(blocks.tobytes(), kind, shape)
        backend.set_tensor(name, kind, shape, blocks.tobytes())
    embed = rng.standard_normal((64, 256), np.float32)
    backend.set_tensor("token_embd.weight", "F32", (64, 256), embed.tobytes())
    ones = np.ones(256, np.float32)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        backend.set_tensor(name, "F32", (256,), ones.tobytes())
    backend.finish()
    ours = backend.forward(backend.new_session(8, "plain"), [5], "last")
    # One token sees only itself, so attention returns its value: the whole model in a few lines.
    norm = numpy_runtime.rms_norm
    x = embed[5:6]
    value = (norm(x, ones, 1e-5) @ dense["blk.0.attn_qkv.weight"].T)[:, 384:].reshape(2, 1, 64)
    x = x + np.repeat(value, 2, axis=1).reshape(1, 256) @ dense["blk.0.attn_output.weight"].T
    gate, up = np.split(norm(x, ones, 1e-5) @ dense["blk.0.ffn_up.weight"].T, 2, axis=1)
    x = x + (up * numpy_runtime.silu(gate)) @ dense["blk.0.ffn_down.weight"].T
    expected = norm(x, ones, 1e-5) @ dense["output.weight"].T
    assert ours is not None
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0"])
def test_chunks_batches_cuts_and_saves_change_no_bit(cache_type: Any, tmp_path: Path) -> None:
    path = llama_gguf(tmp_path / "m.gguf", llama_model(max_position_embeddings=1024), kind="Q4_0")
    backend = _load(path, cache_type=cache_type)
    ids = random_ids(600)
    whole = backend.forward(backend.new_session(640, "plain"), ids, "all")
    assert whole is not None
    session = backend.new_session(640, "plain")
    rows, at = [], 0
    for size in (1, 2, 255, 4, 17, 1, 300, 20):
        rows.append(backend.forward(session, ids[at : at + size], "all"))
        at += size
    np.testing.assert_array_equal(np.concatenate(rows), whole)  # type: ignore[arg-type]
    # Beside others in one pass.
    others = [backend.new_session(640, "plain") for _ in range(3)]
    backend.forward_batch([(s, ids[:n]) for s, n in zip(others, (599, 100, 300))], "none")
    results = backend.forward_batch([(s, ids[n : n + 1]) for s, n in zip(others, (599, 100, 300))])
    for row, n in zip(results, (599, 100, 300)):
        np.testing.assert_array_equal(row[0], whole[n])  # type: ignore[index]
    # Cut back and told something else first.
    session.truncate(123)
    backend.forward(session, random_ids(50, seed=9), "none")
    session.truncate(123)
    np.testing.assert_array_equal(backend.forward(session, ids[123:200], "all"), whole[123:200])
    # Saved and restored; damage is found.
    data = session.save()
    restored = backend.restore(data, 300)
    assert (restored.length, restored.rope_set) == (200, "plain")
    np.testing.assert_array_equal(backend.forward(restored, ids[200:240], "all"), whole[200:240])
    for broken in (data[:-1], data[:40] + b"\x01" + data[41:], b"x" * 20, data[:60] + b"\x7f" + data[61:]):
        with pytest.raises(EngineError):
            backend.restore(broken, 300)


@pytest.mark.parametrize(("cache_type", "bound"), [("f16", 2e-3), ("q8_0", 3e-2)])
def test_small_caches_stay_near_the_exact_one(
    cache_type: Any, bound: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the root mean square of the logits, over a chunk border, with several query heads for a key head."""
    monkeypatch.setenv("POCKETPHI_ACTIVATIONS", "f32")
    model = llama_model(max_position_embeddings=512, hidden_size=64, num_attention_heads=8)
    path = llama_gguf(tmp_path / "m.gguf", model, kind="Q8_0")
    ids, logits = random_ids(300), {}
    for kind in ("f32", cache_type):
        backend = _load(path, cache_type=kind)
        logits[kind] = backend.forward(backend.new_session(512, "plain"), ids, "all")
    error = np.sqrt(np.mean((logits[cache_type] - logits["f32"]) ** 2))
    assert 0 < error < bound * np.sqrt(np.mean(logits["f32"] ** 2))


def test_kernel_sets_and_thread_counts_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama_gguf(tmp_path / "m.gguf", llama_model(), kind="Q4_0")
    ids, results = random_ids(40), []
    library = native._load_library(native.library_path())  # type: ignore[arg-type]
    for kernels in library.pp_kernels_available().decode().split(","):
        for threads in (1, 3):
            monkeypatch.setenv("POCKETPHI_KERNELS", kernels)
            backend = _load(path, num_threads=threads)
            assert backend.describe()["kernels"] == kernels
            results.append(backend.forward(backend.new_session(64, "plain"), ids, "all"))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)  # type: ignore[arg-type]


def test_rotation_equals_the_twin(tmp_path: Path) -> None:
    folder, _ = phi3_folder(
        tmp_path / "m", rope_scaling=longrope(8), original_max_position_embeddings=16, num_hidden_layers=1
    )
    weights, ids, logits = open_weights(folder), random_ids(30), []
    for backend in (_load(folder), numpy_runtime.load(weights, BackendOptions())):
        session = backend.new_session(64, "short")
        backend.forward(session, ids, "none")
        session.rotate("long")
        assert session.rope_set == "long"
        logits.append(backend.forward(session, [7], "last"))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


def test_wrong_use_is_refused_and_leaves_the_session_as_it_was(tmp_path: Path) -> None:
    folder, _ = phi3_folder(tmp_path / "m")
    backend = _load(folder)
    session = backend.new_session(8, "plain")
    backend.forward(session, [3, 4, 5], "none")
    for ids in ([], [999999], [-1], [3] * 6):
        with pytest.raises(EngineError):
            backend.forward(session, ids)
        assert session.length == 3
    with pytest.raises(EngineError):
        backend.forward_batch([(session, [1]), (session, [2])])
    for call in (lambda: session.truncate(4), lambda: backend.new_session(0, "plain"),
                 lambda: backend.new_session(8, "long"), lambda: session.reset("long")):  # fmt: skip
        with pytest.raises(EngineError):
            call()
    session.close()
    session.close()
    with pytest.raises(EngineError):
        backend.forward(session, [1])
    backend.close()
    backend.close()
    with pytest.raises(EngineError):
        backend.new_session(8, "plain")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    import torch

    model = llama_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    path = llama_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(CheckpointError, match="ffn_down"):
        _load(path)


def test_missing_and_misfit_tensors_are_named(tmp_path: Path) -> None:
    weights = open_weights(phi3_folder(tmp_path / "m")[0])
    backend = native.NativeBackend(
        weights.config, BackendOptions(num_threads=1), interleaved=False, tied=weights.tied
    )
    with pytest.raises(EngineError, match="token_embd"):
        backend.finish()
    for name, shape, size in (("nonsense", (4, 4), 64), ("token_embd.weight", (4, 4), 64),
                              ("blk.0.attn_norm.weight", (32,), 12), ("blk.99.attn_norm.weight", (32,), 128)):  # fmt: skip
        with pytest.raises(EngineError, match=name.split(".weight")[0]):
            backend.set_tensor(name, "F32", shape, bytes(size))


def test_many_sessions_leave_no_memory_behind(tmp_path: Path) -> None:
    backend = _load(phi3_folder(tmp_path / "m")[0])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def turns(count: int) -> None:
        for _ in range(count):
            session = backend.new_session(128, "plain")
            backend.forward(session, [3, 4, 5])
            session.close()

    turns(200)
    before = resident()
    turns(3000)
    assert resident() - before < 4 << 20


def _cross_compiler() -> list[str]:
    """A C++ compiler for aarch64 with its flags: Debian's cross GCC, or the clang in the package ziglang."""
    if gcc := shutil.which("aarch64-linux-gnu-g++"):
        return [gcc, "-march=armv8.2-a+dotprod+fp16"]
    try:
        import ziglang
    except ImportError:
        pytest.skip("needs a cross compiler: apt-get install g++-aarch64-linux-gnu, or pip install ziglang")
    zig = str(Path(ziglang.__file__).parent / "zig")
    return [zig, "c++", "-target", "aarch64-linux-musl", "-mcpu=generic+v8_2a+dotprod+fullfp16"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_neon_kernels_under_emulation(tmp_path: Path) -> None:
    """The aarch64 build of the kernels' self-test, run by qemu: NEON equals plain C++, bit for bit."""
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip("needs an emulator: apt-get install qemu-user")
    sources = [
        str(s)
        for s in (ROOT / "native/src").rglob("*.cpp")
        if not s.stem.startswith(("kernels_avx", "kernels_amx"))
    ]
    binary = tmp_path / "kernels_test"
    flags = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-math-errno",
        "-static",
    ]
    includes = [f"-I{ROOT}/native/include", f"-I{ROOT}/native/src"]
    main = str(ROOT / "native/tests/kernels_test.cpp")
    # With zig the first time takes minutes: it builds its C++ library.
    command = [*_cross_compiler(), *flags, *includes, main, *sources, "-o", str(binary)]
    subprocess.run(command, check=True, timeout=1800)
    result = subprocess.run([qemu, "-cpu", "max", str(binary)], capture_output=True, text=True, timeout=600)
    assert "neon: equal to generic, bit for bit" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0
