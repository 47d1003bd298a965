"""The corpus stage as a whole: counts, verdicts, resumption, workers, hostile documents."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from toy_pages import paragraph, write_inputs

from pocketphi import corpus
from pocketphi.core.config import to_tree
from pocketphi.core.errors import ConfigError, DataError, UserError
from pocketphi.corpus import CorpusConfig, InputConfig, PhaseConfig, RuleConfig
from pocketphi.corpus.engines import local
from pocketphi.corpus.parts import Folders, chunks

ROOT = Path(__file__).resolve().parents[2]


def config(folder: Path, **changes: object) -> CorpusConfig:
    settings: dict = {
        "inputs": (str(folder / "pages"), str(folder / "lines.jsonl")),
        "workers": 1,
        "chunk_documents": 16,
        "heldout_fraction": 0.1,
        "phase2": PhaseConfig(min_educational=2.5),
    }
    return CorpusConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs") / "data")


@pytest.fixture(scope="module")
def built(inputs: Path, tmp_path_factory: pytest.TempPathFactory):
    return corpus.run(config(inputs), {}, out=tmp_path_factory.mktemp("out") / "corpus")


def rows(found, **selection) -> list[dict]:
    columns = ["id", "text", "meta", "keep", "reasons", "phase1", "phase2", "heldout", "educational.score"]
    return [row for batch in corpus.read(found, columns, **selection) for row in batch.to_pylist()]


def test_every_document_is_accounted_for(built) -> None:
    counts = built.counts
    assert counts["documents_in"] == 32 + 63
    assert counts["documents_in"] == (
        counts["documents_kept"] + counts["documents_rejected"] + counts["documents_failed"]
    )
    failures = [json.loads(line) for line in (built.path / "failures.jsonl").read_text().splitlines()]
    assert {f["where"]: f["reason"] for f in failures} == {
        "empty.html": "no text found in it",
        "picture.png": "unknown file type",
        "lines.jsonl:62": "not valid JSON: Expecting value: line 1 column 1 (char 0)",
    }
    assert len(rows(built, keep=None)) == counts["documents_in"] - len(failures)


def test_rows_of_documents_and_verdicts_are_aligned(built) -> None:
    for documents, verdicts in corpus.reading.part_files(built):
        ids = pyarrow.parquet.read_table(documents, columns=["id"]).column("id").to_pylist()
        assert ids == pyarrow.parquet.read_table(verdicts, columns=["id"]).column("id").to_pylist()


def test_rejected_documents_carry_all_reasons(built) -> None:
    rejected = {json.loads(r["meta"]).get("original_id"): r for r in rows(built, keep=False)}
    assert set(rejected) == {"copy", "short"}
    assert "exact_duplicate" in rejected["copy"]["reasons"]
    assert {"num_words", "sentences"} <= set(rejected["short"]["reasons"])


def test_phases_and_heldout(built) -> None:
    kept = rows(built)
    heldout = [r for r in kept if r["heldout"]]
    assert 0 < len(heldout) < 0.3 * len(kept)
    assert not any(r["phase1"] or r["phase2"] for r in heldout)
    for row in kept:
        assert row["phase2"] == (row["educational.score"] >= 2.5 and not row["heldout"])
    assert len(rows(built, phase=1)) == len(kept) - len(heldout)


def test_extraction_ran(built) -> None:
    texts = [r["text"] for r in rows(built)]
    assert any(text.startswith("## On the") for text in texts)
    assert not any("All rights reserved" in text or "About" in text for text in texts)


def test_the_latest_corpus_is_found(tmp_path) -> None:
    with pytest.raises(UserError, match="no corpus"):
        corpus.latest(tmp_path)
    for age, (name, kind) in enumerate(
        (("new", "corpus"), ("recipe/old", "corpus"), ("model", "checkpoint"))
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"kind": kind}))
        os.utime(tmp_path / name / "manifest.json", (100 - age, 100 - age))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert corpus.latest(tmp_path) == tmp_path / "new"


def test_why_explains_kept_and_rejected(built) -> None:
    rejected = next(r for r in rows(built, keep=False) if "num_words" in r["reasons"])
    (answer,) = corpus.why(built, rejected["id"][:10])
    lines = {line["rule"]: line for line in answer["rules"]}
    assert lines["num_words"] == {
        "rule": "num_words",
        "score": 11.0,
        "min": 50,
        "max": 100_000,
        "judges": True,
        "keep": False,
        "about": lines["num_words"]["about"],
    }
    assert lines["language"]["keep"] and answer["text"] == rejected["text"]
    (kept,) = corpus.why(built, rows(built)[0]["id"])
    assert kept["keep"] and not kept["reasons"]
    with pytest.raises(UserError, match="no document's id"):
        corpus.why(built, "ffffffffffffffffffffffffffffffff")
    with pytest.raises(UserError, match="at least 4"):
        corpus.why(built, "a")


def test_second_run_does_nothing(built, inputs: Path) -> None:
    before = (built.path / "manifest.json").read_bytes()
    again = corpus.run(config(inputs, workers=3), {}, out=built.path)
    assert again.checksum == built.checksum and (built.path / "manifest.json").read_bytes() == before


def test_number_of_workers_does_not_change_a_byte(built, inputs: Path, tmp_path: Path) -> None:
    other = corpus.run(config(inputs, workers=3), {}, out=tmp_path / "other")
    assert other.manifest["files"] == built.manifest["files"]


def test_moved_threshold_moves_verdicts_only(built, inputs: Path, tmp_path: Path) -> None:
    strict = corpus.run(
        config(inputs, rules={"num_words": RuleConfig(min=10_000)}), {}, out=tmp_path / "strict"
    )
    assert strict.counts["documents_kept"] == 0
    same = {n: f for n, f in built.manifest["files"].items() if n.startswith("documents/")}
    assert {n: f for n, f in strict.manifest["files"].items() if n.startswith("documents/")} == same
    # All that reject the document of ten words; too few for the learned rule to be right about.
    names = ("num_words", "sentences", "stop_words", "unsafe_share")
    off = config(inputs, rules={name: RuleConfig(enabled=False) for name in names})
    lenient = corpus.run(off, {}, out=tmp_path / "lenient")
    assert lenient.counts["documents_rejected"] < built.counts["documents_rejected"]


@pytest.mark.parametrize("moment_s", [0.0, 0.4, 1.2])
def test_killed_run_continues_to_the_same_checksum(
    built, inputs: Path, tmp_path: Path, moment_s: float
) -> None:
    out = tmp_path / "killed"
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom pocketphi import corpus\n"
        "from pocketphi.core.config import parse\n"
        "corpus.run(parse(corpus.CorpusConfig, json.loads(sys.argv[1])), {}, out=Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(to_tree(config(inputs))), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    scratch = out.with_name("killed.scratch")
    while (
        process.poll() is None and time.monotonic() - started < 60 and not list(scratch.glob("part-*.json"))
    ):
        time.sleep(0.01)
    time.sleep(moment_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = corpus.run(config(inputs), {}, out=out)
    assert done.manifest["files"] == built.manifest["files"]
    assert not scratch.exists()


def test_finished_parts_are_not_made_again(inputs: Path, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "final", tmp_path / "scratch")
    folders.make()
    settings = config(inputs)
    every = list(chunks(settings))
    list(local.run_chunks(settings, folders, every[:2]))
    stamps = {part: folders.documents(part).stat().st_mtime_ns for part in (0, 1)}
    from pocketphi.corpus.pipeline import _make_parts

    summaries = _make_parts(settings, folders)
    assert [s["part"] for s in summaries] == list(range(len(every)))
    assert {part: folders.documents(part).stat().st_mtime_ns for part in (0, 1)} == stamps


_CRASHING_WORKER = """
import os, signal, sys, time
from pocketphi.corpus import processing
from pocketphi.corpus.engines import worker
real = processing.Processor.document
def document(self, source, raw):
    if raw.line and b"CRASH" in raw.line:
        os.kill(os.getpid(), signal.SIGSEGV)
    if raw.line and b"HANG" in raw.line:
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        while True:
            sum(range(1000))
    if raw.line and b"SLOW" in raw.line:
        while True:
            sum(range(1000))
    if raw.line and b"MEMORY" in raw.line:
        bytearray(1 << 40)
    return real(self, source, raw)
