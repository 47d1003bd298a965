"""Fine-tuning learns what assistants say and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pocketphi import model as models
from pocketphi import tokenizer as tokenizers
from pocketphi.core.errors import DataError
from pocketphi.model import ModelConfig, PhiForCausalLM
from pocketphi.tokenizer.training import train as train_tokenizer
from pocketphi.train import sft
from pocketphi.train.chat_data import Chat, built_in
from pocketphi.train.config import SftConfig
from pocketphi.train.data import IGNORE


@pytest.fixture(scope="module")
def tokenizer():
    texts = [content for chat in built_in() for _, content in chat.messages] * 2
    return train_tokenizer(texts, tokenizers.TokenizerConfig(vocab_size=700))


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        torch_dtype="float32",
    )
    model = PhiForCausalLM(config)
    model.reset_parameters(seed=0)
    models.save(model, folder, tokenizer)
    return folder


CHATS = [
    Chat((("user", "What is a plant?"), ("assistant", "A plant is a living thing.")), "a"),
    Chat(
        (
            ("user", "Hi <|assistant|> there"),
            ("assistant", "Hello!"),
            ("user", "And?"),
            ("assistant", "Yes."),
        ),
        "a",
    ),
]


def test_mask_selects_the_answers_and_their_ends(tokenizer) -> None:
    train, _, counts = sft.encode_all(CHATS, tokenizer, SftConfig(heldout_ratio=0))
    for chat, encoded in zip(CHATS, train):
        learned = encoded.ids[encoded.mask].tolist()
        end = tokenizer.token_id("<|end|>")
        answers = [content for role, content in chat.messages if role == "assistant"]
        assert learned.count(end) == len(answers)
        text = tokenizer.decode(learned, skip_special=False)
        for answer in answers:
            assert answer in text
        assert "What" not in text and "there" not in text
    assert counts["trained_tokens_per_epoch"] == sum(int(c.mask[1:].sum()) for c in train)
    assert counts["tokens_assistant"] == 3  # role tokens, not those that the user typed


def test_rows_hold_whole_conversations_and_every_target_once(tokenizer) -> None:
    train, _, counts = sft.encode_all(built_in(), tokenizer, SftConfig(heldout_ratio=0, sequence_length=96))
    feed = sft.ChatFeed(train, 96, tokenizer.eos_id, seed=3)
    assert counts["chats_too_long"] + len(train) == len(built_in())
    for epoch in (0, 2):
        batch = feed.batch(epoch * feed.rows_per_epoch, feed.rows_per_epoch)
        targets = batch.targets_BT[batch.targets_BT != IGNORE]
        wanted = np.concatenate([c.ids[1:][c.mask[1:]] for c in train])
        assert sorted(targets.tolist()) == sorted(wanted.tolist())
        found = set()
        for ids, documents in zip(batch.ids_BT, batch.documents_BT):
            for mark in np.unique(documents):
                found.add(tuple(ids[documents == mark].tolist()))
        assert {tuple(c.ids[:-1].tolist()) for c in train} <= found
    full = feed.num_positions / (feed.rows_per_epoch * 96)
    assert full > 0.95
    assert not np.array_equal(feed.batch(0, 8).ids_BT, feed.batch(feed.rows_per_epoch, 8).ids_BT)


class Broken:
    """A tokenizer whose mask or ends are wrong."""

    def __init__(self, tokenizer, mask=None, drop_end=False) -> None:
        self._tokenizer, self._mask, self._drop_end = tokenizer, mask, drop_end

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def chat_with_mask(self, messages):
        ids, mask = self._tokenizer.chat_with_mask(messages)
        if self._drop_end:
            mask = [m and i not in self._tokenizer.stop_ids for i, m in zip(ids, mask)]
        return ids, mask if self._mask is None else [self._mask] * len(ids)


def test_empty_full_and_endless_masks_are_refused(tokenizer) -> None:
    config = SftConfig(heldout_ratio=0)
    with pytest.raises(DataError, match="2 without an answer"):
        sft.encode_all(CHATS, Broken(tokenizer, mask=False), config)
    with pytest.raises(DataError, match="everything, the questions too"):
        sft.encode_all(CHATS, Broken(tokenizer, mask=True), config)
    with pytest.raises(DataError, match="would never stop"):
        sft.encode_all(CHATS, Broken(tokenizer, drop_end=True), config)
    with pytest.raises(DataError, match="2 longer than 4 tokens"):
        sft.encode_all(CHATS, tokenizer, SftConfig(sequence_length=4, batch_tokens=4, micro_batch_tokens=4))


def test_a_tiny_model_learns_to_answer_and_to_stop(tokenizer, checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    pairs = [("What is a plant?", "A plant is a living thing."), ("What is ice?", "Ice is cold water.")]
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    config = SftConfig(
        data=[str(data)],
        built_in=False,
        from_corpus=0,
        heldout_ratio=0,
        epochs=60,
        learning_rate=1e-2,
        sequence_length=64,
        batch_tokens=64,
        micro_batch_tokens=64,
        num_threads=1,
        sample_prompts=[q for q, _ in pairs],
        sample_tokens=20,
    )
    made = sft.run(config, {"checkpoint": checkpoint}, out=tmp_path / "out")
    samples = [json.loads(line) for line in made.file("samples.jsonl").read_text().splitlines()]
    assert [s["text"] for s in samples] == [a for _, a in pairs]
    assert all(s["ended"] for s in samples)
    example = made.file("example.txt").read_text()
    assert "⟦" in example and example.index("<|user|>") < example.index("⟦")
    assert made.counts["chats_chats"] == 2
    # The folder is a model that loads, with the stop ids of the tokenizer.
    again = models.load(made.path)
    assert set(again.stop_ids) == tokenizer.stop_ids
    assert tokenizers.load(made.path).sha256 == tokenizer.sha256
    assert not list(tmp_path.glob("out.checkpoints*"))
    # Run once more it does nothing.
    before = made.path.stat().st_mtime_ns
    assert sft.run(config, {"checkpoint": checkpoint}, out=tmp_path / "out").checksum == made.checksum
    assert made.path.stat().st_mtime_ns == before
