"""Supervised fine-tuning: a checkpoint and chats in, a checkpoint that answers out.

Shapes: T tokens of a row.

Chats become ids and a mask through the tokenizer's template, the same that serves them later; the
loss counts what assistants say and the token that ends their turn. Conversations are packed whole into
rows, kept apart by the document mask. The loop is the one of pre-training.

The artifact holds the model folder, `metrics.jsonl`, `samples.jsonl`, and `example.txt`: one
conversation as it was trained on, trained tokens marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import CheckpointError, DataError, UserError
from pocketphi.train import chat_data
from pocketphi.train.chat_data import Chat
from pocketphi.train.config import PhaseConfig, SftConfig
from pocketphi.train.data import IGNORE, Batch, Permutation

if TYPE_CHECKING:
    from pocketphi.model.transformer import PhiForCausalLM
    from pocketphi.train.checkpoints import Store
    from pocketphi.train.parallel import World
    from pocketphi.train.trainer import Trainer

__all__ = ["SftConfig", "plan", "run"]

_OPEN_ROWS = 200  # rows that still wait for a conversation that fits, while packing
_MARKS = ("⟦", "⟧")


def plan(config: SftConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast fine-tuning; see `pocketphi.train.forecast.sft_plan`."""
    from pocketphi.train import forecast

    return forecast.sft_plan(config, inputs_plan)


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids, with the mask of what is learned."""

    ids: np.ndarray
    mask: np.ndarray

    @property
    def num_positions(self) -> int:
        """Places it takes in a row: every id but the last is an input."""
        return len(self.ids) - 1


class ChatFeed:
    """Rows of whole conversations. Packed once by best fit; every epoch visits the rows in another order."""

    def __init__(self, chats: Sequence[Encoded], sequence_length: int, pad_id: int, *, seed: int) -> None:
        self.sequence_length, self.pad_id, self.seed = sequence_length, pad_id, seed
        self._rows = _pack(chats, sequence_length)
        self.num_chats = len(chats)
        self.num_targets = int(sum(c.mask[1:].sum() for c in chats))
        self.num_positions = sum(c.num_positions for c in chats)

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    def batch(self, first_row: int, num_rows: int) -> Batch:
        shape = (num_rows, self.sequence_length)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int32)
        for place in range(num_rows):
            epoch, index = divmod(first_row + place, len(self._rows))
            row = self._rows[Permutation(len(self._rows), self.seed, 0x5F7, epoch)(index)]
            begin = 0
            for number, chat in enumerate(row):
                end = begin + chat.num_positions
                ids[place, begin:end] = chat.ids[:-1]
                targets[place, begin:end] = np.where(chat.mask[1:], chat.ids[1:], IGNORE)
                documents[place, begin:end] = number
                begin = end
            documents[place, begin:] = len(row)
        return Batch(ids, targets, documents)

    def describe(self, num_rows: int) -> list[str]:
        places = len(self._rows) * self.sequence_length
        return [
            f"{self.num_chats} conversations in {len(self._rows)} rows ({self.num_positions / places:.0%} full), "
            f"{self.num_targets} trained tokens, {num_rows / len(self._rows):.2f} epochs"
        ]


def _pack(chats: Sequence[Encoded], length: int) -> list[list[Encoded]]:
    """Best fit, longest first, in a stable order."""
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (free places, row)
    for chat in sorted(chats, key=lambda c: (-c.num_positions, c.ids.tobytes())):
        fits = [entry for entry in room if entry[0] >= chat.num_positions]
        if fits:
            best = min(fits)
            room.remove(best)
            free, row = best[0] - chat.num_positions, best[1]
        else:
            rows.append([])
            free, row = length - chat.num_positions, len(rows) - 1
        rows[row].append(chat)
        if free > 4:
            room.append((free, row))
        if len(room) > _OPEN_ROWS:
            room.remove(min(room))
    return rows


def run(
    config: SftConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Fine-tune `inputs["checkpoint"]` (artifact or model folder) on chats.

    Optional inputs: `corpus`, from which chats are made by rule; `synth`, whose chats are added.
    Raises DataError when there is nothing to learn from, or the mask is empty or full.
    """
    import torch

    from pocketphi import model as models
    from pocketphi import tokenizer as tokenizers
    from pocketphi.train import pretrain
    from pocketphi.train.trainer import HeldOut, Phase, Trainer

    files = chat_data.files_of(config.data)
    given = inputs["checkpoint"]
    folder = given.path if isinstance(given, Artifact) else Path(given)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    parents: list[Artifact] = []
    sources: list[Path | str] = list(files)
    if (folder / artifact.MANIFEST).is_file():
        parents.append(artifact.load(given, kind="checkpoint"))
    else:
        sources += sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".json"))
    corpus = (
        artifact.load(inputs["corpus"], kind="corpus") if "corpus" in inputs and config.from_corpus else None
    )
    synth = artifact.load(inputs["synth"]) if "synth" in inputs else None
    parents += [parent for parent in (corpus, synth) if parent is not None]
    kept: dict[str, Any] = {}

    def make(world: World, logs: Path, store: Store) -> tuple[Trainer, Any]:
        model = models.load(folder, dtype=torch.float32)
        tokenizer = tokenizers.load(folder)
        if config.sequence_length > model.config.max_position_embeddings:
            raise UserError(
                f"sequence_length {config.sequence_length} exceeds the model's "
                f"{model.config.max_position_embeddings} positions",
                hint=f"use --set sequence_length={model.config.max_position_embeddings}",
            )
        model.stop_ids = tuple(sorted(tokenizer.stop_ids))
        chats, counts = collect(config, files, corpus, synth)
        train, held, more = encode_all(chats, tokenizer, config)
        counts.update(more)
        kept.update(counts=counts, example=show_example(train[0], tokenizer))
        pad = tokenizer.eos_id if tokenizer.eos_id is not None else 0
        feed = ChatFeed(train, config.sequence_length, pad, seed=config.seed)
        rows_per_step = config.batch_tokens // config.sequence_length
        steps = max(1, round(config.epochs * feed.rows_per_epoch / rows_per_step))
        tokens = steps * config.batch_tokens
        phase = PhaseConfig(
            name="sft",
            split="chats",
            tokens=tokens,
            learning_rate=config.learning_rate,
            sequence_length=config.sequence_length,
            batch_tokens=config.batch_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            schedule=config.schedule,
            warmup_tokens=int(config.warmup_ratio * tokens),
            decay_tokens=tokens - int(config.warmup_ratio * tokens) if config.schedule == "wsd" else 0,
            final_ratio=config.final_ratio,
            document_mask=config.document_mask,
        )
        heldout = []
        if held:
            held_feed = ChatFeed(held, config.sequence_length, pad, seed=0)
            heldout.append(HeldOut("heldout-chats", held_feed, held_feed.rows_per_epoch, 0))
        if world.is_main:
            for name, number in sorted(counts.items()):
                if name.startswith("left_out"):
                    progress.say(f"chats left out: {number} ({name[9:]})")
            progress.say("a conversation as it is trained on, trained tokens marked:\n" + kept["example"])

        def sample(model: PhiForCausalLM) -> list[dict[str, Any]]:
            return answers(model, tokenizer, config.sample_prompts, config.sample_tokens)

        trainer = Trainer(
            model,
            [Phase(phase, feed)],
            config,
            world=world,
            store=store,
            logs=logs,
            heldout=heldout,
            sample=sample,
        )
        return trainer, tokenizer

    def finish(place: Path, counts: dict[str, Any]) -> None:
        counts.update(kept["counts"])
        artifact.write_atomic(place / "example.txt", kept["example"] + "\n")

    return pretrain.train_into_artifact(config, parents, make, out=out, sources=sources, finish=finish)


