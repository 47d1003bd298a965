"""Answers: equal to the plain loop whatever the shortcut, and every end and policy told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketphi import engine
from pocketphi.core.errors import DataError, EngineError, UserError
from pocketphi.engine import session as sessions

from .tiny import random_ids

PROMPT = random_ids(20)
FREE = {"stop_ids": []}


def _plain(model: engine.Engine, ids: list[int], count: int, rope_set: Any = None) -> list[int]:
    """The restatement: one fresh pass over the whole sequence for every token, largest logit."""
    ids = list(ids)
    for _ in range(count):
        chosen = rope_set or sessions.rope_set_for(model.config, len(ids))
        session = model.backend.new_session(len(ids), chosen)
        logits = model.backend.forward(session, ids)
        assert logits is not None
        ids.append(int(logits[0].argmax()))
    return ids[-count:]


def test_greedy_equals_the_plain_loop(chat_model: engine.Engine) -> None:
    result = chat_model.generate(PROMPT, max_new_tokens=40, **FREE)
    assert result.tokens == _plain(chat_model, PROMPT, 40)
    assert (result.finish_reason, result.stopped_by, result.prompt_tokens) == ("length", None, 20)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2},
])  # fmt: skip
@pytest.mark.parametrize("draft", [1, 4, 16])
def test_lookup_changes_no_token(chat_model: engine.Engine, options: dict[str, Any], draft: int) -> None:
    plain = chat_model.generate(PROMPT * 3, max_new_tokens=100, lookup=0, **FREE, **options)
    quick = chat_model.generate(PROMPT * 3, max_new_tokens=100, lookup=draft, **FREE, **options)
    assert quick.tokens == plain.tokens and quick.text == plain.text
    assert plain.drafted_tokens == 0
    if not options:  # a random model repeats itself soon when it is greedy
        assert 0 < quick.accepted_tokens <= quick.drafted_tokens


def test_lookup_stops_where_plain_decoding_does(chat_model: engine.Engine) -> None:
    plain = chat_model.generate(PROMPT, max_new_tokens=60, **FREE)
    late = plain.tokens[45]
    first = plain.tokens.index(late)
    for draft in (0, 3, 8):
        result = chat_model.generate(PROMPT, max_new_tokens=60, stop_ids=[late], lookup=draft)
        assert result.tokens == plain.tokens[: first + 1]
        assert (result.finish_reason, result.stopped_by) == ("stop", late)


def test_same_seed_same_text_whatever_is_in_the_cache(chat_model: engine.Engine) -> None:
    options = {"temperature": 1.0, "max_new_tokens": 30, **FREE}
    first = chat_model.generate(PROMPT, seed=1, **options)
    chat_model.generate(PROMPT[:7] + random_ids(9, seed=4), **options)
    again = chat_model.generate(PROMPT, seed=1, **options)
    assert again.cached_tokens == 7
    assert again.tokens == first.tokens
    assert chat_model.generate(PROMPT, seed=2, **options).tokens != first.tokens


def test_stream_pieces_make_up_the_text(chat_model: engine.Engine) -> None:
    options = {"temperature": 1.2, "seed": 3, "max_new_tokens": 60}
    stream = chat_model.generate(PROMPT, stream=True, **FREE, **options)
    chunks = list(stream)
    assert "".join(c.text for c in chunks) == stream.result.text
    assert [t for c in chunks for t in c.tokens] == stream.result.tokens
    decoder = chat_model.tokenizer.stream_decoder(continuing=True)
    whole = "".join(decoder.push(t) for t in stream.result.tokens) + decoder.flush()
    assert whole == stream.result.text
    assert len(chunks) > 10


def test_stop_strings_cross_token_borders(chat_model: engine.Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "seed": 3, "max_new_tokens": 60, **FREE}
    text = chat_model.generate(PROMPT, **options).text
    at = next(n for n in range(10, len(text)) if text.find(text[n : n + 5]) == n)
    stop = text[at : at + 5]
    for draft in (0, 4):
        stream = chat_model.generate(PROMPT, stop=["never this", stop], stream=True, lookup=draft, **options)
        pieces = [c.text for c in stream]
        assert "".join(pieces) == stream.result.text == text[:at]
        assert (stream.result.finish_reason, stream.result.stopped_by) == ("stop", stop)
    # The start of a stop string that does not come to be one is not lost.
    almost = chat_model.generate(PROMPT, stop=[text[-1:] + "never", text[-3:] + "never"], **options)
    assert almost.text == text and almost.finish_reason == "length"
    with pytest.raises(UserError, match="empty"):
        chat_model.generate(PROMPT, stop=[""])


def test_log_probabilities(chat_model: engine.Engine) -> None:
    result = chat_model.generate(PROMPT, max_new_tokens=5, logprobs=2, temperature=1.0, **FREE)
    logits = chat_model.logits(PROMPT + result.tokens)[len(PROMPT) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert result.logprobs == pytest.approx([row[t] for row, t in zip(expected, result.tokens)])
    assert result.top_logprobs is not None
    for row, top in zip(expected, result.top_logprobs):
        assert [i for i, _ in top] == np.argsort(-row)[:2].tolist()


# Ends and refusals


def test_context_full_and_too_long(chat_model: engine.Engine) -> None:
    result = chat_model.generate(PROMPT, max_new_tokens=None, **FREE)
    assert (result.finish_reason, len(result.tokens)) == ("context", 256 - 20)
    with pytest.raises(EngineError, match=r"prompt has 200 tokens and 57 are reserved.*holds 256"):
        chat_model.generate(random_ids(200), max_new_tokens=57)
    assert len(chat_model.generate(random_ids(200), max_new_tokens=56, **FREE).tokens) == 56
    with pytest.raises(EngineError, match="prompt has 256 tokens and 1 are reserved"):
        chat_model.generate(random_ids(256), max_new_tokens=None)
    with pytest.raises(EngineError, match="more than the context of 256"):
        chat_model.logits(random_ids(257))


def test_bad_requests(chat_model: engine.Engine) -> None:
    with pytest.raises(UserError, match=r"unknown option 'temprature'.*did you mean 'temperature'"):
        chat_model.generate(PROMPT, temprature=1.0)
    with pytest.raises(UserError, match="max_new_tokens"):
        chat_model.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(UserError, match="unknown crossing 'exat'"):
        chat_model.generate(PROMPT, crossing="exat")
    with pytest.raises(EngineError, match="token id 100000 is outside"):
        chat_model.generate([100000])
    with pytest.raises(EngineError, match="the prompt is empty"):
        chat_model.generate([])


def test_nan_logits_are_an_error(chat_model: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = chat_model.backend.forward

    def forward(*arguments: Any) -> np.ndarray | None:
        logits = original(*arguments)
        if logits is not None:
            logits[-1, 7] = np.nan
        return logits

    monkeypatch.setattr(chat_model.backend, "forward", forward)
    for call in (chat_model.generate, chat_model.logits):
        with pytest.raises(EngineError, match=r"1 logits of \d+ that are not finite"):
            call(PROMPT)


def test_stop_from_outside_keeps_what_was_said(chat_model: engine.Engine) -> None:
    stream = chat_model.generate(PROMPT, max_new_tokens=60, stream=True, temperature=1.2, seed=3, **FREE)
    seen = ""
    for chunk in stream:
        seen += chunk.text
        if len(seen) > 5:
            stream.stop()
    assert stream.result.finish_reason == "interrupted"
    assert stream.result.text == seen and 5 < len(seen) < 60
    before = stream.result.tokens
    # The cache is still good: the same question again gives the same answer.
    whole = chat_model.generate(PROMPT, max_new_tokens=60, temperature=1.2, seed=3, **FREE)
    assert whole.tokens[: len(before)] == before and whole.cached_tokens == 19
    early = chat_model.generate(PROMPT[::-1], stream=True)
    early.stop()
    assert early.finish().finish_reason == "interrupted" and early.result.tokens == []


def test_two_answers_do_not_share_a_sequence(chat_model: engine.Engine) -> None:
    first = chat_model.generate(PROMPT, stream=True, max_new_tokens=30, temperature=1.2, **FREE)
    next(iter(first))
    alone = chat_model.generate(PROMPT, max_new_tokens=30, temperature=1.2, **FREE)
    with pytest.raises(EngineError, match="another answer was started"):
        first.finish()
    # With sequences of their own they may be interleaved.
    pair = [
        chat_model.generate(
            PROMPT,
            stream=True,
            max_new_tokens=30,
            temperature=1.2,
            sequence=chat_model.new_sequence(),
            **FREE,
        )
        for _ in range(2)
    ]
    for _ in zip(*pair):
        pass
    assert [s.finish().tokens for s in pair] == [alone.tokens] * 2


# LongRoPE


def test_exact_crossing_equals_the_plain_loop(rope_model: engine.Engine) -> None:
    """Factors by the length at every step, as the reference computes: the short ones up to 64."""
    prompt = random_ids(50)
    stream = rope_model.generate(prompt, max_new_tokens=None, stream=True, **FREE)
    for _ in stream:
        if len(stream.result.tokens) >= 40:
            stream.stop()
    result = stream.result
    assert result.tokens == _plain(rope_model, prompt, len(result.tokens))
    assert (result.rope_set, result.rope_crossing, result.approximate) == ("long", "exact", False)


@pytest.mark.parametrize("draft", [0, 8])
@pytest.mark.parametrize("prompt_tokens", [62, 63, 64, 65])
def test_crossing_at_every_offset(rope_model: engine.Engine, prompt_tokens: int, draft: int) -> None:
    rope_model.context_length = prompt_tokens + 12
    prompt = (random_ids(9) * 8)[:prompt_tokens]
    result = rope_model.generate(prompt, max_new_tokens=None, lookup=draft, **FREE)
    assert result.tokens == _plain(rope_model, prompt, 12)
    assert result.rope_set == "long"
    assert result.rope_crossing == ("exact" if prompt_tokens <= 64 else None)


def test_the_set_is_pinned_at_admission(rope_model: engine.Engine) -> None:
    prompt = random_ids(50)
    within = rope_model.generate(prompt, max_new_tokens=14, **FREE)
    assert (within.rope_set, within.rope_crossing) == ("short", None)
    assert within.tokens == _plain(rope_model, prompt, 14, "short")
    beyond = rope_model.generate(prompt, max_new_tokens=15, **FREE)
    assert (beyond.rope_set, beyond.cached_tokens) == ("long", 0), "no cache of the other rotation is used"
    assert beyond.tokens == _plain(rope_model, prompt, 15, "long")


def test_fast_and_stop(rope_model: engine.Engine) -> None:
    prompt = random_ids(50)
    rope_model.context_length = 90
    stopped = rope_model.generate(prompt, max_new_tokens=None, crossing="stop", **FREE)
    # Position 64 is never computed, the token that would stand there is still chosen.
    assert (stopped.finish_reason, stopped.rope_set, len(stopped.tokens)) == ("rope_limit", "short", 15)
    fast = rope_model.generate(prompt, max_new_tokens=None, crossing="fast", **FREE)
    assert (fast.rope_set, fast.rope_crossing, fast.approximate) == ("long", "fast", True)
    assert fast.tokens[:15] == stopped.tokens
    exact = rope_model.generate(prompt, max_new_tokens=None, crossing="exact", **FREE)
    assert exact.tokens == _plain(rope_model, prompt, 40), "a turned cache is not reused for an exact answer"
    assert exact.cached_tokens == 0


def test_a_growing_chat_crosses_between_turns(rope_model: engine.Engine) -> None:
    first = rope_model.generate(random_ids(40), max_new_tokens=10, **FREE)
    longer = random_ids(40) + first.tokens + random_ids(20, seed=2)
    second = rope_model.generate(longer, max_new_tokens=5, **FREE)
    assert (second.rope_set, second.rope_crossing, second.cached_tokens) == ("long", "exact", 0)
    assert second.tokens == _plain(rope_model, longer, 5)
    rope_model.generate(random_ids(40), max_new_tokens=10, **FREE)
    turned = rope_model.generate(longer, max_new_tokens=5, crossing="fast", **FREE)
    assert (turned.rope_crossing, turned.approximate) == ("fast", True) and turned.cached_tokens >= 40


# Conversations


def _talk(count: int) -> list[dict[str, str]]:
    talk = [{"role": "system", "content": "be brief"}]
    for n in range(count):
        talk.append({"role": "user", "content": f"question number {n}"})
        talk.append({"role": "assistant", "content": f"the answer is {n}"})
    return [*talk, {"role": "user", "content": "and now?"}]


def test_next_turn_uses_the_cache(chat_model: engine.Engine) -> None:
    talk = _talk(1)
    first = chat_model.chat(talk, max_new_tokens=8)
    assert first.cached_tokens == 0
    talk += [{"role": "assistant", "content": "well"}, {"role": "user", "content": "more"}]
    second = chat_model.chat(talk, max_new_tokens=8, temperature=0.7)
    assert second.cached_tokens >= first.prompt_tokens - 1
    fresh = chat_model.chat(talk, max_new_tokens=8, temperature=0.7, sequence=chat_model.new_sequence())
    assert fresh.cached_tokens == 0 and fresh.tokens == second.tokens


def test_too_long_a_chat_is_an_error_with_both_numbers(chat_model: engine.Engine) -> None:
    size = len(chat_model.tokenizer.chat(_talk(8)))
    assert size > 256
    with pytest.raises(
        EngineError, match=f"prompt has {size} tokens and 64 are reserved.*holds 256"
    ) as caught:
        chat_model.chat(_talk(8))
    assert "drop-oldest" in (caught.value.hint or "")


def test_drop_oldest_keeps_the_system_turn_and_tells(chat_model: engine.Engine) -> None:
    talk = _talk(8)
    result = chat_model.chat(talk, context_policy="drop-oldest", max_new_tokens=30)
    dropped = result.dropped_turns
    assert len(dropped) >= 2 and len(dropped) % 2 == 0, "whole turns go"
    assert [d["role"] for d in dropped] == ["user", "assistant"] * (len(dropped) // 2)
    assert dropped[0]["text"] == "question number 0"
    kept = [talk[0], *talk[1 + len(dropped) :]]
    assert result.prompt_tokens == len(chat_model.tokenizer.chat(kept)) <= 256 - 30
    fewer = [talk[0], *talk[1 + len(dropped) - 2 :]]
    assert len(chat_model.tokenizer.chat(fewer)) > 256 - 30, "no more than needed goes"
    assert (
        sum(d["num_tokens"] for d in dropped) == len(chat_model.tokenizer.chat(talk)) - result.prompt_tokens
    )
    huge = [talk[0], {"role": "user", "content": "a b c " * 100}]
    with pytest.raises(EngineError, match="even without all earlier turns"):
        chat_model.chat(huge, context_policy="drop-oldest")


def test_text_of_special_tokens_stays_text(chat_model: engine.Engine) -> None:
    plain = chat_model.tokenizer.chat([{"role": "user", "content": "<|end|><|system|>"}])
    assert plain.count(chat_model.tokenizer.token_id("<|end|>")) == 1


# Saved sessions


def test_saved_session_continues_bit_for_bit(chat_model: engine.Engine, tmp_path: Path) -> None:
    first = chat_model.generate(PROMPT, max_new_tokens=10, **FREE)
    path = tmp_path / "talk.session"
    size = chat_model.save_session(path, {"messages": [1, "zwei"]})
    assert size == path.stat().st_size
    longer = PROMPT + first.tokens + random_ids(5)
    expected = chat_model.generate(longer, max_new_tokens=10, **FREE)
    other = engine.load(chat_model.weights.path, backend=chat_model.backend.name)  # type: ignore[arg-type]
    notes = other.load_session(path)
    assert notes == {"messages": [1, "zwei"], "cache": "restored"}
    result = other.generate(longer, max_new_tokens=10, **FREE)
    assert result.cached_tokens >= 29 and result.tokens == expected.tokens


def test_a_cache_of_another_backend_is_computed_again(chat_model: engine.Engine, tmp_path: Path) -> None:
    chat_model.generate(PROMPT, max_new_tokens=3, **FREE)
    path = tmp_path / "talk.session"
    chat_model.save_session(path, {"messages": []})
    chat_model.backend.describe = lambda: {"backend": "other", "cache_type": "f99"}  # type: ignore[method-assign]
    notes = chat_model.load_session(path)
    assert "computed again" in notes["cache"] and chat_model.sequence.ids == []
    assert chat_model.generate(PROMPT, max_new_tokens=3, **FREE).cached_tokens == 0


def test_damaged_and_foreign_sessions(
    chat_model: engine.Engine, rope_model: engine.Engine, tmp_path: Path
) -> None:
    chat_model.generate(PROMPT, max_new_tokens=3, **FREE)
    path = tmp_path / "talk.session"
    chat_model.save_session(path)
    raw = path.read_bytes()
    with pytest.raises(EngineError, match="another model"):
        rope_model.load_session(path)
    for bad in (b"", raw[:20], raw[:-1], raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], raw + b"\0"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"not a saved session|checksum"):
            chat_model.load_session(path)
    with pytest.raises(DataError, match="cannot be read"):
        chat_model.load_session(tmp_path / "absent")
