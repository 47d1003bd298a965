"""Configuration of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pocketphi.core.errors import ConfigError

StartToken = Literal["auto", "bos", "eos", "none"]


@dataclass
class EvalConfig:
    """What is asked of a model.

    suite: named list of tasks (evals/suites.yaml); ignored when `tasks` names any.
    tasks: task names, each optionally with settings: "arc_easy", "mmlu:shots=5,format=letters"; "lm-eval/NAME" is
        a task, group or tag of lm-evaluation-harness.
    data_dir: folder with the benchmark files; without it only tasks that need no file are scored.
    hub: fetch files that the data folder does not hold from the data sets they come from, by the task's own
        name for them, into that folder (or the cache, without one).
    texts: local text files whose bits per byte are measured beside the shards' held-out documents.
    limit: most items per task (of a group of lm-eval's: of each of its tasks), drawn by a hash of the item's id
        (not the first ones); None scores all.
    num_long_items: prompts of each long-context task, where `limit` does not say less.
    max_heldout_tokens: bits per byte is measured on whole documents until this many tokens of each split
        or text; None takes what the suite says, or 100,000.
    max_context_tokens: cut the model's context to this; None takes the model's own.
    max_new_tokens: most tokens of a generated answer, where the task does not say less.
    batch_size: requests that the torch back end scores in one pass; scores do not depend on it.
    start_token: what stands before every prompt. `auto` follows the tokenizer's own rule.
    choices_by: how choice tasks are answered: `likelihood` of each option, or `writing` a letter, for
        models that only write; the two are different protocols and not comparable.
    contamination: check each task's items against the corpus artifact, where one is given.
    chat: put generation prompts into the model's chat template instead of the plain few-shot text.
    endpoint_key_env, judge_key_env: names of environment variables that hold the keys of the model's and
        the judge's endpoint, so that no key is written to a file.
    judge_url, judge_model: OpenAI-compatible endpoint that judges MT-bench answers, and the model's name
        there. judge_tries: replies asked for until a verdict can be read. judge_max_tokens: longest reply.
    timeout_s: longest wait for one reply of an endpoint.
    dtype: precision of the torch model; `auto` is bfloat16 on a GPU and float32 on a CPU.
    num_threads: threads of the engine; None lets it choose.
    backend: engine back end for GGUF files ("auto", "native", "numpy").
    """

    suite: str = "quick"
    tasks: list[str] = field(default_factory=list)
    data_dir: Path | None = None
    hub: bool = False
    texts: list[Path] = field(default_factory=list)
    limit: int | None = None
    num_long_items: int = 20
    max_heldout_tokens: int | None = None
    max_context_tokens: int | None = None
    max_new_tokens: int = 512
    batch_size: int = 8
    start_token: StartToken = "auto"
    choices_by: Literal["likelihood", "writing"] = "likelihood"
    contamination: bool = True
    chat: bool = False
    endpoint_key_env: str = "OPENAI_API_KEY"
    judge_url: str | None = None
    judge_model: str = ""
    judge_key_env: str = "OPENAI_API_KEY"
    judge_tries: int = 3
    judge_max_tokens: int = 1024
    timeout_s: float = 120.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_threads: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in (
            "num_long_items",
            "max_new_tokens",
            "batch_size",
            "judge_tries",
            "judge_max_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("limit", "max_heldout_tokens", "max_context_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 or null, found {value}")
        if self.timeout_s <= 0:
            raise ConfigError(f"timeout_s must be positive, found {self.timeout_s}")
