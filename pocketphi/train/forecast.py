"""What a training run will cost, before it starts. Torch-free.

Three ways, by what is known:
- a run on this machine that takes longer than a rehearsal is rehearsed (rehearsal.py): seconds of a step
  and memory are measured with the real trainer, and multiplied out here;
- a shorter one, or one that cannot fit, is counted: FLOPs from the shape, over the rate of a matrix
  product measured here for a moment times the share of it that training reaches;
- a run on GPUs that are not here (`cluster`) is counted in cluster_forecast.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pocketphi.core import config as configuration
from pocketphi.core import machine, progress
from pocketphi.model.config import ModelConfig
from pocketphi.train import rehearsal
from pocketphi.train.cluster_forecast import GPUS, Gpu, cluster_plan, explain, gpu_memory_bytes, step_s
from pocketphi.train.config import LoopConfig, PhaseConfig, SftConfig, TrainConfig

# Share of the matrix-product rate that training reaches on a CPU where it is not rehearsed: nano on two
# cores (docs/experiments.md).
_CPU_SHARE = 0.30
_COMPILE_S = 45.0  # torch.compile, once a process
_REHEARSE_FROM_S = 30.0
_START_S = 5.0
# Text of a chat made from a document, and tokens that the template adds to a turn.
_CORPUS_CHAT_BYTES, _TURN_TOKENS = 262, 2.5
# A process with torch loaded, before any model; what reading Parquet files adds to it.
_BASE_BYTES = 450_000_000
_PARQUET_BYTES = 110_000_000
# What a process keeps of the corpus, the tokenizer and the shards that it made before.
_EARLIER_STAGES_BYTES = 160_000_000
_TOKENIZER_BYTES = 22_000_000  # of 8192 pieces, which a rehearsal does not load
_TYPICAL_HELDOUT_SETS = 2  # as full ones: sets are as large as their share of the corpus allows
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def peak_flops_of(name: str) -> float:
    """Dense bf16 peak of a GPU by its name; 0 when it is not in the table."""
    found = _gpu_of(name)
    return found.peak_flops if found else 0.0


def _gpu_of(name: str) -> Gpu | None:
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


@lru_cache(maxsize=1)
def measured_flops() -> float:
    """FLOP/s of a float32 matrix product on all cores of this CPU: the best of many, a fifth of a second
    in all. Processor time is taken, so that other programs count little."""
    size = 512
    rng = np.random.default_rng(0)
    a = rng.standard_normal((size, size), dtype=np.float32)
    a @ a  # starts the threads
    best, until = np.inf, time.perf_counter() + 0.2
    while time.perf_counter() < until or not np.isfinite(best):
        started = time.process_time()
        a @ a
        best = min(best, max(time.process_time() - started, 1e-6))
    return 2 * size**3 / best * machine.num_cores()


def loop_plan(
    config: LoopConfig,
    shape: ModelConfig,
    phases: Sequence[PhaseConfig],
    *,
    split_bytes: int = 0,
    extra_bytes: int = 0,
    heldout_tokens: int = 0,
    gpu_elsewhere: str = "H100",
) -> dict[str, Any]:
    """Forecast of one run of the loop through `phases` on this machine.

    `split_bytes` of token files are mapped into memory as they are read; `extra_bytes` the stage holds
    besides; `heldout_tokens` are measured at every evaluation. A run that wants a GPU where there is none
    is counted for one of `gpu_elsewhere`, and says so in `gpu` and `gpu_missing`.
    """
    tokens = [p.num_steps * p.batch_tokens for p in phases]
    flops = sum(shape.train_flops_per_token(p.sequence_length) * t for p, t in zip(phases, tokens))
    parameters = shape.num_parameters
    export = parameters * (4 if config.export_dtype == "float32" else 2)
    evaluations = len(phases)
    if config.evaluate_every_tokens:
        evaluations += sum(tokens) // config.evaluate_every_tokens
    gpu = _local_gpu(config)
    missing = config.device == "cuda" and gpu is None
    if missing:
        gpu = GPUS[gpu_elsewhere]
    if gpu is None:
        steps_s = flops / _cpu_rate(config)
        memory: float = max(_counted_memory(config, shape, phase) for phase in phases)
    else:
        steps_s = sum(p.num_steps * step_s(config, shape, p, gpu, p.batch_tokens) for p in phases)
        memory = max(gpu_memory_bytes(config, shape, phase, 1) for phase in phases)
    seconds = _START_S + steps_s * (1 + evaluations * heldout_tokens / sum(tokens) / 3)
    seconds += 3 * 12 * parameters / 3e8 + (_COMPILE_S if config.compile else 0)
    found = None
    fits = 1.5 * memory < machine.memory_available_bytes()
    if seconds > _REHEARSE_FROM_S and fits and gpu is None:
        found = rehearsal.measured(config, shape, phases)
    if found is not None:
        seconds, memory = _multiplied_out(config, phases, found, evaluations * heldout_tokens)
        memory += _TOKENIZER_BYTES * shape.vocab_size / 8192
    if gpu is None:
        memory += min(split_bytes, 2 * sum(tokens)) + extra_bytes
    return {
        "tokens": int(sum(tokens)),
        "parameters": parameters,
        "flops": float(flops),
        "wall_s": round(seconds, 1),
        "tokens_per_s": round(sum(tokens) / seconds, 1),
        "rehearsed": int(found is not None),
        **({"gpu": gpu_elsewhere, "gpu_missing": 1} if missing else {}),
        "peak_memory_bytes": 0 if missing else int(memory),
        # The artifact, and while the run goes on two checkpoints of weights and optimizer state.
        "disk_bytes": int(export + 2 * 12 * parameters + 200 * sum(p.num_steps for p in phases)),
        "vocab_size": shape.vocab_size,
    }


def _multiplied_out(
    config: LoopConfig, phases: Sequence[PhaseConfig], found: rehearsal.Measured, evaluated: int
) -> tuple[float, float]:
    """Seconds and bytes of the run whose parts were measured."""
    seconds = found.start_s + evaluated * found.evaluate_token_s
    seconds += len(phases) * len(config.sample_prompts) * config.sample_tokens * found.sample_token_s
    checkpoints = 0.0
    for phase, measured_s in zip(phases, found.step_s):
        steps = phase.num_steps * measured_s
        every = config.checkpoint_every_tokens or max(1, phase.tokens // 10)
        # Once after so many tokens, and once when so many seconds have passed without.
        checkpoints += max(phase.tokens / every, steps / config.checkpoint_every_s) + 1
        seconds += steps
    return seconds + checkpoints * found.checkpoint_s, found.peak_memory_bytes


def _local_gpu(config: LoopConfig) -> Gpu | None:
    """The GPU of this machine that the run would take; an unknown one counts as the slowest listed."""
    found = machine.gpus() if config.device != "cpu" else []
    if not found:
        return None
    return _gpu_of(str(found[0]["name"])) or min(GPUS.values(), key=lambda g: g.peak_flops)


def _cpu_rate(config: LoopConfig) -> float:
    """FLOP/s that training reaches on this CPU, where it is not measured."""
    cores = machine.num_cores()
    return measured_flops() * _CPU_SHARE * min(config.num_threads or cores, cores) / cores


def _counted_memory(config: LoopConfig, shape: ModelConfig, phase: PhaseConfig) -> int:
    width = 4 if config.dtype == "float32" else 2
    # Kept for the backward pass, per token and layer: inputs of the norms, products and rotations.
    per_layer = 12 * shape.hidden_size + 5 * shape.intermediate_size
    layers = max(shape.num_hidden_layers - config.checkpoint_layers, 1)
    activations = phase.micro_batch_tokens * width * per_layer * layers
    head = 3 * 4 * min(config.loss_chunk_tokens, phase.micro_batch_tokens) * shape.vocab_size
    return 16 * shape.num_parameters + activations + head + _BASE_BYTES


def train_plan(config: TrainConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast of pre-training: tokens, parameters, flops, wall_s, tokens_per_s, memory and disk.

    With `config.cluster.gpu` it is that of the cluster; see `cluster_forecast.cluster_plan`.
    """
    shape = planned_shape(config, inputs_plan)
    if config.cluster.gpu:
        figures = cluster_plan(config, shape)
        progress.say(explain(figures, config.cluster.gpu))
    else:
        figures = loop_plan(
            config,
            shape,
            config.phases,
            split_bytes=int(inputs_plan.get("shards", {}).get("disk_bytes", 0)),
            extra_bytes=_EARLIER_STAGES_BYTES if "corpus" in inputs_plan else 0,
            heldout_tokens=_TYPICAL_HELDOUT_SETS * config.evaluate_tokens,
        )
    # Flat figures of the shape: fine-tuning is planned with the same one.
    return figures | {name: int(getattr(shape, name)) for name in _SHAPE}


