"""Pre-training in phases: shards and a tokenizer in, a Hugging Face folder out.

The artifact holds the model (config.json, safetensors, tokenizer, generation_config.json),
`metrics.jsonl` and `samples.jsonl`. While a run goes on, its checkpoints lie beside the artifact in
`<out>.checkpoints-<fingerprint>/`; they are removed once the artifact is published.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pocketphi import model as models
from pocketphi import tokenizer as tokenizers
from pocketphi.core import artifact, machine, progress
from pocketphi.core import config as configuration
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.model import ModelConfig, PhiForCausalLM
from pocketphi.model.parametrization import MaximalUpdate
from pocketphi.train import parallel
from pocketphi.train.checkpoints import Store
from pocketphi.train.config import LoopConfig, TrainConfig
from pocketphi.train.data import IGNORE, Batch, PackedFeed
from pocketphi.train.parallel import World
from pocketphi.train.shards import open_split, split_names
from pocketphi.train.trainer import HeldOut, Phase, Result, Trainer


def run(
    config: TrainConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Train a model from random weights (or from `inputs["checkpoint"]`) through the phases.

    `inputs`: `shards` (artifact), `tokenizer` (artifact or folder), optionally `checkpoint`. Under
    torchrun every rank calls this; the main rank writes. Raises DataError for shards that are damaged,
    empty or of another tokenizer, ConfigError for settings that contradict them, UserError when the
    guard stops the run or the disk is full.
    """
    for name in ("shards", "tokenizer"):
        if name not in inputs:
            raise ConfigError(f"training needs {name}", hint="phi train SHARDS TOKENIZER --recipe RECIPE")
    shards = artifact.load(inputs["shards"], kind="shards")
    parents = [shards]
    tokenizer_folder = Path(given.path if isinstance(given := inputs["tokenizer"], Artifact) else given)
    if not tokenizer_folder.exists():
        raise DataError(f"{tokenizer_folder}: no such tokenizer")
    if (tokenizer_folder / artifact.MANIFEST).is_file():
        parents.append(artifact.load(given, kind="tokenizer"))
    sources = [] if len(parents) > 1 else sorted(tokenizer_folder.glob("tokenizer*"))
    if "checkpoint" in inputs:
        parents.append(artifact.load(inputs["checkpoint"], kind="checkpoint"))

    def make(world: World, logs: Path, store: Store) -> tuple[Trainer, Any]:
        tokenizer = tokenizers.load(tokenizer_folder)
        phases = []
        for settings in config.phases:
            split = open_split(
                shards, settings.split, tokenizer_sha256=tokenizer.sha256, verify=world.is_main
            )
            feed = PackedFeed(split, settings.sequence_length, seed=config.seed, mixture=settings.mixture)
            phases.append(Phase(settings, feed))
        if "checkpoint" in inputs:
            model = models.load(parents[-1].path, dtype=torch.float32)
            _check_vocabulary(model.config, tokenizer)
        else:
            model = PhiForCausalLM(model_config(config, tokenizer))
            model.reset_parameters(seed=config.seed, scale_residual=config.scale_residual)
        model.stop_ids = tuple(sorted(tokenizer.stop_ids))
        longest = max(p.sequence_length for p in config.phases)
        if longest > model.config.max_position_embeddings:
            raise ConfigError(
                f"sequence_length {longest} exceeds the model's {model.config.max_position_embeddings} positions",
                hint="set model_overrides.max_position_embeddings",
            )
        heldout = heldout_sets(
            shards, tokenizer.sha256, config.phases[-1].sequence_length, config.evaluate_tokens
        )
        if not heldout and world.is_main:
            progress.say("no held-out split: no bits per byte while training")

        def sample(model: PhiForCausalLM) -> list[dict[str, Any]]:
            return continuations(model, tokenizer, config.sample_prompts, config.sample_tokens)

        scaled = None
        if config.parametrization == "mup":
            scaled = MaximalUpdate.of(model.config, config.mup_base_width, config.mup_base_head_dim)
        trainer = Trainer(
            model,
            phases,
            config,
            world=world,
            store=store,
            logs=logs,
            heldout=heldout,
            sample=sample,
            maximal_update=scaled,
            redraw="checkpoint" not in inputs,
        )
        return trainer, tokenizer

    return train_into_artifact(config, parents, make, out=out, sources=sources)


