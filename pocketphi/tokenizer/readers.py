"""Read a vocabulary from the files that people have.

A folder or tokenizer.json (Hugging Face), tokenizer.model (SentencePiece), a GGUF file, and the binary
vocabulary of llama2.c. The files are untrusted: lengths are checked and damage is a DataError.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocketphi.core.errors import DataError, EngineError
from pocketphi.core.gguf import GgufFile
from pocketphi.tokenizer.vocabulary import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    byte_level_definition,
    phi3_rstrip,
    spm_definition,
)

MAX_JSON_BYTES = 256 << 20
MAX_VOCABULARY = 2_000_000
MAX_PIECE_BYTES = 4096


def read(path: Path | str) -> Vocabulary:
    """Read a vocabulary; the kind of file is seen from its name and first bytes.

    Raises DataError when there is none at `path` or it is damaged, EngineError when it is of a kind that
    is not supported.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return read_json(path / "tokenizer.json")
        if (path / "tokenizer.model").is_file():
            return read_sentencepiece(path / "tokenizer.model")
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return read_gguf(found[0])
        raise DataError(f"{path}: no tokenizer here (tokenizer.json or tokenizer.model is needed)")
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file")
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"GGUF":
        return read_gguf(path)
    if path.suffix == ".json" or head[:1] == b"{":
        return read_json(path)
    if path.suffix == ".bin":
        return read_llama2c(path)
    return read_sentencepiece(path)


# Hugging Face


def read_json(path: Path | str) -> Vocabulary:
    """Read tokenizer.json and, where they stand beside it, tokenizer_config.json and chat_template.jinja."""
    path = Path(path)
    definition = _json(path)
    model = definition.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path}: not a tokenizer.json (no 'model' with a 'vocab')")
    if model.get("type", "BPE") != "BPE":
        raise EngineError(f"{path}: tokenizers of type {model.get('type')} are not supported, only BPE")
    for entry in definition.setdefault("added_tokens", []):
        if not isinstance(entry, dict) or not {"id", "content"} <= set(entry):
            raise DataError(f"{path}: an entry of 'added_tokens' lacks 'id' or 'content'")
        for flag in ("special", "lstrip", "rstrip", "normalized", "single_word"):
            entry.setdefault(flag, False)
    if not isinstance(model.get("merges"), list):
        raise DataError(f"{path}: 'model' has no list of merges")
    ids = [*model["vocab"].values(), *(a["id"] for a in definition["added_tokens"])]
    if not ids or not all(isinstance(i, int) and 0 <= i < MAX_VOCABULARY for i in ids):
        raise DataError(f"{path}: token ids must be whole numbers from 0 to {MAX_VOCABULARY}")
    settings = path.with_name("tokenizer_config.json")
    config = _json(settings) if settings.is_file() else {}
    jinja = config.get("chat_template")
    if isinstance(jinja, list):  # named templates: the one called default is the chat's
        jinja = next((t.get("template") for t in jinja if t.get("name") == "default"), None)
    beside = path.with_name("chat_template.jinja")
    if jinja is None and beside.is_file():
        jinja = beside.read_text(encoding="utf-8")
    vocabulary = Vocabulary(
        definition,
        num_rows=max(ids) + 1,
        add_bos=bool(config.get("add_bos_token", False)),
        jinja=jinja,
        template=config.get("pocketphi_template"),
    )
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is None and name == "unk":
            token = model.get("unk_token")
        if token is not None:
            setattr(vocabulary, f"{name}_id", vocabulary.id_of(token))
    if not config:
        _guess_ends(vocabulary)
    return vocabulary


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _guess_ends(vocabulary: Vocabulary) -> None:
    """A bare vocabulary names no start and end: take the usual strings."""
    if vocabulary.bos_id is None:
        vocabulary.bos_id = vocabulary.id_of("<s>")
    for token in ("<|endoftext|>", "</s>"):
        if vocabulary.eos_id is None:
            vocabulary.eos_id = vocabulary.id_of(token)


