"""Vocabularies in one form, whatever file they come from.

Every source (tokenizer.json, SentencePiece, GGUF, llama2.c) becomes a `Vocabulary`: the `tokenizer.json`
tree that the `tokenizers` library runs, and the few facts that stand beside it. Two kinds are known:

- `spm`: byte-pair encoding with byte fallback as in Llama 2 and Phi-3. A space is written U+2581 and one
  is put before every text; a character that is not in the vocabulary becomes its UTF-8 bytes, `<0x0A>`.
- `byte-level`: byte-pair encoding over bytes written as printable characters, as in GPT-2 and SmolLM2.

SentencePiece stores a score per piece, `tokenizer.json` a list of merges. They say the same: the merge
list is every way of cutting a piece into two pieces, best score first (61,249 for Phi-3's 32,000 pieces).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketphi.core.errors import DataError, EngineError, did_you_mean

SPACE = "\u2581"
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]

# The 64 tokens after the pieces, in Phi-3's order: 32000..32010 of the text models, ..32044 of the vision
# models. Phi-3 leaves the last 19 rows without a name; here they are placeholders too.
ADDED_TOKENS: list[str] = [
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{i}|>" for i in range(1, 5)),
    "<|system|>",
    "<|end|>",
    *(f"<|placeholder{i}|>" for i in range(5, 7)),
    "<|user|>",
    *(f"<|placeholder{i}|>" for i in range(7, 40)),
    "<|image|>",
    *(f"<|placeholder{i}|>" for i in range(40, 59)),
]

# GGUF's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """A tokenizer's data. `definition` is the tree of tokenizer.json; `num_rows` counts the ids of the
    model, which may be more than the ids that have a string (Phi-3: 32064 rows); `scores` are those of
    the SentencePiece or GGUF file, one a row, if it was read from one."""

    definition: dict[str, Any]
    num_rows: int
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    jinja: str | None = None
    template: str | None = None
    scores: list[float] | None = None

    @functools.cached_property
    def kind(self) -> str:
        """`spm` or `byte-level`."""
        return "spm" if self.definition["model"].get("byte_fallback") else "byte-level"

    @functools.cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> string, of all ids that have one."""
        found = {int(i): t for t, i in self.definition["model"]["vocab"].items()}
        found.update({int(a["id"]): a["content"] for a in self.definition["added_tokens"]})
        return found

    @functools.cached_property
    def added(self) -> dict[str, dict[str, Any]]:
        """String -> entry, of the tokens that never come out of plain text."""
        return {a["content"]: a for a in self.definition["added_tokens"]}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding leaves out."""
        return frozenset(int(a["id"]) for a in self.definition["added_tokens"] if a["special"])

    def id_of(self, token: str) -> int | None:
        """Return the id of a token's string, or None."""
        entry = self.added.get(token)
        return int(entry["id"]) if entry else self.definition["model"]["vocab"].get(token)

    @functools.cached_property
    def sha256(self) -> str:
        """A hash over what decides the ids: equal for the same tokenizer read from any kind of file."""
        model = self.definition["model"]
        facts = {
            "kind": self.kind,
            "vocab": sorted((int(i), t) for t, i in model["vocab"].items()),
            "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
            "added": sorted(
                (int(a["id"]), a["content"], bool(a["special"]), bool(a["lstrip"]), bool(a["rstrip"]))
                for a in self.definition["added_tokens"]
            ),
            "normalizer": self.definition.get("normalizer"),
            "pre_tokenizer": self.definition.get("pre_tokenizer"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def added_token(id_: int, content: str, *, special: bool = True, rstrip: bool = False) -> dict[str, Any]:
    """Return an entry of tokenizer.json's `added_tokens`."""
    return {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": rstrip,
        "normalized": False,
        "special": special,
    }


def merges_of(scores: Mapping[str, float]) -> list[list[str]]:
    """Return the merge list of SentencePiece pieces: every cut of every piece, best score first.

    The order among the cuts of one piece (longer left part first) is that of the published conversions.
    """
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((score, len(left), len(right), left, right))
    merges.sort(key=lambda m: m[:3], reverse=True)
    return [[left, right] for _, _, _, left, right in merges]


def scores_of(vocabulary: Vocabulary) -> list[float]:
    """Return a score per row such that SentencePiece merges in the order of the merge list: the scores
    that the vocabulary was read with, or ranks.

    A piece scores minus the rank among pieces of the first merge that makes it; single characters come
    after all pieces (nothing makes them, so their scores decide nothing).
    """
    if vocabulary.scores is not None:
        return list(vocabulary.scores)
    model = vocabulary.definition["model"]
    rank: dict[str, int] = {}
    for pair in model["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        rank.setdefault(left + right, len(rank))
    scores = [0.0] * vocabulary.num_rows
    last = len(rank)
    for piece, id_ in sorted(model["vocab"].items(), key=lambda item: item[1]):
        if piece in rank:
            scores[id_] = -float(rank[piece])
        elif piece not in vocabulary.added and piece not in _BYTE_SET:
            scores[id_] = -float(last)
            last += 1
    return scores


_BYTE_SET = frozenset(BYTE_TOKENS)


def spm_definition(
    tokens: Sequence[str | None],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    rstrip: Iterable[str] = (),
    add_space_prefix: bool = True,
) -> dict[str, Any]:
    """Build the tokenizer.json tree of a SentencePiece-style vocabulary.

    `tokens[i]` is the string of id i, or None for a row without one; `kinds` are GGUF token types.
    Raises DataError when a string occurs twice or the 256 byte tokens are incomplete.
    """
    vocab: dict[str, int] = {}
    added = []
    pieces: dict[str, float] = {}
    swallow = set(rstrip)
    unknown: str | None = None
    for id_, token in enumerate(tokens):
        if token is None or kinds[id_] == UNUSED:
            continue
        if kinds[id_] == UNKNOWN:
            # The first one is the unknown token; later ones pad the embedding and have no string.
            if unknown is not None:
                continue
            unknown = token
        if token in vocab:
            raise DataError(f"the vocabulary has '{token}' twice (ids {vocab[token]} and {id_})")
        vocab[token] = id_
        if kinds[id_] in (UNKNOWN, CONTROL, USER_DEFINED):
            special = kinds[id_] != USER_DEFINED
            added.append(added_token(id_, token, special=special, rstrip=token in swallow))
        elif kinds[id_] == NORMAL:
            pieces[token] = scores[id_]
    missing = [b for b in BYTE_TOKENS if b not in vocab]
    if missing:
        raise DataError(
            f"the vocabulary lacks {len(missing)} of the 256 byte tokens, the first is {missing[0]}"
        )
    # The text model keeps only what stands before the added tokens or between them as pieces.
    first_added_after = max((i for i, k in enumerate(kinds) if k in (NORMAL, BYTE)), default=-1) + 1
    for entry in added:
        if entry["id"] >= first_added_after:
            del vocab[entry["content"]]
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_space_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges_of(pieces),
        },
    }


def phi3_rstrip(tokens: Iterable[str]) -> list[str]:
    """Return the tokens that swallow the blanks after them, for files that do not carry the flag.

    In Phi-3's text models these are `</s>` and all added tokens but `<|endoftext|>`; other vocabularies
    have none. A vocabulary is Phi-3's if it has the role tokens.
    """
    have = list(tokens)
    if not {"<|user|>", "<|assistant|>", "<|end|>"} <= set(have):
        return []
    return [
        t for t in have if t == "</s>" or (t.startswith("<|") and t.endswith("|>") and t != "<|endoftext|>")
    ]


# The `tokenizer.ggml.pre` names of GGUF -> what cuts the text before byte-level merging.
def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, _byte_level(False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _byte_level(True),
    "default": _byte_level(True),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(True)]},
    "llama-bpe": _split(_WORDS.replace("DIGITS", "3")),
    "qwen2": _split(_WORDS.replace("{1,DIGITS}", "")),
}


