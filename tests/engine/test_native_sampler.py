"""The core's sampler against its slow twin in NumPy: the same token, or the same refusal, every time."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketphi import engine
from pocketphi.core.errors import EngineError, UserError
from pocketphi.engine import native
from pocketphi.engine.native_sampler import NativeChoice, NativeSampler, NativeSampling
from pocketphi.engine.sampler import Choice, Sampler, Sampling, draw_bits, weights

from .tiny import random_ids


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    if reason := native.available():
        pytest.skip(f"the native core cannot be used: {reason}")
    path = native.library_path()
    assert path is not None
    return native._load_library(path)


def _outcome(sampler: Sampler, logits: np.ndarray) -> Choice | tuple[str, str | None]:
    try:
        return sampler.choose(logits)
    except EngineError as error:
        return error.message, error.hint


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-320, 1e-4, 0.3, 0.7, 1.0, 1.0, 2.5, 1e6, 1e300]),
        "top_k": st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 2**40)),
        "top_p": st.one_of(st.just(1.0), st.floats(1e-9, 1.0), st.sampled_from([0.5, 0.9, 1 - 2**-53])),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1), st.sampled_from([1e-13, 0.05, 1.0])),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.5, 1e-30, 1e30]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.7, -1.5, 1e38]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4, -0.1, 3e38]),
        "seed": st.integers(-(2**63), 2**64),
    }
)


def _logits(rng: np.random.Generator, size: int, kind: int) -> np.ndarray:
    values = (rng.standard_normal(size) * rng.choice([0.01, 1.0, 4.0, 30.0])).astype(np.float32)
    if kind == 1:  # full of ties
        values = np.round(values, 0)
    elif kind == 2:  # all alike, and both zeros
        values = np.where(rng.random(size) < 0.5, np.float32(0), np.float32(-0.0))
    elif kind == 3:  # the ends of the format
        values *= np.float32(10.0) ** rng.integers(-44, 37, size).astype(np.float32)
    elif kind == 4:  # neighbours in the last bit
        values = np.float32(2.5) + rng.integers(-2, 3, size).astype(np.float32) * np.float32(2.0**-22)
    elif kind == 5:  # damaged
        values[rng.integers(size, size=2)] = rng.choice([np.nan, -np.nan, np.inf, -np.inf])
    return values


def _mask(rng: np.random.Generator, size: int, kind: int) -> np.ndarray | None:
    allowed = np.zeros(size, dtype=bool)
    if kind == 0:
        return None
    if kind == 1:
        allowed[rng.integers(size)] = True
    elif kind > 2:
        allowed |= rng.random(size) < 0.4
    if kind == 4:  # as llguidance packs them
        packed = np.packbits(np.pad(allowed, (0, -size % 32)), bitorder="little")
        return packed.view("<u4")
    return allowed


@settings(max_examples=3000, deadline=None)
@given(
    options=OPTIONS,
    size=st.one_of(st.integers(1, 70), st.integers(250, 260), st.integers(2000, 2600)),
    kinds=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    num_bias=st.integers(0, 3),
    history=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    num_logprobs=st.sampled_from([None, None, 0, 1, 5, 100]),
    data_seed=st.integers(0, 2**32),
)
def test_both_choose_the_same_token(
    lib: ctypes.CDLL,
    options: dict[str, Any],
    size: int,
    kinds: tuple[int, int],
    num_bias: int,
    history: tuple[int, int],
    num_logprobs: int | None,
    data_seed: int,
) -> None:
    rng = np.random.default_rng(data_seed)
    logits, mask = _logits(rng, size, kinds[0]), _mask(rng, size, kinds[1])
    bias = {
        int(i): float(rng.choice([-np.inf, -3e38, 0.5, 3e38, -100]))
        for i in rng.integers(size, size=num_bias)
    }
    prompt, answer = (rng.integers(size, size=n).tolist() for n in history)
    how = Sampling(logit_bias=bias, **options)
    common: dict[str, Any] = {"token_mask": lambda _: mask, "num_logprobs": num_logprobs}
    slow = Sampler(how, prompt, size, **common)
    quick = NativeSampler(lib, Sampler(how, prompt, size, **common))
    for token in answer:
        slow.accept(token)
        quick.accept(token)
    for _ in range(2):
        expected, found = _outcome(slow, logits), _outcome(quick, logits)
        if isinstance(expected, tuple) or isinstance(found, tuple):
            assert expected == found
            return
        assert found.token == expected.token
        if num_logprobs is None:
            assert found == expected
        else:
            assert found.top is not None and expected.top is not None
            assert found.logprob == pytest.approx(expected.logprob, rel=1e-12, abs=1e-12)
            assert [i for i, _ in found.top] == [i for i, _ in expected.top]
            assert [v for _, v in found.top] == pytest.approx(
                [v for _, v in expected.top], rel=1e-12, abs=1e-12
            )
        assert quick.fork().choose(logits).token == expected.token
        slow.accept(expected.token)
        quick.accept(expected.token)


def test_a_vocabulary_of_phi3s_size(lib: ctypes.CDLL) -> None:
    """Peaked as a model's logits are and flat, every truncation, two hundred draws each."""
    size, rng = 32064, np.random.default_rng(0)
    for spread in (0.5, 2.0, 6.0):
        logits = (rng.standard_normal(size) * spread).astype(np.float32)
        for options in ({}, {"top_k": 40}, {"top_p": 0.95}, {"min_p": 0.05}, {"top_p": 0.999, "min_p": 1e-4}):
            how = Sampling(temperature=0.8, seed=int(spread * 10), **options)  # type: ignore[arg-type]
            slow, quick = Sampler(how, [], size), NativeSampler(lib, Sampler(how, [], size))
            for _ in range(13):
                token = slow.choose(logits).token
                assert quick.choose(logits).token == token
                slow.accept(token)
                quick.accept(token)


