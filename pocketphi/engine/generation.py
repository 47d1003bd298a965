"""Generating one answer: the loop between a sequence, a sampler and the caller who reads.

`Stream` yields text as it becomes certain (never half a character, never the start of a stop string) and
holds the finished `Generation`, which says everything that happened: why it ended, which rotation was used,
what was dropped, what came from the cache, how long each part took.

A stream says what it wants computed (`Work`) and is sent the logits: alone it is driven by its reader, in a
`Batch` many are driven together, and each takes the same decisions either way.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Ids
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pocketphi.core.errors import EngineError, UserError
from pocketphi.engine.backend import RopeSet, Want
from pocketphi.engine.draft import Drafter
from pocketphi.engine.sampler import Choice, Sampler
from pocketphi.engine.session import Crossing, Sequence, rope_set_for
from pocketphi.model.config import ModelConfig
from pocketphi.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "context", "rope_limit", "interrupted"]
"""stop: a stop token or stop string; length: max_new_tokens; context: the context is full; rope_limit:
the short factors end here and the crossing policy is `stop`; interrupted: the caller stopped it."""

_PREFILL_TOKENS = 512


@dataclass
class Generation:
    """One finished answer.

    text: without stop token and stop string.  tokens: every generated id, a final stop token included.
    stopped_by: the id or string that ended it.
    rope_set: the rotation that the sequence ended with; rope_crossing: the policy that was applied when
        it outgrew the short factors, None when it did not; approximate: keys were turned in place.
    dropped_turns: what the context policy left out ([] unless asked for): role, num_tokens, text.
    cached_tokens: prompt tokens that were in the cache already.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stopped_by: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    rope_set: RopeSet = "plain"
    rope_crossing: Crossing | None = None
    approximate: bool = False
    dropped_turns: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seed: int = 0
    prefill_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, per second spent on them."""
        later = len(self.tokens) - 1
        return later / self.decode_s if self.decode_s and later > 0 else 0.0

    def to_tree(self) -> dict[str, Any]:
        """All fields and rates, ready for JSON."""
        tree = asdict(self)
        tree["num_tokens"] = len(self.tokens)
        tree["prefill_tokens_per_s"] = round(self.prefill_tokens_per_s, 3)
        tree["decode_tokens_per_s"] = round(self.decode_tokens_per_s, 3)
        return tree


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer: text that is certain now, and the tokens decided since the last piece."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What a stream wants computed next: `ids` after what its sequence holds, and which logits of it."""

    ids: list[int]
    want: Want


Steps = Generator["Chunk | Work", "np.ndarray | None", None]


@dataclass
class Request:
    """What `Stream` needs to know; made by the Engine, which has checked it."""

    ids: list[int]
    max_new_tokens: int
    length_reason: FinishReason
    rope_set: RopeSet
    crossing: Crossing
    context: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    keep_logprobs: bool
    dropped: list[dict[str, Any]]
    prefill_tokens: int = _PREFILL_TOKENS