def planned_shape(config: TrainConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> ModelConfig:
    """The shape that will be trained, as far as it is known before the tokenizer exists."""
    tree = configuration.to_tree(ModelConfig.named(config.model))
    tree.update(config.model_overrides)
    if "max_position_embeddings" in config.model_overrides and tree["rope_scaling"] is None:
        tree["original_max_position_embeddings"] = None
    vocab_size = inputs_plan.get("tokenizer", {}).get("vocab_size")
    if vocab_size and "vocab_size" not in config.model_overrides:
        tree["vocab_size"] = int(vocab_size)
    return ModelConfig(**tree)


def sft_plan(config: SftConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast of fine-tuning; chat tokens are estimated from the bytes of the chats.

    The model is the one of the plan's `train` stage; nano without one.
    """
    from pocketphi.train.chat_data import built_in, data_bytes

    train = inputs_plan.get("train", {})
    tree = configuration.to_tree(ModelConfig.named("nano"))
    if set(_SHAPE) <= set(train):
        tree |= {name: train[name] for name in _SHAPE}
        tree["tie_word_embeddings"] = bool(train["tie_word_embeddings"])
        tree["original_max_position_embeddings"] = None
        tree["vocab_size"] = int(train["vocab_size"])
    shape = ModelConfig(**tree)
    text: float = data_bytes(config.data)
    turns = text / 400  # of chats in files, where nothing else is known
    corpus_chats = config.from_corpus if "corpus" in inputs_plan else 0
    text += corpus_chats * _CORPUS_CHAT_BYTES
    turns += 2 * corpus_chats
    if config.built_in:
        messages = [content for chat in built_in() for _, content in chat.messages]
        text += config.repeat_built_in * sum(len(content.encode()) for content in messages)
        turns += config.repeat_built_in * len(messages)
    per_token = 3.75 + 0.3 * np.log2(max(shape.vocab_size, 512) / 8192)
    tokens = (1 - config.heldout_ratio / 2) * (text / per_token + _TURN_TOKENS * turns)
    rows = max(1.0, 1.01 * tokens / config.sequence_length)
    steps = max(1, round(config.epochs * rows / (config.batch_tokens // config.sequence_length)))
    phase = PhaseConfig(
        name="sft",
        tokens=steps * config.batch_tokens,
        learning_rate=config.learning_rate,
        sequence_length=config.sequence_length,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        document_mask=config.document_mask,
    )
    plan = loop_plan(
        config,
        shape,
        [phase],
        gpu_elsewhere=str(train.get("gpu", "H100")),
        extra_bytes=(_PARQUET_BYTES if corpus_chats else 0)
        + (_EARLIER_STAGES_BYTES if "corpus" in inputs_plan else 0),
        heldout_tokens=int(config.heldout_ratio * tokens),
    )
    del plan["vocab_size"]
    return plan
