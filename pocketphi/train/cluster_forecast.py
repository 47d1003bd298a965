"""Days and memory of a run on GPUs that are not here, and how they come about. Torch-free.

A step on one GPU computes its share of the batch at `mfu` of the peak, and talks: inside a shard group
(a node) weights are gathered for the forward and the backward pass of every micro-batch (bf16) and
gradients scattered (float32); between the replicas gradients are summed once a step (float32, a ring:
twice the shard). The part of this that `overlap` does not hide is added; so is `downtime`.
"""

from __future__ import annotations

from typing import Any

from pocketphi.core.errors import ConfigError, UserError, did_you_mean
from pocketphi.model.config import ModelConfig
from pocketphi.train.config import PhaseConfig, TrainConfig

# Dense bf16 FLOP/s of GPUs, by a part of the name nvidia-smi gives, and their memory.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
MEMORY_BYTES = {"H100": 80e9, "H200": 141e9, "A100": 80e9, "B200": 180e9, "L40S": 48e9, "4090": 24e9}
# Where the recipe states none: a careful share of the 52 % that a bare compiled Phi-3-mini reaches on an
# H100 (docs/guides/training.md). benchmarks/train_gpu.py measures it.
_MFU = 0.45
_CONTEXT_BYTES = 3e9  # CUDA context, NCCL buffers, fragmentation


def cluster_plan(config: TrainConfig, shape: ModelConfig) -> dict[str, Any]:
    """Forecast of the run on `config.cluster`.

    Raises ConfigError for an unknown GPU or a batch that does not divide over the ranks, UserError when
    a GPU's memory cannot hold the run.
    """
    cluster = config.cluster
    if cluster.gpu not in PEAK_FLOPS:
        raise ConfigError(f"cluster.gpu: unknown GPU '{cluster.gpu}'{did_you_mean(cluster.gpu, PEAK_FLOPS)}")
    mfu = cluster.mfu or _MFU
    rate = (config.peak_flops or PEAK_FLOPS[cluster.gpu]) * mfu
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
        compute_s += phase_flops / rate / cluster.num_gpus
        exposed_s += (1 - cluster.overlap) * talk_s
        hidden_s += cluster.overlap * talk_s
        memory = max(memory, gpu_memory_bytes(config, shape, phase, group))
    have = MEMORY_BYTES[cluster.gpu]
    if memory > have:
        raise UserError(
            f"one {cluster.gpu} has {have / 1e9:.0f} GB, this run needs about {memory / 1e9:.0f} GB on each",
            hint="lower micro_batch_tokens, raise checkpoint_layers or shard_ranks",
        )
    seconds = (compute_s + exposed_s) / (1 - cluster.downtime)
    return {
        "tokens": int(tokens),
        "parameters": shape.num_parameters,
        "flops": float(flops),
        "wall_s": round(seconds, 1),
        "gpus": cluster.num_gpus,
        "gpu_days": round(seconds / 86400 * cluster.num_gpus, 1),
        "wall_days": round(seconds / 86400, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "flops_per_token": round(flops / tokens, 1),
        "peak_flops_per_gpu": config.peak_flops or PEAK_FLOPS[cluster.gpu],
        "mfu_of_a_step_assumed": mfu,
        "compute_days": round(compute_s / 86400, 2),
        "communication_exposed_days": round(exposed_s / 86400, 2),
        "communication_hidden_days": round(hidden_s / 86400, 2),
        "downtime_days": round(seconds * cluster.downtime / 86400, 2),
        "mfu_overall": round(flops / seconds / cluster.num_gpus / PEAK_FLOPS[cluster.gpu], 4),
        "gpu_memory_bytes": int(memory),
        "gpu_memory_available_bytes": int(have),
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
        f"  over {gpus} x {rate:.0f} TFLOP/s x {figures['mfu_of_a_step_assumed']:.0%} (assumed for a step): "
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


def gpu_memory_bytes(config: TrainConfig, shape: ModelConfig, phase: PhaseConfig, group: int) -> float:
    """Bytes on one GPU: the shard of weights, gradients and AdamW state (float32), two gathered blocks,
    the head, activations of one micro-batch, the loss's piece of logits."""
    width, ffn, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    block = (shape.num_parameters - 2 * shape.vocab_size * width) / layers if layers else 0
    # Per token and layer in bf16: two norms' inputs and outputs, q k v, attention's output and the
    # stream twice; gate, up and their product.
    kept = 2 * (10 * width + 3 * ffn)
    recomputed = 2 * width
    plain = max(layers - config.checkpoint_layers, 0)
    activations = phase.micro_batch_tokens * (plain * kept + (layers - plain) * recomputed + kept)
    logits = 10 * min(config.loss_chunk_tokens, phase.micro_batch_tokens) * shape.vocab_size
    head = 2 * 2 * shape.vocab_size * width + 4 * shape.vocab_size * width
    # Two gathered blocks in bf16, and a block's gradient in float32 on its way.
    gathered = 2 * 2 * block + 4 * block
    return 16 * shape.num_parameters / group + gathered + head + activations + logits + _CONTEXT_BYTES
