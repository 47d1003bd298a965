"""Tiny random models with a small vocabulary: enough to be scored, quick to make."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pocketphi import model as models
from pocketphi.model import ModelConfig
from pocketphi.tokenizer import TokenizerConfig, training


@pytest.fixture(scope="session")
def tokenizer():
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    return training.train(texts, TokenizerConfig(vocab_size=768))


def make_model(folder: Path, tokenizer, seed: int = 0, **more) -> Path:
    settings = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "initializer_range": 0.15,
    }
    model = models.PhiForCausalLM(ModelConfig(**{**settings, **more}))
    model.reset_parameters(seed=seed)
    models.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def tiny_other(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """The shape of `tiny` with other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "other", tokenizer, seed=1)


@pytest.fixture(scope="session")
def tiny_longrope(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """Factors change at 64 tokens, so that a batch can hold sequences on both sides."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0 + i for i in range(6)]}
    return make_model(
        tmp_path_factory.mktemp("models") / "longrope",
        tokenizer,
        rope_scaling=scaling,
        original_max_position_embeddings=64,
    )


class Scripted:
    """An HTTP endpoint whose replies a function makes: answer(path, body) -> (status, bytes or tree)."""

    def __init__(self, answer) -> None:
        self.calls: list[tuple[str, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.calls.append((self.path, body))
                status, payload = answer(self.path, body)
                raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                with contextlib.suppress(OSError):  # the client may have given up waiting
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Start scripted endpoints; retries do not wait."""
    from pocketphi.evals.backends import endpoint

    monkeypatch.setattr(endpoint, "_FIRST_WAIT_S", 0.0)
    started: list[Scripted] = []

    def start(answer) -> Scripted:
        started.append(Scripted(answer))
        return started[-1]

    yield start
    for each in started:
        each.close()
