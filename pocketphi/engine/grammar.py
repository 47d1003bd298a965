"""Answers that keep to a grammar: a JSON schema, a regular expression or a Lark grammar.

    model.chat(messages, grammar=Grammar.json_schema({"type": "object", ...}))

At every token the grammar says which tokens may come next and the sampler chooses among them, so the
answer is valid whenever it ends by itself (an answer cut by its length limit is a valid beginning). The
grammars are those of llguidance, an optional package that computes the masks; nothing else needs it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pocketphi.core.errors import EngineError, UserError

if TYPE_CHECKING:
    from pocketphi.tokenizer import Tokenizer

Kind = Literal["json-schema", "regex", "lark"]

# JSON as json.dumps writes it. Free white space would let a small model write blanks for ever.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. Raises UserError for text that is no grammar of its kind."""

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """A JSON value that fulfils `schema` (an object, or its text)."""
        if not isinstance(schema, str):
            return cls("json-schema", json.dumps(schema))
        try:
            found = json.loads(schema)
        except ValueError as error:
            raise UserError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(found, dict | bool):
            raise UserError("a JSON schema is an object, or true or false")
        return cls("json-schema", schema)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that `pattern` matches as a whole (Rust's regular expressions: no back-references)."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Text that a Lark grammar with the rule `start` derives."""
        return cls("lark", grammar)

    def mask(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> GrammarMask:
        """Return the token mask for one answer. EngineError without llguidance."""
        return GrammarMask(self, tokenizer, vocab_size, stop_ids)


class GrammarMask:
    """The grammar's `sampler.TokenMask`. It follows the answer it is called with, forwards and back."""

    def __init__(
        self, grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]
    ) -> None:
        llguidance = _llguidance()
        ends = sorted(i for i in stop_ids if i < tokenizer.vocab_size)
        if not ends:
            raise EngineError(
                "a grammar needs a stop token to end the answer with, and this request has none",
                hint="leave stop_ids as it is",
            )
        matcher = llguidance.LLMatcher
        try:
            if grammar.kind == "json-schema":
                compiled = matcher.grammar_from_json_schema(grammar.text, defaults=_JSON_LAYOUT)
            elif grammar.kind == "regex":
                compiled = matcher.grammar_from_regex(grammar.text)
            else:
                compiled = matcher.grammar_from_lark(grammar.text)
        except ValueError as error:
            raise UserError(f"the {grammar.kind} grammar cannot be used: {error}") from None
        self._matcher: Any = matcher(_table(tokenizer, tuple(ends)), compiled, log_level=0)
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise UserError(f"the {grammar.kind} grammar cannot be used: {reason}")
        self._fresh: Any = self._matcher.deep_copy()
        self._vocab_size = vocab_size
        self._answer: list[int] = []

    def __call__(self, answer: Sequence[int]) -> np.ndarray:
        """Return the tokens that may follow `answer` as bits, uint32 [V / 32 rounded up]."""
        self._follow(answer)
        found = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
        self._check()
        # The model's embedding may be padded beyond the tokenizer's ids: those are never allowed.
        words = np.zeros(-(-self._vocab_size // 32), np.uint32)
        words[: found.size] = found[: words.size]
        return words

    def _follow(self, answer: Sequence[int]) -> None:
        same = 0
        for mine, theirs in zip(self._answer, answer):
            if mine != theirs:
                break
            same += 1
        if same < len(self._answer):
            # A grammar that has come to its end cannot go back: then it starts anew.
            if self._matcher.is_stopped() or not self._matcher.rollback(len(self._answer) - same):
                self._matcher, same = self._fresh.deep_copy(), 0
            del self._answer[same:]
        for token in answer[same:]:
            self._matcher.consume_token(token)
            self._answer.append(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0]
            raise EngineError(f"the grammar cannot go on: {reason}")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise EngineError(
            "grammars need the package llguidance", hint="pip install 'pocketphi[grammar]'"
        ) from None
    return llguidance


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.stop_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids whose bytes are exactly `text`, as the middle of an answer would be encoded."""
        data = text if isinstance(text, bytes) else text.encode()
        # After a line break, since many vocabularies put a blank in front of the first word.
        front = self._tokenizer.encode("\n")
        ids = self._tokenizer.encode("\n" + data.decode(errors="replace"))
        rest = ids[len(front) :]
        if ids[: len(front)] == front and b"".join(self.tokens[i] for i in rest) == data:
            return rest
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        special = set(self.special_token_ids)
        by_bytes = {t: i for i, t in reversed(list(enumerate(self.tokens))) if t and i not in special}
        longest, found, at = max(map(len, by_bytes)), [], 0
        while at < len(data):
            size = next((n for n in range(longest, 0, -1) if data[at : at + n] in by_bytes), 0)
            if not size:
                break  # no token for this byte: what is forced ends here
            found.append(by_bytes[data[at : at + size]])
            at += size
        return found


@functools.lru_cache(maxsize=4)
def _tables(sha256: str, ends: tuple[int, ...], hold: _Held) -> Any:
    llguidance = _llguidance()
    wrapped = llguidance.TokenizerWrapper(_Vocabulary(hold.tokenizer))
    return llguidance.LLTokenizer(wrapped, eos_token=list(ends))


class _Held:
    """Carries a tokenizer through the cache without being part of the key."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


def _table(tokenizer: Tokenizer, ends: tuple[int, ...]) -> Any:
    # Seconds for a large vocabulary, so it is built once for each.
    return _tables(tokenizer.sha256, ends, _Held(tokenizer))
