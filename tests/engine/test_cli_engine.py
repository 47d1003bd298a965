"""The verbs chat, bench, models and pull as a person calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketphi.engine import formats, random_weights


def _phi(*arguments: str, home: Path | None = None, **keywords: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "POCKETPHI_HOME": str(home or "/nonexistent")}
    code = "from pocketphi.cli import main; main()"
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, env=environment, **keywords,
    )  # fmt: skip


def test_bench_prints_the_promised_figures(chat_folder: Callable[..., Path]) -> None:
    done = _phi(
        "bench", str(chat_folder()), "--prompt-tokens", "20", "--decode-tokens", "4", "--repeats", "1",
        "--backend", "numpy", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    for name in (
        "prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "peak_rss_bytes", "file_bytes",
        "machine_read_bytes_per_s", "bandwidth_fraction", "load_s",
    ):  # fmt: skip
        assert figures[name] > 0, name
    assert (figures["prompt_tokens"], figures["backend"]) == (20, "numpy")
    too_much = _phi("bench", str(chat_folder()), "--prompt-tokens", "300", "--backend", "numpy")
    assert too_much.returncode == 1 and "exceed the context of 256" in too_much.stderr


def test_bench_of_a_shape() -> None:
    done = _phi("bench", "--shape", "nano", "--prompt-tokens", "8", "--decode-tokens", "2", "--repeats", "1",
                "--backend", "numpy", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_parameters"] > 1_000_000
    assert _phi("bench", "--shape", "phi-3-nini").returncode == 2
    both = _phi("bench", "x.gguf", "--shape", "nano")
    assert both.returncode == 1 and "not both" in both.stderr


def test_chat_errors_name_the_way_out(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(chat_folder())
    for arguments, code, words in (
        (["--model", "absent"], 1, "no model 'absent'"),
        (["--model", folder, "--temperature", "-1", "--backend", "numpy"], 1, "temperature must be"),
        (["--model", folder, "--context", "9999", "--backend", "numpy"], 1, "trained for 1 to 256"),
        (["--model", folder, "--backend", "cuda"], 1, "unknown backend 'cuda'"),
        (["--model", folder, "--max-tokens", "0"], 2, "max-tokens"),
        (["--model", str(tmp_path)], 1, "neither a config.json nor a single .gguf"),
    ):
        done = _phi("chat", "-p", "hi", *arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""
    nothing = _phi("chat", "--model", folder, "--backend", "numpy")
    assert nothing.returncode == 1 and "nothing to answer" in nothing.stderr


def test_chat_never_imports_torch(chat_folder: Callable[..., Path]) -> None:
    code = (
        "import sys; from pocketphi.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", "--model", str(chat_folder()), "-p", "hi", "--max-tokens", "3"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_models_lists_what_is_here(chat_folder: Callable[..., Path], tmp_path: Path) -> None:
    kept = tmp_path / "home" / "models" / "someone--model"
    kept.mkdir(parents=True)
    (kept / "tiny.gguf").write_bytes(b"x" * 10)
    made = tmp_path / "runs" / "r" / "sft"
    made.parent.mkdir(parents=True)
    made.symlink_to(chat_folder())
    (tmp_path / "runs" / "r" / "q.partial").mkdir()
    (tmp_path / "runs" / "r" / "q.partial" / "model.gguf").write_bytes(b"x")
    done = _phi("models", "--json", home=tmp_path / "home", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {f["name"]: f for f in json.loads(done.stdout) if f["where"] != "embedded"}
    assert found["someone--model/tiny.gguf"]["file_bytes"] == 10
    assert set(found) - {"runs/r/sft"} == {"someone--model/tiny.gguf"}, "half-written files are not offered"
    assert "tiny.gguf" in _phi("models", home=tmp_path / "home", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_random_weights_have_the_spread_of_trained_ones(name: str) -> None:
    config = random_weights.shape_named("phi-3-mini")
    weights = random_weights.random_weights(config, type=name)
    part = weights.parts["layers.3.output"][0]
    values = part.array()
    assert values.shape == (3072, 3072) and np.isfinite(values).all()
    assert 0.01 < values.std() < 0.03 and abs(values.mean()) < 0.003
    assert part.num_bytes == len(memoryview(part.raw()).cast("B"))


def test_chat_keeps_to_a_schema_and_says_what_is_wrong(
    chat_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("llguidance", reason="the optional package llguidance is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [12, 345]}')
    shared = ["chat", "--model", str(chat_folder()), "-p", "a thing"]
    done = _phi(*shared, "--json-schema", str(schema), "--json", "--logprobs", "1", "--logit-bias", "20=3",
                "--draft", str(chat_folder(num_hidden_layers=1, seed=1)))  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert json.loads(figures["text"]) in (12, 345)
    assert len(figures["logprobs"]) == figures["num_tokens"] > 1
    for arguments, words in (
        (["--json-schema", str(tmp_path / "absent")], "cannot be read"),
        (["--regex", "a", "--grammar", str(schema)], "one of them"),
        (["--logit-bias", "x=1"], "ID=VALUE"),
        (["--logprobs", "1"], "add --json"),
    ):
        refused = _phi(*shared, *arguments)
        assert refused.returncode == 1 and words in refused.stderr + refused.stdout, refused.stderr