processing.Processor.document = document
worker.main()
"""


def test_documents_that_kill_hang_or_fill_memory_cost_only_themselves(tmp_path: Path) -> None:
    words = ["fine", "CRASH", "fine", "HANG", "SLOW", "MEMORY", "fine"]
    file = tmp_path / "lines.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"{word} {paragraph(i)}"}) + "\n" for i, word in enumerate(words))
    )
    script = tmp_path / "worker.py"
    script.write_text(_CRASHING_WORKER)
    settings = CorpusConfig(inputs=(str(file),), workers=2, document_timeout_s=0.3)
    folders = Folders(tmp_path / "final", tmp_path / "scratch")
    folders.make()
    (summary,) = local.run_chunks(settings, folders, chunks(settings), [sys.executable, str(script)])
    assert summary["documents_in"] == 7 and summary["documents"] == 3
    assert {f["where"]: f["reason"] for f in summary["failures"]} == {
        "lines.jsonl:2": "made its process end (signal 11)",
        "lines.jsonl:4": "took longer than 0.6 s and was killed",
        "lines.jsonl:5": "took longer than 0.3 s",
        "lines.jsonl:6": "MemoryError",
    }


_KILLED_WORKER = """
import os, pathlib, signal, sys
from pocketphi.corpus import processing
from pocketphi.corpus.engines import worker
real = processing.Processor.document
def document(self, source, raw):
    struck = pathlib.Path(__file__).with_name("struck")
    if b"ONCE" in raw.line and not struck.exists():
        struck.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if b"ALWAYS" in raw.line:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, source, raw)
