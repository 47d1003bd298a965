"""Long-context tasks: something is to be found, followed or counted in a context of a given length.

Needle in a haystack and tasks in the manner of RULER (Hsieh et al., arXiv 2404.06654), from this module's
own sentences and words: needles (one, several keys, several values, several questions), variables passed
on, the most common words. Every item follows from (task, length, number) alone, apart from the haystack's
size, which fills the length in the model's own tokens. Nothing can be answered without the context: the
answers are random numbers and invented words.

A record's `correct` is the share of the wanted answers that the reply holds (RULER's metric).
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pocketphi.core.errors import ConfigError
from pocketphi.evals.task import Prompt, Task, Verdict

MAKER_VERSION = 1
# Depths of the needle, in percent of the haystack.
DEPTHS = (0, 25, 50, 75, 100)
DEFAULT_LENGTH = 1024
MIN_LENGTH = 512
_ROOM_TOKENS = 64

_WHO = (
    "the baker", "a teacher", "the old captain", "my neighbour", "the gardener", "a student", "the mayor", "two clerks",
    "the painter", "a young nurse", "the farmer", "an engineer", "the librarian", "a traveller", "the potter", "our guide",
)  # fmt: skip
_DID = (
    "walked to", "wrote about", "looked for", "spoke of", "remembered", "left", "drew a map of", "came back from",
    "dreamt of", "asked about", "took care of", "passed", "described", "cleaned", "waited at", "measured",
)  # fmt: skip
_WHAT = (
    "the market", "a quiet harbour", "the stone bridge", "an empty station", "the north gate", "a field of barley",
    "the reading room", "a narrow street", "the water mill", "an apple orchard", "the lighthouse", "a small island",
    "the school yard", "a winding path", "the town hall", "a wooden boat",
)  # fmt: skip
_WHEN = (
    "before breakfast", "in late autumn", "when the rain stopped", "after a long day", "on the first of May",
    "as the bells rang", "during the holidays", "without a word", "with great patience", "for the second time",
    "while others slept", "against all advice", "early on Sunday", "in the evening light", "by mistake", "once more",
)  # fmt: skip
_ONSET = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
)
_VOWEL = ("a", "e", "i", "o", "u")
_CODA = ("b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "x")


@dataclass(frozen=True)
class Plan:
    """An item before it has a size: what must stand in the context, and the question after it.

    inserts: (depth in 0..1, sentence). filler: makes the n-th sentence of the haystack. wanted: the
    strings that a right reply holds.
    """

    id: str
    group: str
    head: str
    inserts: tuple[tuple[float, str], ...]
    filler: Callable[[int], str]
    question: str
    wanted: tuple[str, ...]


Maker = Callable[[random.Random, int], Plan]


def build(task: Task, tokenizer: Any, extra_tokens: int, count: int) -> list[Prompt]:
    """Return the first `count` items of a task, each filling `task.length` tokens with its answer.

    tokenizer: the model's; None (an endpoint without one) takes four characters for a token.
    extra_tokens: what else goes into the context, a start token or a template.
    Prompts with room for the answer are at most `task.length` tokens long and at least 90% of it.
    """
    length = task.length or DEFAULT_LENGTH
    if length < MIN_LENGTH:
        raise ConfigError(f"task {task.name}: length must be at least {MIN_LENGTH} tokens, found {length}")
    found = []
    for number in range(count):
        seed = hashlib.sha256(f"{task.name}\0{MAKER_VERSION}\0{length}\0{number}".encode()).digest()
        plan = MAKERS[task.name](random.Random(seed), number)
        text = _fill(plan, tokenizer, length - _ROOM_TOKENS - extra_tokens)
        found.append(Prompt(plan.id, text, ", ".join(plan.wanted), plan.group, {"wanted": list(plan.wanted)}))
    return found


def score(text: str, prompt: Prompt) -> Verdict:
    """Share of the wanted strings that a reply holds, whatever stands around them."""
    lowered = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    hits = [w for w in prompt.meta["wanted"] if w.lower() in lowered]
    share = len(hits) / len(prompt.meta["wanted"])
    return Verdict(
        text.strip()[:400] or None, share == 1.0, note=f"{len(hits)} of {len(prompt.meta['wanted'])}"
    )


def share(verdict: Verdict) -> float:
    """The share that `score` wrote into its note."""
    hits, _, total = verdict.note.partition(" of ")
    return int(hits) / int(total)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text)) if tokenizer is not None else -(-len(text) // 4)


def _fill(plan: Plan, tokenizer: Any, room: int) -> str:
    """Grow the haystack until hardly another sentence fits.

    Tokens per sentence are measured and corrected a few times, so that a context of 128k tokens is
    tokenised five times and not twenty.
    """
    sentences: list[str] = []

    def text(count: int) -> str:
        sentences.extend(plan.filler(n) for n in range(len(sentences), count))
        return _assemble(plan, sentences[:count])

    bare = _count(tokenizer, text(0))
    if bare > room:
        raise ConfigError(
            f"task item {plan.id}: {room} tokens do not hold even the question", hint="length=1024"
        )
    count, size = 16, _count(tokenizer, text(16))
    for _ in range(6):
        each = max((size - bare) / count, 0.5)
        if 0 <= room - size < 2 * each:
            break
        count = max(1, int((room - bare) / each) if size > room else count + int((room - size) / each))
        size = _count(tokenizer, text(count))
    while size > room and count:
        count -= 1
        size = _count(tokenizer, text(count))
    return text(count)


def _assemble(plan: Plan, sentences: list[str]) -> str:
    count = len(sentences)
    # From the back, so that earlier places stay where they are.
    for depth, sentence in sorted(plan.inserts, key=lambda x: x[0], reverse=True):
        sentences.insert(round(depth * count), sentence)
    return f"{plan.head}\n\n{' '.join(sentences)}\n\n{plan.question}"


def _haystack(rng: random.Random) -> Callable[[int], str]:
    salt = rng.random()

    def sentence(number: int) -> str:
        own = random.Random(f"{salt}/{number}")
        who, did, what, when = (own.choice(part) for part in (_WHO, _DID, _WHAT, _WHEN))
        return f"{who[0].upper()}{who[1:]} {did} {what} {when}."

    return sentence


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(part) for part in (_ONSET, _VOWEL, _CODA, _ONSET, _VOWEL, _CODA))


def _words(rng: random.Random, count: int) -> list[str]:
    """Invented words, none inside another, so that holding one is not holding two."""
    found: list[str] = []
    while len(found) < count:
        word = _word(rng)
        if not any(word in w or w in word for w in found):
            found.append(word)
    return found


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


_NEEDLE_HEAD = (
    "Some secret numbers are hidden in the following text. Remember them; you will be asked for them."
)


def _needle_text(key: str, value: str) -> str:
    return f"The secret number of {key} is {value}."


def _needles(rng: random.Random, number: int, keys: int, values: int, asked: int) -> Plan:
    names = _words(rng, keys)
    numbers = {name: [_number(rng) for _ in range(values)] for name in names}
    target = names[:asked]
    inserts = []
    depth = DEPTHS[number % len(DEPTHS)]
    for name in names:
        for value in numbers[name]:
            # One needle stands at the depth that the item is about; where there are several, anywhere.
            place = depth / 100 if keys == values == 1 else rng.random()
            inserts.append((place, _needle_text(name, value)))
    which = " and ".join(target) if asked < 3 else ", ".join(target[:-1]) + f" and {target[-1]}"
    noun, verb = ("number", "is") if asked == values == 1 else ("numbers", "are")
    every = "all the " if values > 1 else "the "
    question = (
        f"Question: What {verb} {every}secret {noun} of {which}?\nAnswer: The secret {noun} of {which} {verb}"
    )
    group = f"depth {depth}%" if keys == values == 1 else ""
    wanted = tuple(v for name in target for v in numbers[name])
    return Plan(f"{number}", group, _NEEDLE_HEAD, tuple(inserts), _haystack(rng), question, wanted)


def _needle(rng: random.Random, number: int) -> Plan:
    return _needles(rng, number, 1, 1, 1)


def _needle_keys(rng: random.Random, number: int) -> Plan:
    return _needles(rng, number, 4, 1, 1)


def _needle_values(rng: random.Random, number: int) -> Plan:
    return _needles(rng, number, 1, 4, 1)


def _needle_queries(rng: random.Random, number: int) -> Plan:
    return _needles(rng, number, 4, 1, 4)


def _variables(rng: random.Random, number: int) -> Plan:
    """A value is passed from variable to variable; another chain runs beside it."""
    names = [w.upper() for w in _words(rng, 10)]
    chains = (names[:5], names[5:])
    values = [_number(rng) for _ in chains]
    inserts = []
    for chain, value in zip(chains, values):
        # Each step stands after the one before it.
        places = sorted(rng.random() for _ in chain)
        steps = [f"Let {chain[0]} = {value}."]
        steps += [f"Let {new} = {old}." for old, new in itertools.pairwise(chain)]
        inserts += list(zip(places, steps))
    question = (
        f"Question: Which variables hold the value {values[0]}, directly or through others? Name all five.\n"
        f"Answer: The variables that hold {values[0]} are"
    )
    head = "Variables are set in the following text. Follow which value each of them holds."
    return Plan(f"{number}", "", head, tuple(inserts), _haystack(rng), question, tuple(chains[0]))


def _common_words(rng: random.Random, number: int) -> Plan:
    """A list of words in rounds of fifteen: ten come in every round, the others hardly twice in all."""
    drawn = _words(rng, 10)
    salt = rng.random()

    @cache
    def round_of(turn: int) -> list[str]:
        own = random.Random(f"{salt}/{turn}")
        listed = drawn + [_word(own) for _ in range(5)]
        own.shuffle(listed)
        return listed

    def entry(place: int) -> str:
        return round_of(place // 15)[place % 15] + ","

    question = (
        "Question: Which ten words come most often in the list above?\n"
        "Answer: The ten words that come most often in the list are"
    )
    head = "Here is a list of words, some of which come again and again. Remember which come most often."
    return Plan(f"{number}", "", head, (), entry, question, tuple(drawn))


def _frequent_words(rng: random.Random, number: int) -> Plan:
    """Words in blocks of twenty: three come seven, five and three times in each, the others at most once."""
    drawn = _words(rng, 40)
    salt = rng.random()

    @cache
    def block(turn: int) -> list[str]:
        own = random.Random(f"{salt}/{turn}")
        listed = [drawn[0]] * 7 + [drawn[1]] * 5 + [drawn[2]] * 3 + own.sample(drawn[3:], 5)
        own.shuffle(listed)
        return listed

    def entry(place: int) -> str:
        return block(place // 20)[place % 20] + ","

    question = (
        "Question: Which three words come most often in the coded text above?\n"
        "Answer: The three words that come most often are"
    )
    head = "Read the following coded text and keep count of its words."
    return Plan(f"{number}", "", head, (), entry, question, tuple(drawn[:3]))


MAKERS: dict[str, Maker] = {
    "needle": _needle,
    "needle_keys": _needle_keys,
    "needle_values": _needle_values,
    "needle_queries": _needle_queries,
    "variables": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


def sample(task: Task) -> Sequence[str]:
    """What a prompt version is made from: the shortest form of the first item, without any haystack."""
    seed = hashlib.sha256(
        f"{task.name}\0{MAKER_VERSION}\0{task.length or DEFAULT_LENGTH}\0{0}".encode()
    ).digest()
    plan = MAKERS[task.name](random.Random(seed), 0)
    return [plan.head, plan.question, *(text for _, text in plan.inserts), plan.filler(0)]
