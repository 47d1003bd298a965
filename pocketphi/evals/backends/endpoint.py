"""Scoring behind any OpenAI-compatible endpoint: `http://host:port/v1#model-name`.

Generation works with every server. Log-likelihoods need a server that returns the log-probabilities of
the prompt (`echo` with `logprobs`, as vLLM does); where it does not, the error says so and names the way
out (`choices_by: writing`). Only the standard library is used.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from pocketphi.core.errors import EngineError, UserError
from pocketphi.evals.backends.base import Messages, OptionScore, Reply
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.prompts import Rendered, Request

_TRIES = 4
_FIRST_WAIT_S = 1.0
_MAX_REPLY_BYTES = 32 << 20


class Endpoint:
    """One server and model. Raises EngineError with an excerpt when a reply cannot be used."""

    def __init__(self, address: str, model: str, *, key_env: str, timeout_s: float) -> None:
        self.address, self.model = address.rstrip("/"), model
        self._key = os.environ.get(key_env, "")
        self._timeout_s = timeout_s

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request; timeouts, 429 and 5xx are tried again with growing waits."""
        data = json.dumps({"model": self.model, **body}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_FIRST_WAIT_S * 3 ** (attempt - 1))
            request = urllib.request.Request(f"{self.address}{path}", data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                    raw = reply.read(_MAX_REPLY_BYTES + 1)
            except urllib.error.HTTPError as error:
                excerpt = error.read(300).decode("utf-8", "replace")
                problem = f"HTTP {error.code}: {excerpt}"
                if error.code != 429 and error.code < 500:
                    break
                continue
            except (OSError, TimeoutError) as error:
                problem = str(getattr(error, "reason", error))
                continue
            if len(raw) > _MAX_REPLY_BYTES:
                raise EngineError(f"{self.address}: the reply is larger than {_MAX_REPLY_BYTES >> 20} MiB")
            try:
                tree = json.loads(raw)
            except ValueError:
                tree = None
            if not isinstance(tree, dict):
                problem = f"the reply is not a JSON object: {raw[:120].decode('utf-8', 'replace')!r}"
                continue
            return tree
        raise EngineError(
            f"{self.address}{path}: {problem}",
            hint="items finished so far are kept: run the same command again when the endpoint answers",
        )

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Reply:
        """One answer at temperature 0."""
        body: dict[str, Any] = {
            "messages": list(messages),
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        if stop:
            body["stop"] = list(stop)[:4]
        tree = self.post("/chat/completions", body)
        return _reply(tree, lambda choice: choice["message"]["content"] or "", stop, self.address)

    def complete(self, prompt: str, *, max_new_tokens: int, stop: Sequence[str]) -> Reply:
        """One plain continuation at temperature 0."""
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_new_tokens, "temperature": 0}
        if stop:
            # Most servers take four; the rest is applied to the text.
            body["stop"] = list(stop)[:4]
        return _reply(self.post("/completions", body), lambda choice: choice["text"], stop, self.address)


class EndpointScorer:
    """An endpoint as a `Scorer`. It has no tokenizer of its own: prompts are sent as text."""

    tokenizer = None
    start_ids: tuple[int, ...] = ()
    start_rule = "the server's"
    max_tokens = 1 << 30

    def __init__(self, address: str, config: EvalConfig) -> None:
        place, _, model = address.partition("#")
        if not model:
            raise UserError(
                f"{address}: the model's name is missing", hint="write http://host:port/v1#model-name"
            )
        self.endpoint = Endpoint(place, model, key_env=config.endpoint_key_env, timeout_s=config.timeout_s)
        self._parallel = config.batch_size

    def identity(self) -> dict[str, Any]:
        return {
            "engine": "OpenAI-compatible endpoint",
            "served_model": self.endpoint.model,
            "file_sha256": None,
        }

    def score(self, requests: Iterable[Request]) -> Iterator[list[OptionScore]]:
        raise EngineError("an endpoint is scored by text, not by tokens")

    def score_texts(self, shapes: Iterable[tuple[str, Rendered]]) -> Iterator[list[OptionScore]]:
        """Yield per question the scores of its options; `shapes` are (few-shot text, question)."""

        def one(shape: tuple[str, Rendered]) -> list[OptionScore]:
            before, rendered = shape
            return [
                self._continuation(before + context, continuation)
                for context, continuation in zip(rendered.contexts, rendered.continuations)
            ]

        yield from in_order(one, shapes, self._parallel)

    def rolling(self, ids: Sequence[int]) -> np.ndarray:
        raise EngineError("an endpoint gives no log-probabilities of a whole text")

    def complete(
        self, texts: Iterable[str | Messages], *, chat: bool, max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[Reply]:
        def one(text: str | Messages) -> Reply:
            if chat:
                messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
                return self.endpoint.chat(messages, max_new_tokens=max_new_tokens, stop=stop)
            assert isinstance(text, str), "a conversation needs chat"
            return self.endpoint.complete(text, max_new_tokens=max_new_tokens, stop=stop)

        yield from in_order(one, texts, self._parallel)

    def close(self) -> None:
        pass

    def _continuation(self, context: str, continuation: str) -> OptionScore:
        whole = context + continuation
        tree = self.endpoint.post(
            "/completions",
            {"prompt": whole, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1},
        )
        try:
            found = tree["choices"][0]["logprobs"]
            offsets, logprobs = found["text_offset"], found["token_logprobs"]
            best = found.get("top_logprobs") or [None] * len(offsets)
            if not offsets or offsets[0] != 0 or len(offsets) != len(logprobs):
                raise KeyError("text_offset")
        except (KeyError, IndexError, TypeError):
            raise EngineError(
                f"{self.endpoint.address}: the server does not return the log-probabilities of the prompt",
                hint="choice tasks can be answered in writing instead: --set choices_by=writing",
            ) from None
        # The continuation starts with the token that holds its first character after the space.
        border = len(context.rstrip())
        total, greedy = 0.0, True
        for offset, logprob, top in zip(offsets, logprobs, best):
            if not border <= offset < len(whole):
                continue
            total += float(logprob)
            greedy = greedy and (not top or float(logprob) >= max(float(v) for v in top.values()))
        return OptionScore(total, greedy)


def in_order(function: Any, items: Iterable[Any], parallel: int) -> Iterator[Any]:
    """Map with `parallel` requests in flight, results in order."""
    waiting = iter(items)
    with ThreadPoolExecutor(parallel) as pool:
        while batch := list(islice(waiting, parallel)):
            yield from pool.map(function, batch)


def _reply(tree: dict[str, Any], text_of: Any, stop: Sequence[str], address: str) -> Reply:
    from pocketphi.evals.backends.base import cut_at_stop

    try:
        choice = tree["choices"][0]
        text = text_of(choice)
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError):
        raise EngineError(
            f"{address}: the reply holds no answer: {json.dumps(tree)[:200]}",
            hint="items finished so far are kept: run the same command again when the endpoint answers",
        ) from None
    text, cut = cut_at_stop(text, stop)
    ended = "stop" if cut or choice.get("finish_reason") != "length" else "length"
    used = tree.get("usage")
    tokens = used.get("completion_tokens", 0) if isinstance(used, dict) else 0
    return Reply(text, ended, int(tokens or 0))