processing.Processor.document = document
worker.main()
"""


def test_a_worker_killed_from_outside_costs_no_document(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    words = ["fine", "ONCE", "ALWAYS", "fine"]
    file.write_text(
        "".join(json.dumps({"text": f"{word} {paragraph(i)}"}) + "\n" for i, word in enumerate(words))
    )
    script = tmp_path / "worker.py"
    script.write_text(_KILLED_WORKER)
    settings = CorpusConfig(inputs=(str(file),), workers=1)
    folders = Folders(tmp_path / "final", tmp_path / "scratch")
    folders.make()
    (summary,) = local.run_chunks(settings, folders, chunks(settings), [sys.executable, str(script)])
    assert (tmp_path / "struck").exists() and summary["documents"] == 3
    assert [(f["where"], f["reason"]) for f in summary["failures"]] == [
        ("lines.jsonl:3", "made its process end (signal 9)")
    ]


def test_curated_sources_meet_fewer_rules(tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text(
        json.dumps({"text": "A triangle has three sides, and its angles add up to two right angles."}) + "\n"
    )
    web = corpus.run(CorpusConfig(inputs=(str(file),), workers=1), {}, out=tmp_path / "web")
    book = corpus.run(
        CorpusConfig(inputs=(InputConfig(str(file), quality="textbook"),), workers=1, heldout_fraction=0),
        {},
        out=tmp_path / "book",
    )
    assert web.counts["documents_kept"] == 0
    assert book.counts["documents_kept"] == book.counts["documents_phase2"] == 1


def test_max_documents_is_spread_evenly(inputs: Path) -> None:
    source = InputConfig(str(inputs / "lines.jsonl"), max_documents=5)
    settings = CorpusConfig(inputs=(source,))
    found = [raw.where for chunk in chunks(settings) for raw in chunk.raws]
    assert found == [f"lines.jsonl:{n}" for n in (1, 14, 27, 39, 52)]


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        corpus.run(CorpusConfig(inputs=(str(tmp_path / "missing"),)), {}, out=tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        corpus.run(CorpusConfig(inputs=(str(tmp_path / "empty"),)), {}, out=tmp_path / "o")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown file type"):
        corpus.run(CorpusConfig(inputs=(str(tmp_path / "a.png"),)), {}, out=tmp_path / "o")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="did you mean 'num_words'"):
        corpus.run(
            CorpusConfig(inputs=(str(tmp_path / "a.txt"),), rules={"num_word": RuleConfig()}),
            {},
            out=tmp_path / "o",
        )
    with pytest.raises(UserError, match="no such benchmark"):
        corpus.run(
            CorpusConfig(inputs=(str(tmp_path / "a.txt"),), benchmarks=(str(tmp_path / "none"),)),
            {},
            out=tmp_path / "o",
        )
    assert not (tmp_path / "o").exists()


def test_default_corpus_is_the_text_of_python(tmp_path: Path) -> None:
    settings = CorpusConfig(inputs=(InputConfig("python-docs", quality="docs", max_documents=40),), workers=1)
    found = corpus.run(settings, {}, out=tmp_path / "corpus")
    assert found.counts["documents_kept"] >= 20
    assert CorpusConfig().sources()[0].quality == "docs"


def test_boilerplate_of_a_site_is_rejected_and_counted(tmp_path: Path) -> None:
    menu = "\n".join(f"{paragraph(900 + i, 1)}" for i in range(6))
    rows_in = [
        {"id": f"own-{i}", "url": f"https://site.org/{i}", "text": f"{menu}\n{paragraph(40 + i, 14)}"}
        for i in range(4)
    ]
    # These four have little but the furniture of their site, and not so much alike as to be copies.
    rows_in += [
        {"id": f"menu-{i}", "url": f"https://www.site.org/m{i}", "text": f"{menu}\n{paragraph(60 + i, 3)}"}
        for i in range(4)
    ]
    rows_in.append({"id": "elsewhere", "url": "https://other.org/1", "text": f"{menu}\n{paragraph(70, 3)}"})
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_in))
    settings = CorpusConfig(inputs=(str(file),), workers=1, chunk_documents=3)
    found = corpus.run(settings, {}, out=tmp_path / "corpus")
    columns = ["meta", "reasons", "repeated_lines.score"]
    judged = {
        json.loads(row["meta"])["original_id"]: row
        for batch in corpus.read(found, columns, keep=None)
        for row in batch.to_pylist()
    }
    assert {name for name, row in judged.items() if "repeated_lines" in row["reasons"]} == {
        f"menu-{i}" for i in range(4)
    }
    assert 0.2 < judged["own-0"]["repeated_lines.score"] < 0.5
    assert judged["elsewhere"]["repeated_lines.score"] == 0
    tree = corpus.stats(found)
    assert tree["repeated_lines"]["recurring_lines"] == 6
    assert tree["rules"]["repeated_lines"]["rejected"] == 4
    off = corpus.run(dataclasses.replace(settings, repeated_lines=False), {}, out=tmp_path / "off")
    assert off.counts["documents_rejected"] == found.counts["documents_rejected"] - 4


def test_copies_of_a_page_do_not_make_its_lines_boilerplate(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(
        "".join(
            json.dumps({"url": f"https://a.org/{i}", "text": paragraph(1, 12).replace(". ", ".\n")}) + "\n"
            for i in range(5)
        )
    )
    found = corpus.run(CorpusConfig(inputs=(str(file),), workers=1), {}, out=tmp_path / "corpus")
    assert found.counts["documents_kept"] == 1
