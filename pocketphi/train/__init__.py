"""Training: token shards, the loop, pre-training in phases, fine-tuning on chats.

`run` and `plan` are the pre-training stage; the shards are `pocketphi.train.shards`, fine-tuning is
`pocketphi.train.sft`. Torch is imported when a run starts, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketphi.core.artifact import Artifact
from pocketphi.train.config import PhaseConfig, SftConfig, TrainConfig

__all__ = ["PhaseConfig", "SftConfig", "TrainConfig", "plan", "run"]


def run(
    config: TrainConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Pre-train a model in phases; see `pocketphi.train.pretrain.run`."""
    from pocketphi.train import pretrain

    return pretrain.run(config, inputs, out=out)


def plan(config: TrainConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast a pre-training run; see `pocketphi.train.forecast.train_plan`."""
    from pocketphi.train import forecast

    return forecast.train_plan(config, inputs_plan)
