"""Ids back to text, whole and as they come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketphi import tokenizer as tk

plain = (
    st.text(max_size=40)
    .map(lambda t: t.encode("utf-8", "ignore").decode())
    .map(
        lambda t: t.replace("\u2581", "_")  # SentencePiece writes a blank as U+2581: the two are one
    )
)


@settings(max_examples=200, deadline=None)
@given(text=plain)
def test_round_trip(small: tk.Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 1023), max_size=30))
def test_stream_is_whole_characters(small: tk.Tokenizer, ids: list[int]) -> None:
    """Any ids, sense or not: the parts joined are the whole, and no part ends inside a character."""
    decoder = small.stream_decoder()
    parts = [decoder.push(i) for i in ids]
    seen = b""
    for i, part in zip(ids, parts):
        if i not in small.special_ids:
            seen += small.token_bytes(i)
        part.encode("utf-8")  # no half characters, no surrogates
    assert "".join(parts) + decoder.flush() == small.decode(ids)
    assert small.decode(ids) in (
        seen.decode("utf-8", "replace"),
        seen.removeprefix(b" ").decode("utf-8", "replace"),
    )


def test_stream_of_bytes(small: tk.Tokenizer) -> None:
    llama = "\U0001f999"
    ids = small.encode(f"a {llama} b")
    decoder = small.stream_decoder()
    parts = [decoder.push(i) for i in ids]
    assert sum(i in range(3, 259) for i in ids) == 4, "the animal is four byte tokens"
    assert llama in parts and "\ufffd" not in "".join(parts)
    cut = small.stream_decoder()
    shown = "".join(cut.push(i) for i in ids[:-4])
    assert "\ufffd" not in shown
    assert cut.flush() in ("", "\ufffd")


def test_first_blank(small: tk.Tokenizer) -> None:
    ids = small.encode("the next")
    assert small.decode(ids) == "the next"
    decoder = small.stream_decoder(continuing=True)
    assert "".join(decoder.push(i) for i in ids) == " the next"


def test_special_tokens(small: tk.Tokenizer) -> None:
    ids = [small.eos_id, *small.encode("x"), small.token_id("<|end|>")]
    assert small.decode(ids) == "x"
    assert small.decode(ids, skip_special=False) == "<|endoftext|> x<|end|>"


def test_transformers_decodes_alike(phi3: tk.Tokenizer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    phi3.save(tmp_path)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "Grüße, 世界 🦙"}, {"role": "assistant", "content": "  ok\n"}]
    ids = phi3.chat(talk)
    for skip in (True, False):
        assert phi3.decode(ids, skip_special=skip) == judge.decode(ids, skip_special_tokens=skip)