class Stream:
    """An answer in the making. Iterate for Chunks; `result` is complete when the iteration has ended.

    `stop()` ends it after the token (or piece of prompt) in work; it may be called from a signal handler
    or another thread. Errors leave the cache consistent: what it holds is what `Sequence.ids` says.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        sampler: Sampler,
        decoder: StreamDecoder | None,
        config: ModelConfig,
        drafter: Drafter | None = None,
    ) -> None:
        self.request, self.sequence, self._sampler = request, sequence, sampler
        self._decoder, self._config = decoder, config
        self._stopped = False
        self._text = _HeldBack(request.stop_strings)
        self._drafter = drafter
        self._chunks = self._drive()
        self.batched = False  # a Batch drives it
        self.beside = 0  # tokens of others in the same step
        self.done = False
        self.error: Exception | None = None  # what ended it in a Batch, if anything did
        self.result = Generation(
            prompt_tokens=len(request.ids),
            rope_set=request.rope_set,
            dropped_turns=request.dropped,
            seed=sampler.sampling.seed,
        )

    def __iter__(self) -> Iterator[Chunk]:
        if self.batched:
            raise EngineError("this answer belongs to a batch", hint="iterate the batch's run()")
        return self._chunks

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """End the answer as soon as the token in work is done."""
        self._stopped = True

    def finish(self) -> Generation:
        """Run to the end and return the result."""
        for _ in self:
            pass
        return self.result

    def _drive(self) -> Iterator[Chunk]:
        steps, rows = self.steps(), None
        while True:
            try:
                item = steps.send(rows)
            except StopIteration:
                return
            rows = None
            if isinstance(item, Chunk):
                yield item
            else:
                rows = self.sequence.forward(item.ids, item.want)

    def steps(self) -> Steps:
        """The answer as a coroutine: yields Chunks, and Work for which it must be sent the logits.

        Whoever drives it computes the work with `sequence` and sends the rows; for a reader of the
        stream that is done already. To be called once.
        """
        started = time.perf_counter()
        row = yield from self._prefill()
        result = self.result
        result.prefill_s = time.perf_counter() - started
        if row is None:
            yield from self._end("interrupted")
            return
        sampler, drafter = self._sampler, self._drafter
        pending: list[int] = []  # decided, not yet in the cache: the last token
        draft: list[int] = []
        rows = row
        first = 0.0
        while True:
            # `rows` are the logits after the pending token and after each token of the draft.
            for n in range(len(draft) + 1):
                choice = sampler.choose(rows[n])
                sampler.accept(choice.token)
                self._keep(choice)
                if not first:
                    first = time.perf_counter()
                    result.time_to_first_token_s = first - started
                if drafter is not None:
                    drafter.push(choice.token)
                result.decode_s = time.perf_counter() - first
                reason = self._after(choice.token)
                agreed = n < len(draft) and draft[n] == choice.token
                if reason is not None or not agreed:
                    break
                yield from self._emit()
            accepted = n + 1 if agreed else n
            if draft and drafter is not None:
                drafter.learn(len(draft), min(accepted, len(draft)))
                # Of the draft, what was not chosen must leave the cache; a chosen stop token may stay.
                self.sequence.truncate(len(self.sequence.ids) - (len(draft) - accepted))
                result.drafted_tokens, result.accepted_tokens = drafter.num_drafted, drafter.num_accepted
            if reason is None and self._stopped:
                reason = "interrupted"
            if reason is not None:
                yield from self._end(reason)
                return
            yield from self._emit()
            if self._stopped:  # by the reader, while it had the chunk
                yield from self._end("interrupted")
                return
            pending = [choice.token]
            draft = []
            if drafter is not None:
                draft = drafter.propose(self._draft_room(), sampler, self.beside)
            found = yield from self._advance(pending + draft)
            if found is None:
                yield from self._end("rope_limit")
                return
            rows = found

    def _prefill(self) -> Generator[Work, np.ndarray | None, np.ndarray | None]:
        """Put the prompt into the cache, piece by piece; returns its last logits or None if stopped."""
        request, sequence = self.request, self.sequence
        need = min(request.context, len(request.ids) + request.max_new_tokens)
        sequence.owner = self
        cached, self.result.rope_crossing = sequence.prepare(
            request.ids, request.rope_set, need=need, limit=request.context, crossing=request.crossing
        )
        self.result.cached_tokens = cached
        self.result.approximate = sequence.approximate
        rest = request.ids[cached:]
        row = None
        for at in range(0, len(rest), request.prefill_tokens):
            if self._stopped:
                return None
            piece = rest[at : at + request.prefill_tokens]
            last = at + len(piece) == len(rest)
            row = yield Work(piece, "last" if last else "none")
        return row

    def _advance(self, ids: list[int]) -> Generator[Work, np.ndarray | None, np.ndarray | None]:
        """Compute `ids` after the sequence; logits [T, V], or None when the crossing policy says stop."""
        sequence, size = self.sequence, self.request.prefill_tokens
        if sequence.owner is not self:
            raise EngineError("another answer was started on this sequence; this one cannot go on")
        if sequence.rope_set == "short" and self._crosses(len(sequence.ids) + len(ids)):
            policy = self.request.crossing
            if policy == "stop":
                return None
            self.result.rope_crossing, self.result.rope_set = policy, "long"
            if policy == "fast":
                sequence.rotate("long")
                self.result.approximate = True
            else:
                earlier = list(sequence.ids)
                sequence.reset("long")
                for at in range(0, len(earlier), size):
                    yield Work(earlier[at : at + size], "none")
        return (yield Work(ids, "all"))

    def _crosses(self, length: int) -> bool:
        return rope_set_for(self._config, length) == "long"

    def _draft_room(self) -> int:
        """How many draft tokens may follow the pending one: within the answer, and on this side of a
        rope crossing, which happens with one token at a time."""
        room = self.request.max_new_tokens - len(self.result.tokens) - 1
        if self.sequence.rope_set == "short":
            original = self._config.original_max_position_embeddings or 0
            room = min(room, original - len(self.sequence.ids) - 1)
        return max(0, room)

    def _keep(self, choice: Choice) -> None:
        result = self.result
        result.tokens.append(choice.token)
        if self.request.keep_logprobs:
            if result.logprobs is None or result.top_logprobs is None:
                result.logprobs, result.top_logprobs = [], []
            result.logprobs.append(choice.logprob if choice.logprob is not None else float("nan"))
            result.top_logprobs.append(choice.top or ())

    def _after(self, token: int) -> FinishReason | None:
        """Take in a chosen token; returns why the answer ends with it, if it does."""
        if token in self.request.stop_ids:
            self.result.stopped_by = token
            return "stop"
        if self._decoder is not None:
            found = self._text.push(self._decoder.push(token))
            if found is not None:
                self.result.stopped_by = found
                return "stop"
        if len(self.result.tokens) >= self.request.max_new_tokens:
            return self.request.length_reason
        return None

    _emitted = 0

    def _emit(self, last: bool = False) -> Iterator[Chunk]:
        text = self._text.take(everything=last)
        tokens = tuple(self.result.tokens[self._emitted :])
        if text or (last and tokens):
            self._emitted = len(self.result.tokens)
            self.result.text += text
            yield Chunk(text, tokens)

    def _end(self, reason: FinishReason) -> Iterator[Chunk]:
        if self._decoder is not None and not isinstance(self.result.stopped_by, str):
            found = self._text.push(self._decoder.flush())
            if found is not None:
                self.result.stopped_by, reason = found, "stop"
        self.result.finish_reason = reason
        yield from self._emit(last=True)
        self.done = True


class _HeldBack:
    """Text of which the end may still turn out to be the start of a stop string."""

    def __init__(self, stop_strings: Ids[str]) -> None:
        if any(not s for s in stop_strings):
            raise UserError("a stop string must not be empty")
        self._stops = tuple(stop_strings)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> str | None:
        """Add text; returns the stop string that is complete now (the first to begin), if any."""
        if self._stopped:
            raise EngineError("text after a stop string")
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        # The earliest; of two that begin at one place the one listed first.
        at, stop = min(found, key=lambda f: f[0])
        self._held = self._held[:at]
        self._stopped = True
        return stop

    def take(self, everything: bool = False) -> str:
        """Return and forget the text that no stop string can begin in any more."""
        keep = 0
        if not everything and not self._stopped:
            for stop in self._stops:
                for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                    if self._held.endswith(stop[:size]):
                        keep = size
                        break
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
