"""From pages to chat: the nano recipe, made small, run whole, killed in every stage, run again."""

from __future__ import annotations

import json
import os
import random
import shutil
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
    killed, codes = [], []
    for stage in STAGES:
        if (out / stage / "manifest.json").exists():
            continue  # made before the signal of the stage before came
        whole_s = artifact.load(undisturbed[0] / stage).manifest["timings"]["wall_s"]
        child = subprocess.Popen(
            command(out, source),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
        if wait_for_start(out / "log.jsonl", stage, child):
            time.sleep(random_.uniform(0, min(0.6, 0.8 * whole_s)))
        if child.poll() is None:
            killed.append(stage)
            os.killpg(child.pid, signal.SIGKILL)
        codes.append(child.wait())
        if (out / stage / "manifest.json").exists():
            artifact.load(out / stage)  # whole, if it is there at all
    assert len(killed) >= 5, f"the run was killed only in {killed}; exit codes {codes}"
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


# ---- bad input: each a clear error or a counted, explained skip, and nothing half-written taken for whole ----


def refusal(out: Path, source: Path, *settings: str) -> str:
    """Run the recipe, which must refuse; return what it said, which must not be a traceback."""
    arguments = command(out, source)
    for setting in settings:
        arguments += ["--set", setting]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture
def copied(undisturbed: tuple[Path, dict], tmp_path: Path) -> Path:
    """The finished run, to be damaged."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    return out


@pytest.mark.e2e
def test_a_misspelt_key_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    said = refusal(tmp_path / "run", source, "tokenizer.vocabsize=700")
    assert "vocabsize" in said and "did you mean 'vocab_size'" in said
    assert not (tmp_path / "run" / "corpus").exists()


@pytest.mark.e2e
def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refusal(
        tmp_path / "run", tmp_path / "empty", f"corpus.inputs=[{{path: {tmp_path / 'empty'}, quality: web}}]"
    )
    assert str(tmp_path / "empty") in said
    assert not (tmp_path / "run" / "corpus" / "manifest.json").exists()


@pytest.mark.e2e
def test_damaged_documents_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    """A line of 200 MB, invalid UTF-8, a cut-off page: the corpus says what became of each."""
    folder = pages(tmp_path / "pages")
    whole = json.dumps({"text": "A river carries water from the hills to the sea, and it never rests. " * 9})
    with open(folder / "lines.jsonl", "w", encoding="utf-8") as file:
        file.write('{"text": "')
        for _ in range(200):
            file.write("endless " * 125_000)
        file.write('"}\n' + whole + "\n")
    with open(folder / "bytes.jsonl", "wb") as file:
        file.write(
            b'{"text": "\xff\xfe\xfd broken"}\n' + whole.encode().replace(b"river", b"brook") + b"\n{cut off"
        )
    done = subprocess.run(
        [sys.executable, "-m", "pocketphi", "corpus", "build", "--set", f"inputs=[{folder}]", "--out",
         str(tmp_path / "corpus"), "--json"],
        capture_output=True, text=True, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = artifact.load(tmp_path / "corpus")
    counts = found.counts
    assert counts["documents_in"] == (
        counts["documents_kept"] + counts["documents_rejected"] + counts["documents_failed"]
    )
    failed = found.file("failures.jsonl").read_text()
    assert "lines.jsonl" in failed and "bytes.jsonl" in failed
    import pyarrow.parquet

    texts = [
        text
        for part in sorted((tmp_path / "corpus/documents").glob("*.parquet"))
        for text in pyarrow.parquet.read_table(part, columns=["text"])["text"].to_pylist()
    ]
    assert sum("river carries water" in t or "brook carries water" in t for t in texts) == 2
    assert any("cut off in the mid" in t for t in texts) or "broken.html" in failed


@pytest.mark.e2e
def test_a_corrupt_shard_is_named_and_made_again(
    copied: Path, source: Path, undisturbed: tuple[Path, dict]
) -> None:
    path = next((copied / "shards").glob("phase1*.bin"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    shutil.rmtree(copied / "train")
    again = run(copied, source)
    assert f"{path}: checksum differs from the manifest; making it again" in again.stderr
    figures = json.loads(again.stdout)
    assert figures["stages_made"] == ["shards", "train"]
    assert figures["checksums"] == undisturbed[1]["checksums"]


@pytest.mark.e2e
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_wrong_checkpoint_is_named(copied: Path, source: Path, damage: str) -> None:
    """A checkpoint folder without manifest, as people have them: a tensor is missing, or has another shape."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = copied / "sft"
    (folder / "manifest.json").unlink()
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(3, 5)
    save_file(weights, folder / "model.safetensors")
    for verb in (
        ["quantize", str(folder), "--out", str(copied / "q")],
        ["chat", "-p", "hi", "-m", str(folder)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pocketphi", *verb],
            capture_output=True, text=True, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert name in done.stderr or "blk.1.ffn_down" in done.stderr
        assert damage == "missing" or "3" in done.stderr
    assert not (copied / "q").exists()
