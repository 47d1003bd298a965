"""Training: repeatable, of the right form, and honest about small texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketphi import tokenizer as tk
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.tokenizer import training
from pocketphi.tokenizer.vocabulary import ADDED_TOKENS


def folder_of(tmp_path: Path, texts: list[str]) -> Path:
    rows = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "corpus.jsonl").write_text(rows)
    return tmp_path / "corpus.jsonl"


def test_layout(small: tk.Tokenizer) -> None:
    assert small.vocab_size == 1024 and len(ADDED_TOKENS) == 64
    assert [small.token(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    # Phi-3's order, shifted: 32000 -> 960.
    expected = {0: "<|endoftext|>", 1: "<|assistant|>", 2: "<|placeholder1|>", 6: "<|system|>", 7: "<|end|>"}
    expected |= {9: "<|placeholder6|>", 10: "<|user|>", 11: "<|placeholder7|>", 44: "<|image|>"}
    for offset, token in expected.items():
        assert small.token(960 + offset) == token
    assert small.stop_ids == {960, 961, 967} and small.eos_id == 960 and not small.add_bos
    assert (
        small.vocabulary.added["<|user|>"]["rstrip"] and not small.vocabulary.added["<|endoftext|>"]["rstrip"]
    )


def test_pieces_keep_word_borders(small: tk.Tokenizer) -> None:
    pieces = [small.token(i) or "" for i in range(259, 960)]
    assert not [p for p in pieces if "\u2581" in p.lstrip("\u2581")]
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]
    assert not [p for p in pieces if "\n" in p]
    assert [small.token(i) for i in small.encode("2024")] == ["\u2581", "2", "0", "2", "4"]


def test_run_is_repeatable(texts: list[str], tmp_path: Path) -> None:
    corpus = folder_of(tmp_path, texts)
    config = tk.TokenizerConfig(vocab_size=600, max_bytes=200_000)
    first = tk.run(config, {"corpus": corpus}, out=tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from pocketphi import tokenizer as t;"
        "print(t.run(t.TokenizerConfig(vocab_size=600, max_bytes=200_000), {'corpus': Path(sys.argv[1])},"
        "out=Path(sys.argv[2])).checksum)"
    )
    environment = dict(os.environ, PYTHONHASHSEED="7", TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    second = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "b")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert second.stdout.strip() == first.checksum
    assert 0 < first.counts["documents_used"] < first.counts["documents_in"] == len(texts)
    again = tk.run(config, {"corpus": corpus}, out=tmp_path / "a")
    assert again.manifest == first.manifest
    assert tk.load(first).vocab_size == 600


def test_run_reads_a_corpus_artifact(texts: list[str], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from pocketphi.core import artifact

    marked = [f"{t} zyzzyva" if i % 4 == 0 else t for i, t in enumerate(texts)]
    with artifact.create(tmp_path / "corpus", kind="corpus", config={}) as draft:
        (draft.path / "documents").mkdir()
        (draft.path / "verdicts").mkdir()
        keep = [i % 4 != 0 for i in range(len(texts))]
        heldout = [i % 4 == 1 for i in range(len(texts))]
        pq.write_table(pa.table({"text": marked}), draft.path / "documents" / "part-00000.parquet")
        marks = pa.table({"keep": keep, "heldout": heldout})
        pq.write_table(marks, draft.path / "verdicts" / "part-00000.parquet")
    made = tk.run(
        tk.TokenizerConfig(vocab_size=500), {"corpus": tmp_path / "corpus"}, out=tmp_path / "tokenizer"
    )
    assert made.counts["documents_in"] == sum(k and not h for k, h in zip(keep, heldout))
    assert made.parents[0]["kind"] == "corpus"


def test_rare_characters_are_bytes(texts: list[str]) -> None:
    made = training.train([*texts, "x \u4e16"], tk.TokenizerConfig(vocab_size=600))
    ids = made.encode("\u4e16")
    assert len(ids) == 4 and all(3 <= i < 259 for i in ids[1:]) and made.decode(ids) == "\u4e16"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives only"):
        training.train(["a short text"], tk.TokenizerConfig(vocab_size=1024))
    with pytest.raises(DataError, match="no text"):
        training.train(["", "\n"], tk.TokenizerConfig(vocab_size=1024))
    with pytest.raises(ConfigError, match="323 ids are fixed"):
        tk.TokenizerConfig(vocab_size=100)
    with pytest.raises(ConfigError, match="needs"):
        tk.TokenizerConfig(template="chatml")
    with pytest.raises(DataError, match="neither a corpus artifact nor text"):
        tk.run(tk.TokenizerConfig(), {"corpus": tmp_path}, out=tmp_path / "t")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match="line 1 has no field 'text'"):
        tk.run(tk.TokenizerConfig(), {"corpus": tmp_path}, out=tmp_path / "t")


def test_plan() -> None:
    forecast = tk.plan(tk.TokenizerConfig(), {"corpus": {"tokens": 1_000_000}})
    assert forecast["wall_s"] > 0 and forecast["peak_memory_bytes"] > 0 and forecast["disk_bytes"] > 0
    assert forecast["wall_s"] < tk.plan(tk.TokenizerConfig(), {})["wall_s"]


def test_verbs(texts: list[str], tmp_path: Path) -> None:
    def phi(*arguments: str) -> subprocess.CompletedProcess:
        code = "from pocketphi.cli import main; main()"
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, "-c", code, "tokenizer", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    corpus = folder_of(tmp_path, texts)
    made = phi("train", str(corpus), "--set", "vocab_size=600", "--out", str(tmp_path / "t"), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["vocab_size"] == 600
    shown = phi("encode", str(tmp_path / "t"), "the text", "--json")
    figures = json.loads(shown.stdout)
    assert figures["ids"] == tk.load(tmp_path / "t").encode("the text")
    chat = phi("encode", str(tmp_path / "t"), "--chat", "Hi")
    assert chat.stdout.split()[-1] == "537"
    wrong = phi("train", str(corpus), "--set", "vocab_sise=600")
    assert wrong.returncode == 2 and "did you mean 'vocab_size'" in wrong.stderr