def byte_level_definition(
    tokens: Sequence[str],
    kinds: Sequence[int],
    merges: Sequence[str],
    pre: str,
) -> dict[str, Any]:
    """Build the tokenizer.json tree of a GPT-2-style vocabulary, as GGUF files carry it.

    Raises EngineError for an unknown pre-tokenizer and DataError for a contradiction in the data.
    """
    if pre not in PRE_TOKENIZERS:
        raise EngineError(f"the pre-tokenizer '{pre}' is not known here{did_you_mean(pre, PRE_TOKENIZERS)}")
    vocab: dict[str, int] = {}
    added = []
    for id_, token in enumerate(tokens):
        if kinds[id_] == UNUSED:
            continue
        if token in vocab:
            raise DataError(f"the vocabulary has '{token}' twice (ids {vocab[token]} and {id_})")
        vocab[token] = id_
        if kinds[id_] in (UNKNOWN, CONTROL, USER_DEFINED):
            added.append(added_token(id_, token, special=kinds[id_] != USER_DEFINED))
    pairs = []
    for rank, merge in enumerate(merges):
        left, blank, right = merge.partition(" ")
        if not blank or left not in vocab or right not in vocab or left + right not in vocab:
            raise DataError(
                f"merge {rank} ('{merge}') does not join two tokens of the vocabulary into a third"
            )
        pairs.append([left, right])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab,
            "merges": pairs,
        },
    }


@functools.cache
def byte_characters() -> dict[str, int]:
    """GPT-2's printable character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table
