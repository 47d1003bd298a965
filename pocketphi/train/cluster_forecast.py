"""Days and memory of a run on GPUs that are not here, and how they come about. Torch-free.

A step on one GPU computes its share of the batch (`step_s`, or at `mfu` of the peak where the recipe
states one), and talks: inside a shard group
(a node) weights are gathered for the forward and the backward pass of every micro-batch (bf16) and
gradients scattered (float32); between the replicas gradients are summed once a step (float32, a ring:
twice the shard). The part of this that `overlap` does not hide is added; so is `downtime`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketphi.core.errors import ConfigError, UserError, did_you_mean
from pocketphi.model.config import ModelConfig
from pocketphi.train.config import LoopConfig, PhaseConfig, TrainConfig


@dataclass(frozen=True)
class Gpu:
    """What a GPU has: dense bf16 FLOP/s, bytes/s of its memory, and that memory in bytes."""

    peak_flops: float
    bytes_per_s: float
    memory_bytes: float


# By a part of the name that nvidia-smi gives.
GPUS = {
    "H100": Gpu(989e12, 3.35e12, 80e9),
    "H200": Gpu(989e12, 4.8e12, 141e9),
    "A100": Gpu(312e12, 2.0e12, 80e9),
    "B200": Gpu(2250e12, 8.0e12, 180e9),
    "L40S": Gpu(362e12, 0.86e12, 48e9),
    "4090": Gpu(165e12, 1.0e12, 24e9),
}
# What one H200 reached, of its peak and of its memory's speed, in two profiled runs a hundredfold apart
# in size (docs/experiments.md, "training on one H200"): matrix products; attention in a causal kernel and
# in FlexAttention with document masks; and how often a step passes over what it keeps of a token.
_MATMUL_SHARE = 0.70
_ATTENTION_SHARE = {False: 0.38, True: 0.17}
_PASSES = 10.3
_CONTEXT_BYTES = 3e9  # CUDA context, NCCL buffers, fragmentation


def step_s(config: LoopConfig, shape: ModelConfig, phase: PhaseConfig, gpu: Gpu, tokens: float) -> float:
    """Seconds of a step over `tokens` on one GPU: its products, its attention, its passes over memory.

    Good to 5 % for the runs it was taken from; other GPUs are assumed to be as well used as an H200.
    """
    peak = config.peak_flops or gpu.peak_flops
    products = 6.0 * shape.num_matmul_parameters * tokens
    attention = shape.train_flops_per_token(phase.sequence_length) * tokens - products
    kept = tokens * shape.num_hidden_layers * kept_bytes(shape)
    optimizer = 28.0 * shape.num_parameters  # reads gradient, weight and two moments, writes three
    return (
        products / (_MATMUL_SHARE * peak)
        + attention / (_ATTENTION_SHARE[phase.document_mask] * peak)
        + (_PASSES * kept + optimizer) / gpu.bytes_per_s
    )


def kept_bytes(shape: ModelConfig) -> int:
    """Bytes that a layer keeps of a token for the backward pass, in bf16: inputs and outputs of two
    norms, q k v, attention's output and the stream twice; gate, up and their product."""
    return 2 * (10 * shape.hidden_size + 3 * shape.intermediate_size)


