"""Prompt lookup: guess the next tokens from what the text said before, at no cost.

An answer that quotes, summarises or edits its prompt repeats runs of it. Where the last tokens occurred
before, what followed them then is proposed as a draft; one forward pass over the draft gives the logits
after each of its tokens, and the sampler, which is deterministic, chooses from them exactly what it would
have chosen one by one. Tokens up to the first disagreement are kept: the text is that of plain decoding,
for greedy and for drawn tokens alike, and only the time differs.

How much is guessed is weighed anew at every step: the longer the run that agrees, the surer the guess, and
each length of run has a share of right guesses that is learned as the answer goes on. That many are
proposed as promise the most tokens for the time that the step will take.
"""

from __future__ import annotations

from collections.abc import Iterable

from pocketphi.engine.sampler import Sampler

_SIZES = (3, 2, 1)
"""Lengths of runs in the index; a run that is found is followed back up to `_LONGEST` tokens."""
_LONGEST = 8
_CANDIDATES = 32
"""Most places of one run that are looked at, the latest first of all."""

# By the length of the run (0 is not used): how often a guess is right before anything is known. Measured on
# answers that copy, cite and edit; learning moves them by a tenth at a time, and what is not tried drifts back.
_RIGHT = (0.0, 0.3, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 0.95)
_LEARN, _FORGET = 0.1, 0.02

# Time of a step of n tokens, in steps of one: weights are read once for `together` tokens, arithmetic grows
# with each. Between what AVX2 and AVX-512 machines need.
_TOKEN, _READING = 0.12, 0.6


def step_time(num_tokens: int, together: int) -> float:
    """Return about how long a step of `num_tokens` takes, in steps of one token."""
    return 1 + _TOKEN * (num_tokens - 1) + _READING * ((num_tokens - 1) // together)


class Lookup:
    """An index over the tokens of one sequence.

    max_draft: most tokens proposed at once.
    together: tokens that share one reading of the weights (`Backend.tokens_per_reading`).
    """

    def __init__(self, ids: Iterable[int], max_draft: int, together: int = 6) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}  # a run -> where it went on
        self._right = list(_RIGHT)
        self._copied = 0  # the place in the text that the next token would be copied from
        self._run = 0
        self.max_draft, self._together = max_draft, together
        self.num_drafted = 0
        self.num_accepted = 0
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Add the next token of the sequence."""
        self._copied += 1
        ids, at = self._ids, len(self._ids)
        # The run that ends just before this token is known only now to go on with it.
        for size in _SIZES:
            if at >= size:
                self._after.setdefault(tuple(ids[at - size : at]), []).append(at)
        ids.append(token)

    def propose(self, limit: int, sampler: Sampler | None = None, beside: int = 0) -> list[int]:
        """Return up to `limit` tokens that may come next; empty when guessing does not pay.

        beside: tokens of other sequences that the step will compute too.
        """
        run, at = self._find()
        if not run:
            return []
        count, best = 0, (1 + beside) / step_time(1 + beside, self._together)
        expected, all_right = float(1 + beside), 1.0
        for n in range(1, min(limit, self.max_draft, len(self._ids) - at) + 1):
            all_right *= self._right[min(run + n - 1, _LONGEST)]
            expected += all_right
            rate = expected / step_time(1 + beside + n, self._together)
            if rate > best:
                count, best = n, rate
        if not count:
            self._right[run] += _FORGET * (_RIGHT[run] - self._right[run])
            return []
        self._run, self._copied = run, at
        return self._ids[at : at + count]

    def learn(self, drafted: int, accepted: int) -> None:
        """Tell how a draft went."""
        self.num_drafted += drafted
        self.num_accepted += accepted
        for n in range(min(accepted + 1, drafted)):
            run = min(self._run + n, _LONGEST)
            self._right[run] += _LEARN * ((n < accepted) - self._right[run])

    def _find(self) -> tuple[int, int]:
        """The longest run before the end of the text that stood earlier, and where it went on.

        Of equals the one nearest to where copying was: an edit is followed by what followed in the original.
        """
        ids = self._ids
        best, where = (0, 0), 0
        for size in _SIZES:
            if len(ids) < size:
                continue
            for at in self._after.get(tuple(ids[-size:]), ())[-_CANDIDATES:]:
                run = size
                while run < min(_LONGEST, at) and ids[at - run - 1] == ids[-run - 1]:
                    run += 1
                found = (run, -abs(at - self._copied))
                if found > best:
                    best, where = found, at
            if best[0]:
                break
        return best[0], where
