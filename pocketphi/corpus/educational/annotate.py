"""The annotation stage: a language model grades a sample of documents; a scorer learns from the grades.

Every answer is written to a cache before it is used, so a killed or capped run continues where it
stopped and nothing is paid for twice. Answers that hold no readable grade are asked for again, a little
warmer each time, and counted when they stay unreadable.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError, UserError
from pocketphi.corpus.educational import grading, labels
from pocketphi.corpus.educational.graders import Answer, EndpointGrader, Grader, LocalGrader, guess_tokens

KIND = "annotations"
_WARMER = 0.3  # temperature added with each repetition of an unreadable answer
_LEAST_CHARS = 100  # of a document; less is no ground for a grade


@dataclass(frozen=True)
class AnnotateConfig:
    """Settings of `phi corpus annotate`. Either `endpoint` and `model`, or `local_model`.

    A run stops asking before it would pass `max_cost` (in the currency of the prices) or `max_tokens_total`.
    """

    inputs: tuple[str, ...] = ()  # labelled or plain JSON lines; or the stage's `corpus` input
    num_documents: int = 1000
    seed: int = 0
    endpoint: str | None = None
    model: str = ""
    local_model: str | None = None
    api_key_env: str = ""  # name of the environment variable that holds the key
    max_chars: int = 4000  # of a document shown to the grader
    max_tokens: int = 200  # of an answer
    max_attempts: int = 3  # answers asked for in all while they are unreadable
    max_request_attempts: int = 5  # times a request is sent while the server is busy, broken or away
    max_concurrent: int = 8
    timeout_s: float = 120.0
    max_cost: float | None = None
    max_tokens_total: int | None = None
    price_per_million_prompt_tokens: float = 0.0
    price_per_million_completion_tokens: float = 0.0
    cache: str = "runs/annotation-cache"
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.endpoint and self.local_model:
            raise ConfigError("endpoint and local_model exclude one another")
        if self.endpoint and not self.model:
            raise ConfigError("model is missing: the name of the model that the endpoint serves")
        for name in ("num_documents", "max_attempts", "max_request_attempts", "max_concurrent", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.max_chars < _LEAST_CHARS:
            raise ConfigError(f"max_chars must be at least {_LEAST_CHARS}, found {self.max_chars}")
        priced = self.price_per_million_prompt_tokens or self.price_per_million_completion_tokens
        if self.max_cost is not None and not priced:
            raise ConfigError(
                "max_cost needs prices", hint="set price_per_million_prompt_tokens, or use max_tokens_total"
            )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Cost in the currency of the prices."""
        return (
            prompt_tokens * self.price_per_million_prompt_tokens
            + completion_tokens * self.price_per_million_completion_tokens
        ) / 1e6


def run(
    config: AnnotateConfig,
    inputs: Mapping[str, Artifact | Path | str] | None = None,
    *,
    out: Path | None = None,
    grader: Grader | None = None,
) -> Artifact:
    """Grade a sample of documents; publish annotations.jsonl and unreadable.jsonl.

    Rows: id, text, source, url, license, educational (0-5), durable (0-5), reason. Documents come from
    `config.inputs` and from `inputs["corpus"]`. Raises ConfigError when no grader or no input is named,
    UserError when the grader refuses, DataError when not one grade could be read.
    """
    parents: list[Artifact] = []
    if inputs and "corpus" in inputs:
        parents.append(artifact.load(inputs["corpus"], kind="corpus"))  # type: ignore[arg-type]
    if not parents and not config.inputs:
        raise ConfigError("no documents to grade", hint="name files, or a corpus with --corpus")
    # Who is asked first, how often at once and how long is waited does not change what is asked.
    identity = replace(
        config, cache="", max_concurrent=1, timeout_s=1.0, max_request_attempts=1, api_key_env=""
    )
    sources = [str(path) for name in config.inputs for path in labels.files_of(labels.LabelConfig(name))]
    out = Path(out) if out is not None else artifact.default_path(KIND, identity, parents, sources)
    if done := artifact.reuse(out, kind=KIND, config=identity, parents=parents, sources=sources):
        return done
    grader = grader or _grader(config)
    with artifact.create(
        out, kind=KIND, config=identity, parents=parents, sources=sources, seed=config.seed
    ) as draft:
        documents = sample(config, parents)
        session = _Session(config, grader)
        with (
            open(draft.path / "annotations.jsonl", "w", encoding="utf-8") as graded,
            open(draft.path / "unreadable.jsonl", "w", encoding="utf-8") as unreadable,
        ):
            for document, grade, answer in session.grade_all(documents):
                row = {k: document.get(k) or "" for k in ("id", "text", "source", "url", "license")}
                if grade is None:
                    row.pop("text")
                    _write(unreadable, {**row, "answer": answer[:500]})
                else:
                    _write(graded, {**row, **vars(grade)})
        counts = session.counts(len(documents))
        draft.counts.update(counts)
        say_counts(counts)
        if not counts["documents_graded"]:
            hint = "look at the cache for what the grader said" if counts["documents_unreadable"] else None
            raise DataError("not one document was graded", hint=hint)
    return draft.artifact


