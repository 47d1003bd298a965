"""What a training run is asked to do. Torch-free: `phi recipe plan` reads it.

All lengths of a run are tokens; steps only follow from them (`tokens / batch_tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pocketphi.core.errors import ConfigError

PROMPTS = [
    "A plant is",
    "Water is",
    "The sun is",
    "The history of the city began when",
    "To solve the equation, we first",
    "Once upon a time",
]


@dataclass
class OptimizerConfig:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

    Groups: *matrices* (all 2-D weights of the blocks, and an untied head) decay by `weight_decay`;
    the *embedding table* (the tied head too) and the *norms* do not decay. `muon_momentum` and
    `muon_iterations` count for Muon only; its updates are scaled to AdamW's size, so that one
    learning rate serves both.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_momentum: float = 0.95
    muon_iterations: int = 5

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), found {getattr(self, name)}")
        if self.eps <= 0 or self.weight_decay < 0 or self.muon_iterations < 1:
            raise ConfigError("optimizer: eps > 0, weight_decay >= 0 and muon_iterations >= 1 are needed")


@dataclass
class GuardConfig:
    """What happens when a step's loss or gradient is not finite, or jumps.

    A jump is a loss above `mean + spike_deviations * deviation` of the recent accepted steps, once
    `window` steps were accepted. Such a step is skipped (no update). After `max_skips` skipped steps
    in a row the run goes back to its last checkpoint and leaves the data in between out; after
    `max_roll_backs` of these it stops.
    """

    window: int = 50
    spike_deviations: float = 8.0
    max_skips: int = 4
    max_roll_backs: int = 3

    def __post_init__(self) -> None:
        if self.window < 2 or self.spike_deviations <= 0 or self.max_skips < 1 or self.max_roll_backs < 0:
            raise ConfigError("guard: window >= 2, spike_deviations > 0, max_skips >= 1 are needed")


@dataclass
class PhaseConfig:
    """One stretch of training with its own data, length and learning-rate segment.

    The rate rises linearly over `warmup_tokens` from zero, then
    - `wsd`: stays, and falls to `final_ratio` of the peak over the last `decay_tokens`
      (`decay_shape` linear or sqrt: 1 - sqrt);
    - `cosine`: falls along a half cosine to `final_ratio` at the end of the phase;
    - `constant`: stays.

    `batch_tokens` is one optimizer step over all ranks; `micro_batch_tokens` one forward pass.
    `mixture` maps source patterns to weights (empty: in proportion to size).
    """

    name: str
    tokens: int
    learning_rate: float
    split: str = "phase1"
    sequence_length: int = 512
    batch_tokens: int = 16384
    micro_batch_tokens: int = 8192
    mixture: dict[str, float] = field(default_factory=dict)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_tokens: int = 0
    decay_tokens: int = 0
    decay_shape: Literal["linear", "sqrt"] = "linear"
    final_ratio: float = 0.0
    document_mask: bool = True

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sequence_length < 2 or self.learning_rate <= 0:
            raise ConfigError(
                f"phase '{self.name}': tokens, sequence_length and learning_rate must be positive"
            )
        for name in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self, name) < self.sequence_length or getattr(self, name) % self.sequence_length:
                raise ConfigError(
                    f"phase '{self.name}': {name} {getattr(self, name)} is not a multiple of "
                    f"sequence_length {self.sequence_length}"
                )
        if min(self.warmup_tokens, self.decay_tokens) < 0:
            raise ConfigError(f"phase '{self.name}': warmup_tokens and decay_tokens cannot be negative")
        if self.warmup_tokens + (self.decay_tokens if self.schedule == "wsd" else 0) > self.tokens:
            raise ConfigError(
                f"phase '{self.name}': warmup_tokens + decay_tokens exceed the phase's {self.tokens} tokens"
            )
        if not 0 <= self.final_ratio <= 1:
            raise ConfigError(f"phase '{self.name}': final_ratio must lie in 0..1, found {self.final_ratio}")

    @property
    def rows_per_step(self) -> int:
        return self.batch_tokens // self.sequence_length

    @property
    def num_steps(self) -> int:
        """Steps of the phase: enough to see at least `tokens`."""
        return -(-self.tokens // self.batch_tokens)


@dataclass
class LoopConfig:
    """What pre-training and fine-tuning have in common.

    `dtype` is the type of matrix products; weights and optimizer state are float32 either way.
    `num_threads` 0 takes all cores (on the CPU, bits may depend on this number).
    `checkpoint_every_tokens` 0 means ten times a phase; `checkpoint_every_s` adds some by the clock.
    `compile`, `attention`, `float8` and `checkpoint_layers` are explained in acceleration.py.
    `peak_flops` is the device's, for the MFU; 0 looks it up.
    `shard_ranks` ranks share one copy of weights and optimizer state (0: those of one node).
    `sharded_checkpoints` writes checkpoints in pieces, by every rank and in the background; see sharded.py.
    `trackers` get the figures of metrics.jsonl too; their packages are installed separately.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    clip_grad_norm: float = 1.0
    z_loss: float = 0.0
    loss_chunk_tokens: int = 1024
    compile: bool = False
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    float8: Literal["off", "tensorwise", "rowwise"] = "off"
    checkpoint_layers: int = 0
    checkpoint_every_tokens: int = 0
    checkpoint_every_s: float = 120.0
    keep_checkpoints: bool = False
    evaluate_every_tokens: int = 0
    evaluate_tokens: int = 20000
    monitor_every_steps: int = 20
    peak_flops: float = 0.0
    shard_ranks: int = 0
    sharded_checkpoints: bool = False
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    sample_prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    sample_tokens: int = 40

    def __post_init__(self) -> None:
        if self.clip_grad_norm <= 0 or self.loss_chunk_tokens < 1 or self.z_loss < 0:
            raise ConfigError("clip_grad_norm and loss_chunk_tokens must be positive, z_loss not negative")
        if self.shard_ranks < 0:
            raise ConfigError(f"shard_ranks cannot be negative, found {self.shard_ranks}")
        if self.num_threads < 0 or self.checkpoint_every_s <= 0 or self.monitor_every_steps < 1:
            raise ConfigError(
                "num_threads >= 0, checkpoint_every_s > 0 and monitor_every_steps >= 1 are needed"
            )


