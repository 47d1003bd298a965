"""Several answers at once, drafts by a second model, and grammars: none may change what an answer would be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi import engine
from pocketphi.core.errors import EngineError, UserError
from pocketphi.engine.grammar import Grammar

from .tiny import longrope, random_ids

FREE: dict[str, Any] = {"stop_ids": []}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 8, "lookup": 0},
    {"temperature": 0.9, "logit_bias": {11: 4.0}, "logprobs": 2, "seed": 9},
]


# Continuous batching


def test_answers_in_a_batch_are_those_alone(chat_model: engine.Engine) -> None:
    """Prompts of many lengths, cut in pieces of 7, joining late, more of them than fit at once."""
    prompts = [random_ids(n, seed=n) for n in (3, 50, 1, 120, 20, 33, 64, 90)]
    limits = [30, 12, 40, 5, 25, 1, 18, 33]
    alone = [
        chat_model.generate(p, max_new_tokens=n, **FREE, **OPTIONS[i % 4])
        for i, (p, n) in enumerate(zip(prompts, limits))
    ]
    with chat_model.batch(max_sequences=3, prefill_tokens=7) as batch:
        streams = [
            batch.add(p, max_new_tokens=n, **FREE, **OPTIONS[i % 4])
            for i, (p, n) in enumerate(zip(prompts[:5], limits))
        ]
        pieces: dict[int, str] = {}
        most = 0
        for stream, chunk in batch.run():
            pieces[id(stream)] = pieces.get(id(stream), "") + chunk.text
            most = max(most, batch.num_running)
            while len(streams) < len(prompts) and streams[0].done:
                i = len(streams)
                streams.append(batch.add(prompts[i], max_new_tokens=limits[i], **FREE, **OPTIONS[i % 4]))
    assert most == 3 and len(streams) == len(prompts)
    for stream, expected in zip(streams, alone):
        assert stream.error is None and stream.done
        assert stream.result.tokens == expected.tokens
        assert stream.result.text == expected.text == pieces.get(id(stream), "")
        assert stream.result.finish_reason == expected.finish_reason
        assert stream.result.logprobs == pytest.approx(expected.logprobs)


def test_native_batches_give_the_same_bits(chat_folder: Callable[..., Path]) -> None:
    """Log-probabilities are equal to the last bit, whatever runs beside and however prompts are cut."""
    from pocketphi.engine import native

    if reason := native.available():
        pytest.skip(f"the native core cannot be used: {reason}")
    with engine.load(chat_folder(), backend="native") as model:
        prompts = [random_ids(n, seed=n) for n in (5, 130, 60)]
        alone = [model.generate(p, max_new_tokens=20, logprobs=1, lookup=0, **FREE) for p in prompts]
        for size in (1, 16, 200):
            with model.batch(prefill_tokens=size) as batch:
                streams = [batch.add(p, max_new_tokens=20, logprobs=1, lookup=0, **FREE) for p in prompts]
                for _ in batch.run():
                    pass
            assert [s.result.logprobs for s in streams] == [r.logprobs for r in alone]


def test_a_batch_crosses_rope_sets_as_one_answer_does(rope_model: engine.Engine) -> None:
    prompts = [random_ids(n, seed=n) for n in (10, 60, 70)]
    options: dict[str, Any] = {"max_new_tokens": None, "stop_ids": [5, 9]}
    alone = [rope_model.generate(p, **{**options, "max_new_tokens": 50}) for p in prompts]
    together = rope_model.generate_batch(prompts, stop_ids=[5, 9], max_new_tokens=50)
    for one, other in zip(alone, together):
        assert one.tokens == other.tokens
        assert (one.rope_set, one.rope_crossing) == (other.rope_set, other.rope_crossing)


def test_one_bad_answer_leaves_the_others(chat_model: engine.Engine) -> None:
    def nothing(_answer: Any) -> np.ndarray:
        return np.zeros(chat_model.config.vocab_size, dtype=bool)

    expected = chat_model.generate(random_ids(9), max_new_tokens=10, **FREE)
    with chat_model.batch() as batch:
        bad = batch.add(random_ids(9, seed=2), token_mask=nothing)
        good = batch.add(random_ids(9), max_new_tokens=10, **FREE)
        for _ in batch.run():
            pass
        assert isinstance(bad.error, EngineError) and not bad.done
        assert good.result.tokens == expected.tokens
        with pytest.raises(EngineError, match="belongs to a batch"):
            next(iter(batch.add(random_ids(3))))
    with pytest.raises(EngineError, match="no token is allowed"):
        chat_model.generate_batch([random_ids(4)], token_mask=nothing)
    with pytest.raises(UserError, match="at least one"):
        chat_model.batch(max_sequences=0)


def test_stopping_one_of_a_batch(chat_model: engine.Engine) -> None:
    with chat_model.batch() as batch:
        first = batch.add(random_ids(9), max_new_tokens=60, **FREE)
        other = batch.add(random_ids(8), max_new_tokens=20, **FREE)
        for n in range(12):
            batch.step()
            if n == 5:
                first.stop()
        for _ in batch.run():
            pass
    assert first.result.finish_reason == "interrupted" and len(first.result.tokens) < 30
    assert other.result.finish_reason == "length" and len(other.result.tokens) == 20


# Draft models


@pytest.fixture
def draft_model(chat_folder: Callable[..., Path], backend_name: Any) -> engine.Engine:
    return engine.load(chat_folder(num_hidden_layers=1, seed=1), backend=backend_name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 5])
def test_draft_model_changes_no_token(
    chat_model: engine.Engine, draft_model: engine.Engine, options: dict[str, Any], count: int
) -> None:
    options = {k: v for k, v in options.items() if k != "lookup"}
    for prompt in (random_ids(20), random_ids(150, seed=3)):
        plain = chat_model.generate(prompt, max_new_tokens=60, lookup=0, **FREE, **options)
        quick = chat_model.generate(
            prompt, max_new_tokens=60, draft=draft_model, draft_tokens=count, **FREE, **options
        )
        assert quick.tokens == plain.tokens and quick.text == plain.text
        assert quick.logprobs == pytest.approx(plain.logprobs)
        assert quick.drafted_tokens > 0


def test_a_twin_is_always_right(chat_folder: Callable[..., Path], backend_name: Any) -> None:
    """A draft model that is the model: every guess is accepted, greedy and drawn alike."""
    model, twin = (engine.load(chat_folder(), backend=backend_name) for _ in range(2))
    for options in OPTIONS[:3]:
        options = {k: v for k, v in options.items() if k != "lookup"}
        result = model.generate(random_ids(12), max_new_tokens=50, draft=twin, **FREE, **options)
        assert result.accepted_tokens == result.drafted_tokens >= 36


def test_draft_across_a_crossing_stops_and_turns(
    chat_folder: Callable[..., Path], rope_model: engine.Engine, backend_name: Any
) -> None:
    folder = chat_folder(
        rope_scaling=longrope(8), original_max_position_embeddings=64, num_hidden_layers=1, seed=1
    )
    with engine.load(folder, backend=backend_name) as draft:
        for prompt in (30, 62, 63, 64):
            ids = random_ids(prompt)
            plain = rope_model.generate(ids, max_new_tokens=60, lookup=0, stop_ids=[4])
            assert (
                rope_model.generate(ids, max_new_tokens=60, draft=draft, stop_ids=[4]).tokens == plain.tokens
            )
    talk = [{"role": "user", "content": "the thing in a"}]
    plain = rope_model.chat(talk, max_new_tokens=20, lookup=0)
    talk += [{"role": "assistant", "content": plain.text}, {"role": "user", "content": "more"}]
    plain = rope_model.chat(talk, max_new_tokens=20, lookup=0)
    with engine.load(folder, backend=backend_name, context_length=40) as short:
        assert rope_model.chat(talk, max_new_tokens=20, draft=short).tokens == plain.tokens


def test_a_draft_that_does_not_fit_is_refused(chat_model: engine.Engine, smollm2: Path) -> None:
    with pytest.raises(EngineError, match="itself"):
        chat_model.generate([3], draft=chat_model)
    with (
        engine.load(smollm2, backend="native" if chat_model.backend.name == "native" else "numpy") as other,
        pytest.raises(EngineError, match="another tokenizer"),
    ):
        chat_model.generate([3], draft=other)
    with pytest.raises(UserError, match="draft_tokens"):
        chat_model.generate([3], draft_tokens=0)


# Grammars: the random model says nonsense, so what is valid is valid because of the grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["plant", "rock"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def needs_llguidance() -> None:
    pytest.importorskip("llguidance", reason="the optional package llguidance is not installed")


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> engine.Engine:
    """A random model over a vocabulary with all bytes: every text can be said."""
    from pocketphi.tokenizer.training import assemble

    from .tiny import phi3_folder

    tokenizer = assemble(["▁", *"abcdefghijklmnopqrstuvwxyz0123456789", '"', "{", "}", ":", ",", '":', '",'])
    folder, _ = phi3_folder(
        tmp_path_factory.mktemp("bytes"), vocab_size=tokenizer.vocab_size + 3, eos_token_id=tokenizer.eos_id
    )
    tokenizer.save(folder)
    return engine.load(folder)


@pytest.mark.usefixtures("needs_llguidance")
@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 4, "lookup": 8},
])  # fmt: skip
def test_json_schema_is_kept(byte_model: engine.Engine, options: dict[str, Any]) -> None:
    talk = [{"role": "user", "content": "a plant"}]
    result = byte_model.chat(talk, grammar=Grammar.json_schema(SCHEMA), max_new_tokens=120, **options)
    found = json.loads(result.text)
    assert set(found) == {"name", "count", "kind"}
    assert len(found["name"]) <= 8 and 0 <= found["count"] <= 99 and found["kind"] in ("plant", "rock")
    assert result.finish_reason == "stop"


@pytest.mark.usefixtures("needs_llguidance")
def test_regex_lark_batches_and_drafts_keep_it(byte_model: engine.Engine) -> None:
    pattern = Grammar.regex(r"[a-c]{2,5}-[0-9]{3}")
    options: dict[str, Any] = {"temperature": 1.2, "max_new_tokens": 40, "grammar": pattern}
    plain = [byte_model.generate("x", seed=n, **options) for n in range(4)]
    assert all(re.fullmatch(r"[a-c]{2,5}-[0-9]{3}", r.text) for r in plain)
    assert len({r.text for r in plain}) > 1
    with byte_model.batch() as batch:
        streams = [batch.add("x", seed=n, **options) for n in range(4)]
        for _ in batch.run():
            pass
    assert [s.result.tokens for s in streams] == [r.tokens for r in plain]
    with engine.load(byte_model.weights.path) as twin:
        quick = byte_model.generate("x", seed=1, draft=twin, **options)
    assert quick.tokens == plain[1].tokens and quick.accepted_tokens > 0
    lark = Grammar.lark('start: "yes" | "no" | "may" start')
    text = byte_model.generate("x", max_new_tokens=60, temperature=1.0, grammar=lark).text
    assert re.fullmatch(r"(may)*(yes|no)", text)


@pytest.mark.usefixtures("needs_llguidance")
def test_bad_grammars_are_refused(byte_model: engine.Engine) -> None:
    for bad in (Grammar.regex("(a"), Grammar.lark("start: nothing"), Grammar.json_schema({"type": "odd"})):
        with pytest.raises(UserError, match="grammar cannot be used"):
            byte_model.generate("x", grammar=bad)
    with pytest.raises(UserError, match="not JSON"):
        Grammar.json_schema("{")
    with pytest.raises(UserError, match="is an object"):
        Grammar.json_schema("3")
    with pytest.raises(EngineError, match="stop token"):
        byte_model.generate("x", grammar=Grammar.regex("a"), stop_ids=[])
    with pytest.raises(UserError, match="one of them"):
        byte_model.generate("x", grammar=Grammar.regex("a"), token_mask=lambda _: None)


# Stop strings, when a token is less than a character


@pytest.mark.parametrize("stop", ["é!", "!é", "ü", "aé!éü", "üx never"])
@pytest.mark.parametrize("lookup", [0, 3])
def test_stop_strings_inside_characters(byte_model: engine.Engine, stop: str, lookup: int) -> None:
    """The answer is forced byte by byte: a stop string begins and ends within tokens' borders, in the
    middle of a guess or not, and half a character is never shown."""
    text = "aé!éü"
    tokenizer = byte_model.tokenizer
    one = {
        tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1
    }
    ids = [one[bytes([b])] for b in text.encode()]

    def force(answer: Any) -> np.ndarray:
        allowed = np.zeros(byte_model.config.vocab_size, dtype=bool)
        allowed[ids[len(answer)] if len(answer) < len(ids) else sorted(byte_model.stop_ids)[0]] = True
        return allowed

    # The prompt repeats the answer, so that guesses run over the end of a stop string.
    stream = byte_model.generate(
        [*ids, *ids, *ids], token_mask=force, stop=[stop], stream=True, lookup=lookup
    )
    pieces = [chunk.text for chunk in stream]
    found = text.find(stop)
    assert "".join(pieces) == stream.result.text == (text if found < 0 else text[:found])
    assert stream.result.finish_reason == "stop"
    assert (stream.result.stopped_by == stop) == (found >= 0)
    if found >= 0:
        assert len(stream.result.tokens) == len(text[: found + len(stop)].encode())
    assert lookup == 0 or stream.result.accepted_tokens > 0