def say_counts(counts: Mapping[str, Any]) -> None:
    """Say what happened to every document."""
    progress.say(
        f"{counts['documents_in']} documents: {counts['documents_graded']} graded, "
        f"{counts['documents_unreadable']} unreadable, {counts['documents_not_reached']} not reached; "
        f"{counts['requests']} requests, {counts['answers_from_cache']} answers from the cache, "
        f"cost {counts['cost']:.4g}"
    )
    if counts["documents_shortened"]:
        progress.say(f"{counts['documents_shortened']} documents were shortened to fit the model's context")
    if counts["documents_not_reached"]:
        progress.say("the cap was reached: raise max_cost or max_tokens_total and run again to continue")


def sample(config: AnnotateConfig, parents: list[Artifact]) -> list[dict[str, Any]]:
    """Return `num_documents` documents, chosen by a hash of seed and id, in that order.

    Only the chosen ones are held in memory. Raises DataError when there is none.
    """
    import heapq

    best: list[tuple[int, int, dict[str, Any]]] = []  # a heap of the smallest hashes, largest on top
    seen: set[str] = set()
    for number, row in enumerate(_documents(config, parents)):
        identity = row["id"]
        digest = hashlib.blake2b(f"{config.seed}\0{identity}".encode(), digest_size=8).digest()
        key = -int.from_bytes(digest, "big")
        if len(best) == config.num_documents and key <= best[0][0]:
            continue
        if identity in seen:
            continue
        seen.add(identity)
        if len(best) < config.num_documents:
            heapq.heappush(best, (key, -number, row))
        else:
            seen.discard(heapq.heapreplace(best, (key, -number, row))[2]["id"])
    if not best:
        raise DataError("the inputs hold no document with a text")
    return [row for _, _, row in sorted(best, key=lambda entry: (-entry[0], -entry[1]))]


def _documents(config: AnnotateConfig, parents: list[Artifact]) -> Iterator[dict[str, Any]]:
    for name in config.inputs:
        for path in labels.files_of(labels.LabelConfig(name)):
            for number, row in enumerate(labels.rows_of(path)):
                text = row.get(config.text_field)
                if isinstance(text, str) and text.strip():
                    identity = str(row.get("id") or f"{path.name}:{number}")
                    yield {**row, "text": text, "id": identity}
    columns = ["id", "text", "source", "url", "license"]
    for parent in parents:
        from pocketphi import corpus

        # Rejected documents are graded too: the scorer must know what it is to reject.
        for batch in corpus.read(parent, columns=columns, keep=None):
            yield from batch.to_pylist() if hasattr(batch, "to_pylist") else [batch]


