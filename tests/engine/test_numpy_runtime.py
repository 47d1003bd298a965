"""The plain runtime against transformers, and its own promises: chunking, cutting and saving change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi import engine
from pocketphi.core.errors import EngineError
from pocketphi.engine import numpy_runtime
from pocketphi.engine.backend import BackendOptions
from pocketphi.engine.weights import open_weights

from .tiny import judge_logits, longrope, phi3_folder, random_ids

CASES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "all heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 7},
    "longrope short": {"rope_scaling": longrope(8), "original_max_position_embeddings": 64},
    "longrope long": {"rope_scaling": longrope(8), "original_max_position_embeddings": 16},
    "longrope and window": {
        "rope_scaling": longrope(8),
        "original_max_position_embeddings": 16,
        "sliding_window": 9,
    },
}


@pytest.mark.parametrize("case", list(CASES))
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    folder, model = phi3_folder(tmp_path / "m", **CASES[case])
    ids = random_ids(40)
    with engine.load(folder, backend="numpy") as ours:
        np.testing.assert_allclose(ours.logits(ids), judge_logits(model, ids), atol=1e-5, rtol=1e-5)
        # With a cache, token by token: the same bits as in one go.
        session = ours.backend.new_session(64, ours.sequence.rope_set or _rope(ours, 40))
        rows = [ours.backend.forward(session, [i])[0] for i in ids]  # type: ignore[index]
        np.testing.assert_array_equal(np.stack(rows), ours.logits(ids))


def _rope(model: engine.Engine, length: int) -> Any:
    from pocketphi.engine.session import rope_set_for

    return rope_set_for(model.config, length)


@pytest.mark.parametrize("length", [2047, 2048, 2049])
def test_window_of_2047_shows_2048_tokens(length: int, tmp_path: Path) -> None:
    """Phi-3 counts earlier tokens; transformers counts the token itself too, so its twin has 2048."""
    shape = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    }
    folder, model = phi3_folder(tmp_path / "m", sliding_window=2048, **shape)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 2048', '"sliding_window": 2047'))
    ids = random_ids(length)
    with engine.load(folder, backend="numpy") as ours:
        assert ours.config.visible_window == 2048
        last = ours.logits(ids)[-1]
        np.testing.assert_allclose(last, judge_logits(model, ids)[-1], atol=1e-5, rtol=1e-5)
        # The test can fail: one token more or less of the window changes the numbers visibly.
        if length > 2048:
            session = ours.backend.new_session(length, "plain")
            ours.config.sliding_window = 2046
            other = ours.backend.forward(session, ids)
            assert other is not None and np.abs(other[0] - last).max() > 1e-4


@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_factor_set_switches_after_4096(length: int, tmp_path: Path) -> None:
    folder, model = phi3_folder(
        tmp_path / "m",
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        max_position_embeddings=8192,
        original_max_position_embeddings=4096,
        rope_scaling=longrope(8),
    )
    ids = random_ids(length)
    with engine.load(folder, backend="numpy") as ours:
        whole = ours.logits(ids)
        np.testing.assert_allclose(whole, judge_logits(model, ids), atol=3e-5, rtol=1e-5)
        assert _rope(ours, length) == ("long" if length > 4096 else "short")
        chunks = np.concatenate(list(ours.logits_in_pieces(ids, piece_tokens=1000)))
        np.testing.assert_array_equal(chunks, whole)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> numpy_runtime.NumpyBackend:
    folder, _ = phi3_folder(
        tmp_path_factory.mktemp("m"), max_position_embeddings=1024, original_max_position_embeddings=1024
    )
    return numpy_runtime.load(open_weights(folder), BackendOptions(max_batch_tokens=64))


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 93, 200], [299, 1], [255, 1, 1, 43]])
def test_chunking_changes_no_bit(backend: numpy_runtime.NumpyBackend, sizes: list[int]) -> None:
    ids = random_ids(300)
    reference = backend.forward(backend.new_session(300, "plain"), ids, "all")
    session, at, rows = backend.new_session(512, "plain"), 0, []
    for size in sizes:
        rows.append(backend.forward(session, ids[at : at + size], "all"))
        at += size
    np.testing.assert_array_equal(np.concatenate(rows), reference)  # type: ignore[arg-type]


def test_truncating_forgets_without_a_trace(backend: numpy_runtime.NumpyBackend) -> None:
    ids = random_ids(50)
    session = backend.new_session(100, "plain")
    backend.forward(session, ids[:30])
    backend.forward(session, random_ids(60, seed=9))
    session.truncate(30)
    after = backend.forward(session, ids[30:], "all")
    clean = backend.forward(backend.new_session(50, "plain"), ids, "all")
    assert clean is not None
    np.testing.assert_array_equal(after, clean[30:])
    with pytest.raises(EngineError, match="50 tokens to 51"):
        session.truncate(51)


def test_saved_session_goes_on_bit_for_bit(backend: numpy_runtime.NumpyBackend) -> None:
    ids = random_ids(40)
    session = backend.new_session(64, "plain")
    backend.forward(session, ids[:25])
    restored = backend.restore(session.save(), 300)
    assert (restored.length, restored.capacity) == (25, 300)
    np.testing.assert_array_equal(
        backend.forward(restored, ids[25:], "all"), backend.forward(session, ids[25:], "all")
    )


def test_restore_refuses_what_does_not_fit(backend: numpy_runtime.NumpyBackend) -> None:
    session = backend.new_session(64, "plain")
    backend.forward(session, [5, 6, 7])
    state = session.save()
    for bad, message in (
        (state[:-1], "bytes"),
        (b"x" + state[1:], "not a state"),
        (state.replace(b"[2, 2, 3, 8]", b"[2, 2, 9, 8]"), "bytes"),
        (state.replace(b"[2, 2, 3, 8]", b"[3, 2, 2, 8]"), "another shape"),
    ):
        with pytest.raises(EngineError, match=message):
            backend.restore(bad, 64)
    with pytest.raises(EngineError, match="3 tokens, the capacity is 2"):
        backend.restore(state, 2)


def test_bad_calls_leave_the_session_as_it_was(backend: numpy_runtime.NumpyBackend) -> None:
    session = backend.new_session(4, "plain")
    backend.forward(session, [5, 6])
    for ids, message in (
        ([1, 2, 3], "capacity of 4"),
        ([320], "token id 320 is outside"),
        ([-1], "token id -1 is outside"),
        ([], "at least one"),
    ):
        with pytest.raises(EngineError, match=message):
            backend.forward(session, ids)
        assert session.length == 2


def test_turning_keys_is_exact_in_the_first_layer(tmp_path: Path) -> None:
    folder, _ = phi3_folder(
        tmp_path / "m", rope_scaling=longrope(8), original_max_position_embeddings=16, num_hidden_layers=2
    )
    made = numpy_runtime.load(open_weights(folder), BackendOptions())
    ids = random_ids(12)
    turned, fresh = made.new_session(64, "short"), made.new_session(64, "long")
    made.forward(turned, ids)
    made.forward(fresh, ids)
    turned.rotate("long")
    np.testing.assert_allclose(turned.keys[0], fresh.keys[0], atol=2e-6)
    assert np.abs(turned.keys[1] - fresh.keys[1]).max() > 1e-3, "deeper keys are an approximation"
    assert turned.rope_set == "long"
