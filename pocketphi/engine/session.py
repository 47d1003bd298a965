"""One conversation's cache: what it holds, what may go in, and how it is kept in a file.

`fit` decides what of a conversation goes into the context: nothing is ever dropped unless the policy says
so, and then the result lists it. `Sequence` pairs a backend's session with the ids in it, so that a new
prompt reuses its longest common prefix, and never mixes two rotations in one cache.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pocketphi.core.artifact import write_atomic
from pocketphi.core.errors import DataError, EngineError
from pocketphi.engine.backend import Backend, RopeSet, Session, Want
from pocketphi.model.config import ModelConfig

ContextPolicy = Literal["error", "drop-oldest"]
Crossing = Literal["exact", "fast", "stop"]
"""What to do when a sequence admitted under the short factors outgrows them: `exact` computes all of it
again under the long ones, `fast` turns the cached keys (an approximation), `stop` ends the answer."""

Message = Mapping[str, str]

_MAGIC = b"PPSESS01"
_MAX_HEADER_BYTES = 64 << 20
_GROW_TOKENS = 512


def rope_set_for(config: ModelConfig, num_tokens: int) -> RopeSet:
    """The factor set of a sequence that may grow to `num_tokens`."""
    if config.rope_scaling is None:
        return "plain"
    return "long" if num_tokens > (config.original_max_position_embeddings or 0) else "short"


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits. `dropped` lists what was left out: role, num_tokens, start of the text."""

    ids: list[int]
    dropped: list[dict[str, Any]]


def fit(
    messages: Ids[Message],
    encode: Callable[[Ids[Message]], list[int]],
    *,
    context: int,
    reserve: int,
    policy: ContextPolicy = "error",
) -> Fitted:
    """Encode a conversation into at most `context - reserve` tokens.

    `error` raises EngineError with both numbers when it does not fit. `drop-oldest` leaves out the
    oldest turns (a user's message with the answers to it), never a system message at the front and never
    the last turn; when even those do not fit it raises too.
    """
    ids = encode(messages)
    room = context - reserve
    if len(ids) <= room:
        return Fitted(ids, [])
    if policy == "error":
        raise too_long(len(ids), reserve, context)
    front = 0
    while front < len(messages) and messages[front]["role"] == "system":
        front += 1
    # A turn begins with each user's message; what stands before the first belongs to it.
    starts = [n for n in range(front, len(messages)) if messages[n]["role"] == "user" and n > front]
    for start in starts:
        kept = [*messages[:front], *messages[start:]]
        fewer = encode(kept)
        if len(fewer) <= room:
            return Fitted(fewer, _describe_dropped(messages, front, start, encode))
    shortest = [*messages[:front], *messages[starts[-1] :]] if starts else messages
    error = too_long(len(encode(shortest)), reserve, context)
    raise EngineError(f"{error.message}, even without all earlier turns", hint=error.hint)


def _describe_dropped(
    messages: Ids[Message], front: int, start: int, encode: Callable[[Ids[Message]], list[int]]
) -> list[dict[str, Any]]:
    whole = len(encode(messages[front:]))
    found = []
    for n in range(front, start):
        rest = len(encode(messages[n + 1 :]))
        text = messages[n].get("content", "")
        found.append({"role": messages[n]["role"], "num_tokens": whole - rest, "text": text[:80]})
        whole = rest
    return found


def too_long(prompt: int, reserve: int, context: int) -> EngineError:
    """The error for a prompt that leaves no room for the answer."""
    return EngineError(
        f"the prompt has {prompt} tokens and {reserve} are reserved for the answer, "
        f"the context holds {context}",
        hint="shorten it, ask for a shorter answer, load with a longer context, or (in a chat) use the "
        "context policy drop-oldest",
    )


