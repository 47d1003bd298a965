"""From logits to one token: penalties, temperature, truncation, and a draw that can be repeated.

The steps, in this order, each leaving the others' numbers alone when it is off:

    1. logit bias, added
    2. repetition penalty (prompt and answer), presence and frequency penalty (answer only); then the token
       mask (a grammar), which puts everything it does not allow at -inf
    3. temperature 0: the largest logit, the lowest id among equals. Otherwise divide by temperature,
    4. top_k largest;  5. top_p: the shortest run of largest whose probability reaches it;
    6. min_p: at least this fraction of the largest probability;  7. one draw from what is left.

The draw for answer token n is a function of (seed, n) alone. So the same seed and prompt give the same
text however the prompt was cut, whatever else runs, and with or without speculation.

Log-probabilities are those of the model itself: log-softmax of the raw logits, before any of the above.

This is the plain statement in NumPy, for the NumPy backend and for tests; `native/src/sampling.cpp` chooses
the same token from the same logits. To that end nothing is left to a library or to the order of a sum:
weights are whole numbers (`weights`), the draw is a whole number of 53 bits, and biases and penalties are
single float32 operations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pocketphi.core.errors import EngineError, UserError

TokenMask = Callable[[Sequence[int]], "np.ndarray | None"]
"""Given the answer's ids so far, the allowed ids as a boolean array [V] or as bits (uint32 [V / 32 rounded
up], token i is bit i % 32 of word i // 32), or None for all: where a grammar comes in (llguidance computes
such bits)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy. Raises UserError for values without a meaning."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, meaning in (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", 0 < _single(self.repetition_penalty) < math.inf, "above 0 (1 is off)"),
            ("presence_penalty", math.isfinite(_single(self.presence_penalty)), "a number (0 is off)"),
            ("frequency_penalty", math.isfinite(_single(self.frequency_penalty)), "a number (0 is off)"),
        ):
            if not good:
                raise UserError(f"{name} must be {meaning}, found {getattr(self, name)!r}")
        for token, bias in self.logit_bias.items():
            if not _single(bias) < math.inf:
                raise UserError(f"logit_bias: token {token}: {bias!r} is not a number below infinity")


def _single(value: float) -> float:
    """The value as it will be computed with."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


@dataclass(frozen=True)
class Choice:
    """A chosen token. `logprob` and `top` ([(id, logprob)], best first) are None unless asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


WEIGHT_BITS = 40
"""A weight is a whole number of 2^-40: what is less likely than 2^-41 of the best token is never drawn."""

_MASK = (1 << 64) - 1


