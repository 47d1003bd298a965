"""Damaged tokenizer files end in our errors, never in another exception."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path

import pytest

from pocketphi import tokenizer as tk
from pocketphi.core.errors import DataError, PocketPhiError
from pocketphi.tokenizer import readers, training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    pieces = ["\u2581", *"abcdefgh", "ab", "\u2581ab", "abc"]
    training.assemble(pieces).save(made)
    return made


def mutations(raw: bytes, count: int) -> list[bytes]:
    random_ = random.Random(3)
    result = []
    for _ in range(count):
        changed = bytearray(raw)
        for _ in range(random_.randint(1, 3)):
            changed[random_.randrange(len(changed))] = random_.randrange(256)
        if random_.random() < 0.3:
            del changed[random_.randrange(len(changed)) :]
        result.append(bytes(changed))
    return result


@pytest.mark.parametrize(("name", "count"), [("tokenizer.model", 300), ("tokenizer.json", 150)])
def test_mutated_files(folder: Path, tmp_path: Path, name: str, count: int) -> None:
    refused = 0
    for raw in mutations((folder / name).read_bytes(), count):
        (tmp_path / name).write_bytes(raw)
        try:
            tk.load(tmp_path / name).encode("abc dab")
        except PocketPhiError:
            refused += 1
    assert refused > count // 10


def test_mutated_llama2c(tmp_path: Path) -> None:
    tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{b:02X}>".encode() for b in range(256)), b" a", b"b"]
    raw = struct.pack("<i", 8) + b"".join(
        struct.pack("<fi", float(-i), len(t)) + t for i, t in enumerate(tokens)
    )
    (tmp_path / "t.bin").write_bytes(raw)
    assert tk.load(tmp_path / "t.bin").vocab_size == 261
    for changed in mutations(raw, 200):
        (tmp_path / "t.bin").write_bytes(changed)
        with contextlib.suppress(PocketPhiError):
            tk.load(tmp_path / "t.bin").encode("ab")


def test_clear_messages(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file"):
        tk.load(tmp_path / "none")
    with pytest.raises(DataError, match="no tokenizer here"):
        tk.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not readable as JSON"):
        tk.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "merges": []}}))
    assert tk.load(tmp_path).vocab_size == 1
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["merges"].append(["x", "yz"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="refuses this vocabulary"):
        tk.load(tmp_path)
    with pytest.raises(DataError, match="byte tokens"):
        readers.spm_definition(["<unk>", "a"], [0.0, 0.0], [2, 1])
    with pytest.raises(DataError, match="twice"):
        readers.spm_definition(["<unk>", "a", "a"], [0.0] * 3, [2, 1, 1])
