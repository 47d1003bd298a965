"""Chats to learn from: files in the forms people have, our own conversations, and chats made from the
corpus by rule.

Forms of a row, told by its fields:
  {"messages": [{"role", "content"}]}                     with "label": false it is left out (KTO)
  {"conversations": [{"from", "value"}], "chosen"?}       ShareGPT; a `chosen` turn is appended
  {"instruction", "input"?, "output" | "response"}        Alpaca
  {"instruction", "instances": [{"input", "output"}]}     Self-Instruct
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ..."}            HH-RLHF, the chosen side
  {"prompt": {"text", "replies": [...]}}                  OpenAssistant trees, the best-ranked path
  {"prompt", "completion" | "response"}, {"question", "answer"}

Whatever is left out is counted with its reason. Torch-free.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.train.shards import read_documents

Message = dict[str, str]
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Chat:
    """One conversation: messages from an optional system turn to an assistant's, and its origin."""

    messages: tuple[tuple[str, str], ...]
    source: str

    def as_messages(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def key(self) -> bytes:
        """A hash of the text alone: equal conversations have equal keys."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode()).digest()


class Skipped(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


def files_of(data: Iterable[str]) -> list[Path]:
    """The chat files behind paths and folders, sorted in each folder. Raises DataError."""
    found: list[Path] = []
    for entry in data:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES))
            if not inside:
                raise DataError(f"{path}: no chat file in this folder (known: {', '.join(_SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such chat file", hint="name a .json or .jsonl file (also .gz, .zst)")
    return found


def data_bytes(data: Iterable[str]) -> int:
    """About how much text the files hold; compressed ones count four times. Missing ones count nothing."""
    total = 0
    for entry in data:
        path = Path(entry).expanduser()
        paths = [p for p in path.iterdir() if p.name.endswith(_SUFFIXES)] if path.is_dir() else [path]
        for file in paths:
            if file.is_file():
                total += file.stat().st_size * (4 if file.suffix in (".gz", ".zst") else 1)
    return total


def read_file(
    path: Path, left_out: Counter[str], *, max_rows: int = 0, max_characters: int = 0
) -> list[Chat]:
    """Read the chats of a file. `left_out` counts, by reason, the rows that are not used.

    Raises DataError when the file is not readable, or not one row of it has a known form.
    """
    chats: list[Chat] = []
    num_rows = 0
    name = path.name.split(".")[0]
    for row in _rows(path, left_out):
        num_rows += 1
        if max_rows and len(chats) >= max_rows:
            left_out[f"{name}: beyond max_rows_per_file"] += 1
            continue
        try:
            chat = Chat(checked(messages_of(row)), name)
            if max_characters and sum(len(c) for _, c in chat.messages) > max_characters:
                raise Skipped("longer than max_characters")
            chats.append(chat)
        except Skipped as reason:
            left_out[f"{name}: {reason}"] += 1
    if not chats:
        reasons = ", ".join(f"{k} ({v})" for k, v in left_out.items() if k.startswith(name)) or "it is empty"
        raise DataError(f"{path}: no chat in {num_rows} rows: {reasons}")
    return chats


def _rows(path: Path, left_out: Counter[str]) -> Iterator[Any]:
    try:
        with _open(path) as file:
            if ".jsonl" not in path.name:
                tree = json.load(file)
                yield from tree if isinstance(tree, list) else [tree]
                return
            for line in file:
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except ValueError:
                    left_out[f"{path.name.split('.')[0]}: a line that is not JSON"] += 1
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not readable: {error}") from None


def _open(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".zst":
        import zstandard

        try:
            raw: Any = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), closefd=True)  # noqa: SIM115
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        return io.TextIOWrapper(raw, encoding="utf-8")
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8")
    return open(path, encoding="utf-8")


def messages_of(row: Any) -> list[Message]:
    """Turn a row of a known form into messages. Raises Skipped."""
    if not isinstance(row, Mapping):
        raise Skipped("not an object")
    if row.get("label") is False:
        raise Skipped("labelled as a bad answer")
    if isinstance(row.get("messages"), list):
        return [_message(m, "role", "content") for m in row["messages"]]
    if isinstance(row.get("conversations"), list):
        turns = [*row["conversations"], *([row["chosen"]] if isinstance(row.get("chosen"), Mapping) else [])]
        messages = [_message(m, "from", "value") for m in turns]
        system = row.get("system")
        return (
            [{"role": "system", "content": system}, *messages]
            if isinstance(system, str) and system
            else messages
        )
    if isinstance(row.get("chosen"), str):
        return _human_assistant(row["chosen"])
    if isinstance(row.get("instruction"), str):
        instances = row.get("instances")
        body = instances[0] if isinstance(instances, list) and instances else row
        answer = body.get("output", body.get("response")) if isinstance(body, Mapping) else None
        extra = body.get("input") or "" if isinstance(body, Mapping) else ""
        question = (
            f"{row['instruction'].strip()}\n\n{extra.strip()}" if str(extra).strip() else row["instruction"]
        )
        return _pair(question, answer)
    if isinstance(row.get("prompt"), Mapping):
        return _best_path(row["prompt"])
    for ask, answer in (("prompt", "completion"), ("prompt", "response"), ("question", "answer")):
        if isinstance(row.get(ask), str) and isinstance(row.get(answer), str):
            return _pair(row[ask], row[answer])
    raise Skipped("no known form")


def checked(messages: list[Message]) -> tuple[tuple[str, str], ...]:
    """Check that turns alternate and say something; cut what follows the last answer. Raises Skipped."""
    turns = [(m["role"], m["content"].strip()) for m in messages]
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    body = turns[1:] if turns and turns[0][0] == "system" else turns
    if not body:
        raise Skipped("no answer of the assistant")
    if any(not content for _, content in turns):
        raise Skipped("an empty turn")
    if [role for role, _ in body] != ["user", "assistant"] * (len(body) // 2):
        raise Skipped("turns that do not alternate")
    return tuple(turns)


def _message(turn: Any, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get(text_key), str):
        raise Skipped("a turn without text")
    role = _ROLES.get(str(turn.get(role_key)).lower())
    if role is None:
        raise Skipped(f"role '{turn.get(role_key)}'")
    return {"role": role, "content": turn[text_key]}


def _pair(question: Any, answer: Any) -> list[Message]:
    if not isinstance(question, str) or not isinstance(answer, str):
        raise Skipped("no answer of the assistant")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _human_assistant(text: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    if len(parts) < 3 or parts[0].strip():
        raise Skipped("not a Human/Assistant text")
    return [{"role": roles[parts[i]], "content": parts[i + 1]} for i in range(1, len(parts) - 1, 2)]


def _best_path(node: Mapping[str, Any]) -> list[Message]:
    messages = []
    current: Mapping[str, Any] | None = node
    while current is not None:
        messages.append(_message(current, "role", "text"))
        replies = [r for r in current.get("replies") or [] if isinstance(r, Mapping) and not r.get("deleted")]
        # Rank 0 is the best; replies nobody ranked come last, in their order.
        current = min(
            replies, key=lambda r: r["rank"] if isinstance(r.get("rank"), int) else 1 << 30, default=None
        )
    return messages


# Our own conversations


def built_in() -> list[Chat]:
    """The conversations of the package, and sums and differences of one-digit numbers."""
    text = (resources.files("pocketphi.train") / "data" / "conversations.yaml").read_text(encoding="utf-8")
    chats = []
    for entry in yaml.safe_load(text):
        if "turns" in entry:
            roles = ["user", "assistant"] * (len(entry["turns"]) // 2)
            chats.append(Chat(tuple(zip(roles, entry["turns"])), "conversations"))
            continue
        for question in entry["ask"]:
            chats.append(Chat((("user", question), ("assistant", entry["say"])), "conversations"))
    return [*chats, *_arithmetic()]


def _arithmetic() -> Iterator[Chat]:
    def chat(question: str, answer: str) -> Chat:
        return Chat((("user", question), ("assistant", answer)), "arithmetic")

    for a in range(10):
        for b in range(10):
            yield chat(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")
            if a >= b:
                yield chat(f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}.")


# Chats made from documents

_IS = r"(?:is|are|was|were)"
_TITLE = re.compile(r"^[A-Z][\w'’\-]*(?: [\w'’\-]+){0,4}$")
_ABBREVIATIONS = re.compile(
    r"(?:\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|c|ca|approx|No|Jr|Sr)|\.[a-z])\.$"
)
_PERSON = re.compile(
    rf"\b{_IS} an? (?:[\w\-]+,? ){{0,6}}(?:\w+(?:ian|ist|er|or|man|woman|ect|ess)|king|queen|monk|poet|painter|"
    r"politician|emperor|president|saint|philosopher|general)\b"
)


def from_corpus(corpus: Artifact, limit: int) -> tuple[list[Chat], Counter[str]]:
    """Make at most `limit` chats from the kept documents of a corpus.

    A document yields chats when its first line is a title and the first sentence after it says what
    the title is ("X is ..."): "What is X?" is answered with that sentence, "Explain X." or "Tell me
    about X." with the first sentences, and its first paragraph is given to be summed up in that
    sentence. The answers are the documents' own words. Chosen evenly by a hash of the document's id.
    Returns the chats and how many there are of each kind.
    """
    candidates: list[tuple[bytes, str, Definition]] = []
    for document in read_documents(corpus):
        if not document["keep"] or document["heldout"]:
            continue
        if (found := definition(document["text"])) is not None:
            key = hashlib.sha256(b"chats:" + document["id"].encode()).digest()
            candidates.append((key, document["id"], found))
    candidates.sort(key=lambda c: c[:2])
    chats: list[Chat] = []
    kinds: Counter[str] = Counter()
    for key, _, found in candidates:
        for kind, chat in _chats_of(found, key[0]):
            if len(chats) >= limit:
                return chats, kinds
            chats.append(chat)
            kinds[kind] += 1
    return chats, kinds


@dataclass(frozen=True)
class Definition:
    """What a document says of its title: `name` as one asks for it, the first sentence, more of them."""

    name: str
    person: bool
    plural: bool
    first: str
    more: str


def definition(text: str) -> Definition | None:
    """Read the definition off an encyclopedia-like text, or None where there is none."""
    lines = [line.strip(" #*\t") for line in text.strip().split("\n")]
    title, body = lines[0], " ".join(" ".join(lines[1:]).split())
    if not _TITLE.match(title) or len(title) > 40 or len(body) < 40:
        return None
    sentences = first_sentences(body, 420)
    if not sentences or not 30 <= len(sentences[0]) <= 260:
        return None
    stem = re.escape(title)
    head = re.match(
        rf"^(?P<article>(?:An?|The) )?{stem}\b(?P<between>[^.]{{0,40}}?) (?P<verb>{_IS})\b", body, re.I
    )
    if head is None:
        return None
    article = (head["article"] or "").lower()
    one_word = article in ("a ", "an ") or _is_common(title, body)
    common = title.split(" ", 1)[1].islower() if " " in title else one_word
    shown = title[0].lower() + title[1:] if common else title
    person = " " in title and not common and _PERSON.search(sentences[0]) is not None
    return Definition(
        name=article + shown,
        person=person,
        plural=head["verb"] in ("are", "were"),
        first=sentences[0],
        more=" ".join(sentences[:3]),
    )


def _is_common(title: str, body: str) -> bool:
    """A one-word title is a common noun when the text also writes it in lower case."""
    return re.search(rf"\b{re.escape(title.lower())}s?\b", body[len(title) :]) is not None


def first_sentences(text: str, max_characters: int) -> list[str]:
    """The first sentences of a text, as many whole ones as fit."""
    sentences: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?][\"')]*(?= |$)", text[: max_characters + 200]):
        if _ABBREVIATIONS.search(text[: match.start() + 1]):
            continue
        if match.end() < len(text) and not re.match(r" [A-Z\"'(\d]", text[match.end() : match.end() + 2]):
            continue
        if match.end() > max_characters:
            break
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    return sentences


def _chats_of(found: Definition, choice: int) -> Iterator[tuple[str, Chat]]:
    def chat(question: str, answer: str) -> Chat:
        return Chat((("user", question), ("assistant", answer)), "corpus")

    past = re.search(r"\b(?:was|were)\b", found.first[: len(found.name) + 50]) is not None
    verb = ("were" if found.plural else "was") if past else ("are" if found.plural else "is")
    yield "definitions", chat(f"{'Who' if found.person else 'What'} {verb} {found.name}?", found.first)
    if found.more == found.first:
        return
    if choice % 3 == 0:
        yield "explanations", chat(f"Tell me about {found.name}.", found.more)
    elif choice % 3 == 1 and not found.person:
        yield "explanations", chat(f"Explain {found.name}.", found.more)
    else:
        asks: list[Callable[[str], str]] = [
            lambda text: f"Summarize this text in one sentence:\n\n{text}",
            lambda text: f"What is this text about?\n\n{text}",
        ]
        yield "summaries", chat(asks[choice % 2](found.more), found.first)