def cluster_plan(config: TrainConfig, shape: ModelConfig) -> dict[str, Any]:
    """Forecast of the run on `config.cluster`.

    Raises ConfigError for an unknown GPU or a batch that does not divide over the ranks, UserError when
    a GPU's memory cannot hold the run.
    """
    cluster = config.cluster
    if cluster.gpu not in GPUS:
        raise ConfigError(f"cluster.gpu: unknown GPU '{cluster.gpu}'{did_you_mean(cluster.gpu, GPUS)}")
    gpu = GPUS[cluster.gpu]
    peak = config.peak_flops or gpu.peak_flops
    group = config.shard_ranks or min(cluster.num_gpus, cluster.gpus_per_node)
    if cluster.num_gpus % group:
        raise ConfigError(
            f"cluster: {cluster.num_gpus} GPUs do not divide into groups of shard_ranks {group}"
        )
    compute_s = hidden_s = exposed_s = flops = tokens = 0.0
    memory = 0.0
    for phase in config.phases:
        if phase.rows_per_step % cluster.num_gpus:
            raise ConfigError(
                f"phase '{phase.name}': {phase.rows_per_step} rows a step do not divide over "
                f"{cluster.num_gpus} GPUs",
                hint=f"batch_tokens as a multiple of {cluster.num_gpus * phase.sequence_length}",
            )
        phase_flops = (
            shape.train_flops_per_token(phase.sequence_length) * phase.num_steps * phase.batch_tokens
        )
        talk_s = phase.num_steps * communication_s(config, shape, phase, group)
        flops += phase_flops
        tokens += phase.num_steps * phase.batch_tokens
        if cluster.mfu:
            compute_s += phase_flops / (peak * cluster.mfu) / cluster.num_gpus
        else:
            step = step_s(config, shape, phase, gpu, phase.batch_tokens / cluster.num_gpus)
            compute_s += phase.num_steps * step
        exposed_s += (1 - cluster.overlap) * talk_s
        hidden_s += cluster.overlap * talk_s
        memory = max(memory, gpu_memory_bytes(config, shape, phase, group))
    if memory + _CONTEXT_BYTES > gpu.memory_bytes:
        raise UserError(
            f"one {cluster.gpu} has {gpu.memory_bytes / 1e9:.0f} GB, this run needs about "
            f"{(memory + _CONTEXT_BYTES) / 1e9:.0f} GB on each",
            hint="lower micro_batch_tokens, raise checkpoint_layers or shard_ranks",
        )
    seconds = (compute_s + exposed_s) / (1 - cluster.downtime)
    return {
        "tokens": int(tokens),
        "parameters": shape.num_parameters,
        "flops": float(flops),
        "wall_s": round(seconds, 1),
        "gpu": cluster.gpu,
        "gpus": cluster.num_gpus,
        "gpu_days": round(seconds / 86400 * cluster.num_gpus, 1),
        "wall_days": round(seconds / 86400, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "flops_per_token": round(flops / tokens, 1),
        "peak_flops_per_gpu": peak,
        "mfu_of_a_step": round(flops / compute_s / cluster.num_gpus / peak, 4),
        "mfu_is_given": int(cluster.mfu > 0),
        "compute_days": round(compute_s / 86400, 2),
        "communication_exposed_days": round(exposed_s / 86400, 2),
        "communication_hidden_days": round(hidden_s / 86400, 2),
        "downtime_days": round(seconds * cluster.downtime / 86400, 2),
        "mfu_overall": round(flops / seconds / cluster.num_gpus / peak, 4),
        "gpu_memory_bytes": int(memory),
        "gpu_memory_available_bytes": int(gpu.memory_bytes),
        # Of the cluster's hosts and storage, not of this machine.
        "checkpoint_bytes": 12 * shape.num_parameters,
        "peak_memory_bytes": 0,
        "disk_bytes": 0,
        "vocab_size": shape.vocab_size,
    }


def explain(figures: dict[str, Any], gpu: str) -> str:
    """How the GPU-days of `cluster_plan` come about, in a few lines."""
    gpus, rate = figures["gpus"], figures["peak_flops_per_gpu"] / 1e12
    return (
        f"train on {gpus} {gpu}: {figures['gpu_days']:.0f} GPU-days, {figures['wall_days']:.1f} days\n"
        f"  {figures['tokens'] / 1e12:.2f}T tokens x {figures['flops_per_token'] / 1e9:.1f} GFLOP "
        f"= {figures['flops']:.3g} FLOP\n"
        f"  over {gpus} x {rate:.0f} TFLOP/s x {figures['mfu_of_a_step']:.0%} "
        f"({'given in the recipe' if figures['mfu_is_given'] else 'a step counted from products and memory'}): "
        f"{figures['compute_days']:.2f} days\n"
        f"  communication not hidden {figures['communication_exposed_days']:.2f} days "
        f"(hidden {figures['communication_hidden_days']:.2f}), failures {figures['downtime_days']:.2f} days; "
        f"overall {figures['mfu_overall']:.0%} of the peak\n"
        f"  each GPU holds {figures['gpu_memory_bytes'] / 1e9:.0f} GB of "
        f"{figures['gpu_memory_available_bytes'] / 1e9:.0f}; a checkpoint has "
        f"{figures['checkpoint_bytes'] / 1e9:.0f} GB"
    )


def communication_s(config: TrainConfig, shape: ModelConfig, phase: PhaseConfig, group: int) -> float:
    """Seconds that one step would talk if nothing of it were hidden."""
    cluster, parameters = config.cluster, shape.num_parameters
    micro_steps = max(1, phase.batch_tokens // cluster.num_gpus // phase.micro_batch_tokens)
    inside = 0.0
    if group > 1:
        # bf16 weights twice and float32 gradients once, of which a rank already has its own share.
        moved = (2 * 2 + 4) * parameters * (group - 1) / group
        rate = cluster.node_bytes_per_s if group <= cluster.gpus_per_node else cluster.network_bytes_per_s
        inside = micro_steps * moved / rate
    replicas = cluster.num_gpus // group
    rate = (
        cluster.network_bytes_per_s if cluster.num_gpus > cluster.gpus_per_node else cluster.node_bytes_per_s
    )
    between = micro_steps * 2 * 4 * parameters / group * (replicas - 1) / replicas / rate
    return inside + between


def gpu_memory_bytes(config: LoopConfig, shape: ModelConfig, phase: PhaseConfig, group: int) -> float:
    """Bytes of tensors on one GPU at the worst moment, the allocator's and CUDA's own not counted: the
    shard of weights and AdamW state (float32), the head in bf16, activations of one micro-batch, a piece
    of logits; gradients beside activations only where micro-batches are added up."""
    width, layers = shape.hidden_size, shape.num_hidden_layers
    block = (shape.num_parameters - 2 * shape.vocab_size * width) / layers if layers else 0
    kept, recomputed = kept_bytes(shape), 2 * width
    plain = max(layers - config.checkpoint_layers, 0)
    activations = phase.micro_batch_tokens * (plain * kept + (layers - plain) * recomputed)
    logits = 6 * min(config.loss_chunk_tokens, phase.micro_batch_tokens) * shape.vocab_size
    head = (2 + 4) * shape.vocab_size * width
    # Two gathered blocks in bf16, and a block's gradient in float32 on its way.
    gathered = 2 * 2 * block + 4 * block if group > 1 else 0.0
    state, gradients = 12 * shape.num_parameters / group, 4 * shape.num_parameters / group
    ranks = config.cluster.num_gpus if isinstance(config, TrainConfig) else 1
    adds_up = phase.batch_tokens // ranks > phase.micro_batch_tokens
    working = activations + logits + head + gathered
    return state + (working + gradients if adds_up else max(working, gradients))