def collect(
    config: SftConfig, files: Sequence[Path], corpus: Artifact | None, synth: Artifact | None
) -> tuple[list[Chat], dict[str, Any]]:
    """All chats of the run, and their counts by source."""
    left_out: Counter[str] = Counter()
    chats: list[Chat] = []
    for path in [*files, *([synth.file("chats.jsonl")] if synth is not None else [])]:
        chats += chat_data.read_file(
            path, left_out, max_rows=config.max_rows_per_file, max_characters=config.max_characters
        )
    if corpus is not None:
        made, kinds = chat_data.from_corpus(corpus, config.from_corpus)
        chats += made
        if not made:
            progress.say("sft: no document of the corpus reads like a definition; no chats were made from it")
        else:
            progress.say(f"sft: {len(made)} chats made from the corpus ({dict(kinds)})")
    if config.built_in:
        chats += chat_data.built_in() * config.repeat_built_in
    if not chats:
        raise DataError(
            "there is no chat to learn from",
            hint="give `data` files, leave `built_in` on, or give a corpus with encyclopedia-like documents",
        )
    by_source = Counter(chat.source for chat in chats)
    counts: dict[str, Any] = {"chats": len(chats)}
    counts |= {f"chats_{name.replace('-', '_')}": number for name, number in sorted(by_source.items())}
    counts |= {f"left_out {reason}": number for reason, number in sorted(left_out.items())}
    return chats, counts


