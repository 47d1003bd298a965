"""Toy shards: documents of random bytes, a tokenizer of one token a byte."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from pocketphi.train import shards


class ByteTokenizer:
    """Token = byte + 3; 0 is unknown, 1 begins, 2 ends."""

    vocab_size = 300
    eos_id = 259
    bos_id = 1
    stop_ids = frozenset([259])
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [b + 3 for b in text.encode()]

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


WORDS = ["the", "a", "river", "stone", "light", "grows", "water", "plant", "is", "old", "sun", "it", "of"]


def toy_documents(count: int = 60, *, seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + "."
        source = ["books", "web", "textbooks"][i % 3]
        rows.append(
            {
                "id": hashlib.sha256(f"{i}".encode()).hexdigest()[:16],
                "text": text,
                "source": f"owner/{source}@abc",
                "collection": source,
                "keep": i % 10 != 7,
                "phase1": True,
                "phase2": source == "textbooks",
                "heldout": i % 9 == 4,
            }
        )
    return rows


def write_shards(folder: Path, documents: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    writer = shards._Writer(folder, shards.ShardsConfig(**settings), ByteTokenizer())
    for document in documents:
        writer.add(document)
    return writer.close()