def test_weights_are_the_exponential() -> None:
    values = np.linspace(-70, 0, 100_001).astype(np.float32)
    exact = np.exp(np.maximum(values.astype(np.float64), -64)) * 2.0**40
    assert np.abs(weights(values, 0.0, 1.0) - exact).max() <= 0.51
    assert weights(np.zeros(1, np.float32), 0.0, 5e-324).tolist() == [2**40]


def test_draws_follow_the_distribution(lib: ctypes.CDLL) -> None:
    """Chi-square of 20,000 draws among 12 tokens: 11 degrees of freedom, 31.3 has a chance of 0.001."""
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    share = np.exp(logits.astype(np.float64))
    share /= share.sum()
    counts = np.zeros(12)
    for seed in range(20_000):
        how = Sampling(temperature=1.0, seed=seed)
        counts[NativeSampler(lib, Sampler(how, [], 12)).choose(logits).token] += 1
    assert ((counts - 20_000 * share) ** 2 / (20_000 * share)).sum() < 31.3


def test_guesses_leave_the_distribution(chat_model: engine.Engine) -> None:
    """Second tokens after a repeating prompt: the same for every seed with guesses and without, and as
    often as the model's own probabilities say."""
    prompt, options = random_ids(6) * 3, {"temperature": 1.0, "stop_ids": []}
    logits = chat_model.logits(prompt)[-1].astype(np.float64)
    share = np.exp(logits - logits.max())
    share /= share.sum()
    first: Counter[int] = Counter()
    drafted = 0
    for seed in range(300):
        plain = chat_model.generate(prompt, max_new_tokens=4, seed=seed, lookup=0, **options)
        quick = chat_model.generate(prompt, max_new_tokens=4, seed=seed, lookup=3, **options)
        assert quick.tokens == plain.tokens
        drafted += quick.drafted_tokens
        first[quick.tokens[0]] += 1
    assert drafted > 0
    best = int(share.argmax())
    deviation = (300 * share[best] * (1 - share[best])) ** 0.5
    assert abs(first[best] - 300 * share[best]) < 4 * deviation


def test_what_cannot_be_sampled_is_refused(lib: ctypes.CDLL) -> None:
    """By the C API itself: the binding's own checks come before it."""
    logits = np.zeros(8, np.float32)
    ids = np.array([3, 8], np.int32)
    good = {"temperature": 0.5, "top_p": 1.0, "repetition_penalty": 1.0}

    def ask(how: dict[str, Any], **choice: Any) -> str:
        given = {"logits": logits.ctypes.data, "vocab_size": 8, **choice}
        code = lib.pp_sample(NativeSampling(**{**good, **how}), NativeChoice(**given))
        return lib.pp_last_error().decode() if code else ""

    assert ask({}) == ""
    for how, expected in (
        ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"), ({"top_p": float("nan")}, "top_p"), ({"min_p": 2}, "min_p"),
        ({"top_k": -1}, "top_k"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "penalty"), ({"num_bias": 2}, "without its numbers"),
        ({"num_bias": 2, "bias_ids": ids.ctypes.data, "bias": logits.ctypes.data}, "biased token outside"),
    ):  # fmt: skip
        assert expected in ask(how)
    assert "no logits" in ask({}, logits=None)
    assert "no logits" in ask({}, vocab_size=0)
    assert "more than" in ask({}, vocab_size=2**30)
    assert "negative" in ask({}, num_answer=-1)
    assert "without its numbers" in ask({}, num_prompt=2)
    outside = {"num_answer": 2, "answer": ids.ctypes.data}
    assert "outside the vocabulary of 8" in ask({"presence_penalty": 1}, **outside)
    assert lib.pp_sample(None, NativeChoice()) == 1


def test_biases_and_penalties_without_a_meaning() -> None:
    for bad in (
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"presence_penalty": 1e39},
    ):
        with pytest.raises(UserError, match=next(iter(bad))):
            Sampling(**bad)  # type: ignore[arg-type]
    assert draw_bits(0, 0) * 2.0**-53 == 0.6524484863740322
