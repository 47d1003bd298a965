"""A model ladder: a few small runs, a law fitted to them, and a larger run forecast before it is made.

Every rung is an ordinary pre-training run (an artifact in `<out>.rungs/`, resumed and reused like any
other). Widths share one learning rate through the maximal-update parametrisation. The ladder's artifact
holds `ladder.json`: the runs, the law, the forecast with its range, and, where the larger run was made,
what it came to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError
from pocketphi.model.config import ModelConfig
from pocketphi.train import forecast, scaling
from pocketphi.train.config import OptimizerConfig, PhaseConfig, TrainConfig


@dataclass
class LadderConfig:
    """Rungs: every width with every number of tokens. `learning_rate` is that of the narrowest width.

    Shapes are `model`'s with another `hidden_size`: heads of `head_dim`, the MLP in proportion.
    `predict_width` and `predict_tokens` name the larger run (0: twice the widest and longest);
    `train_predicted` makes it too, to compare. Rungs decay their rate to zero over the last fifth.
    """

    model: str = "nano"
    head_dim: int = 32
    widths: list[int] = field(default_factory=lambda: [64, 96, 128])
    tokens: list[int] = field(default_factory=lambda: [250_000, 500_000, 1_000_000])
    predict_width: int = 0
    predict_tokens: int = 0
    train_predicted: bool = False
    learning_rate: float = 4e-3
    split: str = "phase1"
    sequence_length: int = 256
    batch_tokens: int = 4096
    micro_batch_tokens: int = 4096
    warmup_ratio: float = 0.05
    evaluate_tokens: int = 20000
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    num_threads: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if len(set(self.widths)) < 2 or len(set(self.tokens)) < 2 or len(self.widths) * len(self.tokens) < 5:
            raise ConfigError("a ladder needs two widths, two numbers of tokens and five runs at least")
        for width in [*self.widths, self.larger_width]:
            if width < self.head_dim or width % self.head_dim:
                raise ConfigError(f"width {width} is not a multiple of head_dim {self.head_dim}")
        if not 0 <= self.warmup_ratio < 0.8 or self.learning_rate <= 0:
            raise ConfigError("warmup_ratio must lie in [0, 0.8), learning_rate must be positive")

    @property
    def larger_width(self) -> int:
        return self.predict_width or 2 * max(self.widths)

    @property
    def larger_tokens(self) -> int:
        return self.predict_tokens or 2 * max(self.tokens)


def plan(config: LadderConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast of all rungs together."""
    total = {"wall_s": 0.0, "peak_memory_bytes": 0, "disk_bytes": 0, "tokens": 0}
    for width, tokens in _rungs(config, larger=config.train_predicted):
        part = forecast.train_plan(rung(config, width, tokens), inputs_plan)
        total["peak_memory_bytes"] = max(total["peak_memory_bytes"], part["peak_memory_bytes"])
        for key in ("wall_s", "disk_bytes", "tokens"):
            total[key] += part[key]
    return total


def rung(config: LadderConfig, width: int, tokens: int) -> TrainConfig:
    """The configuration of one run of the ladder."""
    named = ModelConfig.named(config.model)
    heads = width // config.head_dim
    groups = named.num_attention_heads // named.num_key_value_heads
    ffn = max(16, round(width * named.intermediate_size / named.hidden_size / 16) * 16)
    phase = PhaseConfig(
        name="ladder",
        split=config.split,
        tokens=tokens,
        learning_rate=config.learning_rate,
        sequence_length=config.sequence_length,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        warmup_tokens=int(config.warmup_ratio * tokens),
        decay_tokens=tokens // 5,
    )
    return TrainConfig(
        model=config.model,
        model_overrides={
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // groups if heads % groups == 0 and heads >= groups else heads,
        },
        parametrization="mup",
        mup_base_width=min(config.widths),
        phases=[phase],
        seed=config.seed,
        num_threads=config.num_threads,
        device=config.device,
        dtype=config.dtype,
        compile=config.compile,
        optimizer=config.optimizer,
        evaluate_tokens=config.evaluate_tokens,
        sample_prompts=[],
        checkpoint_every_tokens=tokens,  # short runs: besides, the clock decides
    )


