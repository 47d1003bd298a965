"""Chat templates: conversations become pieces, each a special token or plain text.

The variants are data (`templates.yaml`). A template never builds one string to be parsed again: what a
user writes is carried as text from end to end, so `<|system|>` in a message stays seven characters and
never becomes a token. The Jinja text for other programs is written from the same data.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from pocketphi.core import config as configuration
from pocketphi.core.errors import UserError, did_you_mean

DEFAULT = "phi-3"
Message = Mapping[str, str]


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation.

    `token` names a special token ("{bos}" and "{eos}" stand for the tokenizer's own), or is None for
    plain `text`. `target` marks what a model learns to write: an assistant's content and its end token.
    """

    token: str | None = None
    text: str = ""
    target: bool = False


@dataclass
class Recognise:
    """How a foreign Jinja template is known; see `templates.yaml`."""

    has: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)


@dataclass
class ChatTemplate:
    """One variant of `templates.yaml`; the fields are explained there."""

    name: str
    about: str
    tokens: list[str]
    turns: dict[str, str]
    begin: str = ""
    skip_empty: list[str] = field(default_factory=list)
    default_system: str | None = None
    generation: str = ""
    generation_unless_last: list[str] = field(default_factory=list)
    otherwise: str = ""
    stop: list[str] = field(default_factory=list)
    recognise: Recognise = field(default_factory=Recognise)

    def pieces(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[Piece]:
        """Render a conversation.

        Raises UserError for an empty conversation, an unknown role, or content that is not text.
        """
        messages = self._checked(messages)
        result = self._literal(self.begin)
        for message in messages:
            if not message["content"] and message["role"] in self.skip_empty:
                continue
            target = message["role"] == "assistant"
            before, after = self.turns[message["role"]].split("{content}")
            result += self._literal(before)
            result.append(Piece(text=message["content"], target=target))
            closing = self._literal(after)
            if target and closing and closing[0].token:
                closing[0] = Piece(token=closing[0].token, target=True)
            result += closing
        if add_generation_prompt:
            if messages[-1]["role"] not in self.generation_unless_last:
                result += self._literal(self.generation)
        else:
            result += self._literal(self.otherwise)
        return result

    def jinja(self) -> str:
        """Return the template as Jinja, for tokenizer_config.json and GGUF files."""
        parts = []
        if self.default_system is not None:
            first = self._jinja_string(self.turns["system"].replace("{content}", self.default_system))
            parts.append(f"{{% if messages[0]['role'] != 'system' %}}{{{{ {first} }}}}{{% endif %}}")
        if self.begin:
            parts.append(f"{{{{ {self._jinja_string(self.begin)} }}}}")
        parts.append("{% for message in messages %}")
        for i, (role, turn) in enumerate(self.turns.items()):
            condition = f"message['role'] == '{role}'"
            body = f"{{{{ {self._jinja_string(turn)} }}}}"
            if role in self.skip_empty:
                body = f"{{% if message['content'] %}}{body}{{% endif %}}"
            parts.append(f"{{% {'elif' if i else 'if'} {condition} %}}{body}")
        refusal = f"this template has no turn for the role '{{0}}' (it has {', '.join(self.turns)})"
        before, after = refusal.split("{0}")
        parts.append(
            f"{{% else %}}{{{{ raise_exception({_quoted(before)} + message['role'] + {_quoted(after)}) }}}}"
            "{% endif %}{% endfor %}"
        )
        if self.generation:
            condition = "add_generation_prompt"
            for role in self.generation_unless_last:
                condition += f" and messages[-1]['role'] != '{role}'"
            parts.append(f"{{% if {condition} %}}{{{{ {self._jinja_string(self.generation)} }}}}")
            if self.otherwise:
                parts.append(f"{{% else %}}{{{{ {self._jinja_string(self.otherwise)} }}}}")
            parts.append("{% endif %}")
        return "".join(parts)

    def _checked(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        checked = []
        for i, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not isinstance(content, str):
                raise UserError(
                    f"message {i} needs 'role' and 'content', both text; it has "
                    f"{ {k: type(v).__name__ for k, v in message.items()} }"
                )
            if role not in self.turns:
                hint = None
                if role == "system":
                    hint = "put the instructions into the first user message, or choose another template"
                raise UserError(
                    f"message {i}: the chat template '{self.name}' has no turn for the role '{role}'"
                    f"{did_you_mean(role, self.turns)}",
                    hint=hint,
                )
            checked.append({"role": role, "content": content})
        if not checked:
            raise UserError("the conversation is empty: at least one message is needed")
        if self.default_system is not None and checked[0]["role"] != "system":
            checked.insert(0, {"role": "system", "content": self.default_system})
        return checked

    @functools.cached_property
    def _splitter(self) -> re.Pattern[str]:
        marks = ["{bos}", "{eos}", *self.tokens]
        return re.compile("(" + "|".join(map(re.escape, marks)) + ")")

    def _literal(self, text: str) -> list[Piece]:
        """Split a string of the template itself (never user text) into tokens and text."""
        parts = self._splitter.split(text)
        return [Piece(token=p) if i % 2 else Piece(text=p) for i, p in enumerate(parts) if p]

    def _jinja_string(self, text: str) -> str:
        parts = re.split(r"(\{bos\}|\{eos\}|\{content\})", text)
        names = {"{bos}": "bos_token", "{eos}": "eos_token", "{content}": "message['content']"}
        return " + ".join(names.get(p, _quoted(p)) for p in parts if p)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


@functools.cache
def variants() -> dict[str, ChatTemplate]:
    """Return all variants by name, in the order in which they are recognised."""
    text = resources.files("pocketphi.tokenizer").joinpath("templates.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = yaml.safe_load(text)
    return {
        name: configuration.parse(ChatTemplate, {"name": name, **entry}, where=f"templates.yaml: {name}")
        for name, entry in tree.items()
    }


def named(name: str) -> ChatTemplate:
    """Return a variant; raises UserError that names the nearest one."""
    known = variants()
    if name not in known:
        raise UserError(f"unknown chat template '{name}'{did_you_mean(name, known)}")
    return known[name]


def recognise(jinja: str | None, tokens: Iterable[str]) -> ChatTemplate | None:
    """Find the variant that a foreign tokenizer uses.

    `jinja` is its template if it brings one, `tokens` are its special tokens. A template exported by
    `ChatTemplate.jinja` is found exactly, others by their marks. Without any template the tokens decide:
    Phi-3's role tokens mean phi-3, ChatML's mean chatml. Returns None when nothing fits.
    """
    have = set(tokens)
    fitting = [v for v in variants().values() if {t for t in v.tokens if t != "<|system|>"} <= have]
    if jinja is None:
        return next((v for v in fitting if v.name in (DEFAULT, "chatml")), None)
    for variant in fitting:
        if variant.jinja() == jinja:
            return variant
    flat = re.sub(r"\s+", "", jinja).replace('"', "'")
    for variant in fitting:
        marks = variant.recognise
        if all(m in flat for m in marks.has) and not any(m in flat for m in marks.lacks):
            return variant
    return None