def encode_all(
    chats: Sequence[Chat], tokenizer: Any, config: SftConfig
) -> tuple[list[Encoded], list[Encoded], dict[str, Any]]:
    """Encode, check, and split off the held-out conversations (by a hash, the same for equal texts).

    Raises DataError when nothing or everything would be trained on, when an answer has no end to
    learn, or when a conversation's start and end tokens do not count up to its messages.
    """
    train: list[Encoded] = []
    held: list[Encoded] = []
    too_long = no_target = 0
    totals: Counter[str] = Counter()
    for chat in chats:
        ids, mask = tokenizer.chat_with_mask(chat.as_messages())
        encoded = Encoded(np.array(ids, dtype=np.int64), np.array(mask, dtype=bool))
        if encoded.num_positions > config.sequence_length:
            too_long += 1
            continue
        if not encoded.mask[1:].any():
            no_target += 1
            continue
        totals += check_structure(chat, encoded, tokenizer)
        share = int.from_bytes(chat.key[:8], "big") / 2**64
        is_held = share < config.heldout_ratio and chat.source not in ("conversations", "arithmetic")
        (held if is_held else train).append(encoded)
    if not train:
        raise DataError(
            f"no conversation is left to train on: {too_long} longer than {config.sequence_length} tokens, "
            f"{no_target} without an answer",
            hint="raise sequence_length",
        )
    num_targets = sum(int(c.mask[1:].sum()) for c in train)
    num_positions = sum(c.num_positions for c in train)
    if num_targets in (0, num_positions):
        what = "nothing" if num_targets == 0 else "everything, the questions too,"
        raise DataError(
            f"the loss mask selects {what} of {num_positions} tokens",
            hint="the tokenizer's chat template does not tell answers from questions",
        )
    counts: dict[str, Any] = {
        "chats_trained": len(train),
        "chats_held_out": len(held),
        "chats_too_long": too_long,
        "trained_tokens_per_epoch": num_targets,
        "tokens_per_epoch": num_positions,
        **{f"tokens_{name}": number for name, number in sorted(totals.items())},
    }
    if too_long:
        progress.say(f"chats left out: {too_long} (longer than {config.sequence_length} tokens)")
    if no_target:
        counts["chats_without_target"] = no_target
        progress.say(f"chats left out: {no_target} (no trained token)")
    return train, held, counts


def check_structure(chat: Chat, encoded: Encoded, tokenizer: Any) -> Counter[str]:
    """Count role, end and stop tokens of a conversation against its messages.

    Raises DataError on a difference: a role token out of the text, or an answer without a trained end.
    """
    ids = encoded.ids.tolist()
    answers = sum(role == "assistant" for role, _ in chat.messages)
    found: Counter[str] = Counter()
    for role in ("system", "user", "assistant"):
        token = tokenizer.token_id(f"<|{role}|>")
        if token is None:
            continue
        wanted = sum(r == role for r, _ in chat.messages)
        found[role] = ids.count(token)
        # A template may drop or merge system turns; it may not lose or invent the others.
        if role != "system" and found[role] not in (0, wanted):
            raise DataError(f"a conversation of {wanted} {role} turns has {found[role]} tokens <|{role}|>")
    trained_ends = sum(i in tokenizer.stop_ids for i, m in zip(ids, encoded.mask) if m)
    found["trained_ends"] = trained_ends
    if trained_ends < answers:
        raise DataError(
            f"{answers} answers have {trained_ends} trained end tokens: the model would never stop",
            hint="the chat template and the tokenizer's stop tokens do not fit together",
        )
    return found


def show_example(encoded: Encoded, tokenizer: Any) -> str:
    """The conversation as text with special tokens, trained stretches between marks."""
    text = ""
    trained = False
    stretch: list[int] = []
    for id_, is_trained in [*zip(encoded.ids.tolist(), encoded.mask.tolist()), (None, not encoded.mask[-1])]:
        if stretch and is_trained != trained:
            decoded = _plain(stretch, tokenizer)
            text += _MARKS[0] + decoded + _MARKS[1] if trained else decoded
            stretch = []
        trained = is_trained
        if id_ is not None:
            stretch.append(id_)
    return text


def _plain(ids: Sequence[int], tokenizer: Any) -> str:
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], num_tokens: int) -> list[dict[str, Any]]:
    """The greedy answer to each prompt, and whether it ended by itself."""
    from pocketphi import model as models

    texts = []
    for prompt in prompts:
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
        room = min(num_tokens, model.config.max_position_embeddings - len(ids))
        if room < 1:
            raise DataError(f"the sample prompt {prompt[:40]!r} fills the model's context")
        new = models.generate(model, ids, max_new_tokens=room, stop_ids=tokenizer.stop_ids)
        texts.append({"prompt": prompt, "text": tokenizer.decode(new), "ended": len(new) < room})
    return texts