def draw_bits(seed: int, step: int) -> int:
    """Return 53 bits that depend on (seed, step) only: SplitMix64 of both."""
    state = _mix((seed & _MASK) ^ 0x9E3779B97F4A7C15)
    return _mix((state + (step + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11


def uniform(seed: int, step: int) -> float:
    """Return `draw_bits` as a number in [0, 1)."""
    return draw_bits(seed, step) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def weights(values: np.ndarray, best: float, temperature: float) -> np.ndarray:
    """Return exp((values - best) / temperature) in whole numbers of 2^-40, int64.

    The exponential is spelt out (x = k ln 2 + r, the series of exp(r) to r^11), since no two libraries'
    agree in the last bit; every operation is one of float64 and rounds once.
    """
    with np.errstate(over="ignore"):
        inverse = min(float(np.float64(1) / temperature), 1.7976931348623157e308)
        x = np.maximum((values.astype(np.float64) - best) * inverse, -64.0)
    k = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    p = np.full_like(r, 1 / 39916800)
    for divisor in (3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1):
        p = p * r + 1 / divisor
    return np.rint(np.ldexp(p, k.astype(np.int64) + WEIGHT_BITS)).astype(np.int64)


NOT_FINITE_HINT = "the weights are damaged, or their values overflow the number format of this file"


def check_logits(logits: np.ndarray) -> np.ndarray:
    """Return `logits`, or raise EngineError when any of them is NaN or infinite."""
    if not np.isfinite(logits).all():
        bad = int(np.size(logits) - np.isfinite(logits).sum())
        raise EngineError(
            f"the model produced {bad} logits of {np.size(logits)} that are not finite",
            hint=NOT_FINITE_HINT,
        )
    return logits


class Sampler:
    """Chooses the tokens of one answer, in order. `choose` looks; `accept` moves on.

    Raises UserError when `sampling` biases a token outside the vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        *,
        token_mask: TokenMask | None = None,
        num_logprobs: int | None = None,
    ) -> None:
        self.sampling = sampling
        self.prompt = prompt
        self.answer: list[int] = []
        self.vocab_size = vocab_size
        self._token_mask = token_mask
        self._num_logprobs = num_logprobs
        for token in sampling.logit_bias:
            if not 0 <= token < vocab_size:
                raise UserError(f"logit_bias: token {token} is outside the vocabulary of {vocab_size}")

    def fork(self) -> Sampler:
        """Return a copy that can run ahead of this one: same settings, same answer so far."""
        ahead = copy.copy(self)
        ahead.answer = list(self.answer)
        ahead._num_logprobs = None
        return ahead

    def accept(self, token: int) -> None:
        """Add a token to the answer, so that penalties and the next draw know it."""
        self.answer.append(token)

    def choose(self, logits_V: np.ndarray) -> Choice:
        """Return the next token for these float32 logits [V]; the sampler stays where it is.

        Raises EngineError when a logit is NaN or infinite, before or after bias and penalties, or when
        the mask allows no token.
        """
        check_logits(logits_V)
        adjusted = self._adjust(logits_V)
        if self.sampling.temperature == 0:
            token = int(np.argmax(adjusted))
        else:
            token = self._draw(adjusted)
        if self._num_logprobs is None:
            return Choice(token)
        logprobs = log_softmax(logits_V)
        top = tuple((int(i), float(logprobs[i])) for i in largest(logits_V, self._num_logprobs))
        return Choice(token, float(logprobs[token]), top)

    def mask_bits(self) -> np.ndarray | None:
        """What the token mask allows next, as bits; None when there is none or it allows all tokens."""
        allowed = self._token_mask(self.answer) if self._token_mask is not None else None
        if allowed is None:
            return None
        words = -(-self.vocab_size // 32)
        if np.shape(allowed) == (words,) and allowed.dtype == np.uint32:
            return np.ascontiguousarray(allowed)
        if np.shape(allowed) != (self.vocab_size,):
            raise EngineError(f"the token mask has shape {np.shape(allowed)}, not {(self.vocab_size,)}")
        packed = np.zeros(4 * words, np.uint8)
        bits = np.packbits(np.asarray(allowed, dtype=bool), bitorder="little")
        packed[: bits.size] = bits
        return packed.view("<u4")

    def _adjust(self, logits_V: np.ndarray) -> np.ndarray:
        s = self.sampling
        out = logits_V.astype(np.float32, copy=True)
        with np.errstate(over="ignore", invalid="ignore"):
            for token, bias in s.logit_bias.items():
                out[token] += np.float32(bias)
            if s.repetition_penalty != 1:
                penalty = np.float32(s.repetition_penalty)
                seen_V = np.zeros(self.vocab_size, dtype=bool)
                seen_V[np.array([*self.prompt, *self.answer], dtype=np.int64)] = True
                seen = out[seen_V]
                out[seen_V] = np.where(seen > 0, seen / penalty, seen * penalty)
            if s.presence_penalty or s.frequency_penalty:
                answer = np.array(self.answer, dtype=np.int64)
                counts_V = np.bincount(answer, minlength=self.vocab_size).astype(np.float32)
                out -= np.float32(s.presence_penalty) * (counts_V > 0)
                out -= np.float32(s.frequency_penalty) * counts_V
        words = self.mask_bits()
        if words is not None:
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self.vocab_size]
            out[bits == 0] = -np.inf
        if bad := int((~(out < np.inf)).sum()):
            raise EngineError(f"bias and penalties make {bad} logits infinite")
        if out.max() == -np.inf:
            raise EngineError("no token is allowed here: the mask or the bias rules out the whole vocabulary")
        return out

    def _draw(self, adjusted_V: np.ndarray) -> int:
        s = self.sampling
        ids = largest(adjusted_V, s.top_k or self.vocab_size)
        weight = weights(adjusted_V[ids], float(adjusted_V[ids[0]]), s.temperature)
        cumulative = np.cumsum(weight)
        keep = ids.size
        if s.top_p < 1:
            reached = cumulative >= max(1, math.ceil(s.top_p * float(cumulative[-1])))
            keep = int(np.argmax(reached)) + 1 if reached.any() else keep
        if s.min_p:
            below = weight < math.ceil(s.min_p * 2**WEIGHT_BITS)
            keep = min(keep, int(np.argmax(below))) if below.any() else keep
        target = draw_bits(s.seed, len(self.answer)) * int(cumulative[keep - 1]) >> 53
        return int(ids[np.searchsorted(cumulative[:keep], target, side="right")])


def largest(values_V: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` largest values, best first, equal values by id."""
    count = min(count, values_V.size)
    if count < values_V.size:
        # A threshold first: sorting a few is much quicker than sorting a vocabulary.
        threshold = np.partition(values_V, values_V.size - count)[values_V.size - count] if count else np.inf
        candidates = np.flatnonzero(values_V >= threshold)
    else:
        candidates = np.arange(values_V.size)
    order = np.argsort(-values_V[candidates], kind="stable")
    return candidates[order[:count]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis, computed in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
