"""Ids against independent judges: llama.cpp's vectors, sentencepiece, transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from pocketphi import tokenizer as tk
from pocketphi.core.errors import EngineError, UserError

SOURCES = [
    ("ggml-vocab-phi-3.gguf", "phi-3"),
    ("ggml-vocab-llama-spm.gguf", "llama-spm"),
    ("llama2_tokenizer.model", "phi-3"),  # the same 32000 pieces
    ("llama2_tokenizer.model", "llama-spm"),
    ("llama2_tokenizer.bin", "llama-spm"),
]
HARD = [
    "",
    " ",
    "  two  blanks ",
    "\n\n\n tabs\t\tand\r\nends ",
    "aaaaaaaaaaaaaaaaaaaaaaaa ======== ---------------- \u2581\u2581 ......",
    "def f(x):\n        return x ** 2  # 3.14159 1234567890",
    "Ærøskøbing, Straße, naïve, здравствуй мир, 你好世界, مرحبا, 👩‍👩‍👧‍👦 🦙 \u0000 \ufffd",
    "don't can't I'll 'quoted' \"double\" (brackets) [x] {y} <z> a/b\\c e-mail@x.org",
]


def vectors(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    raw = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    texts = raw.split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    ids = [[int(i) for i in line.split()] for line in lines]
    assert len(texts) == len(ids) + 1 and not texts[-1].strip()
    return list(zip(texts, ids))


@pytest.mark.parametrize(("file", "name"), SOURCES)
def test_every_vector(shared_data: Path, file: str, name: str) -> None:
    folder = shared_data / "tokenizer"
    tokenizer = tk.load(folder / file)
    cases = vectors(folder, name)
    assert len(cases) == 46
    for text, ids in cases:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def test_vectors_survive_saving(shared_data: Path, phi3: tk.Tokenizer, tmp_path: Path) -> None:
    phi3.save(tmp_path)
    again = tk.load(tmp_path)
    assert again.sha256 == phi3.sha256
    assert again.template is not None and again.template.name == "phi-3"
    for text, ids in vectors(shared_data / "tokenizer", "phi-3"):
        assert again.encode(text) == ids


def test_sentencepiece_agrees(shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = shared_data / "tokenizer" / "llama2_tokenizer.model"
    judge = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = tk.load(file)
    page = (shared_data / "README.md").read_text()[:60_000]
    for text in [*HARD, page]:
        assert ours.encode(text) == judge.encode(text), text[:80]


def test_own_sentencepiece_file(small: tk.Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """What we write as tokenizer.model gives sentencepiece (so llama.cpp's algorithm) the same ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    small.save(tmp_path)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [*HARD, *texts[:100]]:
        assert small.encode(text) == judge.encode(text), text[:80]
    again = tk.load(tmp_path / "tokenizer.model")
    assert again.sha256 == small.sha256 and again.stop_ids == small.stop_ids


def test_transformers_agrees(small: tk.Tokenizer, texts: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, *texts[:100]]:
        ids = small.encode(text)
        assert judge(text, add_special_tokens=False)["input_ids"] == ids
        assert judge(text)["input_ids"] == ids  # no start token is added, as in Phi-3's update
        assert judge.decode(ids) == small.decode(ids)
    assert judge.eos_token_id == small.eos_id and judge.bos_token_id == small.bos_id


def test_gguf_round_trip(small: tk.Tokenizer, texts: list[str], tmp_path: Path) -> None:
    """The keys written for a GGUF file give back the same tokenizer."""
    file = write_gguf(tmp_path / "vocab.gguf", small.gguf_metadata())
    again = tk.load(file)
    assert again.sha256 == small.sha256
    assert again.stop_ids == small.stop_ids and again.eos_id == small.eos_id
    assert again.template is not None and again.template.name == "phi-3"
    for text in [*HARD, *texts[:100]]:
        assert again.encode(text) == small.encode(text)


def test_gguf_round_trip_of_phi3_and_smollm2(
    phi3: tk.Tokenizer, smollm2: tk.Tokenizer, tmp_path: Path
) -> None:
    for tokenizer in (phi3, smollm2):
        again = tk.load(write_gguf(tmp_path / "v.gguf", tokenizer.gguf_metadata()))
        assert again.sha256 == tokenizer.sha256 and again.vocab_size == tokenizer.vocab_size
        assert again.add_bos == tokenizer.add_bos


def write_gguf(path: Path, keys: dict) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "phi3")
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_smollm2(smollm2: tk.Tokenizer, tmp_path: Path) -> None:
    """GPT-2-style ids: digits apart, and transformers reads what we save."""
    assert smollm2.vocab_size == 49152 and smollm2.vocabulary.kind == "byte-level"
    assert [smollm2.token(i) for i in smollm2.encode("in 2024")] == ["in", "Ġ", "2", "0", "2", "4"]
    for text in HARD:
        assert smollm2.decode(smollm2.encode(text)) == text
    transformers = pytest.importorskip("transformers")
    smollm2.save(tmp_path)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        assert judge(text, add_special_tokens=False)["input_ids"] == smollm2.encode(text)


def test_llama2c(shared_data: Path) -> None:
    tokenizer = tk.load(shared_data / "tokenizer" / "tok512.bin")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (512, 1, True)
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily.", add_bos=True)
    assert ids[:5] == [1, 403, 407, 261, 378]


def test_facts(phi3: tk.Tokenizer) -> None:
    assert phi3.vocab_size == 32064 and phi3.eos_id == 32000 and phi3.bos_id == 1
    assert phi3.stop_ids == {32000, 32001, 32007}
    assert phi3.token(32010) == "<|user|>" and phi3.token(32063) is None
    assert phi3.token_bytes(32063) == b"" and phi3.token_bytes(13) == b"\n"
    assert phi3.token_bytes(phi3.encode("Hello")[0]) == b" Hello"
    with pytest.raises(UserError, match="outside the vocabulary"):
        phi3.token_bytes(32064)


def test_batch_is_single(small: tk.Tokenizer, texts: list[str]) -> None:
    chosen = [*HARD, *texts[:20]]
    assert small.encode_batch(chosen) == [small.encode(t) for t in chosen]


def test_refuses_what_it_cannot_do(tmp_path: Path, small: tk.Tokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        small.encode("a\ud800b")
    small.save(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(EngineError, match="only BPE"):
        tk.load(tmp_path)
    piece = b"\n\x03abc\x15" + struct.pack("<f", -1.0)
    (tmp_path / "unigram.model").write_bytes(b"\n" + bytes([len(piece)]) + piece)
    with pytest.raises(EngineError, match="type BPE"):
        tk.load(tmp_path / "unigram.model")
