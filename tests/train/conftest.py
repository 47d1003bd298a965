"""Fixtures of the training tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train.toy_training import texts, toy_documents, write_shards

from pocketphi import tokenizer as tokenizers
from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.tokenizer.training import train as train_tokenizer
from pocketphi.train import shards


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, toy_documents())
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(), tokenizers.TokenizerConfig(vocab_size=400)).save(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    import pyarrow
    from pyarrow import parquet

    out = tmp_path_factory.mktemp("corpus") / "corpus"
    rows: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for i, text in enumerate(texts()):
        meta = json.dumps({"input": ["web", "books"][i % 2] + ".jsonl.zst"})
        common = {"url": "", "source": "x@1", "license": "MIT", "fetched_at": "", "meta": meta}
        rows.append({"id": f"{i:032x}", "text": text, **common})
        marks = {"keep": i % 11 != 3, "phase1": True, "phase2": i % 2 == 1, "heldout": i % 10 == 0}
        verdicts.append({"id": f"{i:032x}", **marks})
    with artifact.create(out, kind="corpus", config={}) as draft:
        for name, table in (("documents", rows), ("verdicts", verdicts)):
            (draft.path / name).mkdir()
            for part in range(2):
                piece = table[part * 60 : part * 60 + 60]
                parquet.write_table(
                    pyarrow.Table.from_pylist(piece), draft.path / name / f"part-{part:05d}.parquet"
                )
        draft.counts["documents_in"] = len(rows)
    return draft.artifact


@pytest.fixture(scope="session")
def made_shards(
    corpus: Artifact, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    out = tmp_path_factory.mktemp("shards") / "shards"
    return shards.run(shards.ShardsConfig(), {"corpus": corpus, "tokenizer": tokenizer_folder}, out=out)


@pytest.fixture(scope="session")
def ladder_inputs(made_shards: Artifact, tokenizer_folder: Path) -> dict[str, Any]:
    return {"shards": made_shards, "tokenizer": tokenizer_folder}
