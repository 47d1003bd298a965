"""A tiny model with trained-like structure, its tokenizer and some text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data import topics

    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a model of width 256 whose channels are excited very unevenly."""
    import torch

    from pocketphi import model as models
    from pocketphi import tokenizer as tk
    from pocketphi.tokenizer import training

    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    tokenizer = training.train(texts, tk.TokenizerConfig(vocab_size=640))
    config = models.ModelConfig(
        vocab_size=640, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, sliding_window=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, torch_dtype="float32",
    )  # fmt: skip
    model = models.PhiForCausalLM(config)
    model.reset_parameters(seed=0)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.from_numpy(np.exp(rng.normal(size=256)).astype(np.float32)))
            else:
                parameter *= 4
    out = tmp_path_factory.mktemp("model") / "tiny"
    models.save(model, out, tokenizer)
    return out
