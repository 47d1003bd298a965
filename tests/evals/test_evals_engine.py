"""Engine against torch, on one set of weights in a GGUF file: the same choices, whole or in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pocketphi import evals, quant
from pocketphi.engine import native
from pocketphi.evals.backends.engine import EngineScorer
from pocketphi.evals.backends.torch_model import TorchScorer
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.prompts import Request

# Half precision keeps the keys and values of the native core: two options closer than this (in nats) may
# change places, and nothing else may.
TIE_NATS = {"numpy": 1e-4, "native": 1e-2}
REAL = ["arc_easy:shots=2", "winogrande", "openbookqa", "mmlu:shots=1"]


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny` in float32, as a GGUF file."""
    out = tmp_path_factory.mktemp("gguf") / "f32"
    config = quant.QuantConfig(type="f32", fidelity_tokens=0)
    return quant.run(config, {"checkpoint": tiny}, out=out).file("model.gguf")


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and (reason := native.available()):
        pytest.skip(f"the native core cannot be used: {reason}")
    yield request.param


@pytest.fixture(scope="module")
def own_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of our own, in the columns of ARC-Easy: options of one word and of many, alike at the start."""
    folder = tmp_path_factory.mktemp("own")
    places = ["the sea", "the sea and the land", "under a tree", "in"]
    animals = ["fish", "foxes", "birds", "bees", "whales", "ants", "cats", "bats"]
    with open(folder / "arc_easy.test.jsonl", "w") as file:
        for i in range(40):
            query = f"Question: Where do {animals[i % 8]} number {i} live?\nAnswer:"
            row = {"id": f"q{i}", "query": query, "choices": places, "gold": i % 4}
            file.write(json.dumps(row) + "\n")
    return folder


def items(found) -> list[dict]:
    return [json.loads(line) for line in found.file("items.jsonl").read_text().splitlines()]


def same_choices(a: list[dict], b: list[dict], tie_nats: float) -> None:
    assert [(i["task"], i["id"]) for i in a] == [(i["task"], i["id"]) for i in b]
    for x, y in zip(a, b):
        np.testing.assert_allclose(x["logprobs"], y["logprobs"], atol=tie_nats)
        if x["margin"] > 2 * tie_nats:
            assert x["pred"] == y["pred"], (x["task"], x["id"], x["logprobs"], y["logprobs"])
    ties = sum(x["margin"] <= 2 * tie_nats for x in a)
    assert ties <= 0.02 * len(a), "too many ties for this test to mean something"


def test_engine_and_torch_choose_alike(
    backend: str, tiny: Path, gguf: Path, own_items: Path, tmp_path: Path
) -> None:
    for name, settings in {"torch": {"batch_size": 16}, "engine": {"backend": backend}}.items():
        config = EvalConfig(tasks=["arc_easy", "house"], data_dir=own_items, **settings)
        evals.run(config, {"model": tiny if name == "torch" else gguf}, out=tmp_path / name)
    torch_items, engine_items = (
        [json.loads(line) for line in (tmp_path / n / "items.jsonl").read_text().splitlines()]
        for n in ("torch", "engine")
    )
    assert len(torch_items) == 100
    same_choices(torch_items, engine_items, TIE_NATS[backend])


def test_engine_and_torch_choose_alike_on_real_items(
    backend: str, tiny: Path, gguf: Path, shared_data: Path, tmp_path: Path
) -> None:
    common = {"tasks": REAL, "data_dir": shared_data / "benchmarks", "limit": 12, "max_context_tokens": 384}
    ours = evals.run(EvalConfig(**common, backend=backend), {"model": gguf}, out=tmp_path / "engine")
    theirs = evals.run(EvalConfig(**common), {"model": tiny}, out=tmp_path / "torch")
    same_choices(items(theirs), items(ours), TIE_NATS[backend])


def test_whole_or_in_chunks(backend: str, gguf: Path) -> None:
    """A long context in one call, and in pieces of 7 tokens, gives the same scores to the last bit."""
    rng = np.random.default_rng(0)
    context = tuple(rng.integers(300, 700, 200).tolist())
    request = Request(context, ((310, 320, 330), (340,), (310, 350)), (0, 1, 2))
    scorer = EngineScorer(gguf, EvalConfig(backend=backend))
    whole = next(iter(scorer.score([request])))
    original = scorer._engine.backend.forward

    def in_pieces(session, ids, want="last"):
        parts = [original(session, ids[i : i + 7], want) for i in range(0, len(ids), 7)]
        return np.concatenate(parts) if want == "all" else parts[-1]

    scorer._engine.backend.forward = in_pieces  # type: ignore[method-assign]
    scorer._cached = ()
    chunked = next(iter(scorer.score([request])))
    assert chunked == whole
    scorer.close()


def test_letters_of_a_question_are_read_from_one_row(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = TorchScorer(tiny, EvalConfig())
    rows = []
    original = scorer._hidden

    def counting(wanted):
        rows.append(len(wanted))
        return original(wanted)

    monkeypatch.setattr(scorer, "_hidden", counting)
    context = tuple(range(300, 330))
    together = next(scorer.score([Request(context, ((301,), (302,), (303, 304), (305,)), (0, 1, 2, 3))]))
    assert rows == [2]
    alone = [
        next(scorer.score([Request(context, (o,), (0,))]))[0] for o in ((301,), (302,), (303, 304), (305,))
    ]
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in alone], abs=1e-4)


def test_both_write_what_goes_on_from_the_prompt(tiny: Path, gguf: Path) -> None:
    """With the first blank: a program's indentation would be one short without it."""
    texts = ["def f(x):\n", *(f"Question {i}: which of them is it?\nAnswer:" for i in range(24))]
    replies = []
    for scorer in (TorchScorer(tiny, EvalConfig()), EngineScorer(gguf, EvalConfig(backend="numpy"))):
        found = scorer.complete(texts, chat=False, max_new_tokens=4, stop=[])
        replies.append([r.text for r in found])
        scorer.close()
    assert replies[0] == replies[1]
    assert any(text.startswith(" ") for text in replies[0])
