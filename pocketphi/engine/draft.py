"""Speculative decoding: drafts that cost less than the model's own tokens, and never change the text.

Whoever drafts, the model computes the logits after every token of the draft in one pass and the sampler
chooses from them what it would have chosen one by one; a draft is kept up to its first disagreement. The
sampler's draw for answer token n depends on (seed, n) only, so with drafts or without them the text is the
same, greedy or drawn, and so is its distribution.

Two kinds: `lookup.Lookup` (what the text said before, free) and `ModelDraft` here (a small model with the
same tokenizer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from pocketphi.core.errors import EngineError
from pocketphi.engine.sampler import Sampler
from pocketphi.engine.session import Sequence, rope_set_for

if TYPE_CHECKING:
    from pocketphi.engine.engine import Engine

_PREFILL_TOKENS = 512


class Drafter(Protocol):
    """Proposes what may come next. `push` tells it every token that was decided."""

    num_drafted: int
    num_accepted: int

    def push(self, token: int) -> None: ...

    def propose(self, limit: int, sampler: Sampler, beside: int = 0) -> list[int]:
        """Return at most `limit` tokens that `sampler` may choose next; [] when there is no guess.

        beside: tokens of other sequences that the step will compute too.
        """
        ...

    def learn(self, drafted: int, accepted: int) -> None: ...


class ModelDraft:
    """Drafts by a smaller model.

    Its tokens are chosen by a copy of the answer's own sampler, run ahead on the small model's logits: the
    same penalties, the same mask and the same draws, so that a small model that is right agrees when
    sampling too. The number of tokens proposed adapts between 1 and `max_draft`. The draft's cache is a
    sequence of its own; a text longer than the draft's context gets no drafts.
    """

    def __init__(self, draft: Engine, sequence: Sequence, ids: list[int], max_draft: int) -> None:
        self._engine, self._sequence = draft, sequence
        self._ids = list(ids)
        self._agreed = 0  # so many ids of the draft's cache are known to be those of the text
        self._knows = max(ids) < draft.config.vocab_size
        self.max_draft = max_draft
        self._draft = max_draft
        self.num_drafted = 0
        self.num_accepted = 0

    def push(self, token: int) -> None:
        """Add the next token of the text."""
        self._ids.append(token)
        self._knows = self._knows and token < self._engine.config.vocab_size

    def propose(self, limit: int, sampler: Sampler, beside: int = 0) -> list[int]:
        """Return up to `limit` tokens that the small model would go on with."""
        limit = min(limit, self._draft, self._engine.context_length - len(self._ids))
        if limit < 1 or not self._knows:
            return []
        ahead, found = sampler.fork(), []
        row = self._catch_up(limit)
        while True:
            try:
                token = ahead.choose(self._fit(row, ahead.vocab_size)).token
            except EngineError:
                break  # the mask allows nothing here, or the small model overflows: no guess
            found.append(token)
            if len(found) == limit or token >= self._engine.config.vocab_size:
                break
            ahead.accept(token)
            row = self._forward([token])
        return found

    def learn(self, drafted: int, accepted: int) -> None:
        """Tell how a draft went; adapts the length of the next one."""
        self.num_drafted += drafted
        self.num_accepted += accepted
        if accepted == drafted:
            self._draft = min(self.max_draft, self._draft + 1)
        elif accepted < drafted / 2:
            self._draft = max(1, self._draft - 1)

    def _catch_up(self, limit: int) -> np.ndarray:
        """Make the draft's cache hold the text; returns its logits after the last token."""
        sequence, ids = self._sequence, self._ids
        room, need = self._engine.context_length, len(ids) + limit
        rope_set = rope_set_for(self._engine.config, need)
        if sequence.owner is not self or rope_set != sequence.rope_set or need > sequence.capacity:
            sequence.owner = self
            # Some more room than is needed now: a cache that grows is copied.
            self._agreed, _ = sequence.prepare(
                ids, rope_set, need=min(room, need + 512), limit=room, crossing="exact"
            )
        held, at = sequence.ids, self._agreed
        while at < min(len(held), len(ids) - 1) and held[at] == ids[at]:
            at += 1
        if len(held) > at:
            sequence.truncate(at)
        self._agreed = len(ids)
        return self._forward(ids[at:])

    def _forward(self, ids: list[int]) -> np.ndarray:
        row = None
        for at in range(0, len(ids), _PREFILL_TOKENS):
            row = self._sequence.forward(ids[at : at + _PREFILL_TOKENS], "last")
        assert row is not None
        return row[0]

    @staticmethod
    def _fit(row_V: np.ndarray, size: int) -> np.ndarray:
        # The same tokenizer, but one model's embedding may be padded further than the other's.
        if row_V.size >= size:
            return row_V[:size]
        return np.concatenate([row_V, np.full(size - row_V.size, -1e30, np.float32)])


def check_draft(model: Engine, draft: Engine) -> None:
    """Raise EngineError when `draft` cannot draft for `model`."""
    if draft is model:
        raise EngineError("a model cannot draft for itself: that costs more than it saves")
    if model.tokenizer.sha256 != draft.tokenizer.sha256:
        raise EngineError(
            f"the draft model {draft.weights.path.name} has another tokenizer than {model.weights.path.name}",
            hint="a draft model must come with the same vocabulary: take a smaller model of the same family",
        )
