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
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pocketphi.core.errors import EngineError, UserError

TokenMask = Callable[[Sequence[int]], "np.ndarray | None"]
"""Given the answer's ids so far, the allowed ids as a boolean array [V], or None for all: where a
grammar comes in (llguidance computes such masks)."""


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
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number (0 is off)"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number (0 is off)"),
        ):
            if not good:
                raise UserError(f"{name} must be {meaning}, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class Choice:
    """A chosen token. `logprob` and `top` ([(id, logprob)], best first) are None unless asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


_FIRST = 256


def uniform(seed: int, step: int) -> float:
    """Return a number in [0, 1) that depends on (seed, step) only: SplitMix64 of both, upper 53 bits."""
    state = _mix((seed & _MASK) ^ 0x9E3779B97F4A7C15)
    return (_mix((state + (step + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def check_logits(logits: np.ndarray) -> np.ndarray:
    """Return `logits`, or raise EngineError when any of them is NaN or infinite."""
    if not np.isfinite(logits).all():
        bad = int(np.size(logits) - np.isfinite(logits).sum())
        raise EngineError(
            f"the model produced {bad} logits of {np.size(logits)} that are not finite",
            hint="the weights are damaged, or their values overflow the number format of this file",
        )
    return logits


class Sampler:
    """Chooses the tokens of one answer, in order. `choose` looks; `accept` moves on."""

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
        self.answer: list[int] = []
        self.vocab_size = vocab_size
        self._token_mask = token_mask
        self._num_logprobs = num_logprobs
        for token in sampling.logit_bias:
            if not 0 <= token < vocab_size:
                raise UserError(f"logit_bias: token {token} is outside the vocabulary of {vocab_size}")
        self._bias_ids = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._seen_V = np.zeros(vocab_size, dtype=bool)
        self._seen_V[np.asarray(prompt, dtype=np.int64)] = True
        self._counts_V = np.zeros(vocab_size, dtype=np.float32)

    def fork(self) -> Sampler:
        """Return a copy that can run ahead of this one: same settings, same answer so far."""
        ahead = copy.copy(self)
        ahead.answer = list(self.answer)
        ahead._seen_V, ahead._counts_V = self._seen_V.copy(), self._counts_V.copy()
        ahead._num_logprobs = None
        return ahead

    def accept(self, token: int) -> None:
        """Add a token to the answer, so that penalties and the next draw know it."""
        self.answer.append(token)
        self._seen_V[token] = True
        self._counts_V[token] += 1

    def choose(self, logits_V: np.ndarray) -> Choice:
        """Return the next token for these float32 logits [V]; the sampler stays where it is.

        Raises EngineError when a logit is NaN or infinite, or when the mask allows no token.
        """
        check_logits(logits_V)
        adjusted = self._adjust(logits_V)
        if self.sampling.temperature == 0:
            token = int(np.argmax(adjusted))
        else:
            token = self._draw(adjusted)
        if adjusted[token] == -np.inf:
            raise EngineError("no token is allowed here: the mask or the bias rules out the whole vocabulary")
        if self._num_logprobs is None:
            return Choice(token)
        logprobs = log_softmax(logits_V)
        top = tuple((int(i), float(logprobs[i])) for i in largest(logprobs, self._num_logprobs))
        return Choice(token, float(logprobs[token]), top)

    def _adjust(self, logits_V: np.ndarray) -> np.ndarray:
        s = self.sampling
        out = logits_V.astype(np.float32, copy=True)
        if self._bias_ids.size:
            out[self._bias_ids] += self._bias
        if s.repetition_penalty != 1:
            penalty = np.float32(s.repetition_penalty)
            seen = out[self._seen_V]
            out[self._seen_V] = np.where(seen > 0, seen / penalty, seen * penalty)
        if s.presence_penalty:
            out -= np.float32(s.presence_penalty) * (self._counts_V > 0)
        if s.frequency_penalty:
            out -= np.float32(s.frequency_penalty) * self._counts_V
        if self._token_mask is not None:
            allowed = self._token_mask(self.answer)
            if allowed is not None:
                if np.shape(allowed) != (self.vocab_size,):
                    raise EngineError(
                        f"the token mask has shape {np.shape(allowed)}, not {(self.vocab_size,)}"
                    )
                out[~np.asarray(allowed, dtype=bool)] = -np.inf
        return out

    def _draw(self, adjusted_V: np.ndarray) -> int:
        s = self.sampling
        best = np.float64(adjusted_V.max())
        if best == -np.inf:
            return int(np.argmax(adjusted_V))

        def weights(values: np.ndarray) -> np.ndarray:
            # float64: sums over a vocabulary must not decide a draw by rounding.
            return np.exp((values.astype(np.float64) - best) / s.temperature)

        draw = uniform(s.seed, len(self.answer))
        if s.top_k:
            ids = largest(adjusted_V, s.top_k)
            weight = weights(adjusted_V[ids])
            cumulative = np.cumsum(weight)
            return self._among(ids, weight, cumulative, float(cumulative[-1]), draw)
        # Sorting a vocabulary costs milliseconds, and nearly always its first few hundred decide.
        weight_V = weights(adjusted_V)
        total, count = float(weight_V.sum()), _FIRST
        while True:
            ids = largest(adjusted_V, count)
            weight = weight_V[ids]
            cumulative = np.cumsum(weight)
            if s.top_p < 1 or s.min_p:
                enough = s.top_p < 1 and cumulative[-1] >= s.top_p * total
                enough = enough or (s.min_p > 0 and weight[-1] < s.min_p)
            else:
                enough = draw * total < cumulative[-1]
            if enough or ids.size == adjusted_V.size:
                return self._among(ids, weight, cumulative, total, draw)
            count *= 8

    def _among(
        self, ids: np.ndarray, weight: np.ndarray, cumulative: np.ndarray, total: float, draw: float
    ) -> int:
        """Cut to top_p and min_p and draw; `total` is the weight of all that could be in `ids`."""
        s = self.sampling
        keep = ids.size
        if s.top_p < 1:
            reached = cumulative >= s.top_p * total
            keep = int(np.argmax(reached)) + 1 if reached.any() else keep
        if s.min_p:
            keep = min(keep, int((weight >= s.min_p).sum()))
        mass = float(cumulative[keep - 1]) if s.top_p < 1 or s.min_p else total
        at = int(np.searchsorted(cumulative[:keep], draw * mass, side="right"))
        return int(ids[min(at, keep - 1)])


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
