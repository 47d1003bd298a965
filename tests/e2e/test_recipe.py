"""From pages to chat: the nano recipe, made small, run whole, killed in every stage, run again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocketphi.core import artifact

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["corpus", "tokenizer", "shards", "train", "sft", "quantize", "eval", "report"]
TOPICS = ["plants", "rivers", "bridges", "bread", "stars", "maps", "clocks", "birds", "metals", "music"]

# The nano recipe with everything small; the stages and their wiring are the recipe's own.
SMALL = [
    "tokenizer.vocab_size=700",
    "train.model_overrides={hidden_size: 64, intermediate_size: 160, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}",
    *(
        f"train.phases.{phase}.{key}={value}"
        for phase in (0, 1)
        for key, value in (
            ("tokens", 30000), ("sequence_length", 128), ("batch_tokens", 1024), ("micro_batch_tokens", 1024),
        )
    ),
    "train.phases.0.warmup_tokens=5000",
    "train.phases.1.decay_tokens=30000",
    "train.checkpoint_every_tokens=10000",
    "sft.epochs=1",
    "sft.sequence_length=256",
    "sft.repeat_built_in=1",
    "sft.from_corpus=20",
    "eval.limit=5",
    "eval.max_heldout_tokens=2000",
    "corpus.heldout_fraction=0.1",
]  # fmt: skip


def pages(folder: Path) -> Path:
    """Write a small web of plain pages, and some that must be rejected."""
    folder.mkdir()
    random_ = random.Random(0)
    for index in range(60):
        topic, other = random_.sample(TOPICS, 2)
        sentences = [
            f"This is what we know about {topic}, and it is the {word} part of what people have learned."
            f" The study of {topic} is old, and it has often been joined with the study of {other}."
            for word in random_.sample(
                ["first", "second", "useful", "hidden", "careful", "common", "simple"], 5
            )
        ]
        body = "".join(
            f"<p>{s} Page {index} says so with number {random_.randint(0, 10**6)}.</p>" for s in sentences
        )
        (folder / f"page{index}.html").write_text(
            f"<html><head><title>On {topic}</title></head><body><nav><a href=/>Home</a></nav>"
            f"<article><h1>On {topic}</h1>{body}</article><footer>Follow us</footer></body></html>"
        )
    (folder / "spam.html").write_text(
        "<html><body><p>" + "buy now cheap pills click here " * 40 + "</p></body></html>"
    )
    (folder / "broken.html").write_bytes(b"<html><body><p>cut off in the mid\xff\xfe")
    return folder


def command(out: Path, source: Path) -> list[str]:
    inputs = f"corpus.inputs=[{{path: {source}, quality: web}}, {{path: python-docs, quality: docs, max_documents: 60}}]"
    settings = [inputs, "corpus.benchmarks=[]", "eval.data_dir=null", *SMALL]
    arguments = [
        sys.executable,
        "-m",
        "pocketphi",
        "recipe",
        "run",
        str(ROOT / "recipes/nano.yaml"),
        "--json",
    ]
    arguments += ["--out", str(out)]
    for setting in settings:
        arguments += ["--set", setting]
    return arguments


def run(out: Path, source: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(out, source), capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages(tmp_path_factory.mktemp("web") / "pages")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, json.loads(run(out, source).stdout)


@pytest.mark.e2e
def test_every_stage_made_its_artifact(undisturbed: tuple[Path, dict]) -> None:
    out, figures = undisturbed
    assert figures["stages_made"] == STAGES
    for stage in STAGES:
        found = artifact.load(out / stage)
        assert found.checksum == figures["checksums"][stage]
    counts = artifact.load(out / "corpus").counts
    assert counts["documents_in"] == (
        counts["documents_kept"] + counts["documents_rejected"] + counts["documents_failed"]
    )
    assert counts["documents_rejected"] >= 1
    assert (out / "forecast.json").exists()
    page = (out / "report/index.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.e2e
def test_the_lineage_leads_from_the_model_to_the_corpus(undisturbed: tuple[Path, dict]) -> None:
    out, _ = undisturbed
    kinds = [found.kind for found in artifact.lineage(artifact.load(out / "quantize"))]
    assert kinds[0] == "gguf" and "corpus" in kinds and "tokenizer" in kinds


@pytest.mark.e2e
def test_run_again_it_does_nothing_and_says_so_at_once(undisturbed: tuple[Path, dict], source: Path) -> None:
    out, figures = undisturbed
    again = run(out, source)
    assert json.loads(again.stdout)["stages_made"] == []
    assert json.loads(again.stdout)["checksums"] == figures["checksums"]
    assert "nothing to do" in again.stderr


@pytest.mark.e2e
def test_killed_in_every_stage_it_ends_with_the_same_checksums(
    undisturbed: tuple[Path, dict], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    random_ = random.Random(os.getpid())
    killed = []
    for stage in STAGES:
        child = subprocess.Popen(
            command(out, source),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        if wait_for_start(out / "log.jsonl", stage, child):
            time.sleep(random_.uniform(0, 0.6))
        if child.poll() is None:
            killed.append(stage)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if (out / stage / "manifest.json").exists():
            artifact.load(out / stage)  # whole, if it is there at all
    assert len(killed) >= 5, f"the run was killed only in {killed}"
    finished = json.loads(run(out, source).stdout)
    assert finished["checksums"] == undisturbed[1]["checksums"]


def wait_for_start(log: Path, stage: str, child: subprocess.Popen) -> bool:
    """Wait until the stage has begun in this process (its event is new in the log)."""
    seen = len(log.read_text().splitlines()) if log.exists() else 0
    deadline = time.monotonic() + 200
    while child.poll() is None and time.monotonic() < deadline:
        if log.exists():
            for line in log.read_text().splitlines()[seen:]:
                event = json.loads(line)
                if event["event"] == "stage_start" and Path(event["path"]).name == stage:
                    return True
        time.sleep(0.02)
    return False


@pytest.mark.e2e
def test_the_model_it_made_chats(undisturbed: tuple[Path, dict]) -> None:
    out, _ = undisturbed
    done = subprocess.run(
        [sys.executable, "-m", "pocketphi", "chat", "--model", str(out / "quantize/model.gguf"),
         "--prompt", "What is a plant?", "--json"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["decode_tokens_per_s"] > 0 and answer["peak_rss_bytes"] > 0


@pytest.mark.e2e
def test_a_verdict_can_be_asked_for(undisturbed: tuple[Path, dict]) -> None:
    import pyarrow.parquet

    out, _ = undisturbed
    verdicts = pyarrow.parquet.read_table(sorted((out / "corpus/verdicts").glob("*.parquet"))[0])
    rejected = [row for row in verdicts.select(["id", "keep"]).to_pylist() if not row["keep"]]
    done = subprocess.run(
        [sys.executable, "-m", "pocketphi", "corpus", "why", rejected[0]["id"][:12], "--corpus", str(out / "corpus")],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rejected" in (done.stdout + done.stderr).lower()
