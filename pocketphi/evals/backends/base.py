"""The seam between evaluation and what computes logits.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pocketphi.core.errors import EngineError, PocketPhiError, UserError
from pocketphi.evals.prompts import Request

# A conversation: [{"role", "content"}, ...].
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class OptionScore:
    """Sum of the log-probabilities (nats) of an option's tokens, and whether each was the likeliest."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Reply:
    """A generated text and why it ended: "stop" (end token or stop string) or "length".

    cut_tokens: how many tokens of the prompt's left end did not fit.
    """

    text: str
    ended: str
    num_tokens: int
    cut_tokens: int = 0


class Scorer(Protocol):
    """A model ready to be evaluated."""

    tokenizer: Any
    max_tokens: int
    start_ids: tuple[int, ...]
    start_rule: str

    def identity(self) -> dict[str, Any]:
        """What the score depends on: engine, kernels, file hash, types. No paths, no machine names."""
        ...

    def score(self, requests: Iterable[Request]) -> Iterator[list[OptionScore]]:
        """Yield, request by request and in order, the score of each option given the context."""
        ...

    def rolling(self, ids: Sequence[int]) -> np.ndarray:
        """Return log P(ids[i] | ids[:i]) for i >= 1, float64 [T-1]; len(ids) <= max_tokens + 1."""
        ...

    def complete(
        self, texts: Iterable[str | Messages], *, chat: bool, max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[Reply]:
        """Yield, in order, a greedy continuation of each text.

        `chat`: an answer to it as a user's message, or to a whole conversation.
        """
        ...

    def close(self) -> None: ...


def log_probabilities(logits_TV: np.ndarray, targets_T: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row-wise log softmax at the targets, float64 [T], and whether each is the likeliest, bool [T].

    Exponentials in float32, sums in float64: an error of about 1e-7 in each, an eighth of the time
    of float64 throughout. EngineError when the logits are not finite: a score from NaN would be a
    number that means nothing.
    """
    rows_TV = np.asarray(logits_TV, dtype=np.float32)
    top_T = rows_TV.max(axis=1)
    if not np.isfinite(top_T).all():
        raise EngineError("the model returned logits that are not finite", hint="the model file is damaged")
    index_T = np.asarray(targets_T, dtype=np.int64)
    chosen_T = rows_TV[np.arange(len(index_T)), index_T]
    sums_T = np.exp(rows_TV - top_T[:, None]).sum(axis=1, dtype=np.float64)
    return chosen_T.astype(np.float64) - top_T - np.log(sums_T), chosen_T >= top_T


def start_tokens(tokenizer: Any, rule: str) -> tuple[tuple[int, ...], str]:
    """Return the ids that stand before every prompt and the rule in words.

    `auto` follows the tokenizer (`add_bos`): a start token the model never saw in training costs
    points as surely as a missing one.
    """
    bos, eos = getattr(tokenizer, "bos_id", None), getattr(tokenizer, "eos_id", None)
    if rule == "auto":
        rule = "bos" if tokenizer.add_bos and bos is not None else "none"
        word = f"auto: {rule}"
    else:
        word = rule
    if rule == "bos":
        if bos is None:
            raise UserError("start_token: bos was asked for and the tokenizer has none")
        return (int(bos),), word
    if rule == "eos":
        if eos is None:
            raise UserError("start_token: eos was asked for and the tokenizer has none")
        return (int(eos),), word
    return (), word


def prompt_ids(tokenizer: Any, start_ids: Sequence[int], text: str | Messages, chat: bool) -> list[int]:
    """A text as a prompt: after the start token, or as a user's message in the chat template.

    A conversation is always put into the template. UserError when the model has none.
    """
    if isinstance(text, str):
        if not chat:
            return [*start_ids, *(int(i) for i in tokenizer.encode(text))]
        messages, hint = [{"role": "user", "content": text}], "--set chat=false"
    else:
        messages, hint = [dict(m) for m in text], "conversations need a model with a chat template"
    try:
        return [int(i) for i in tokenizer.chat(messages, add_generation_prompt=True)]
    except PocketPhiError as error:
        raise UserError(
            f"chat was asked for and the model has no chat template: {error.message}", hint=hint
        ) from None


def fit_prompt(ids: Sequence[int], max_new_tokens: int, max_tokens: int) -> tuple[list[int], int]:
    """Return the prompt, cut on its left where needed, and the tokens there is room to write.

    The answer gets at most half of the context, so that a prompt is never cut to nothing.
    """
    room = (
        min(max_new_tokens, max(1, max_tokens // 2))
        if len(ids) + max_new_tokens > max_tokens
        else max_new_tokens
    )
    return list(ids)[-(max_tokens - room) :], room


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut a text before the earliest stop string."""
    places = [p for p in (text.find(s) for s in stop if s) if p >= 0]
    return (text[: min(places)], True) if places else (text, False)
