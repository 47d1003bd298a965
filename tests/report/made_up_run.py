"""A small made-up run: every artifact that the report reads, in the shape that the stages write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact

TEXTS = [
    ("d0", "A plant is a living thing that makes its own food from sunlight and water.", True, []),
    ("d1", "Buy cheap pills now <script>alert(1)</script> click here", False, ["spam", "length"]),
    ("d2", "The capital of France is Paris, a city on the river Seine.", True, []),
    ("d3", "zzz", False, ["length"]),
    ("d4", "Rain forms when water in the clouds grows heavy and falls.", True, []),
]


def build_run(folder: Path, *, steps: int = 60) -> Path:
    """Write the artifacts of a run into `folder` (corpus, tokenizer, shards, train, eval, log, forecast)."""
    folder.mkdir(parents=True)
    with progress.run_log(folder / "log.jsonl"):
        corpus = _corpus(folder / "corpus")
        tokenizer = _plain(
            folder / "tokenizer", "tokenizer", {"tokenizer.json": "{}"}, [corpus], vocab_size=8192
        )
        shards = _plain(
            folder / "shards", "shards", {"phase1.bin": "x"}, [corpus, tokenizer], tokens_phase1=1_200_000
        )
        train = _train(folder / "train", [shards, tokenizer], steps)
        _eval(folder / "eval", [train, shards])
    forecast = {
        name: {"wall_s": seconds, "peak_memory_bytes": 900_000_000, "disk_bytes": 5_000_000}
        for name, seconds in (("corpus", 40), ("tokenizer", 10), ("shards", 8), ("train", 300), ("eval", 30))
    }
    (folder / "forecast.json").write_text(json.dumps(forecast))
    return folder


def _plain(path: Path, kind: str, files: dict[str, str], parents: list[Artifact], **counts: int) -> Artifact:
    with artifact.create(path, kind=kind, config={"kind": kind}, parents=parents) as draft:
        for name, text in files.items():
            (draft.path / name).write_text(text)
        draft.counts.update(counts)
        draft.timings["wall_s"] = {"tokenizer": 12.0, "shards": 6.5}.get(kind, 1.0)
    return draft.artifact


def _corpus(path: Path) -> Artifact:
    with artifact.create(path, kind="corpus", config={"inputs": ["pages"]}) as draft:
        for name in ("documents", "verdicts"):
            (draft.path / name).mkdir()
        ids, texts, keeps, reasons = zip(*TEXTS)
        n = len(ids)
        documents = pyarrow.table(
            {
                "id": list(ids),
                "text": list(texts),
                "url": [f"https://example.org/{i}" for i in ids],
                "source": ["pages"] * n,
                "license": ["CC-BY-4.0"] * n,
                "fetched_at": [""] * n,
                "meta": ["{}"] * n,
            }
        )
        verdicts = pyarrow.table(
            {
                "id": list(ids),
                "length.score": np.arange(n, dtype=np.float32),
                "length.keep": ["length" not in r for r in reasons],
                "spam.score": np.arange(n, dtype=np.float32),
                "spam.keep": ["spam" not in r for r in reasons],
                "educational.score": np.linspace(0.5, 3.5, n, dtype=np.float32),
                "keep": list(keeps),
                "reasons": pyarrow.array(list(reasons), pyarrow.list_(pyarrow.string())),
                "phase1": list(keeps),
                "phase2": [k and i == "d0" for i, k in zip(ids, keeps)],
                "heldout": [False] * n,
            }
        )
        pyarrow.parquet.write_table(documents, draft.path / "documents" / "part-00000.parquet")
        pyarrow.parquet.write_table(verdicts, draft.path / "verdicts" / "part-00000.parquet")
        (draft.path / "stats.json").write_text(json.dumps(_stats()))
        draft.counts.update(documents_in=6, documents_kept=3, documents_rejected=2, documents_failed=1)
        draft.timings["wall_s"] = 43.0
    return draft.artifact


def _stats() -> dict:
    rng = np.random.default_rng(0)
    kept = np.histogram(rng.normal(2.6, 0.7, 3200), 50, (0, 5))[0]
    rejected = np.histogram(rng.normal(1.4, 0.6, 2100), 50, (0, 5))[0]
    rules = {
        "length": 700,
        "language": 420,
        "educational": 380,
        "repetition": 260,
        "spam": 190,
        "duplicate": 150,
    }
    return {
        "totals": {
            "documents_in": 5420,
            "documents_kept": 3200,
            "documents_rejected": 2100,
            "documents_failed": 120,
            "documents_phase1": 3100,
            "documents_phase2": 900,
            "documents_heldout": 60,
        },
        "rules": {n: {"rejected": c, "rejected_alone": c // 3, "about": n} for n, c in rules.items()},
        "sources": {
            "web pages": {"quality": "web", "documents_kept": 2000, "documents_rejected": 1900},
            "textbooks": {"quality": "textbook", "documents_kept": 1200, "documents_rejected": 200},
        },
        "educational_histogram": {
            "edges": np.linspace(0, 5, 51).round(3).tolist(),
            "kept": kept.tolist(),
            "rejected": rejected.tolist(),
        },
    }


def _train(path: Path, parents: list[Artifact], steps: int) -> Artifact:
    rng = np.random.default_rng(1)
    with artifact.create(path, kind="checkpoint", config={"phases": 2}, parents=parents) as draft:
        for step in range(0, steps, 5):
            speed = 9000 + 700 * math.sin(step / 5)
            progress.event("train_step", step=step, tokens=step * 16384, tokens_per_s=speed)
        with open(draft.path / "metrics.jsonl", "w") as file:
            for step in range(1, steps + 1):
                phase = "phase1" if step <= steps * 0.7 else "phase2"
                loss = 3.1 + 5.6 * math.exp(-step / (steps * 0.14)) - (0.25 if phase == "phase2" else 0)
                row = {
                    "event": "step",
                    "step": step,
                    "tokens": step * 16384,
                    "phase": phase,
                    "loss": loss + float(rng.normal(0, 0.07)),
                    "learning_rate": 1e-3
                    * min(1, step / (steps * 0.08))
                    * (1 if phase == "phase1" else 1 - (step / steps - 0.7) / 0.3),
                }
                file.write(json.dumps(row) + "\n")
                if step % (steps // 6) == 0:
                    held = {"heldout-web": {"nll_per_token": loss + 0.1, "num_tokens": 9}}
                    file.write(
                        json.dumps(
                            {"event": "heldout", "step": step, "tokens": step * 16384, "heldout": held}
                        )
                        + "\n"
                    )
        (draft.path / "config.json").write_text("{}")
        draft.counts.update(num_parameters=4_100_000, tokens=steps * 16384, steps=steps)
        draft.timings["wall_s"] = 282.0
    return draft.artifact


def _eval(path: Path, parents: list[Artifact]) -> Artifact:
    def task(name: str, title: str, value: float, n: int, chance: float, **more: object) -> dict:
        return {
            "task": name, "name": name, "title": title, "kind": "choice", "shots": 0, "format": "cloze",
            "metric": "accuracy_norm", "value": value, "stderr": math.sqrt(value * (1 - value) / n), "n": n,
            "chance": chance, **more,
        }  # fmt: skip

    results = {
        "schema": 1,
        "model": "tiny/quantize",
        "suite": "quick",
        "limit": 100,
        "identity": {"engine": "pocketphi.engine", "start_token": "auto: none", "file_sha256": "ab" * 32},
        "tasks": [
            {
                "task": "bits", "name": "bits", "title": "Bits per byte", "kind": "bits", "shots": 0, "format": None,
                "metric": "bits_per_byte", "value": 1.4321, "stderr": 0.012, "n": 60,
            },
            task("house", "House questions", 0.47, 60, 0.25),
            task("arc_easy", "ARC-Easy", 0.36, 100, 0.25, contaminated_share=0.01),
            task("piqa", "PIQA", 0.56, 100, 0.5),
            task("hellaswag", "HellaSwag", 0.27, 100, 0.25),
        ],
        "skipped": [{"task": "winogrande", "reason": "no data: winogrande_xl.validation.jsonl.zst"}],
    }  # fmt: skip
    with artifact.create(path, kind="eval", config={"suite": "quick"}, parents=parents) as draft:
        (draft.path / "results.json").write_text(json.dumps(results))
        (draft.path / "items.jsonl").write_text("{}\n")
        draft.timings["wall_s"] = 25.0
    return draft.artifact
