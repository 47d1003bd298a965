"""How a question is put to a model: the three forms, the few-shot text, the token split.

- `cloze`: the question, then each option's own words (lm-evaluation-harness' form for most tasks);
- `letters`: options listed as "A. ...", the answer is a letter (its form for MMLU);
- `phi3`: the form of Appendix A of the Phi-3 report: "Question:" / "Options:" / "Answer:" blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocketphi.core.errors import DataError
from pocketphi.evals.task import LETTERS, Question, Task


@dataclass(frozen=True)
class Rendered:
    """A question as texts: `contexts[i] + continuations[i]` is what option i reads like."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One context and the continuations whose log-likelihoods are wanted after it.

    options[i] is scored given `context`; indices[i] says which option of the question it is.
    """

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    indices: tuple[int, ...]
    cut_tokens: int = 0


def render(task: Task, question: Question) -> Rendered:
    """Return the question in the task's form, without shots."""
    if task.format == "cloze":
        continuations = question.continuations or tuple(" " + o for o in question.options)
        contexts = question.cloze if len(question.cloze) > 1 else question.cloze * len(continuations)
        lengths = question.lengths or tuple(len(o) for o in question.options)
        return Rendered(contexts, continuations, lengths)
    listed = "\n".join(f"{LETTERS[i]}. {o}" for i, o in enumerate(question.options))
    passage = f"{question.passage}\n" if question.passage else ""
    if task.format == "letters":
        # lm-eval's MMLU prompt has no word before the question; the others say "Question: ".
        word = "" if task.heading is not None else "Question: "
        context = f"{passage}{word}{question.text}\n{listed}\nAnswer:"
    else:
        context = f"Question:\n\n{passage}{question.text}\n\nOptions:\n\n{listed}\n\nAnswer:"
    count = len(question.options)
    letters = tuple(f" {LETTERS[i]}" for i in range(count))
    return Rendered((context,) * count, letters, (1,) * count)


def shots_text(task: Task, shots: Sequence[Question], group: str) -> str:
    """Return the heading and the solved questions that stand before every question of a group."""
    heading = task.heading(group) if task.heading is not None and task.format != "phi3" else ""
    solved = []
    for shot in shots:
        shown = render(task, shot)
        solved.append(shown.contexts[shot.gold] + shown.continuations[shot.gold])
    return heading + "".join(text + "\n\n" for text in solved)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokenise context and continuation together, as a model would read them.

    Returns the ids and how many belong to the context. A space at the context's end moves to the
    continuation, because in most vocabularies it belongs to the word that follows; tokens that
    span the border belong to the side that `encode(context)` gives them (lm-eval's rule).
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole = list(tokenizer.encode(context + continuation))
    return whole, len(tokenizer.encode(context))


def lead_id(tokenizer: Any, *, end_first: bool = False) -> int:
    """The token that stands for the beginning where a text has nothing before it: start, else end of text.

    With `end_first` the other way round, as documents follow each other in training. DataError for neither.
    """
    found = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not found:
        raise DataError("the tokenizer has neither a start nor an end token to read a text from")
    return int(found[-1 if end_first else 0])


def requests(
    tokenizer: Any,
    rendered: Rendered,
    shared_text: str,
    start_ids: Sequence[int],
    max_tokens: int,
) -> list[Request]:
    """Turn a rendered question into requests; options with the same context tokens share one.

    A context that does not fit is cut on its left, and the number of tokens cut is recorded.
    """
    grouped: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, (context, continuation) in enumerate(zip(rendered.contexts, rendered.continuations)):
        ids, border = encode_pair(tokenizer, shared_text + context, continuation)
        before = start_ids or (() if border else (lead_id(tokenizer),))
        ids = [*before, *ids]
        border = min(border + len(before), len(ids) - 1)
        grouped.setdefault(tuple(ids[:border]), []).append((index, tuple(ids[border:])))
    found = []
    for context_ids, options in grouped.items():
        longest = max(len(o) for _, o in options)
        # The last token of an option is only predicted, never read: it needs no place.
        cut = max(0, len(context_ids) + longest - 1 - max_tokens)
        cut = min(cut, len(context_ids) - 1)
        kept = context_ids[cut:]
        if cut and start_ids and len(kept) > len(start_ids):
            kept = (*start_ids, *kept[len(start_ids) :])
        found.append(Request(kept, tuple(o for _, o in options), tuple(i for i, _ in options), cut))
    return found
