"""Who grades: any OpenAI-compatible endpoint, or a local model through the engine."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pocketphi.core.errors import UserError

_CHARS_PER_TOKEN = 3.0  # a cautious guess for English, used where a server reports no usage
_MAX_ANSWER_BYTES = 1 << 22
_PIECE_BYTES = 1 << 14


@dataclass(frozen=True)
class Answer:
    """What a grader said. Token counts are the server's, or a guess when it reports none."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Grader(Protocol):
    """Answers one conversation; `concurrent` says whether several may be asked at once.

    `fits` says whether a conversation and its answer have room in the model's context; an endpoint knows
    its own and says so when asked.
    """

    name: str
    concurrent: bool

    def fits(self, messages: Sequence[dict[str, str]], *, max_tokens: int) -> bool: ...

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float) -> Answer: ...


def guess_tokens(messages: Sequence[dict[str, str]]) -> int:
    """A cautious number of tokens of a conversation."""
    return int(sum(len(m["content"]) for m in messages) / _CHARS_PER_TOKEN) + 8 * len(messages)


class EndpointGrader:
    """POSTs to `<url>/chat/completions`. Busy and broken servers are asked again, with growing pauses."""

    concurrent = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str = "",
        timeout_s: float = 120.0,
        max_attempts: int = 5,
        first_pause_s: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"endpoint {url!r} is not an http(s) address", hint="for example http://localhost:8000/v1"
            )
        self.name = model
        self._url = url.rstrip("/") + "/chat/completions"
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._first_pause_s = first_pause_s
        self._headers = {"Content-Type": "application/json"}
        if api_key_env:
            key = os.environ.get(api_key_env, "")
            if not key:
                raise UserError(
                    f"the environment variable {api_key_env} is empty", hint="put the endpoint's key into it"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def fits(self, messages: Sequence[dict[str, str]], *, max_tokens: int) -> bool:
        return True

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float) -> Answer:
        """Raises UserError when the server refuses, or stays away through all attempts."""
        body = json.dumps(
            {
                "model": self.name,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": temperature,
            }
        ).encode()
        trouble = ""
        for attempt in range(self._max_attempts):
            pause_s = self._first_pause_s * 2**attempt
            request = urllib.request.Request(self._url, data=body, headers=self._headers)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                    return _read(self._body(reply), messages)
            except urllib.error.HTTPError as error:
                detail = error.read(500).decode("utf-8", "replace").strip()
                trouble = f"HTTP {error.code} {detail}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise UserError(
                        f"{self._url} refuses: {trouble}", hint="check endpoint, model and api_key_env"
                    ) from None
                pause_s = _retry_after(error.headers.get("Retry-After"), pause_s)
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                # URLError and timeouts are OSErrors; the others are answers cut short or not of the API.
                trouble = f"{type(error).__name__}: {error}"
            if attempt + 1 < self._max_attempts:
                time.sleep(min(pause_s, 60.0))
        raise UserError(
            f"{self._url}: no answer in {self._max_attempts} attempts; the last: {trouble}",
            hint="run the same command again later: what was answered is kept",
        )

    def _body(self, reply: Any) -> bytes:
        """The whole answer; TimeoutError when it dribbles in for longer than one request may take."""
        until = time.monotonic() + self._timeout_s
        pieces: list[bytes] = []
        size = 0
        while piece := reply.read1(_PIECE_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size > _MAX_ANSWER_BYTES:
                raise ValueError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError(f"the answer was not complete after {self._timeout_s:g} s")
        return b"".join(pieces)


class LocalGrader:
    """A model of this machine, through pocketphi.engine.

    The form of the answer is set and the model fills it in: its reason, then for each axis the digit from
    0 to 5 that it finds most probable there (or draws, at a temperature). So every answer can be read,
    also those of a model too small to keep to a form; what its grades are worth must be measured.
    """

    concurrent = False
    _AXES = ("educational", "durable")
    _FORM_TOKENS = 40  # room for the fixed parts of the answer

    def __init__(self, path: str) -> None:
        from pocketphi import engine

        self._engine = engine.load(engine.resolve(path))
        self.name = f"local-form:{self._engine.fingerprint}"

    def fits(self, messages: Sequence[dict[str, str]], *, max_tokens: int) -> bool:
        prompt = len(self._engine.tokenizer.chat(list(messages)))
        return prompt + max_tokens + self._FORM_TOKENS <= self._engine.context_length

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float) -> Answer:
        """Raises EngineError when question and answer do not fit the context (see `fits`)."""
        tokenizer = self._engine.tokenizer
        asked = tokenizer.chat(list(messages))
        said = '{"reason": "'
        reason = self._engine.generate(
            asked + tokenizer.encode(said),
            max_new_tokens=max_tokens,
            temperature=temperature,
            seed=0,
            stop=['"', "\n", "}"],
        )
        said = json.dumps({"reason": " ".join(reason.text.replace("\\", " ").split())}, ensure_ascii=False)[
            :-1
        ]
        for axis in self._AXES:
            said += f', "{axis}":'
            said += f" {self._digit(asked, said, temperature)}"
        said += "}"
        return Answer(said, len(asked), len(tokenizer.encode(said)))

    def _digit(self, asked: list[int], said: str, temperature: float) -> int:
        tokenizer = self._engine.tokenizer
        spelled = [tokenizer.encode(f"{said} {digit}") for digit in range(6)]
        start, ends = spelled[0][:-1], [ids[-1] for ids in spelled]
        if len(set(ends)) < 6 or any(ids[:-1] != start for ids in spelled):
            raise UserError(
                "this model's tokenizer has no single tokens for the digits",
                hint="serve it (`phi serve`, vLLM, llama.cpp) and name the address with --endpoint",
            )
        allowed_V = np.zeros(self._engine.config.vocab_size, dtype=bool)
        allowed_V[ends] = True
        answer = self._engine.generate(
            asked + start,
            max_new_tokens=1,
            temperature=temperature,
            seed=0,
            stop_ids=frozenset(),
            token_mask=lambda _: allowed_V,
        )
        return ends.index(answer.tokens[0])


def _read(raw: bytes, messages: Sequence[dict[str, str]]) -> Answer:
    reply: Any = json.loads(raw)
    text = reply["choices"][0]["message"]["content"] or ""
    usage = reply.get("usage") or {}
    prompt = usage.get("prompt_tokens")
    completion = usage.get("completion_tokens")
    return Answer(
        str(text),
        int(prompt) if prompt is not None else guess_tokens(messages),
        int(completion) if completion is not None else max(1, int(len(text) / _CHARS_PER_TOKEN)),
    )


def _retry_after(value: str | None, otherwise: float) -> float:
    try:
        return max(0.0, float(value)) if value is not None else otherwise
    except ValueError:
        return otherwise
