"""What a task is: where its rows come from, how a row becomes a question, how a question is asked.

Six kinds of tasks:

- `choice`: options are scored by their log-likelihood after a prompt (ARC, HellaSwag, MMLU, ...);
- `generate`: the model writes and an extraction rule reads the answer (GSM8K, MATH, BBH, code, ...);
- `conversation`: the model answers in turns and a judge rates the answers (MT-bench);
- `long`: something is to be found in a context of a given length (evals/longcontext.py);
- `bits`: bits per byte of a text;
- `harness`: lm-evaluation-harness defines all of it (`lm-eval/NAME`, evals/harness).

A task's `version` changes whenever a score would; its prompt version is a hash of how it asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pocketphi.core.errors import ConfigError
from pocketphi.core.registry import Registry

Kind = Literal["choice", "generate", "bits", "conversation", "long", "harness"]
Format = Literal["cloze", "letters", "phi3"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One item of a choice task.

    text: what is asked, without any prompt words; passage: what it is asked about ("" if nothing).
    gold: index into `options`. group: subject or subset, also the heading of its few-shot prompt.
    cloze: contexts for the cloze form, one for all options or one for each (WinoGrande).
    continuations: what follows the contexts in the cloze form; None means " " + option.
    lengths: characters by which the normalised accuracy divides; None means those of the options.
    true: for tasks with several right options (TruthfulQA MC2), which ones are right.
    """

    id: str
    text: str
    options: tuple[str, ...]
    gold: int
    passage: str = ""
    group: str = ""
    cloze: tuple[str, ...] = ()
    continuations: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    true: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt and what answers it.

    prompt: what the model reads; target: what a shot shows as the answer, and what extraction is
    compared with. choices: options for multiple-choice questions answered by generation.
    meta: what the scorer of the task needs (tests of a code task, aliases of an answer).
    """

    id: str
    prompt: str
    target: str
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """How a generated answer was read: `answer` is None when none could be read from the text."""

    answer: str | None
    correct: bool
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A task as defined here; `with_settings` returns a variant (other shots, other format).

    file, shots_file: stems of the benchmark files ("arc_easy.test"). When `shots_file` equals
    `file`, the rows shown as shots are taken out of what is scored.
    shot_ids: items that are the shots by definition, instead of a draw.
    length: tokens that a long-context prompt fills together with its answer.
    stop: strings that end a written answer; chat_stop: those in a conversation, where they are others.
    metric: which figure is the task's `value`. source: where the rows come from and their licence.
    hub: data set id on the Hugging Face hub (evals/hub.py fetches its rows). gated: why its rows may be
    missing though the data set is public, and what to do.
    settings: what was set by hand, for tasks that are defined elsewhere.
    """

    name: str
    kind: Kind
    version: int | float | str
    title: str
    file: str | None
    columns: tuple[str, ...]
    source: str
    hub: str = ""
    gated: str = ""
    read: Callable[[Mapping[str, Any], int], Any] | None = None
    shots_file: str | None = None
    shots: int = 0
    format: Format = "cloze"
    metric: str = "accuracy"
    heading: Callable[[str], str] | None = None
    score: Callable[[str, Prompt], Verdict] | None = None
    stop: tuple[str, ...] = ()
    chat_stop: tuple[str, ...] | None = None
    max_new_tokens: int = 256
    prefix_file: str | None = None
    lm_eval: str = ""
    shots_by_group: bool = False
    shot_ids: tuple[str, ...] = ()
    length: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def with_settings(self, settings: Mapping[str, str]) -> Task:
        """Return the task with `shots`, `format` or `length` replaced; ConfigError for anything else."""
        result = self
        for key, value in settings.items():
            if key == "shots":
                if not value.isdigit():
                    raise ConfigError(f"task {self.name}: shots must be a number, found {value!r}")
                result = replace(result, shots=int(value))
            elif key == "format":
                if value not in ("cloze", "letters", "phi3") or self.kind != "choice":
                    raise ConfigError(
                        f"task {self.name}: format must be cloze, letters or phi3, and only for choice tasks"
                    )
                result = replace(result, format=value)  # type: ignore[arg-type]
            elif key == "length":
                if not value.isdigit() or self.kind != "long":
                    raise ConfigError(
                        f"task {self.name}: length must be a number, and only for long-context tasks"
                    )
                result = replace(result, length=int(value))
            else:
                raise ConfigError(f"task {self.name}: unknown setting '{key}' (known: shots, format, length)")
        if result.shots and result.shots_file is None and result.prefix_file is None:
            raise ConfigError(f"task {self.name}: there are no rows to draw shots from")
        return result

    @property
    def label(self) -> str:
        """Name with what distinguishes variants: "arc_easy[10-shot phi3]"."""
        parts = []
        if self.length:
            parts.append(f"{self.length} tokens")
        if self.shots:
            parts.append(f"{self.shots}-shot")
        if self.kind == "harness":
            parts += [self.settings[k] for k in ("metric", "filter") if k in self.settings]
        if self.format != "cloze":
            parts.append(self.format)
            if self.kind == "generate":
                parts.append("written")
        return f"{self.name}[{' '.join(parts)}]" if parts else self.name


TASKS: Registry[Task] = Registry("task")


def register(task: Task) -> Task:
    return TASKS.add(task.name)(task)


def parse_task(text: str) -> Task:
    """Read "name" or "name:shots=5,format=letters" of a task of ours. ConfigError names the nearest."""
    from pocketphi.evals import tasks as _tasks  # noqa: F401  (fills the registry)

    name, settings = split_settings(text)
    return TASKS[name].with_settings(settings)


def split_settings(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the settings of "name:key=value,...". ConfigError for another form."""
    name, _, rest = text.partition(":")
    settings = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(f"task {text!r}: expected NAME:KEY=VALUE, found {part!r}")
        settings[key.strip()] = value.strip()
    return name.strip(), settings


def pick(ids: Iterable[str], count: int | None, salt: str) -> list[int]:
    """Return the positions of `count` ids drawn by hash, in their original order.

    A draw by hash depends on nothing but the ids, and unlike the first `count` rows it is not one
    subject or one source. None returns all.
    """
    listed = list(ids)
    if count is None or count >= len(listed):
        return list(range(len(listed)))
    keyed = sorted(range(len(listed)), key=lambda i: _key(salt, listed[i]))
    return sorted(keyed[:count])


def draw_shots(ids: Iterable[str], count: int, salt: str) -> list[int]:
    """Return the positions of the rows shown as shots, in the order of the draw."""
    listed = list(ids)
    return sorted(range(len(listed)), key=lambda i: _key("shots " + salt, listed[i]))[:count]


def prompt_version(task: Task, sample: Any) -> str:
    """Hash of how a task asks: its settings and one rendered sample prompt."""
    tree = [task.name, task.version, task.format, task.shots, list(task.stop), sample]
    if task.length:
        tree.append(task.length)
    return hashlib.sha256(json.dumps(tree, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def _key(salt: str, id_: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{id_}".encode()).digest()
