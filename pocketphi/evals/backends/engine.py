"""Scoring on the engine: the shipped file, in the runtime that ships.

The few-shot text of a group is computed once and its cache kept; a question's context is computed
once for all its options. The engine promises that a token's logits depend only on the tokens before
it, not on how they were cut into calls, so this changes time and not scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi import engine
from pocketphi.core.errors import EngineError
from pocketphi.evals.backends import model_file_sha256
from pocketphi.evals.backends.base import (
    Generation,
    OptionScore,
    cut_at_stop,
    log_probabilities,
    log_probability,
    start_tokens,
)
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.prompts import Request


class EngineScorer:
    """A GGUF file (or any file the engine loads) as a `Scorer`."""

    def __init__(self, path: Path, config: EvalConfig) -> None:
        self._path = path
        self._engine = engine.load(path, num_threads=config.num_threads, backend=config.backend)
        self.tokenizer = self._engine.tokenizer
        own = int(self._engine.config.max_position_embeddings)
        self.max_tokens = min(own, config.max_context_tokens or own)
        self.start_ids, self.start_rule = start_tokens(self.tokenizer, config.start_token)
        self._backend = getattr(self._engine, "backend", None)
        self._session: Any = None
        self._shared: tuple[int, ...] = ()

    def identity(self) -> dict[str, Any]:
        found = self._engine.describe()
        kept = (
            "backend",
            "kernels",
            "cache_type",
            "architecture",
            "quantization",
            "file_type",
            "num_parameters",
        )
        return {
            "engine": "pocketphi.engine",
            **{k: found[k] for k in kept if k in found},
            "file": self._path.name,
            "file_sha256": model_file_sha256(self._path),
        }

    def score(self, requests: Iterable[Request]) -> Iterator[list[OptionScore]]:
        for request in requests:
            if self._backend is None:
                yield [self._whole(request.context, option) for option in request.options]
            else:
                yield self._reusing(request)

    def rolling(self, ids: Sequence[int]) -> np.ndarray:
        logits_TV = self._engine.logits(list(ids[:-1]))
        return log_probabilities(logits_TV, ids[1:])[0]

    def generate(self, ids: Sequence[int], *, max_new_tokens: int, stop: Sequence[str]) -> Generation:
        room = self.max_tokens - max_new_tokens
        kept = list(ids)[-room:] if room > 0 else list(ids)
        stop_ids = set(self.tokenizer.stop_ids)
        produced: list[int] = []
        # Streaming, so that a stop string ends the work and not only the text.
        for token in self._tokens(kept, max_new_tokens, stop_ids):
            if token in stop_ids:
                text = cut_at_stop(self.tokenizer.decode(produced), stop)[0]
                return Generation(text, "stop", len(produced))
            produced.append(token)
            text, stopped = cut_at_stop(self.tokenizer.decode(produced), stop)
            if stopped:
                return Generation(text, "stop", len(produced))
        return Generation(self.tokenizer.decode(produced), "length", len(produced))

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()

    def _tokens(self, ids: list[int], max_new_tokens: int, stop_ids: set[int]) -> Iterator[int]:
        if self._backend is None:
            for _ in range(max_new_tokens):
                token = int(np.argmax(self._engine.logits(ids)[-1]))
                yield token
                if token in stop_ids:
                    return
                ids = [*ids, token]
            return
        session = self._open(len(ids) + max_new_tokens)
        self._shared = ()
        session.truncate(0)
        logits = self._backend.forward(session, ids, want="last")
        for _ in range(max_new_tokens):
            token = int(np.argmax(logits[-1]))
            yield token
            if token in stop_ids or session.length >= session.capacity:
                return
            logits = self._backend.forward(session, [token], want="last")

    def _open(self, num_tokens: int) -> Any:
        """Return the session, with the rotation that a sequence of `num_tokens` has by its whole length."""
        wanted = self._rope_set(num_tokens)
        if self._session is None:
            self._session = self._backend.new_session(self.max_tokens, wanted)
            self._shared = ()
        elif self._session.rope_set != wanted:
            self._session.reset(wanted)
            self._shared = ()
        return self._session

    def _rope_set(self, num_tokens: int) -> str:
        config = self._engine.config
        if not config.rope_scaling:
            return "plain"
        return "long" if num_tokens > config.original_max_position_embeddings else "short"

    def _reusing(self, request: Request) -> list[OptionScore]:
        context = request.context
        longest = max(len(o) for o in request.options)
        if len(context) + longest - 1 > self.max_tokens:
            raise EngineError(
                f"an option of {longest} tokens does not fit the context of {self.max_tokens} tokens"
            )
        session = self._open(len(context) + longest - 1)
        shared = context[: request.shared]
        if not shared or shared != self._shared:
            session.truncate(0)
            self._shared = ()
            if shared:
                self._backend.forward(session, list(shared), want="none")
                self._shared = shared
        else:
            session.truncate(len(shared))
        first_V = self._backend.forward(session, list(context[len(shared) :]), want="last")[-1]
        scores = []
        for option in request.options:
            total, greedy = log_probability(first_V, option[0])
            if len(option) > 1:
                logits_TV = self._backend.forward(session, list(option[:-1]), want="all")
                more, top = log_probabilities(logits_TV, option[1:])
                total += float(more.sum())
                greedy = greedy and bool(top.all())
                session.truncate(len(context))
            scores.append(OptionScore(total, greedy))
        return scores

    def _whole(self, context: tuple[int, ...], option: tuple[int, ...]) -> OptionScore:
        ids = [*context, *option]
        logits_TV = self._engine.logits(ids[:-1])[-len(option) :]
        logprobs, top = log_probabilities(logits_TV, option)
        return OptionScore(float(logprobs.sum()), bool(top.all()))
