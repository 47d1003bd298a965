"""The tokenizer: text to ids and back, conversations to ids, and the loss mask.

Text is text: whatever a string holds, `encode` makes it of pieces and bytes, never of special tokens.
Special tokens enter only by their ids, where a chat template puts them.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pocketphi.core.errors import DataError, UserError
from pocketphi.tokenizer import template as chat_template
from pocketphi.tokenizer.template import ChatTemplate, Message, Piece
from pocketphi.tokenizer.vocabulary import BYTE_TOKENS, SPACE, Vocabulary, byte_characters

# What `\s` means to the tokenizers library (Unicode White_Space). Python's str.strip takes more.
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEADING = re.compile(f"^[{_WHITE}]+")
_TRAILING = re.compile(f"[{_WHITE}]+$")
_BYTE_VALUE = {t: bytes([b]) for b, t in enumerate(BYTE_TOKENS)}


class Tokenizer:
    """Built by `pocketphi.tokenizer.load`. Methods raise UserError for text with lone surrogates."""

    def __init__(self, vocabulary: Vocabulary, template: str | None = None) -> None:
        self.vocabulary = vocabulary
        self._text = _text_backend(vocabulary)
        chosen = template or vocabulary.template
        self.template: ChatTemplate | None
        if chosen is not None:
            self.template = chat_template.named(chosen)
        else:
            self.template = chat_template.recognise(vocabulary.jinja, vocabulary.added)

    def __repr__(self) -> str:
        kind = self.vocabulary.kind
        chat = self.template.name if self.template else None
        return f"Tokenizer(kind={kind!r}, vocab_size={self.vocab_size}, template={chat!r})"

    # Facts

    @property
    def vocab_size(self) -> int:
        """The number of ids, counting rows without a string (Phi-3: 32064)."""
        return self.vocabulary.num_rows

    @property
    def bos_id(self) -> int | None:
        """The start token, if any."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document."""
        return self.vocabulary.eos_id

    @property
    def pad_id(self) -> int | None:
        """The token that fills up a batch, if any."""
        return self.vocabulary.pad_id

    @property
    def add_bos(self) -> bool:
        """Whether models of this vocabulary expect the start token before plain text."""
        return self.vocabulary.add_bos

    @property
    def sha256(self) -> str:
        """A hash over what decides the ids, whatever file the vocabulary came from."""
        return self.vocabulary.sha256

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return self.vocabulary.special_ids

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends an answer: the end of text and the template's stop tokens.

        For Phi-3 these are 32000, 32001 and 32007; a model that knows only the first runs on.
        """
        tokens = self.template.stop if self.template else []
        found = {self.vocabulary.id_of(t) for t in tokens} | {self.eos_id}
        return frozenset(i for i in found if i is not None)

    def token(self, id_: int) -> str | None:
        """Return the string of an id as the vocabulary writes it, or None for a row without one."""
        return self.vocabulary.tokens.get(id_)

    def token_id(self, token: str) -> int | None:
        """Return the id of a vocabulary string such as `<|end|>`, or None."""
        return self.vocabulary.id_of(token)

    # Text to ids

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Return the ids of a text. Special strings inside it stay text."""
        ids = self._encode(text).ids if text else []
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, using all cores that the tokenizers library is allowed."""
        for text in texts:
            _check(text)
        return [e.ids for e in self._text.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode(self, text: str) -> tokenizers.Encoding:
        _check(text)
        return self._text.encode(text, add_special_tokens=False)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation, `[{"role": "user", "content": "Hi"}, ...]`.

        Built of the template's token ids and the encoded contents; nothing is parsed again. Blanks after
        a role token are swallowed where the vocabulary says so, as the reference tokenizer does.
        Raises UserError when there is no chat template, or it has no turn for a role.
        """
        pieces = self._template().pieces(messages, add_generation_prompt=add_generation_prompt)
        return self._assemble(pieces)[0]

    def chat_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a finished conversation and, per id, whether a model should learn it.

        The mask is true on what assistants said and on the token that ends their turn.
        """
        return self._assemble(self._template().pieces(messages, add_generation_prompt=False))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return a conversation as one string, for people to read. Never encode this string."""
        pieces = self._template().pieces(messages, add_generation_prompt=add_generation_prompt)
        ends = {"{bos}": self.bos_id, "{eos}": self.eos_id}
        shown = []
        for piece in pieces:
            if piece.token in ends:
                id_ = ends[piece.token]
                shown.append((self.token(id_) or "") if id_ is not None else "")
            else:
                shown.append(piece.token or piece.text)
        return "".join(shown)

    def with_template(self, name: str) -> Tokenizer:
        """Return the same vocabulary with another chat template."""
        return Tokenizer(self.vocabulary, template=name)

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise UserError(
                "this tokenizer has no chat template that is known here",
                hint=f"name one of: {', '.join(chat_template.variants())}",
            )
        return self.template

    def _assemble(self, pieces: Iterable[Piece]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        text = ""  # since the last token
        spans: list[tuple[int, int]] = []  # (start, end) in it of what is to be learnt
        swallow = False

        def flush(next_entry: dict[str, Any] | None) -> None:
            nonlocal text, spans
            shift = 0
            if swallow and (found := _LEADING.match(text)):
                shift = found.end()
            body = text[shift:]
            if next_entry is not None and next_entry["lstrip"]:
                body = _TRAILING.sub("", body)
            if body:
                encoding = self._encode(body)
                ids.extend(encoding.ids)
                for start, end in encoding.offsets:
                    # The blank that the normaliser puts in front belongs to the character after it.
                    middle = (start if end > start else end) + shift
                    mask.append(any(a <= middle < b for a, b in spans))
            text, spans = "", []

        for piece in pieces:
            if piece.token is None:
                if piece.target and piece.text:
                    spans.append((len(text), len(text) + len(piece.text)))
                text += piece.text
                continue
            id_ = self._id_in_template(piece.token)
            if id_ is None:
                continue
            entry = self.vocabulary.added.get(self.token(id_) or "")
            flush(entry)
            ids.append(id_)
            mask.append(piece.target)
            swallow = bool(entry and entry["rstrip"])
        flush(None)
        return ids, mask

    def _id_in_template(self, token: str) -> int | None:
        if token == "{bos}":
            return self.bos_id
        if token == "{eos}":
            return self.eos_id
        id_ = self.vocabulary.id_of(token)
        if id_ is None:
            name = self.template.name if self.template else None
            raise UserError(
                f"the chat template '{name}' needs the token {token}, which this vocabulary lacks"
            )
        return id_

    # Ids to text

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        table = {}
        byte_level = self.vocabulary.kind == "byte-level"
        characters = byte_characters()
        for id_, token in self.vocabulary.tokens.items():
            if token in self.vocabulary.added:
                table[id_] = token.encode()
            elif byte_level:
                table[id_] = b"".join(
                    bytes([characters[c]]) if c in characters else c.encode() for c in token
                )
            else:
                table[id_] = _BYTE_VALUE.get(token) or token.replace(SPACE, " ").encode()
        return table

    def token_bytes(self, id_: int) -> bytes:
        """Return what an id adds to the text, as UTF-8 bytes (maybe a part of a character).

        Rows without a string add nothing. Raises UserError for an id outside the vocabulary.
        """
        if not 0 <= id_ < self.vocab_size:
            raise UserError(f"token id {id_} is outside the vocabulary (0 to {self.vocab_size - 1})")
        return self._bytes.get(id_, b"")

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids. Bytes that are not UTF-8 become U+FFFD.

        The one blank that encoding put in front of the text is taken away again.
        """
        decoder = self.stream_decoder(skip_special=skip_special)
        return "".join(decoder.push(int(i)) for i in ids) + decoder.flush()

    def stream_decoder(self, *, skip_special: bool = True, continuing: bool = False) -> StreamDecoder:
        """Return a decoder that takes one id at a time.

        `continuing` says that the ids go on from a text, so that their first blank is part of it.
        """
        return StreamDecoder(self, skip_special, continuing)

    # Files

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, and tokenizer.model for
        SentencePiece kinds, so that transformers and llama.cpp's converter load the folder."""
        from pocketphi.tokenizer import saving

        saving.save(self, Path(folder))

    def gguf_metadata(self, num_rows: int | None = None) -> dict[str, Any]:
        """Return the `tokenizer.*` keys of a GGUF file with this vocabulary.

        `num_rows` is the number of rows of the model's embedding when it has more than there are ids.
        """
        from pocketphi.tokenizer import saving

        return saving.gguf_metadata(self, num_rows)


class StreamDecoder:
    """Turns ids into text as they come. What `push` returns is whole characters only."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continuing: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        decoders = tokenizer.vocabulary.definition.get("decoder") or {}
        strips = any(d.get("type") == "Strip" for d in decoders.get("decoders", ()))
        self._strip = strips and not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """Take one id and return the text that it completes, maybe empty."""
        if id_ in self._skip:
            return ""
        data = self._tokenizer.token_bytes(id_)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def _check(text: str) -> None:
    # Lone surrogates come from broken JSON escapes or file names; no UTF-8 exists for them.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start})",
            hint="replace it before: text.encode('utf-8', 'replace').decode()",
        ) from None


def _text_backend(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Build the tokenizer for plain text: no special token can come out of it.

    Tokens that a vocabulary matches in plain text on purpose (`special` false, such as runs of tabs)
    stay, but not the ends of text, which Phi-3 lists among them (`</s>`).
    """
    ids = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id)
    ends = {vocabulary.tokens.get(i) for i in ids if i is not None}
    ends |= {"<s>", "</s>", "<unk>"}
    special = {a["content"] for a in vocabulary.definition["added_tokens"] if a["special"]} | (
        ends & set(vocabulary.added)
    )
    model = dict(vocabulary.definition["model"])
    merges = model["merges"]
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in merges)
    model["merges"] = [m for m, (left, right) in zip(merges, pairs) if left + right not in special]
    tree = dict(
        vocabulary.definition,
        added_tokens=[a for a in vocabulary.definition["added_tokens"] if a["content"] not in special],
        post_processor=None,
        truncation=None,
        padding=None,
        model=model,
    )
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the library raises plain Exception for everything
        raise DataError(f"the tokenizers library refuses this vocabulary: {error}") from None