class Sequence:
    """The ids in a backend's session. Invariant: `ids` are exactly the tokens in the cache.

    approximate: keys were rotated in place (crossing policy `fast`), so an exact request must not
    build on this cache.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._session: Session | None = None
        self.ids: list[int] = []
        self.approximate = False
        self.owner: object | None = None  # the stream that writes to it now

    @property
    def rope_set(self) -> RopeSet | None:
        return self._session.rope_set if self._session else None

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds without growing."""
        return self._session.capacity if self._session else 0

    def prepare(
        self, ids: Ids[int], rope_set: RopeSet, *, need: int, limit: int, crossing: Crossing
    ) -> tuple[int, Crossing | None]:
        """Make the cache a prefix of `ids` under `rope_set` and big enough for `need` tokens.

        Returns the number of tokens of `ids` already in it, at most len(ids) - 1 (the last one is always
        computed, for its logits), and what was done if this continues a sequence under other factors.
        `limit` bounds how far the cache is grown.
        """
        common = min(common_prefix(self.ids, ids), len(ids) - 1)
        crossed: Crossing | None = None
        if self._session is None or self._session.capacity < need:
            self._grow(need, limit, rope_set)
        session = self._session
        assert session is not None
        if self.approximate and crossing != "fast":
            common = 0
        if common and session.rope_set != rope_set:
            crossed = "exact"
            if crossing == "fast" and (session.rope_set, rope_set) == ("short", "long"):
                self.truncate(common)
                self.rotate(rope_set)
                crossed = "fast"
            else:
                common = 0
        if common == 0:
            self.reset(rope_set)
        else:
            self.truncate(common)
        return common, crossed

    def forward(self, ids: Ids[int], want: Want = "last") -> np.ndarray | None:
        """Append `ids` and return logits as `Backend.forward` does."""
        assert self._session is not None
        logits = self._backend.forward(self._session, ids, want)
        self.ids.extend(int(i) for i in ids)
        return logits

    @property
    def session(self) -> Session:
        """The backend's session; EngineError before `prepare`."""
        if self._session is None:
            raise EngineError("the sequence is empty: prepare it first")
        return self._session

    def truncate(self, length: int) -> None:
        assert self._session is not None
        self._session.truncate(length)
        del self.ids[length:]

    def reset(self, rope_set: RopeSet) -> None:
        """Forget everything; what comes is rotated with `rope_set`."""
        assert self._session is not None
        self._session.reset(rope_set)
        self.ids.clear()
        self.approximate = False

    def rotate(self, rope_set: RopeSet) -> None:
        """Turn the cached keys in place; from here on the sequence is approximate."""
        assert self._session is not None
        self._session.rotate(rope_set)
        self.approximate = True

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None
        self.ids.clear()
        self.approximate = False

    def _grow(self, need: int, limit: int, rope_set: RopeSet) -> None:
        # By doubling: a chat that grows turn by turn is copied a few times, not at every turn.
        old = self._session.capacity if self._session else 0
        capacity = min(limit, max(_GROW_TOKENS, 2 * old, -(-need // _GROW_TOKENS) * _GROW_TOKENS))
        if self._session is None or not self.ids:
            self.close()
            self._session = self._backend.new_session(capacity, rope_set)
            return
        state, ids, approximate = self._session.save(), list(self.ids), self.approximate
        self.close()
        self._session = self._backend.restore(state, capacity)
        self.ids, self.approximate = ids, approximate

    # Files

    def save(self, path: Path | str, *, model: str, notes: Mapping[str, Any] | None = None) -> int:
        """Write the cache and `notes` (JSON) to a file with a checksum; returns its size in bytes."""
        header = {
            "model": model,
            "backend": self._backend.describe()["backend"],
            "cache_type": self._backend.describe()["cache_type"],
            "ids": self.ids,
            "approximate": self.approximate,
            "notes": dict(notes or {}),
        }
        text = json.dumps(header, ensure_ascii=False).encode()
        state = self._session.save() if self._session and self.ids else b""
        body = struct.pack("<I", len(text)) + text + state
        data = _MAGIC + hashlib.sha256(body).digest() + body
        try:
            write_atomic(Path(path), data)
        except OSError as error:
            raise DataError(f"{path}: the session cannot be written: {error.strerror}") from None
        return len(data)

    def load(self, path: Path | str, *, model: str, limit: int) -> dict[str, Any]:
        """Read what `save` wrote and return its notes.

        A cache of another backend or cache type is left out and computed again when needed, which the
        returned notes say under "cache" ("restored" or the reason). Raises DataError for a damaged file
        and EngineError for one of another model.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: the session cannot be read: {error.strerror}") from None
        body = data[40:]
        if data[:8] != _MAGIC or len(body) < 4:
            raise DataError(f"{path}: not a saved session")
        if hashlib.sha256(body).digest() != data[8:40]:
            raise DataError(f"{path}: the checksum differs: the saved session is damaged or cut short")
        (size,) = struct.unpack_from("<I", body)
        try:
            if size > min(_MAX_HEADER_BYTES, len(body) - 4):
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(body[4 : 4 + size])
            ids = [int(i) for i in header["ids"]]
            notes = dict(header["notes"])
            wrote = (header["backend"], header["cache_type"])
            found_model, approximate = header["model"], bool(header["approximate"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: the saved session is damaged: {error}") from None
        if found_model != model:
            raise EngineError(
                f"{path}: this session was saved with another model",
                hint="load the model file that it was saved with",
            )
        self.close()
        facts = self._backend.describe()
        if wrote != (facts["backend"], facts["cache_type"]):
            return {**notes, "cache": f"of backend {wrote[0]} ({wrote[1]}): computed again"}
        if not ids:
            return {**notes, "cache": "empty"}
        if len(ids) > limit:
            return {**notes, "cache": f"of {len(ids)} tokens, the context holds {limit}: computed again"}
        capacity = min(limit, max(_GROW_TOKENS, len(ids)))
        self._session = self._backend.restore(body[4 + size :], capacity)
        if self._session.length != len(ids):
            self.close()
            raise DataError(f"{path}: the saved session is damaged: {len(ids)} ids for another cache")
        self.ids, self.approximate = ids, approximate
        return {**notes, "cache": "restored"}


def forward_together(backend: Backend, work: Ids[tuple[Sequence, Ids[int], Want]]) -> list[np.ndarray | None]:
    """Append ids to several sequences in one pass over the weights; logits as each one's `forward` gives."""
    rows = backend.forward_batch(
        [(sequence.session, list(ids)) for sequence, ids, _ in work], [want for _, _, want in work]
    )
    for sequence, ids, _ in work:
        sequence.ids.extend(int(i) for i in ids)
    return rows


def common_prefix(a: Ids[int], b: Ids[int]) -> int:
    """Return how many ids at the front of both are the same."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))
