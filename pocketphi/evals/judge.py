"""A judge behind any OpenAI-compatible endpoint: ratings of single answers, verdicts on pairs.

Prompts and reference answers are MT-bench's own files (Zheng et al., arXiv 2306.05685). The judge answers
at temperature 0; a reply without a readable verdict is asked once more for the verdict alone, up to
`judge_tries` times, and after that it counts as unreadable: in a rating as the lowest, in a pair as no win
for anybody. What judged is part of every record: a score by another judge is another score.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pocketphi.core.errors import ConfigError, DataError, EngineError
from pocketphi.evals import extract
from pocketphi.evals.backends.endpoint import Endpoint
from pocketphi.evals.data import read, require

LOWEST, HIGHEST = 1.0, 10.0
# Categories whose answers are right or wrong: the judge sees a reference answer.
WITH_REFERENCE = frozenset({"math", "reasoning", "coding"})
PUBLISHED_JUDGE = "gpt-4"
_REMINDERS = {
    "rating": 'Your reply holds no rating in the form asked for. Reply with the rating alone, such as "[[5]]".',
    "preference": 'Your reply holds no verdict in the form asked for. Reply with "[[A]]", "[[B]]" or "[[C]]" alone.',
}
_FIELD = re.compile(
    r"\{(question|answer|question_[12]|answer_[12]|answer_[ab]|answer_[ab]_[12]|ref_answer_[12])\}"
)
T = TypeVar("T")


@dataclass
class JudgeConfig:
    """Who judges, and how patiently.

    judge_url: OpenAI-compatible endpoint, such as http://host:port/v1. judge_model: the model's name there.
    judge_key_env: environment variable with the endpoint's key. judge_tries: replies asked for until a
    verdict can be read. judge_max_tokens: longest reply. data_dir: folder with mt_bench_judge_prompts
    and mt_bench_reference_gpt-4. parallel: requests in flight. timeout_s: longest wait for one reply.
    """

    judge_url: str | None = None
    judge_model: str = ""
    judge_key_env: str = "OPENAI_API_KEY"
    judge_tries: int = 3
    judge_max_tokens: int = 1024
    data_dir: Path | None = None
    parallel: int = 4
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("judge_tries", "judge_max_tokens", "parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class Judgment(Generic[T]):
    """A verdict, or None when no reply held one; `tries` counts the replies asked for."""

    value: T | None
    text: str
    tries: int
    served_as: str


@dataclass
class Judge:
    """One judge with MT-bench's prompts and reference answers."""

    config: JudgeConfig
    endpoint: Endpoint
    prompts: Mapping[str, Mapping[str, str]]
    references: Mapping[str, Sequence[str]]
    prompts_sha256: str
    references_sha256: str

    @property
    def sha256(self) -> str:
        """Hash of everything the verdicts depend on besides the answers."""
        tree = [self.config.judge_model, self.prompts_sha256, self.references_sha256, self.config.judge_tries]
        tree += [self.config.judge_max_tokens, _REMINDERS]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def identity(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the result says of the judge; `served_as` is what the endpoint called itself, by the records."""
        return {
            "judge_model": self.config.judge_model,
            "judge_served_as": sorted({r["judge"]["served_as"] for r in records}),
            "judge_sha256": self.sha256,
            "judge_prompts_sha256": self.prompts_sha256,
            "judge_references_sha256": self.references_sha256,
            "comparable_with_published": self.config.judge_model.startswith(PUBLISHED_JUDGE),
        }

    def rate(self, item: Mapping[str, Any], answers: Sequence[str], turn: int) -> Judgment[float]:
        """Rate the answer of turn 0 or 1 of a conversation from 1 to 10."""
        reference = self._reference(item)
        name = "single-math-v1" if reference else "single-v1"
        if turn == 0:
            fields = {"question": item["turns"][0], "answer": answers[0]}
        else:
            name += "-multi-turn"
            fields = {f"question_{i + 1}": item["turns"][i] for i in (0, 1)}
            fields |= {f"answer_{i + 1}": answers[i] for i in (0, 1)}
        read_rating: Callable[[str], float | None] = lambda text: extract.rating(text, LOWEST, HIGHEST)  # noqa: E731
        return self._ask(name, fields | reference, read_rating, "rating")

    def prefer(
        self, item: Mapping[str, Any], first: Sequence[str], second: Sequence[str], turn: int
    ) -> Judgment[str]:
        """Compare two conversations up to a turn: "A" (the first), "B", or "C" for a tie."""
        reference = self._reference(item)
        name = "pair-math-v1" if reference else "pair-v2"
        if turn == 0:
            fields = {"question": item["turns"][0], "answer_a": first[0], "answer_b": second[0]}
        else:
            name += "-multi-turn"
            fields = {f"question_{i + 1}": item["turns"][i] for i in (0, 1)}
            fields |= {f"answer_a_{i + 1}": first[i] for i in (0, 1)}
            fields |= {f"answer_b_{i + 1}": second[i] for i in (0, 1)}
        return self._ask(name, fields | reference, extract.preference, "preference")

    def _reference(self, item: Mapping[str, Any]) -> dict[str, str]:
        if item["category"] not in WITH_REFERENCE:
            return {}
        known = self.references.get(str(item["id"]))
        if known is None:
            raise DataError(f"question {item['id']} ({item['category']}) has no reference answer")
        return {f"ref_answer_{i + 1}": text for i, text in enumerate(known)}

    def _ask(
        self, name: str, fields: Mapping[str, str], verdict: Callable[[str], T | None], form: str
    ) -> Judgment[T]:
        prompt = self.prompts[name]
        # One pass over the template: braces and field names inside an answer stay text.
        body = _FIELD.sub(lambda m: fields[m.group(1)], prompt["prompt_template"])
        messages = [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": body},
        ]
        text = served_as = ""
        for attempt in range(1, self.config.judge_tries + 1):
            text, served_as = self._reply(messages)
            found = verdict(text)
            if found is not None:
                return Judgment(found, text, attempt, served_as)
            messages = [
                *messages[:2],
                {"role": "assistant", "content": text or "(empty)"},
                {"role": "user", "content": _REMINDERS[form]},
            ]
        return Judgment(None, text, self.config.judge_tries, served_as)

    def _reply(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        tree = self.endpoint.post(
            "/chat/completions",
            {"messages": list(messages), "max_tokens": self.config.judge_max_tokens, "temperature": 0},
        )
        try:
            text = tree["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise EngineError(
                f"judge {self.endpoint.address}: the reply holds no answer: {json.dumps(tree)[:200]}",
                hint="items finished so far are kept: run the same command again when the judge answers",
            ) from None
        served = "/".join(str(tree[k]) for k in ("model", "system_fingerprint") if tree.get(k))
        return text if isinstance(text, str) else "", served


def load(config: JudgeConfig) -> Judge:
    """Open the judge: its endpoint, prompts and references. ConfigError without an address or a name."""
    if not config.judge_url:
        raise ConfigError("no judge: judge_url is not set", hint="--set judge_url=http://host:port/v1")
    if not config.judge_model:
        raise ConfigError("judge_model is not set: the judge's name goes into every record")
    prompts_file = require(config.data_dir, "mt_bench_judge_prompts")
    references_file = require(config.data_dir, "mt_bench_reference_gpt-4")
    prompts = {r["name"]: r for r in read(prompts_file, ("name", "system_prompt", "prompt_template"))}
    missing = [n for n in _names() if n not in prompts]
    if missing:
        raise DataError(f"{prompts_file.path}: lacks the prompt '{missing[0]}'")
    references: dict[str, Sequence[str]] = {}
    for row in read(references_file, ("question_id", "choices")):
        try:
            references[str(row["question_id"])] = [str(t) for t in row["choices"][0]["turns"]]
        except (IndexError, KeyError, TypeError) as error:
            raise DataError(f"{references_file.path}: question {row['question_id']}: {error!r}") from None
    endpoint = Endpoint(
        config.judge_url, config.judge_model, key_env=config.judge_key_env, timeout_s=config.timeout_s
    )
    return Judge(config, endpoint, prompts, references, prompts_file.sha256, references_file.sha256)


def _names() -> list[str]:
    kinds = ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
    return [name + more for name in kinds for more in ("", "-multi-turn")]
