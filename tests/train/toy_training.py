"""Toy shards: documents of random bytes, a tokenizer of one token a byte."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch

from pocketphi.train import shards
from pocketphi.train.chat_data import built_in
from pocketphi.train.config import PhaseConfig
from pocketphi.train.data import PackedFeed


def texts(count: int = 120) -> list[str]:
    """Documents of a few plain sentences each."""
    sentences = [chat.messages[-1][1] for chat in built_in() if chat.source == "conversations"]
    rng = random.Random(0)
    return [" ".join(rng.sample(sentences, rng.randint(1, 4))) for _ in range(count)]


class ByteTokenizer:
    """Token = byte + 3; 0 is unknown, 1 begins, 2 ends."""

    vocab_size = 300
    eos_id = 259
    bos_id = 1
    stop_ids = frozenset([259])
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [b + 3 for b in text.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

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
    writer.add(documents)
    return writer.close()


def toy_model(**changes: Any):
    from pocketphi.model import ModelConfig, PhiForCausalLM

    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 259,
        "pad_token_id": 259,
        "torch_dtype": "float32",
    }
    model = PhiForCausalLM(ModelConfig(**{**shape, **changes}))
    model.reset_parameters(seed=0)
    return model


def toy_phases(**changes: Any) -> list[PhaseConfig]:
    common = {"sequence_length": 32, "batch_tokens": 256, "micro_batch_tokens": 128, "learning_rate": 3e-3}
    first = {"name": "one", "tokens": 256 * 12, "warmup_tokens": 512, **common, **changes}
    second = {
        "name": "two",
        "split": "phase2",
        "tokens": 256 * 6,
        "decay_tokens": 256 * 6,
        **common,
        **changes,
    }
    return [PhaseConfig(**first), PhaseConfig(**second)]


def toy_trainer(
    shards_folder: Path, run_folder: Path, phases: list[PhaseConfig] | None = None, **settings: Any
):
    """A trainer of the toy model on toy shards, with one held-out set."""
    from pocketphi.train.checkpoints import Store
    from pocketphi.train.config import LoopConfig
    from pocketphi.train.parallel import World
    from pocketphi.train.trainer import HeldOut, Phase, Trainer

    torch.set_num_threads(1)  # the bits of a sum may depend on it
    world = settings.pop("world", World(0, 1, torch.device("cpu")))
    model = settings.pop("model", None) or toy_model()
    config = LoopConfig(**{"monitor_every_steps": 5, **settings})
    run_folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for phase in phases or toy_phases():
        feed = PackedFeed(
            shards.open_split(shards_folder, phase.split), phase.sequence_length, seed=config.seed
        )
        pairs.append(Phase(phase, feed))
    held = shards.open_split(shards_folder, "heldout-web")
    held_feed = PackedFeed(held, 32, seed=0)
    heldout = [HeldOut("heldout-web", held_feed, held_feed.rows_per_epoch, held.num_bytes_text)]
    return Trainer(
        model,
        pairs,
        config,
        world=world,
        store=Store(run_folder / "checkpoints"),
        logs=run_folder,
        heldout=heldout,
    )
