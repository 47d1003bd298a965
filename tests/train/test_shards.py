"""Shards hold every kept document once, and a damaged one is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from train.toy_training import ByteTokenizer, toy_documents, write_shards

from pocketphi.core.errors import DataError
from pocketphi.train import shards


def test_every_kept_document_stands_once_in_its_splits(tmp_path: Path) -> None:
    documents = toy_documents()
    counts = write_shards(tmp_path, documents)
    assert counts["documents_in"] == len(documents)
    held = {d["id"] for d in documents if d["keep"] and d["heldout"]}
    wanted = {
        "phase1": {d["id"] for d in documents if d["keep"]} - held,
        "phase2": {d["id"] for d in documents if d["keep"] and d["phase2"]} - held,
    }
    by_id = {d["id"]: d for d in documents}
    seen_held: set[str] = set()
    for name in shards.split_names(tmp_path):
        split = shards.open_split(tmp_path, name, tokenizer_sha256=ByteTokenizer.sha256)
        ids = (tmp_path / f"{name}.ids").read_text().split()
        assert len(ids) == len(set(ids)) == split.num_documents
        if name in wanted:
            assert set(ids) == wanted[name]
        else:
            seen_held |= set(ids)
        for i, key in enumerate(ids):
            tokens = split.tokens[int(split.starts[i]) : int(split.starts[i + 1])]
            assert tokens[-1] == ByteTokenizer.eos_id
            assert ByteTokenizer().decode(tokens.tolist()) == by_id[key]["text"]
            assert split.nbytes[i] == len(by_id[key]["text"].encode())
        for source in split.sources:
            for key in ids[source.first_document : source.first_document + source.num_documents]:
                assert by_id[key]["collection"] == source.name
    assert seen_held == held


def test_order_does_not_depend_on_reading_order(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", toy_documents())
    write_shards(tmp_path / "b", toy_documents()[::-1])
    write_shards(tmp_path / "c", toy_documents(), seed=5)
    read = {k: (tmp_path / k / "phase1.bin").read_bytes() for k in "abc"}
    assert read["a"] == read["b"]
    assert read["a"] != read["c"]


def test_small_sources_are_merged_and_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, toy_documents(), max_sources=2)
    split = shards.open_split(tmp_path, "phase1")
    assert len(split.sources) == 2
    assert "other" in {s.name for s in split.sources}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "phase1.bin").write_bytes((f / "phase1.bin").read_bytes()[:-2]),
            "phase1.bin: .* bytes",
        ),
        (lambda f: _flip(f / "phase1.bin"), "phase1.bin: checksum"),
        (lambda f: _flip(f / "phase1.idx"), "phase1.idx: checksum"),
        (lambda f: (f / "phase1.idx").unlink(), "phase1.idx: missing"),
        (lambda f: (f / "phase1.json").write_text("{"), "phase1.json: not a readable"),
        (lambda f: _edit(f / "phase1.json", num_tokens=0), "phase1.bin: the split is empty"),
    ],
)
def test_damaged_shard_is_refused_by_name(toy_shards: Path, tmp_path: Path, damage, message: str) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(toy_shards, folder)
    shards.open_split(folder, "phase1")
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        shards.open_split(folder, "phase1")
    assert caught.value.hint


def test_another_tokenizer_is_refused(toy_shards: Path) -> None:
    with pytest.raises(DataError, match="written with another tokenizer"):
        shards.open_split(toy_shards, "phase1", tokenizer_sha256="0" * 64)


def test_unknown_split_names_the_nearest(toy_shards: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'phase"):
        shards.open_split(toy_shards, "phase9")


def test_empty_phase_is_an_error(tmp_path: Path) -> None:
    documents = [{**d, "phase2": False} for d in toy_documents()]
    with pytest.raises(DataError, match="'phase2' would be empty"):
        write_shards(tmp_path, documents)
    with pytest.raises(DataError, match="no document"):
        write_shards(tmp_path / "none", [{**d, "keep": False} for d in toy_documents()])


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100_000)
    write_shards(tmp_path, toy_documents(12))
    assert json.loads((tmp_path / "phase1.json").read_text())["dtype"] == "uint32"
    assert shards.open_split(tmp_path, "phase1").tokens.dtype == np.dtype("<u4")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _edit(path: Path, **changes: int) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