@dataclass
class ClusterConfig:
    """GPUs to forecast for: `gpu` by a part of its name (H100, H200, A100, B200, ...; empty: this machine).

    `mfu` is the share of the peak that steps reach on one GPU; 0 counts it (cluster_forecast.step_s).
    The rates are per GPU and direction: `node_bytes_per_s` between the GPUs of a node,
    `network_bytes_per_s` between nodes. `overlap` is the share of communication hidden behind compute.
    """

    gpu: str = ""
    num_gpus: int = 1
    gpus_per_node: int = 8
    mfu: float = 0.0
    node_bytes_per_s: float = 3.5e11
    network_bytes_per_s: float = 4.0e10
    overlap: float = 0.7
    downtime: float = 0.05  # share of the time lost to failures, restarts and checkpoints

    def __post_init__(self) -> None:
        if min(self.num_gpus, self.gpus_per_node) < 1:
            raise ConfigError("cluster: num_gpus and gpus_per_node must be positive")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ConfigError("cluster: num_gpus must be a multiple of gpus_per_node")
        if not (0 <= self.mfu <= 1 and 0 <= self.overlap <= 1 and 0 <= self.downtime < 1):
            raise ConfigError("cluster: mfu and overlap lie in 0..1, downtime in [0, 1)")
        if min(self.node_bytes_per_s, self.network_bytes_per_s) <= 0:
            raise ConfigError("cluster: node_bytes_per_s and network_bytes_per_s must be positive")


@dataclass
class TrainConfig(LoopConfig):
    """Pre-training: the model's shape by name, changed by `model_overrides`, and the phases.

    The vocabulary and the ids of special tokens always come from the tokenizer.
    `parametrization` mup: rates and `initializer_range` are those of a model of `mup_base_width` (and
    head size `mup_base_head_dim`; 0: the same), and hold for this one; see model/parametrization.py.
    `cluster` names the GPUs that `phi recipe plan` forecasts for, instead of this machine.
    """

    model: str = "nano"
    model_overrides: dict[str, Any] = field(default_factory=dict)
    scale_residual: bool = True
    parametrization: Literal["standard", "mup"] = "standard"
    mup_base_width: int = 256
    mup_base_head_dim: int = 0
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    phases: list[PhaseConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mup_base_width < 1 or self.mup_base_head_dim < 0:
            raise ConfigError("mup_base_width must be positive, mup_base_head_dim not negative")
        if not self.phases:
            self.phases = [
                PhaseConfig(
                    name="phase1",
                    tokens=6_000_000,
                    learning_rate=3e-3,
                    warmup_tokens=400_000,
                ),
                PhaseConfig(
                    name="phase2",
                    split="phase2",
                    tokens=3_000_000,
                    learning_rate=3e-3,
                    decay_tokens=3_000_000,
                ),
            ]
        if len({p.name for p in self.phases}) != len(self.phases):
            raise ConfigError("phases must have different names")


@dataclass
class SftConfig(LoopConfig):
    """Supervised fine-tuning on chat data.

    `data` names files (JSON, JSON lines, .zst) or folders with them; `max_rows_per_file` bounds each.
    `built_in` adds the conversations of the package, `repeat_built_in` times; `from_corpus` bounds the
    chats made from the corpus artifact by rule (0: none). Conversations longer than
    `sequence_length` are left out and counted.
    """

    data: list[str] = field(default_factory=list)
    max_rows_per_file: int = 0
    max_characters: int = 0
    built_in: bool = True
    repeat_built_in: int = 1
    from_corpus: int = 2000
    epochs: float = 2.0
    learning_rate: float = 1e-3
    sequence_length: int = 512
    batch_tokens: int = 8192
    micro_batch_tokens: int = 8192
    schedule: Literal["wsd", "cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.05
    final_ratio: float = 0.0
    document_mask: bool = True
    heldout_ratio: float = 0.03
    sample_prompts: list[str] = field(
        default_factory=lambda: [
            "What is a plant?",
            "Who are you?",
            "What is water?",
            "What is 2 plus 3?",
            "Why is the sky blue?",
        ]
    )
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs <= 0 or self.learning_rate <= 0:
            raise ConfigError("epochs and learning_rate must be positive")
        if not 0 <= self.warmup_ratio < 1 or not 0 <= self.heldout_ratio < 0.5:
            raise ConfigError("warmup_ratio must lie in [0, 1), heldout_ratio in [0, 0.5)")
        if not (self.data or self.built_in or self.from_corpus):
            raise ConfigError("no chat data: give `data`, or leave `built_in` or `from_corpus` on")
