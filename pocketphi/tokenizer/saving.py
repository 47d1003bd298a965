"""Write a vocabulary for other programs: Hugging Face folders, SentencePiece models, GGUF metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketphi.core import artifact
from pocketphi.core.errors import EngineError, UserError
from pocketphi.tokenizer.vocabulary import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    scores_of,
)

if TYPE_CHECKING:
    from pocketphi.tokenizer.tokenizer import Tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that `transformers.AutoTokenizer` and `pocketphi.tokenizer.load` read."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tokenizer.vocabulary
    names = {
        f"{name}_token": vocabulary.tokens[id_]
        for name in ("bos", "eos", "unk", "pad")
        if (id_ := getattr(vocabulary, f"{name}_id")) is not None and id_ in vocabulary.tokens
    }
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; LlamaTokenizer would build its own normaliser.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 10**9,
        "added_tokens_decoder": {
            str(a["id"]): {flag: a[flag] for flag in flags} for a in vocabulary.definition["added_tokens"]
        },
    }
    if tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template.jinja()
        settings["pocketphi_template"] = tokenizer.template.name
    elif vocabulary.jinja is not None:
        settings["chat_template"] = vocabulary.jinja
    _write(folder / "tokenizer.json", vocabulary.definition)
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", names)
    if vocabulary.kind == "spm":
        artifact.write_atomic(folder / "tokenizer.model", sentencepiece_model(vocabulary))


def _write(path: Path, tree: Any) -> None:
    artifact.write_atomic(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def _rows(vocabulary: Vocabulary, num_rows: int | None = None) -> tuple[list[str], list[float], list[int]]:
    """Return string, score and GGUF type of every row."""
    num_rows = vocabulary.num_rows if num_rows is None else num_rows
    if num_rows < vocabulary.num_rows:
        raise UserError(f"the tokenizer has {vocabulary.num_rows} ids, the model only {num_rows} rows")
    scores = scores_of(vocabulary) if vocabulary.kind == "spm" else []
    scores += [0.0] * (num_rows - len(scores))
    bytes_ = set(BYTE_TOKENS) if vocabulary.kind == "spm" else set()
    tokens, kinds = [], []
    for id_ in range(num_rows):
        token = vocabulary.tokens.get(id_)
        if token is None:
            token, kind = f"[PAD{id_}]", UNUSED
        elif id_ == vocabulary.unk_id and vocabulary.kind == "spm":
            kind = UNKNOWN
        elif token in vocabulary.added:
            kind = CONTROL if vocabulary.added[token]["special"] else USER_DEFINED
        else:
            kind = BYTE if token in bytes_ else NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, scores, kinds


def gguf_metadata(tokenizer: Tokenizer, num_rows: int | None = None) -> dict[str, Any]:
    """Return the `tokenizer.*` keys for a GGUF file; lists of str, float and int as GGUF wants them.

    Raises EngineError when GGUF has no name for the way this vocabulary cuts text, UserError when
    `num_rows` (of the model's embedding) is less than the ids there are.
    """
    vocabulary = tokenizer.vocabulary
    tokens, scores, kinds = _rows(vocabulary, num_rows)
    prefix = "tokenizer.ggml."
    keys: dict[str, Any] = {prefix + "tokens": tokens, prefix + "token_type": kinds}
    if vocabulary.kind == "spm":
        normalizer = json.dumps(vocabulary.definition.get("normalizer"))
        keys[prefix + "model"] = "llama"
        keys[prefix + "pre"] = "default"
        keys[prefix + "scores"] = scores
        keys[prefix + "add_space_prefix"] = '"Prepend"' in normalizer
    else:
        cut = vocabulary.definition.get("pre_tokenizer")
        pre = next((name for name, known in PRE_TOKENIZERS.items() if known == cut), None)
        if pre is None:
            raise EngineError("GGUF has no name for this vocabulary's pre-tokenizer; it cannot be written")
        merges = vocabulary.definition["model"]["merges"]
        keys[prefix + "model"] = "gpt2"
        keys[prefix + "pre"] = pre
        keys[prefix + "merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    keys[prefix + "add_bos_token"] = vocabulary.add_bos
    keys[prefix + "add_eos_token"] = False
    ends = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in ends.items():
        if (id_ := getattr(vocabulary, f"{name}_id")) is not None:
            keys[f"{prefix}{key}_token_id"] = id_
    if tokenizer.template is not None:
        if tokenizer.template.stop:
            end_of_turn = vocabulary.id_of(tokenizer.template.stop[0])
            if end_of_turn is not None:
                keys[prefix + "eot_token_id"] = end_of_turn
        keys["tokenizer.chat_template"] = tokenizer.template.jinja()
        keys["pocketphi.chat_template"] = tokenizer.template.name
    elif vocabulary.jinja is not None:
        keys["tokenizer.chat_template"] = vocabulary.jinja
    return keys


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """Return the vocabulary as a SentencePiece model file (protobuf; see `readers` for the fields)."""
    tokens, scores, kinds = _rows(vocabulary)
    data = bytearray()
    for token, score, kind in zip(tokens, scores, kinds):
        piece = _field(1, token.encode()) + b"\x15" + struct.pack("<f", score)
        if kind != NORMAL:
            # SentencePiece counts UNUSED as 5 and BYTE as 6, as GGUF does.
            piece += b"\x18" + _varint(kind)
        data += _field(1, piece)
    trainer = b"\x18" + _varint(2)  # model_type = BPE
    trainer += b"\x98\x02" + _varint(1)  # byte_fallback (field 35)
    for field_number, id_ in ((40, 0), (41, vocabulary.bos_id), (42, vocabulary.eos_id), (43, -1)):
        if id_ is not None:
            trainer += _varint(field_number << 3) + _varint(id_ & (2**64 - 1))
    data += _field(2, trainer)
    prefix = '"Prepend"' in json.dumps(vocabulary.definition.get("normalizer"))
    normalizer = _field(1, b"identity") + _field(2, b"")
    normalizer += b"\x18" + _varint(int(prefix)) + b"\x20" + _varint(0) + b"\x28" + _varint(1)
    data += _field(3, normalizer)
    return bytes(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content
