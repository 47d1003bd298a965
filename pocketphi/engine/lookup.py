"""Prompt lookup: guess the next tokens from what the text said before, at no cost.

An answer that quotes, summarises or edits its prompt repeats runs of it. When the last few tokens
occurred before, what followed them then is proposed as a draft; one forward pass over the draft gives
the logits after each of its tokens, and the sampler, which is deterministic, chooses from them exactly
what it would have chosen one by one. Tokens up to the first disagreement are kept: the text is that of
plain decoding, for greedy and for drawn tokens alike, and only the time differs.
"""

from __future__ import annotations

from collections.abc import Iterable

from pocketphi.engine.sampler import Sampler

_SIZES = (4, 3, 2)
"""Lengths of the runs that are looked up, longest first: a longer match is a better guess."""


class Lookup:
    """An index over the tokens of one sequence.

    max_draft: most tokens proposed at once. The number adapts: it doubles after a draft that was right
    to the end and halves after one that was wrong at once, down to 1.
    """

    def __init__(self, ids: Iterable[int], max_draft: int) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.max_draft = max_draft
        self._draft = max_draft
        self.num_drafted = 0
        self.num_accepted = 0
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Add the next token of the sequence."""
        at = len(self._ids)
        # The run that ends just before this token is known only now to go on with it.
        for size in _SIZES:
            if at >= size:
                self._next[tuple(self._ids[at - size : at])] = at
        self._ids.append(token)

    def propose(self, limit: int, sampler: Sampler | None = None) -> list[int]:
        """Return up to `limit` tokens that may come next; empty when nothing matches."""
        count = min(limit, self._draft)
        if count < 1:
            return []
        for size in _SIZES:
            at = self._next.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if at is not None:
                return self._ids[at : at + count]
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """Tell how a draft went; adapts the length of the next one."""
        self.num_drafted += drafted
        self.num_accepted += accepted
        if accepted == drafted:
            self._draft = min(self.max_draft, self._draft * 2)
        elif accepted == 0:
            self._draft = max(1, self._draft // 2)
