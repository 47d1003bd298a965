"""What a training run will cost, before it starts. Torch-free.

FLOPs are counted from the shape; the speed is the rate of a matrix product measured here for a moment
(or the peak of a GPU that is present), times the share of it that this trainer reaches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from pocketphi.core import config as configuration
from pocketphi.core import machine
from pocketphi.model.config import ModelConfig
from pocketphi.train.config import LoopConfig, SftConfig, TrainConfig

# Shares of the matrix-product rate that training reaches; measured, see docs/experiments.md.
_CPU_SHARE = 0.55
_GPU_SHARE = 0.40
# Dense bf16 FLOP/s of GPUs, by a part of the name nvidia-smi gives.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
# Text of the package's own chats, and of one made from a document.
_BUILT_IN_BYTES, _CORPUS_CHAT_BYTES = 40_000, 350
# A process with torch loaded, before any model.
_BASE_BYTES = 450_000_000


def peak_flops_of(name: str) -> float:
    """Dense bf16 peak of a GPU by its name; 0 when it is not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


@lru_cache(maxsize=1)
def measured_flops() -> float:
    """FLOP/s of a float32 matrix product on this CPU: the best of a few, a fifth of a second in all."""
    size = 768
    rng = np.random.default_rng(0)
    a = rng.standard_normal((size, size), dtype=np.float32)
    a @ a  # starts the threads
    best, until = np.inf, time.perf_counter() + 0.2
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def loop_plan(
    config: LoopConfig, shape: ModelConfig, tokens: int, sequence_length: int, micro_batch_tokens: int
) -> dict[str, Any]:
    """Forecast of one run of the loop over `tokens` tokens."""
    flops = shape.train_flops_per_token(sequence_length) * tokens
    gpu = machine.gpus() if config.device != "cpu" else []
    if gpu:
        rate = (config.peak_flops or peak_flops_of(str(gpu[0]["name"])) or 1e14) * _GPU_SHARE
    else:
        rate = measured_flops() * _CPU_SHARE
    parameters = shape.num_parameters
    width = 4 if config.dtype == "float32" else 2
    # Kept for the backward pass, per token and layer: inputs of the norms, products and rotations.
    per_layer = 12 * shape.hidden_size + 5 * shape.intermediate_size
    layers = shape.num_hidden_layers
    activations = micro_batch_tokens * width * (per_layer * max(layers - config.checkpoint_layers, 1))
    head = 3 * 4 * min(config.loss_chunk_tokens, micro_batch_tokens) * shape.vocab_size
    memory = 16 * parameters + activations + head + (0 if gpu else _BASE_BYTES)
    export = parameters * (4 if config.export_dtype == "float32" else 2)
    return {
        "tokens": int(tokens),
        "parameters": parameters,
        "flops": float(flops),
        "wall_s": round(6 + flops / rate + 3 * 12 * parameters / 3e8, 1),
        "tokens_per_s": round(tokens * rate / flops, 1),
        "peak_memory_bytes": int(memory),
        # The artifact, and while the run goes on two checkpoints of weights and optimizer state.
        "disk_bytes": int(export + 2 * 12 * parameters + 200 * tokens / max(micro_batch_tokens, 1)),
        "vocab_size": shape.vocab_size,
    }


def train_plan(config: TrainConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast of pre-training: tokens, parameters, flops, wall_s, tokens_per_s, memory and disk."""
    shape = planned_shape(config, inputs_plan)
    totals: dict[str, Any] = {}
    for phase in config.phases:
        tokens = phase.num_steps * phase.batch_tokens
        part = loop_plan(config, shape, tokens, phase.sequence_length, phase.micro_batch_tokens)
        for key in ("tokens", "flops", "wall_s"):
            totals[key] = round(totals.get(key, 0) + part[key], 1)
        totals["peak_memory_bytes"] = max(totals.get("peak_memory_bytes", 0), part["peak_memory_bytes"])
        for key in ("parameters", "disk_bytes", "vocab_size"):
            totals[key] = part[key]
    totals["tokens_per_s"] = round(totals["tokens"] / totals["wall_s"], 1)
    return totals


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
    """Forecast of fine-tuning; chat tokens are guessed from the sizes of the files (4 bytes a token).

    The model is the one of the plan's `train` stage, as far as its figures tell; nano without one.
    """
    from pocketphi.train.chat_data import data_bytes

    built_in = _BUILT_IN_BYTES * config.repeat_built_in if config.built_in else 0
    text = data_bytes(config.data) + _CORPUS_CHAT_BYTES * config.from_corpus + built_in
    tokens = max(int(config.epochs * text / 4 * 1.15), config.batch_tokens)
    plan = loop_plan(
        config, ModelConfig.named("nano"), tokens, config.sequence_length, config.micro_batch_tokens
    )
    train = inputs_plan.get("train", {})
    if {"flops", "tokens", "parameters"} <= set(train):
        grown = float(train["flops"]) / float(train["tokens"]) / (plan["flops"] / tokens)
        more = float(train["parameters"]) / plan["parameters"]
        plan["flops"] *= grown
        plan["wall_s"] = round(6 + (plan["wall_s"] - 6) * grown, 1)
        plan["tokens_per_s"] = round(plan["tokens_per_s"] / grown, 1)
        plan["disk_bytes"] = int(plan["disk_bytes"] * more)
        plan["peak_memory_bytes"] = max(plan["peak_memory_bytes"], int(train.get("peak_memory_bytes", 0)))
        plan["parameters"] = train["parameters"]
    del plan["vocab_size"]
    return plan