# SentencePiece: the few fields of its protobuf that decide the ids. Message numbers are those of
# sentencepiece_model.proto: ModelProto{1: pieces, 2: trainer_spec, 3: normalizer_spec},
# SentencePiece{1: piece, 2: score, 3: type}, TrainerSpec{3: model_type},
# NormalizerSpec{1: name, 2: precompiled_charsmap, 3: add_dummy_prefix, 4: remove_extra_whitespaces}.


def read_sentencepiece(path: Path | str) -> Vocabulary:
    """Read a SentencePiece model of type BPE with byte fallback and no normalisation, as Llama's is.

    Beside it, `added_tokens.json` (string -> id) is honoured. Raises EngineError for unigram models and
    for models that normalise their text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error}") from None
    tokens: list[str | None] = []
    scores: list[float] = []
    kinds: list[int] = []
    model_type, prefix, collapse, charsmap = 1, True, True, b""
    for number, value in _fields(data, path):
        if number == 1 and isinstance(value, bytes):
            piece, score, kind = "", 0.0, NORMAL
            for inner, content in _fields(value, path):
                if inner == 1 and isinstance(content, bytes):
                    try:
                        piece = content.decode("utf-8")
                    except UnicodeDecodeError:
                        raise DataError(f"{path}: piece {len(tokens)} is not UTF-8") from None
                elif inner == 2 and isinstance(content, bytes) and len(content) == 4:
                    score = struct.unpack("<f", content)[0]
                elif inner == 3 and isinstance(content, int):
                    kind = content
            tokens.append(piece)
            scores.append(score)
            kinds.append(kind)
        elif number == 2 and isinstance(value, bytes):
            model_type = next((v for n, v in _fields(value, path) if n == 3 and isinstance(v, int)), 1)
        elif number == 3 and isinstance(value, bytes):
            for inner, content in _fields(value, path):
                if inner == 2 and isinstance(content, bytes):
                    charsmap = content
                elif inner == 3 and isinstance(content, int):
                    prefix = bool(content)
                elif inner == 4 and isinstance(content, int):
                    collapse = bool(content)
    if not tokens:
        raise DataError(f"{path}: no pieces found: not a SentencePiece model")
    if model_type != 2:
        raise EngineError(f"{path}: only SentencePiece models of type BPE are supported")
    if charsmap or collapse:
        raise EngineError(f"{path}: this SentencePiece model normalises its text, which is not supported")
    added = path.with_name("added_tokens.json")
    if added.is_file():
        for token, id_ in sorted(_json(added).items(), key=lambda item: item[1]):
            if id_ == len(tokens):
                tokens.append(token)
                scores.append(0.0)
                kinds.append(CONTROL)
            elif not (isinstance(id_, int) and 0 <= id_ < len(tokens) and tokens[id_] == token):
                raise DataError(f"{added}: '{token}' has id {id_}, expected {len(tokens)}")
    definition = spm_definition(
        tokens, scores, kinds, rstrip=phi3_rstrip(t for t in tokens if t), add_space_prefix=prefix
    )
    vocabulary = Vocabulary(definition, num_rows=len(tokens), scores=scores)
    vocabulary.unk_id = next((i for i, k in enumerate(kinds) if k == UNKNOWN), None)
    _guess_ends(vocabulary)
    return vocabulary


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, int | bytes]]:
    """Walk a protobuf message: (field number, value); numbers for varints, bytes for the rest."""
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise DataError(f"{path}: damaged SentencePiece model (at byte {at} of a message)")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < end:
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        if wire == 2:
            length = varint()
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise DataError(f"{path}: not a SentencePiece model (wire type {wire})")
        if length > end - at:
            raise DataError(
                f"{path}: damaged SentencePiece model (a field of {length} bytes, {end - at} left)"
            )
        yield key >> 3, data[at : at + length]
        at += length


# GGUF


def read_gguf(source: Path | str | GgufFile) -> Vocabulary:
    """Read the vocabulary inside a GGUF file: kinds `llama` (SentencePiece scores) and `gpt2` (merges)."""
    if not isinstance(source, GgufFile):
        with GgufFile(source) as file:
            return read_gguf(file)
    path, metadata = source.path, source.metadata
    prefix = "tokenizer.ggml."
    model = metadata.get(prefix + "model")
    tokens = metadata.get(prefix + "tokens")
    if not isinstance(model, str) or not isinstance(tokens, list) or not tokens:
        raise DataError(f"{path}: the file holds no vocabulary ({prefix}model, {prefix}tokens)")
    if not all(isinstance(t, str) for t in tokens) or len(tokens) > MAX_VOCABULARY:
        raise DataError(f"{path}: {prefix}tokens is not a list of at most {MAX_VOCABULARY} strings")
    kinds = metadata.get(prefix + "token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise DataError(f"{path}: {prefix}token_type does not match the {len(tokens)} tokens")
    scores = None
    if model == "llama":
        scores = metadata.get(prefix + "scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise DataError(f"{path}: {prefix}scores does not match the {len(tokens)} tokens")
        control = [t for t, k in zip(tokens, kinds) if k not in (NORMAL, BYTE, UNUSED)]
        definition = spm_definition(
            tokens,
            scores,
            kinds,
            rstrip=phi3_rstrip(control),
            add_space_prefix=bool(metadata.get(prefix + "add_space_prefix", True)),
        )
    elif model == "gpt2":
        merges = metadata.get(prefix + "merges")
        if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
            raise DataError(f"{path}: {prefix}merges is missing")
        pre = metadata.get(prefix + "pre", "default")
        definition = byte_level_definition(tokens, kinds, merges, str(pre))
    else:
        raise EngineError(f"{path}: vocabularies of kind '{model}' are not supported (llama and gpt2 are)")
    vocabulary = Vocabulary(
        definition,
        num_rows=len(tokens),
        add_bos=bool(metadata.get(prefix + "add_bos_token", model == "llama")),
        jinja=metadata.get("tokenizer.chat_template"),
        template=metadata.get("pocketphi.chat_template"),
        scores=scores,
    )
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id_ = metadata.get(f"{prefix}{key}_token_id")
        if id_ is not None:
            if not isinstance(id_, int) or not 0 <= id_ < len(tokens):
                raise DataError(f"{path}: {prefix}{key}_token_id is {id_!r}, outside the vocabulary")
            setattr(vocabulary, f"{name}_id", id_)
    if model == "llama" and vocabulary.bos_id is None:
        _guess_ends(vocabulary)
    return vocabulary


# llama2.c


def read_llama2c(path: Path | str) -> Vocabulary:
    """Read llama2.c's tokenizer.bin: longest length (int32), then score (float32), length, bytes a token.

    The file keeps spaces as spaces and does not tell kinds: 0 is unknown, 1 the start, 2 the end,
    3..258 the bytes. Its models expect the start token first.
    """
    path = Path(path)
    data = path.read_bytes()
    tokens: list[str | None] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        if len(data) - at < 8:
            raise DataError(f"{path}: the file ends inside token {len(tokens)}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= min(MAX_PIECE_BYTES, len(data) - at):
            raise DataError(f"{path}: token {len(tokens)} claims {length} bytes")
        try:
            text = data[at : at + length].decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}: token {len(tokens)} is not UTF-8") from None
        at += length
        tokens.append(text.replace(" ", SPACE))
        scores.append(score)
    if len(tokens) < 259 or tokens[3] != BYTE_TOKENS[0]:
        raise DataError(f"{path}: not a llama2.c vocabulary")
    tokens[0], tokens[1], tokens[2] = "<unk>", "<s>", "</s>"
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)
    definition = spm_definition(tokens, scores, kinds)
    return Vocabulary(
        definition,
        num_rows=len(tokens),
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_bos=True,
        scores=scores,
    )
