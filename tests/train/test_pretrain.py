"""The pre-training stage on a real tokenizer: shards in, a model folder out; the same after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train.toy_training import texts

from pocketphi import model as models
from pocketphi import tokenizer as tokenizers
from pocketphi import train
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.tokenizer.training import train as train_tokenizer
from pocketphi.train import pretrain, sft, shards
from pocketphi.train.config import OptimizerConfig, PhaseConfig, SftConfig, TrainConfig
from pocketphi.train.trainer import Trainer


def small_config(**changes: Any) -> TrainConfig:
    common = {"sequence_length": 32, "batch_tokens": 256, "micro_batch_tokens": 256, "learning_rate": 3e-3}
    settings: dict[str, Any] = {
        "model_overrides": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        },
        "num_threads": 1,
        "optimizer": OptimizerConfig(kind="muon"),
        "phases": [
            PhaseConfig(name="one", tokens=2048, warmup_tokens=512, **common),
            PhaseConfig(
                name="two", split="phase2", tokens=1024, decay_tokens=1024, mixture={"*": 1.0}, **common
            ),
        ],
        "checkpoint_every_tokens": 512,
        "evaluate_every_tokens": 1024,
        "sample_prompts": ["The river"],
        "sample_tokens": 5,
    }
    return TrainConfig(**{**settings, **changes})


def test_shards_of_a_corpus_artifact(made_shards: Artifact, tokenizer_folder: Path) -> None:
    counts = made_shards.counts
    assert counts["documents_in"] == 120
    kept = counts["documents_in"] - counts["documents_rejected"] - counts["documents_unassigned"]
    held = sum(v for k, v in counts.items() if k.startswith("documents_heldout"))
    assert counts["documents_phase1"] + held == kept
    split = shards.open_split(
        made_shards, "phase1", tokenizer_sha256=tokenizers.load(tokenizer_folder).sha256
    )
    assert [s.name for s in split.sources] == ["books", "web"]
    text = tokenizers.load(tokenizer_folder).decode(split.tokens[: int(split.starts[1])].tolist())
    assert text in texts()


def test_run_gives_a_model_folder_and_again_after_a_cut(
    made_shards: Artifact, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"shards": made_shards, "tokenizer": tokenizer_folder}
    config = small_config()
    whole = train.run(config, inputs, out=tmp_path / "whole")
    tokenizer = tokenizers.load(whole.path)
    model = models.load(whole.path)
    assert set(model.stop_ids) == tokenizer.stop_ids
    assert model.config.vocab_size == tokenizer.vocab_size
    assert whole.counts["parameters"] == model.config.num_parameters
    assert whole.counts["tokens"] == 3072
    assert 0 < whole.counts["heldout_web_bits_per_byte"] < 8
    assert whole.manifest["timings"]["tokens_per_s"] > 0
    lines = [json.loads(line) for line in whole.file("metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 12
    assert {line["step"] for line in lines if line.get("event") == "heldout"} == {4, 8, 12}
    samples = [json.loads(line) for line in whole.file("samples.jsonl").read_text().splitlines()]
    assert [s["phase"] for s in samples] == ["one", "two"]
    assert all(s["text"].startswith("The river") for s in samples)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["whole"]

    one_step = Trainer.one_step

    def cut(self: Trainer, phase: Any) -> None:
        if self.cursor.step == 9:
            raise KeyboardInterrupt
        one_step(self, phase)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "one_step", cut)
        train.run(config, inputs, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    again = train.run(config, inputs, out=tmp_path / "cut")
    assert again.checksum == whole.checksum
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"whole", "cut"}


def test_continued_training_starts_from_the_checkpoint(
    made_shards: Artifact, tokenizer_folder: Path, tmp_path: Path
) -> None:
    first = train.run(
        small_config(), {"shards": made_shards, "tokenizer": tokenizer_folder}, out=tmp_path / "a"
    )
    config = small_config(phases=small_config().phases[1:])
    inputs = {"shards": made_shards, "tokenizer": tokenizer_folder, "checkpoint": first}
    second = train.run(config, inputs, out=tmp_path / "b")
    begin = [
        json.loads(made.file("metrics.jsonl").read_text().splitlines()[0])["loss"] for made in (first, second)
    ]
    assert begin[1] < begin[0] - 0.3


def test_contradictions_between_settings_and_inputs_are_refused(
    made_shards: Artifact, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(texts()[:60], tokenizers.TokenizerConfig(vocab_size=399)).save(other)
    with pytest.raises(DataError, match="another tokenizer"):
        train.run(small_config(), {"shards": made_shards, "tokenizer": other}, out=tmp_path / "x")
    inputs = {"shards": made_shards, "tokenizer": tokenizer_folder}
    for changes, message in (
        ({"model_overrides": {"hidden_sise": 3}}, "hidden_size"),
        ({"model_overrides": {"vocab_size": 300}}, "300 token ids, the tokenizer 400"),
        ({"model_overrides": {**small_config().model_overrides, "max_position_embeddings": 16}}, "exceeds"),
        (
            {"phases": [PhaseConfig(name="p", tokens=512, learning_rate=1e-3, mixture={"novels": 1.0})]},
            "matches no",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            train.run(small_config(**changes), inputs, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bits_per_byte_count_the_text_alone(made_shards: Artifact, tokenizer_folder: Path) -> None:
    """Against a straight computation: every document after an end token, in nats, by its bytes."""
    import math

    import torch

    tokenizer = tokenizers.load(tokenizer_folder)
    config = small_config()
    model = pretrain.PhiForCausalLM(pretrain.model_config(config, tokenizer))
    model.reset_parameters(seed=1)
    (entry,) = [
        e for e in pretrain.heldout_sets(made_shards, tokenizer.sha256, 64, 10**6) if e.name == "heldout-web"
    ]
    split = shards.open_split(made_shards, "heldout-web")
    nll = 0.0
    for a, b in zip(split.starts[:-1], split.starts[1:]):
        ids = [tokenizer.eos_id, *split.tokens[int(a) : int(b) - 1].tolist()]
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        nll -= float(log_p[range(len(ids) - 1), ids[1:]].sum())
    wanted = nll / math.log(2) / int(split.nbytes.sum())
    assert entry.num_bytes == int(split.nbytes.sum())
    from pocketphi.train.loss import TokenLoss

    total = 0.0
    with torch.no_grad():
        batch = entry.feed.batch(0, entry.num_rows)
        arrays = (batch.ids_BT, batch.targets_BT, batch.documents_BT)
        total = float(TokenLoss(model)(*(torch.from_numpy(a) for a in arrays))[0])
    # Rows cut long documents, which costs a little context: close, not equal.
    assert total / math.log(2) / entry.num_bytes == pytest.approx(wanted, rel=0.02)


def test_plan_counts_what_a_run_then_has(made_shards: Artifact, tokenizer_folder: Path) -> None:
    found = train.plan(small_config(), {"tokenizer": {"vocab_size": 400}})
    tokenizer = tokenizers.load(tokenizer_folder)
    assert found["parameters"] == pretrain.model_config(small_config(), tokenizer).num_parameters
    assert found["tokens"] == 3072
    assert {"wall_s", "peak_memory_bytes", "disk_bytes", "flops"} <= set(found)
    assert all(isinstance(value, (int, float)) for value in found.values())
    chat = sft.plan(SftConfig(num_threads=1), {"train": found})
    assert chat["parameters"] == found["parameters"]
    assert chat["wall_s"] > 0 and chat["tokens"] > 0
    full = train.plan(TrainConfig(model="phi-3-mini-4k", num_threads=1), {})
    assert full["parameters"] == 3_821_079_552
    assert full["peak_memory_bytes"] > 16 * 3.8e9


def test_the_evaluation_reads_held_out_documents_from_shards(
    made_shards: Artifact, tokenizer_folder: Path
) -> None:
    """The seam between the shards and the bits-per-byte evaluation: the documents come back as text."""
    from types import SimpleNamespace

    from pocketphi.evals import bits

    scorer = SimpleNamespace(tokenizer=tokenizers.load(tokenizer_folder))
    found = [
        text
        for name in bits.heldout_splits(made_shards)
        for _, text in bits.heldout_documents(made_shards, name, scorer)
    ]
    assert found
    assert set(found) <= set(texts())
    assert len(found) == sum(v for k, v in made_shards.counts.items() if k.startswith("documents_heldout"))