def run(
    config: LadderConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Train the rungs, fit the law, forecast the larger run (and make it, where asked).

    `inputs`: `shards` and `tokenizer`, as for pre-training. Raises what a training run raises, and
    DataError when the runs do not determine the law.
    """
    from pocketphi.train import pretrain

    parents = [artifact.load(inputs["shards"], kind="shards")]
    out = out or artifact.default_path("ladder", config, parents, [])
    if done := artifact.reuse(out, kind="ladder", config=config, parents=parents, sources=[]):
        return done
    folder = out.with_name(out.name + ".rungs")
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[scaling.Run] = []
    rows: list[dict[str, Any]] = []
    larger = (config.larger_width, config.larger_tokens)
    predicted: dict[str, Any] = {}
    vocab_size = 0
    for width, tokens in _rungs(config, larger=config.train_predicted):
        settings = rung(config, width, tokens)
        if (width, tokens) == larger:
            # Said before the run is made: a forecast, not a fit.
            predicted = _forecast(config, runs, vocab_size)
            _say_forecast(predicted)
        progress.say(f"ladder: width {width}, {progress.quantity(tokens)} tokens")
        made = pretrain.run(settings, inputs, out=folder / f"w{width}-t{tokens}")
        shape = _shape(made)
        vocab_size = shape.vocab_size
        # Parameters in matrix products, layers and head: what compute and the law count.
        result = scaling.Run(float(shape.num_matmul_parameters), float(made.counts["tokens"]), _loss(made))
        rows.append({"width": width, **vars(result), "larger": (width, tokens) == larger})
        if (width, tokens) == larger:
            predicted["actual_loss"] = result.loss
            predicted["relative_error"] = predicted["loss"] / result.loss - 1
            progress.say(
                f"ladder: the run came to {result.loss:.4f}, the forecast was {predicted['loss']:.4f} "
                f"({predicted['relative_error']:+.2%})"
            )
        else:
            runs.append(result)
    if not predicted:
        predicted = _forecast(config, runs, vocab_size)
        _say_forecast(predicted)
    law = scaling.fit(runs)
    with artifact.create(out, kind="ladder", config=config, parents=parents, seed=config.seed) as draft:
        tree = {"runs": rows, "law": law.as_dict(), "forecast": predicted}
        artifact.write_atomic(draft.path / "ladder.json", json.dumps(tree, indent=1))
        draft.counts.update(law.as_dict())
        draft.counts.update({f"forecast_{k}": v for k, v in predicted.items()})
        draft.counts["runs"] = len(rows)
    return draft.artifact


def _rungs(config: LadderConfig, *, larger: bool) -> list[tuple[int, int]]:
    found = [(width, tokens) for width in sorted(config.widths) for tokens in sorted(config.tokens)]
    return [*found, (config.larger_width, config.larger_tokens)] if larger else found


def _forecast(config: LadderConfig, runs: list[scaling.Run], vocab_size: int) -> dict[str, Any]:
    steps = -(-config.larger_tokens // config.batch_tokens)
    tokens = steps * config.batch_tokens
    shape = forecast.planned_shape(
        rung(config, config.larger_width, config.larger_tokens), {"tokenizer": {"vocab_size": vocab_size}}
    )
    parameters = shape.num_matmul_parameters
    loss, low, high = scaling.forecast(runs, parameters, tokens)
    return {"parameters": parameters, "tokens": tokens, "loss": loss, "loss_low": low, "loss_high": high}


def _say_forecast(found: Mapping[str, Any]) -> None:
    progress.say(
        f"ladder: {progress.quantity(float(found['parameters']))} parameters on "
        f"{progress.quantity(float(found['tokens']))} tokens: loss {found['loss']:.4f} forecast "
        f"({found['loss_low']:.4f} to {found['loss_high']:.4f} leaving one run out)"
    )


def _shape(made: Artifact) -> ModelConfig:
    return ModelConfig.from_hf(json.loads(made.file("config.json").read_text(encoding="utf-8")))


def _loss(made: Artifact) -> float:
    """Held-out nats per token over all held-out sets at the end; the last losses where there is no set."""
    rows = [json.loads(line) for line in made.file("metrics.jsonl").read_text().splitlines()]
    held = [row["heldout"] for row in rows if row.get("event") == "heldout"]
    if held:
        sets = held[-1].values()
        return sum(s["nll_per_token"] * s["num_tokens"] for s in sets) / sum(s["num_tokens"] for s in sets)
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    return float(sum(tail) / len(tail))