class _Session:
    """Grades documents through the cache, within the cap."""

    def __init__(self, config: AnnotateConfig, grader: Grader) -> None:
        self.config, self.grader = config, grader
        self.cache = AnswerCache(Path(config.cache), grader.name)
        self.prompt_tokens = self.completion_tokens = 0
        self.requests = self.from_cache = self.graded = self.unreadable = self.retried = self.shortened = 0
        self._reserved = (0, 0)
        self._lock = threading.Lock()
        self._capped = False

    def grade_all(
        self, documents: list[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], grading.Grade | None, str]]:
        """Yield (document, grade or None, last answer) in order; those past the cap are left out."""
        workers = self.config.max_concurrent if self.grader.concurrent else 1
        waiting: dict[int, Future[tuple[grading.Grade | None, str] | None]] = {}
        with progress.bar("grading", len(documents), unit="documents") as bar, self.cache:
            pool = ThreadPoolExecutor(workers)
            try:
                asked = 0
                for number, document in enumerate(documents):
                    while asked < len(documents) and len(waiting) < 2 * workers:
                        waiting[asked] = pool.submit(self._grade, documents[asked]["text"])
                        asked += 1
                    outcome = self._result(waiting, number)
                    bar.advance()
                    if outcome is None:
                        continue  # past the cap; a cached answer may still follow
                    grade, answer = outcome
                    self.graded += grade is not None
                    self.unreadable += grade is None
                    yield document, grade, answer
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _result(waiting: dict[int, Future[Any]], number: int) -> Any:
        """The outcome of one document; an error of any other ends the wait at once."""
        own = waiting[number]
        while not own.done():
            finished, _ = wait(waiting.values(), return_when=FIRST_COMPLETED)
            for future in finished:
                if future is not own:
                    future.result()
            if not own.done():
                wait([own], timeout=0.05)
        return waiting.pop(number).result()

    def _grade(self, text: str) -> tuple[grading.Grade | None, str] | None:
        """Return (grade, answer), or None when the cap stands in the way."""
        messages = self._question(text)
        said = ""
        for attempt in range(self.config.max_attempts):
            temperature = _WARMER * attempt
            settings = {"max_tokens": self.config.max_tokens, "temperature": temperature}
            key = self.cache.key(messages, settings, attempt)
            answer = self.cache.get(key)
            if answer is None:
                guess = (guess_tokens(messages), self.config.max_tokens)
                if not self._reserve(guess):
                    return None
                try:
                    answer = self.grader.ask(
                        messages, max_tokens=self.config.max_tokens, temperature=temperature
                    )
                finally:
                    self._release(guess)
                self.cache.put(key, answer)
                with self._lock:
                    self.requests += 1
            else:
                with self._lock:
                    self.from_cache += 1
            with self._lock:
                # What the cache holds was paid for as well: the cap holds for the whole undertaking.
                self.prompt_tokens += answer.prompt_tokens
                self.completion_tokens += answer.completion_tokens
                self.retried += attempt > 0
            said = answer.text
            grade = grading.read_grade(said)
            if grade is not None:
                return grade, said
        return None, said

    def _question(self, text: str) -> list[dict[str, str]]:
        """The conversation about a document, which is shortened until it fits the grader's context."""
        chars = self.config.max_chars
        messages = grading.messages(grading.extract(text, chars))
        if self.grader.fits(messages, max_tokens=self.config.max_tokens):
            return messages
        chars = min(chars, len(text))
        while chars > _LEAST_CHARS:
            chars = max(_LEAST_CHARS, chars * 3 // 4)
            messages = grading.messages(grading.extract(text, chars))
            if self.grader.fits(messages, max_tokens=self.config.max_tokens):
                with self._lock:
                    self.shortened += 1
                return messages
        raise UserError(
            f"{self.grader.name}: its context does not hold the question, {_LEAST_CHARS} characters of a "
            f"document and an answer of {self.config.max_tokens} tokens",
            hint="take a model with a longer context, or lower max_tokens",
        )

    def _reserve(self, guess: tuple[int, int]) -> bool:
        """Set tokens aside for a request, unless the cap could be passed by it."""
        with self._lock:
            if self._capped:
                return False
            prompt = self.prompt_tokens + self._reserved[0] + guess[0]
            completion = self.completion_tokens + self._reserved[1] + guess[1]
            over_tokens = (
                self.config.max_tokens_total is not None
                and prompt + completion > self.config.max_tokens_total
            )
            over_cost = (
                self.config.max_cost is not None
                and self.config.cost(prompt, completion) > self.config.max_cost
            )
            if over_tokens or over_cost:
                self._capped = True
                return False
            self._reserved = (self._reserved[0] + guess[0], self._reserved[1] + guess[1])
            return True

    def _release(self, guess: tuple[int, int]) -> None:
        with self._lock:
            self._reserved = (self._reserved[0] - guess[0], self._reserved[1] - guess[1])

    def counts(self, documents_in: int) -> dict[str, Any]:
        """documents_in = graded + unreadable + not_reached."""
        return {
            "documents_in": documents_in,
            "documents_graded": self.graded,
            "documents_unreadable": self.unreadable,
            "documents_not_reached": documents_in - self.graded - self.unreadable,
            "documents_shortened": self.shortened,
            "answers_repeated": self.retried,
            "requests": self.requests,
            "answers_from_cache": self.from_cache,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.config.cost(self.prompt_tokens, self.completion_tokens),
        }


class AnswerCache:
    """Answers by a hash of everything that was asked, one JSON line each, appended and flushed."""

    def __init__(self, folder: Path, grader: str) -> None:
        self._grader = grader
        self._path = folder / f"{hashlib.sha256(grader.encode()).hexdigest()[:16]}.jsonl"
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> AnswerCache:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if self._path.exists():
            with open(self._path, "rb") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                        answer = Answer(row["text"], row["prompt_tokens"], row["completion_tokens"])
                        self._answers[row["key"]] = answer
                    except (ValueError, KeyError, TypeError):
                        if not line.endswith(b"\n"):
                            break  # the line that a kill cut short: overwritten below
                    whole += len(line)
        self._file = open(self._path, "ab")
        self._file.truncate(whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def key(self, messages: list[dict[str, str]], settings: Mapping[str, Any], attempt: int) -> str:
        tree = [self._grader, messages, dict(settings), attempt]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        line = json.dumps({"key": key, **vars(answer)}, ensure_ascii=False) + "\n"
        with self._lock:
            self._answers[key] = answer
            self._file.write(line.encode("utf-8", "replace"))
            self._file.flush()


def _grader(config: AnnotateConfig) -> Grader:
    if config.local_model:
        return LocalGrader(config.local_model)
    if not config.endpoint:
        raise ConfigError(
            "no grader is named", hint="set endpoint and model (any OpenAI-compatible server), or local_model"
        )
    return EndpointGrader(
        config.endpoint,
        config.model,
        api_key_env=config.api_key_env,
        timeout_s=config.timeout_s,
        max_attempts=config.max_request_attempts,
    )


def _write(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
