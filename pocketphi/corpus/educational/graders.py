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

from pocketphi.core.errors import UserError

_CHARS_PER_TOKEN = 3.0  # a cautious guess for English, used where a server reports no usage
_MAX_ANSWER_BYTES = 1 << 22


@dataclass(frozen=True)
class Answer:
    """What a grader said. Token counts are the server's, or a guess when it reports none."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Grader(Protocol):
    """Answers one conversation; `concurrent` says whether several may be asked at once."""

    name: str
    concurrent: bool

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
                    return _read(reply.read(_MAX_ANSWER_BYTES), messages)
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


class LocalGrader:
    """A model of this machine, through pocketphi.engine."""

    concurrent = False

    def __init__(self, path: str) -> None:
        from pocketphi import engine

        self._engine = engine.load(path)
        self.name = f"local:{self._engine.fingerprint}"

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float) -> Answer:
        said = self._engine.chat(list(messages), max_new_tokens=max_tokens, temperature=temperature, seed=0)
        return Answer(said.text, guess_tokens(messages), max(1, int(len(said.text) / _CHARS_PER_TOKEN)))


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
