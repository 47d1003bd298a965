"""Continuous batching: several answers at once, reading the weights once for a token of each.

    with model.batch() as batch:
        first = batch.add("Once upon a time", max_new_tokens=100)
        other = batch.chat([{"role": "user", "content": "Hi"}], temperature=0.7, seed=3)
        for stream, chunk in batch.run():
            ...
    print(first.result.text)

How much that gains depends on what limits the machine: much where it is the memory, little where it is
arithmetic (small models, AVX2). Answers join and leave at any step. Which others run beside an answer, and in which pieces its prompt is computed,
changes nothing about it: with the same seed and prompt it has the text it has alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketphi.core import machine
from pocketphi.core.errors import EngineError, PocketPhiError, UserError
from pocketphi.engine.generation import Chunk, Generation, Steps, Stream, Work
from pocketphi.engine.session import Message, Sequence, common_prefix, forward_together

if TYPE_CHECKING:
    from pocketphi.engine.engine import Engine


@dataclass
class _Running:
    stream: Stream
    steps: Steps
    work: Work | None = None


class Batch:
    """Answers in the making that share passes over the weights. Made by `Engine.batch`.

    max_sequences: most answers computed at once, each with a cache of its own; more wait their turn, as
        they do while memory for another cache is short.
    prefill_tokens: most prompt tokens computed in one step, so that a long prompt that joins does not
        halt the answers that are running.
    """

    def __init__(self, engine: Engine, max_sequences: int = 8, prefill_tokens: int = 128) -> None:
        if max_sequences < 1 or prefill_tokens < 1:
            raise UserError("a batch needs room for at least one sequence and one token at a time")
        self._engine = engine
        self.max_sequences, self.prefill_tokens = max_sequences, prefill_tokens
        self._waiting: deque[Stream] = deque()
        self._running: list[_Running] = []
        self._idle: list[Sequence] = []

    def add(self, prompt: str | Ids[int], **options: Any) -> Stream:
        """Queue the continuation of a text or ids; options and errors as for `Engine.generate`."""
        sequence = Sequence(self._engine.backend)
        return self._queue(self._engine.generate(prompt, stream=True, sequence=sequence, **options))

    def chat(self, messages: Ids[Message], **options: Any) -> Stream:
        """Queue the answer to a conversation; options and errors as for `Engine.chat`."""
        sequence = Sequence(self._engine.backend)
        return self._queue(self._engine.chat(messages, stream=True, sequence=sequence, **options))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def run(self) -> Iterator[tuple[Stream, Chunk]]:
        """Step until every answer is done, those added meanwhile included; yields their pieces."""
        while self._waiting or self._running:
            yield from self.step()

    def step(self) -> list[tuple[Stream, Chunk]]:
        """Compute one pass for all that are running; returns the pieces of text that became certain.

        An answer that fails ends with the error in `Stream.error`; the others go on.
        """
        pieces: list[tuple[Stream, Chunk]] = []
        self._admit(pieces)
        chosen, prompt_tokens = [], 0
        for item in self._running:
            assert item.work is not None
            # One token of an answer (and its draft) always fits; prompts take turns, the oldest first.
            if item.work.want != "all":
                if prompt_tokens and prompt_tokens + len(item.work.ids) > self.prefill_tokens:
                    continue
                prompt_tokens += len(item.work.ids)
            chosen.append(item)
        for item in chosen:
            item.stream.beside = len(self._running) - 1
        for item, rows in self._compute(chosen):
            self._advance(item, rows, pieces)
        self._running = [item for item in self._running if item.work is not None]
        return pieces

    def close(self) -> None:
        """Free the caches and forget the answers that are not done."""
        for item in self._running:
            item.steps.close()
            item.stream.sequence.close()
        for sequence in self._idle:
            sequence.close()
        self._running, self._idle = [], []
        self._waiting.clear()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _queue(self, stream: Stream) -> Stream:
        stream.request.prefill_tokens = self.prefill_tokens
        stream.batched = True
        self._waiting.append(stream)
        return stream

    def _admit(self, pieces: list[tuple[Stream, Chunk]]) -> None:
        while self._waiting and len(self._running) < self.max_sequences:
            stream = self._waiting[0]
            if self._running and not self._memory_for(stream):
                return
            self._waiting.popleft()
            stream.sequence = self._take(stream.request.ids)
            item = _Running(stream, stream.steps())
            self._advance(item, None, pieces)
            if item.work is not None:
                self._running.append(item)

    def _memory_for(self, stream: Stream) -> bool:
        request = stream.request
        tokens = min(request.context, len(request.ids) + request.max_new_tokens)
        need = tokens * self._engine.backend.plan().cache_bytes_per_token
        return need < machine.memory_available_bytes()

    def _take(self, ids: list[int]) -> Sequence:
        """A cache for a prompt: of those that are free the one that holds most of it already."""
        if not self._idle:
            return Sequence(self._engine.backend)
        best = max(self._idle, key=lambda sequence: common_prefix(sequence.ids, ids))
        if not common_prefix(best.ids, ids) and len(self._idle) + len(self._running) < self.max_sequences:
            return Sequence(self._engine.backend)
        self._idle.remove(best)
        return best

    def _compute(self, items: list[_Running]) -> list[tuple[_Running, np.ndarray | None]]:
        work = [(i.stream.sequence, i.work.ids, i.work.want) for i in items if i.work is not None]
        if not work:
            return []
        try:
            return list(zip(items, forward_together(self._engine.backend, work)))
        except EngineError as error:
            # All or nothing, and nothing has changed: alone, only what is at fault fails.
            if len(items) == 1:
                self._fail(items[0], error)
                return []
            return [pair for item in items for pair in self._compute([item])]

    def _advance(self, item: _Running, rows: np.ndarray | None, pieces: list[tuple[Stream, Chunk]]) -> None:
        """Let one answer take its decisions up to the next work it wants."""
        item.work = None
        try:
            step = item.steps.send(rows)
            while isinstance(step, Chunk):
                pieces.append((item.stream, step))
                step = item.steps.send(None)
            item.work = step
        except StopIteration:
            self._idle.append(item.stream.sequence)
        except PocketPhiError as error:
            self._fail(item, error)

    def _fail(self, item: _Running, error: Exception) -> None:
        item.work, item.stream.error = None, error
        item.steps.close()
        item.stream.sequence.close()


def finish_all(batch: Batch, streams: list[Stream]) -> list[Generation]:
    """Run a batch to its end; raises the first error that ended one of `streams`."""
    for _ in batch.run():
        pass
    for stream in streams:
        if stream.error is not None:
            raise stream.error
    return [stream.result for stream in streams]
