"""Whether two scores may be subtracted, and if not, why.

Two scores may differ in the model: its weights, their types, the engine that computes them. They may not
differ in what was asked (task, prompt, items, data), in how it was asked (shots, chat, room for the
answer, start token), or in who judged. A model's own tokenizer and template are part of the model; the
same tokenizer under two start-token rules or two templates is a difference in the asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What must be equal, and how its difference is named.
_EQUAL = (
    ("name", "the task"),
    ("task_version", "the task's version"),
    ("metric", "the metric"),
    ("filter", "the filter of the answers"),
    ("definition_sha256", "the definition in lm-eval"),
    ("kind", "the way of answering (likelihood or writing)"),
    ("shots", "the number of shots"),
    ("format", "the prompt form"),
    ("length", "the length of the context"),
    ("chat", "chat template used or not"),
    ("max_new_tokens", "the room for an answer in tokens"),
    ("max_turn_tokens", "the room for an answer in tokens"),
    ("judge_sha256", "the judge"),
    ("window_rule", "the window rule"),
)


@dataclass
class Ruling:
    """`refusals` forbid a subtraction; `notes` go beside it."""

    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rule(
    entry_a: Mapping[str, Any],
    entry_b: Mapping[str, Any],
    side_a: Mapping[str, Any],
    side_b: Mapping[str, Any],
    items_a: Mapping[str, Mapping[str, Any]],
    items_b: Mapping[str, Mapping[str, Any]],
) -> Ruling:
    """Judge one task's two entries of results.json, the identities beside them, and the items by id."""
    found = Ruling()
    for key, words in _EQUAL:
        a, b = entry_a.get(key), entry_b.get(key)
        if a != b:
            found.refusals.append(f"{words} differs ({_short(a)} against {_short(b)})")
    _data(entry_a, entry_b, found)
    if entry_a["kind"] == "harness" and not entry_a.get("paired"):
        found.refusals.append(f"{entry_a['metric']} is no mean over items, so there is nothing to pair")
    same_items = items_a.keys() == items_b.keys()
    if not same_items:
        both = len(items_a.keys() & items_b.keys())
        found.refusals.append(
            f"other items were scored (n={len(items_a)} against n={len(items_b)}, {both} in common)"
        )
    elif entry_a.get("prompt_version") != entry_b.get("prompt_version") and not found.refusals:
        found.refusals.append(
            f"the prompt's version differs ({_short(entry_a.get('prompt_version'))} against "
            f"{_short(entry_b.get('prompt_version'))})"
        )
    _tokens(entry_a, side_a, side_b, found)
    _cut(entry_a, entry_b, side_a, side_b, found)
    if entry_a["kind"] == "bits" and same_items:
        changed = sum(items_a[i].get("text_sha256") != items_b[i].get("text_sha256") for i in items_a)
        if changed:
            found.refusals.append(f"{changed} of the {len(items_a)} texts differ")
    if entry_a["kind"] == "long" and same_items:
        changed = sum(items_a[i].get("prompt_sha256") != items_b[i].get("prompt_sha256") for i in items_a)
        if changed and side_a.get("tokenizer_sha256") == side_b.get("tokenizer_sha256"):
            found.refusals.append(f"{changed} of the {len(items_a)} generated prompts differ")
        elif changed:
            found.notes.append("the haystack fills the length in each model's own tokens")
    return found


def _data(entry_a: Mapping[str, Any], entry_b: Mapping[str, Any], found: Ruling) -> None:
    """The same rows are the same data, in whatever file they came."""
    for rows, file, words in (
        ("rows_sha256", "file_sha256", "the data file"),
        ("shots_sha256", "shots_file_sha256", "the file of the shots"),
    ):
        # Scores of earlier versions know their files only.
        key = rows if entry_a.get(rows) and entry_b.get(rows) else file
        a, b = entry_a.get(key), entry_b.get(key)
        if a != b:
            found.refusals.append(f"{words} differs ({_short(a)} against {_short(b)})")


def _tokens(
    entry: Mapping[str, Any], side_a: Mapping[str, Any], side_b: Mapping[str, Any], found: Ruling
) -> None:
    same = side_a.get("tokenizer_sha256") == side_b.get("tokenizer_sha256")
    start_a, start_b = str(side_a.get("start_token")), str(side_b.get("start_token"))
    if start_a != start_b:
        own = start_a.startswith("auto") and start_b.startswith("auto")
        if same or not own:
            found.refusals.append(f"the start-token rule differs ({start_a} against {start_b})")
        else:
            found.notes.append(f"each model's own start token ({start_a} against {start_b})")
    if (entry.get("chat") or entry["kind"] == "conversation") and (
        side_a.get("template_sha256") != side_b.get("template_sha256")
    ):
        words = f"{_short(side_a.get('template_sha256'))} against {_short(side_b.get('template_sha256'))}"
        if same:
            found.refusals.append(f"the chat template differs on the same tokenizer ({words})")
        else:
            found.notes.append(f"each model's own chat template ({words})")
    if not same:
        found.notes.append("tokenizers differ: figures per token are not subtracted")


def _cut(
    entry_a: Mapping[str, Any],
    entry_b: Mapping[str, Any],
    side_a: Mapping[str, Any],
    side_b: Mapping[str, Any],
    found: Ruling,
) -> None:
    room_a, room_b = side_a.get("max_context_tokens"), side_b.get("max_context_tokens")
    if room_a == room_b:
        return
    words = f"{room_a} against {room_b} tokens"
    if entry_a["kind"] == "bits":
        found.refusals.append(f"the windows differ ({words}): a longer one sees more before each token")
    elif entry_a.get("num_cut_prompts") or entry_b.get("num_cut_prompts"):
        found.refusals.append(f"prompts were cut to contexts of different length ({words})")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
