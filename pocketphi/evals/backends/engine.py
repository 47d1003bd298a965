"""Scoring on the engine: the shipped file, in the runtime that ships.

What a request shares with the one before it is not computed again: the few-shot text of a group, a
question's context for all its options, the words with which two options begin. The engine promises that a
token's logits depend only on the tokens before it, not on how they were cut into calls, so this changes
time and not scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from pocketphi import engine
from pocketphi.core.errors import EngineError
from pocketphi.engine.backend import Session
from pocketphi.engine.session import common_prefix, rope_set_for
from pocketphi.evals.backends import model_file_sha256
from pocketphi.evals.backends.base import (
    Messages,
    OptionScore,
    Reply,
    fit_prompt,
    log_probabilities,
    prompt_ids,
    start_tokens,
)
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.prompts import Request


class EngineScorer:
    """A GGUF file (or any file the engine loads) as a `Scorer`."""

    def __init__(self, path: Path, config: EvalConfig) -> None:
        self._path = path
        self._engine = engine.load(
            path,
            num_threads=config.num_threads,
            backend=cast(Any, config.backend),
            context_length=config.max_context_tokens,
        )
        self.tokenizer = self._engine.tokenizer
        self.max_tokens = self._engine.context_length
        self.start_ids, self.start_rule = start_tokens(self.tokenizer, config.start_token)
        self._session: Session | None = None
        # The tokens whose keys and values the session holds.
        self._cached: tuple[int, ...] = ()

    def identity(self) -> dict[str, Any]:
        found = self._engine.describe()
        kept = ("backend", "kernels", "cache_type", "architecture", "tensor_types", "num_parameters")
        return {
            "engine": "pocketphi.engine",
            **{k: found[k] for k in kept if k in found},
            "file": self._path.name,
            "file_sha256": model_file_sha256(self._path),
        }

    def score(self, requests: Iterable[Request]) -> Iterator[list[OptionScore]]:
        for request in requests:
            yield self._reusing(request)

    def rolling(self, ids: Sequence[int]) -> np.ndarray:
        pieces, start = [], 1
        for logits_TV in self._engine.logits_in_pieces(list(ids[:-1])):
            pieces.append(log_probabilities(logits_TV, ids[start : start + len(logits_TV)])[0])
            start += len(logits_TV)
        return np.concatenate(pieces)

    def complete(
        self, texts: Iterable[str | Messages], *, chat: bool, max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[Reply]:
        for text in texts:
            ids = prompt_ids(self.tokenizer, self.start_ids, text, chat)
            kept, room = fit_prompt(ids, max_new_tokens, self.max_tokens)
            # The engine keeps the longest common prefix with the prompt before: the shots.
            found = self._engine.generate(kept, max_new_tokens=room, temperature=0.0, stop=list(stop))
            ended = "stop" if found.finish_reason == "stop" else "length"
            yield Reply(found.text, ended, len(found.tokens), len(ids) - len(kept))

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        self._engine.close()

    def _open(self, num_tokens: int) -> Session:
        """Return a session for `num_tokens` tokens, with the rotation of a sequence of that length."""
        wanted = rope_set_for(self._engine.config, num_tokens)
        if self._session is not None and self._session.capacity < num_tokens:
            self._session.close()
            self._session = None
        if self._session is None:
            # Room to spare, so that a slightly longer question does not cost the cached shots.
            capacity = min(self.max_tokens, max(512, num_tokens + num_tokens // 2))
            self._session = self._engine.backend.new_session(capacity, wanted)
            self._cached = ()
        elif self._session.rope_set != wanted:
            self._session.reset(wanted)
            self._cached = ()
        return self._session

    def _reusing(self, request: Request) -> list[OptionScore]:
        context = request.context
        longest = max(len(o) for o in request.options)
        if len(context) + longest - 1 > self.max_tokens:
            raise EngineError(
                f"an option of {longest} tokens does not fit the context of {self.max_tokens} tokens"
            )
        backend = self._engine.backend
        session = self._open(len(context) + longest - 1)
        # The shots, a passage asked about twice, the half of a sentence before its blank: whatever the
        # last request left. The context's last token is computed anyway, for its logits.
        kept = min(common_prefix(self._cached, context), len(context) - 1)
        session.truncate(kept)
        # Should what follows fail, nothing beyond this is taken for granted.
        self._cached = context[:kept]
        ends = [_End(_rows(backend.forward(session, list(context[kept:]), "last"))[0])]
        scores = []
        read: tuple[int, ...] = ()
        for option in request.options:
            same = common_prefix(read, option[:-1])
            session.truncate(len(context) + same)
            del ends[same + 1 :]
            if more := list(option[same:-1]):
                ends += [_End(row_V) for row_V in _rows(backend.forward(session, more, "all"))]
            read = option[:-1]
            found = [end.log_probability(token) for end, token in zip(ends, option)]
            scores.append(OptionScore(sum(p for p, _ in found), all(top for _, top in found)))
        self._cached = (*context, *read)
        return scores


class _End:
    """The logits after some token, for every option that goes on from there."""

    def __init__(self, logits_V: np.ndarray) -> None:
        self._logits_V = logits_V
        best = int(logits_V.argmax())
        self._top = float(logits_V[best])
        # log P = logit - norm, whichever token it is asked of.
        self._norm = self._top - float(log_probabilities(logits_V[None], [best])[0][0])

    def log_probability(self, token: int) -> tuple[float, bool]:
        """log P(token), and whether it is (one of) the likeliest."""
        logit = float(self._logits_V[token])
        return logit - self._norm, logit >= self._top


def _rows(logits_TV: np.ndarray | None) -> np.ndarray:
    assert logits_TV is not None
    return logits_TV