def train_into_artifact(
    config: LoopConfig,
    parents: Sequence[Artifact],
    make: Callable[[World, Path, Store], tuple[Trainer, Any]],
    *,
    out: Path | None,
    sources: Sequence[Path | str] = (),
    finish: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Artifact:
    """Build a trainer with `make(world, logs folder, checkpoints)`, run it, publish a checkpoint.

    Shared by pre-training and fine-tuning. `finish(folder, counts)` may add files and counts.
    """
    out = out or artifact.default_path("checkpoint", config, parents, sources)
    asked: dict[str, Any] = {"kind": "checkpoint", "config": config, "parents": parents, "sources": sources}
    store = Store(checkpoints_folder(out, artifact.fingerprint("checkpoint", config, parents, sources)))
    if done := artifact.reuse(out, **asked):
        _remove_checkpoints(store, config)
        return done
    with determinism(config), parallel.world(config.device) as world:
        if not world.is_main:
            world.barrier()  # until the main rank has opened the draft
            trainer, _ = make(world, out.with_name(out.name + ".partial"), store)
            trainer.run()
            trainer.plain_model()
            world.barrier()  # until it is published
            return artifact.load(out, kind="checkpoint", verify=False)
        with artifact.create(out, **asked, seed=config.seed, resumable=True) as draft:
            world.barrier()
            trainer, tokenizer = make(world, draft.path, store)
            result = trainer.run()
            models.save(trainer.plain_model(), draft.path, tokenizer, dtype=config.export_dtype)
            draft.counts.update(counts_of(trainer, result))
            if finish is not None:
                finish(draft.path, draft.counts)
            draft.timings.update(result.timings)
        world.barrier()
        _remove_checkpoints(store, config)
    return draft.artifact


def counts_of(trainer: Trainer, result: Result) -> dict[str, Any]:
    """The flat figures of a finished run."""
    counts: dict[str, Any] = {
        "parameters": trainer.model.config.num_parameters,
        "tokens": result.cursor.tokens,
        "steps": result.cursor.step,
        "final_loss": result.last_loss,
        "steps_skipped": result.guard.num_skipped,
        "spikes": result.guard.num_spikes,
        "not_finite": result.guard.num_not_finite,
        "roll_backs": result.guard.num_roll_backs,
    }
    for name, figures in result.heldout.items():
        for key, value in figures.items():
            if key != "num_tokens":
                counts[f"{name.replace('-', '_')}_{key}"] = round(value, 6)
    return counts


def model_config(config: TrainConfig, tokenizer: Any) -> ModelConfig:
    """The named shape with the overrides, and vocabulary and special ids of the tokenizer.

    Raises ConfigError for an override that is not a field, or a vocabulary that does not fit.
    """
    named = ModelConfig.named(config.model)
    tree = configuration.to_tree(named)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for key, value in config.model_overrides.items():
        if key not in known:
            from pocketphi.core.errors import did_you_mean

            raise ConfigError(f"model_overrides: unknown key '{key}'{did_you_mean(key, known)}")
        tree[key] = value
    if "max_position_embeddings" in config.model_overrides and named.rope_scaling is None:
        tree.setdefault("original_max_position_embeddings", None)
        tree["original_max_position_embeddings"] = tree["max_position_embeddings"]
    tree["torch_dtype"] = config.export_dtype
    tree["vocab_size"] = config.model_overrides.get("vocab_size", tokenizer.vocab_size)
    tree["bos_token_id"], tree["eos_token_id"] = tokenizer.bos_id, tokenizer.eos_id
    tree["pad_token_id"] = tokenizer.eos_id
    result = ModelConfig(**tree)
    _check_vocabulary(result, tokenizer)
    return result


def _check_vocabulary(config: ModelConfig, tokenizer: Any) -> None:
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the model has {config.vocab_size} token ids, the tokenizer {tokenizer.vocab_size}",
            hint="use the tokenizer that the model was made with",
        )


class _TextTargets:
    """A feed in which the end-of-text targets are not counted: bits per byte are about the text."""

    def __init__(self, feed: PackedFeed, eos_id: int) -> None:
        self.feed, self.eos_id = feed, eos_id
        self.sequence_length = feed.sequence_length

    @property
    def rows_per_epoch(self) -> int:
        return self.feed.rows_per_epoch

    def batch(self, first_row: int, num_rows: int) -> Batch:
        batch = self.feed.batch(first_row, num_rows)
        batch.targets_BT[batch.targets_BT == self.eos_id] = IGNORE
        return batch

    def describe(self, num_rows: int) -> list[str]:
        return self.feed.describe(num_rows)


def heldout_sets(shards: Artifact, tokenizer_sha256: str, length: int, max_tokens: int) -> list[HeldOut]:
    """The first documents of every held-out split, up to `max_tokens` (whole documents)."""
    found = []
    for name in split_names(shards):
        if not name.startswith("heldout"):
            continue
        split = open_split(shards, name, tokenizer_sha256=tokenizer_sha256)
        ends = split.starts[1:]
        num_documents = max(1, int((ends <= max_tokens).sum()))
        part = split.first_documents(num_documents)
        feed = PackedFeed(part, length, seed=0)
        found.append(
            HeldOut(name, _TextTargets(feed, split.eos_id), feed.rows_per_epoch, part.num_bytes_text)
        )
    return found


def continuations(
    model: PhiForCausalLM, tokenizer: Any, prompts: Sequence[str], num_tokens: int
) -> list[dict[str, Any]]:
    """The most probable continuation of each prompt, greedily."""
    texts = []
    for prompt in prompts:
        # Documents open after an end-of-text token in training: so does a prompt.
        ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
        room = min(num_tokens, model.config.max_position_embeddings - len(ids))
        if room < 1:
            raise DataError(f"the sample prompt {prompt[:40]!r} fills the model's context")
        new = models.generate(model, ids, max_new_tokens=room, stop_ids=[tokenizer.eos_id])
        texts.append({"prompt": prompt, "text": tokenizer.decode([*ids[1:], *new])})
    return texts


class determinism:
    """Fix threads and algorithms for a run, and give the process back as it was."""

    def __init__(self, config: LoopConfig) -> None:
        self.num_threads = config.num_threads or machine.num_cores()

    def __enter__(self) -> None:
        self._before = (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )
        torch.set_num_threads(self.num_threads)
        # Every new tensor would be filled with NaN: memory traffic for an error we do not make.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before[0])
        torch.use_deterministic_algorithms(self._before[1])
        torch.utils.deterministic.fill_uninitialized_memory = self._before[2]  # type: ignore[attr-defined]


def checkpoints_folder(out: Path, fingerprint: str) -> Path:
    """Where the checkpoints of a run in progress lie; another configuration has another folder."""
    return out.with_name(f"{out.name}.checkpoints-{fingerprint[:8]}")


def _remove_checkpoints(store: Store, config: LoopConfig) -> None:
    if not config.keep_checkpoints:
        store.clear()
