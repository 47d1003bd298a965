"""The seam between the engine's Python face and what computes logits.

A backend is a module with three functions,

    available() -> str                      "" when it can be used here, else the reason why not
    plan(weights: Weights, options: BackendOptions) -> MemoryPlan     before anything is loaded; when it
                                            is missing, `engine.stored_plan` is taken
    load(weights: Weights, options: BackendOptions) -> Backend

(`pocketphi.engine.numpy_runtime` is the plain one, `pocketphi.engine.native` the C++ core). All
decisions stay above this seam: stop tokens, context policy, which rope factor set a sequence gets, prompt
cache, speculation. A backend turns token ids into logits and logits into tokens, keeps the keys and values
of a session, and is told everything it needs to know.

Legend: T tokens of one call, V vocabulary, S tokens already in a session's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pocketphi.core.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

    from pocketphi.engine.sampler import Sampler
    from pocketphi.model.config import ModelConfig

RopeSet = Literal["plain", "short", "long"]
"""Which rotation a sequence uses: `plain` for models without rope scaling, else the factor list."""

Want = Literal["none", "last", "all"]
"""Which rows of logits a call returns: no row, the last token's, or every token's."""

CacheType = Literal["f32", "f16", "q8_0"]


@dataclass(frozen=True)
class BackendOptions:
    """What the caller chose when loading.

    num_threads: None lets the backend choose (the physical cores this process may use).
    cache_type: how keys and values are stored; None is the backend's default.
    max_batch_tokens: most tokens that one internal step computes; a longer `ids` is cut into chunks of
        this size by the backend, without any effect on the result's meaning.
    """

    num_threads: int | None = None
    cache_type: CacheType | None = None
    max_batch_tokens: int = 512


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a model needs: resident weights, cache for one token, working memory."""

    weight_bytes: int
    cache_bytes_per_token: int
    working_bytes: int

    def total(self, context_tokens: int) -> int:
        """Bytes for one session that can hold `context_tokens`."""
        return self.weight_bytes + self.cache_bytes_per_token * context_tokens + self.working_bytes


def wants_of(want: Want | Sequence[Want], count: int) -> list[Want]:
    """Return one Want for each of `count` items of work."""
    if isinstance(want, str):
        return [want] * count
    if len(want) != count:
        raise EngineError(f"{count} items of work and {len(want)} wants")
    return list(want)


class Session(Protocol):
    """One sequence and its cache of keys and values. Made by `Backend.new_session`, never directly.

    Invariant: every cached key was rotated with `rope_set`; there are never two rotations in a cache.
    """

    @property
    def length(self) -> int:
        """S, the tokens in the cache; the next token's position is S."""
        ...

    @property
    def capacity(self) -> int:
        """The most tokens that the cache can hold."""
        ...

    @property
    def rope_set(self) -> RopeSet: ...

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on. 0 <= length <= S, else EngineError.

        What is computed afterwards is bit for bit what a session that never saw them would compute.
        """
        ...

    def reset(self, rope_set: RopeSet) -> None:
        """Forget everything and use this rotation from now on."""
        ...

    def rotate(self, rope_set: RopeSet) -> None:
        """Turn the cached keys from the present factor set to another by the angle difference.

        Exact for the first layer only (deeper keys and all values were computed under the old set):
        the engine calls it under the crossing policy `fast` and nowhere else.
        """
        ...

    def save(self) -> bytes:
        """Return the cache as bytes that `Backend.restore` of the same model and cache type reads."""
        ...

    def close(self) -> None:
        """Free the cache; the session must not be used afterwards. Closing twice is allowed."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A loaded model. Used by one thread at a time; the caller serialises."""

    name: str
    config: ModelConfig
    tokens_per_reading: int
    """How many tokens of one `forward` share a reading of the weights, and so cost little more than one. The
    engine guesses ahead by prompt lookup accordingly; 0 turns that off unless it is asked for."""

    def new_session(self, capacity: int, rope_set: RopeSet) -> Session:
        """Open an empty session for at most `capacity` tokens. EngineError when memory is short."""
        ...

    def forward(
        self, session: Session, ids: Sequence[int] | np.ndarray, want: Want = "last"
    ) -> np.ndarray | None:
        """Append `ids` (T >= 1) to the session and compute.

        Returns float32 logits [T, V] for `all`, [1, V] for `last`, None for `none`; always a new array
        that the caller owns. A token's logits depend only on the tokens before it and the rope set:
        not on chunking, not on the other sessions. EngineError, and the session as it was, when S + T
        exceeds the capacity or an id is outside the vocabulary.
        """
        ...

    def forward_batch(
        self, work: Sequence[tuple[Session, Sequence[int]]], want: Want | Sequence[Want] = "last"
    ) -> list[np.ndarray | None]:
        """Several sessions in one pass over the weights; each result equals its own `forward`.

        want: for all of them, or a sequence with one for each.
        """
        ...

    def sampler(self, plain: Sampler) -> Sampler:
        """Return what chooses the tokens of an answer in the place of `plain`, which has chosen none yet:
        the same tokens, this backend's own way."""
        ...

    def restore(self, data: bytes, capacity: int) -> Session:
        """Open a session from what `Session.save` returned. EngineError when it does not fit the model."""
        ...

    def plan(self) -> MemoryPlan: ...

    def describe(self) -> dict[str, Any]:
        """Flat facts for people and logs, at least: backend, kernels (the CPU path taken), num_threads,
        cache_type, weight_bytes, cache_bytes_per_token."""
        ...

    def close(self) -> None:
        """Free the weights. Closing twice is allowed."""
        ...
