"""The forecast: tokens, parameters, memory, time and disk of every stage, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, machine
from pocketphi.core.errors import UserError
from pocketphi.core.progress import duration, quantity
from pocketphi.recipe.stages import Recipe

# A forecast that leaves the machine nothing would be killed half-way: keep this much free.
_SPARE_MEMORY_BYTES = 500_000_000
_SPARE_DISK_BYTES = 200_000_000
# Figures that one stage tells the next, of no interest in the table.
_NOT_SHOWN = {
    "wall_s",
    "peak_memory_bytes",
    "disk_bytes",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
}


@dataclass(frozen=True)
class Forecast:
    """Per stage flat figures (`wall_s`, `peak_memory_bytes`, `disk_bytes`, and what the stage knows)."""

    stages: dict[str, dict[str, Any]]
    memory_bytes: int
    disk_free_bytes: int

    @property
    def wall_s(self) -> float:
        return sum(float(s.get("wall_s", 0)) for s in self.stages.values())

    @property
    def peak_memory_bytes(self) -> int:
        return max((int(s.get("peak_memory_bytes", 0)) for s in self.stages.values()), default=0)

    @property
    def disk_bytes(self) -> int:
        return sum(int(s.get("disk_bytes", 0)) for s in self.stages.values())

    def check(self) -> None:
        """Raise UserError, with the numbers, when this machine cannot hold the run."""
        if self.peak_memory_bytes + _SPARE_MEMORY_BYTES > self.memory_bytes:
            stage = max(self.stages, key=lambda s: self.stages[s].get("peak_memory_bytes", 0))
            raise UserError(
                f"stage '{stage}' needs about {self.peak_memory_bytes / 1e9:.1f} GB of memory, "
                f"this machine has {self.memory_bytes / 1e9:.1f} GB",
                hint="use a smaller model, batch or sequence length",
            )
        if self.disk_bytes + _SPARE_DISK_BYTES > self.disk_free_bytes:
            raise UserError(
                f"the run writes about {self.disk_bytes / 1e9:.2f} GB, "
                f"{self.disk_free_bytes / 1e9:.2f} GB are free",
                hint="free some space or write to another disk with --out",
            )

    def check_gpu(self, folder: Path) -> None:
        """Raise UserError when a stage whose artifact is not in `folder` wants a GPU that is not here."""
        for name, figures in self.stages.items():
            if figures.get("gpu_missing") and not (folder / name / artifact.MANIFEST).exists():
                raise UserError(
                    f"stage '{name}' is to run on a CUDA GPU, and this machine has none",
                    hint=f"`phi recipe plan` counts it for an H100; to run it here: --set {name}.device=cpu",
                )

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows for people: stage, time, memory, disk, what else is known."""
        shown = []
        for name, figures in self.stages.items():
            rest = {k: v for k, v in figures.items() if k not in _NOT_SHOWN}
            notes = ", ".join(
                f"{k} {quantity(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v}"
                for k, v in rest.items()
            )
            shown.append(
                (
                    name,
                    duration(float(figures.get("wall_s", 0))),
                    f"{figures.get('peak_memory_bytes', 0) / 1e6:.0f} MB",
                    f"{figures.get('disk_bytes', 0) / 1e6:.1f} MB",
                    notes,
                )
            )
        return shown


def plan(recipe: Recipe, out: Path | None = None) -> Forecast:
    """Ask every stage of the recipe for its forecast, in order; each sees the ones before it.

    Raises ConfigError when a section does not parse: a run that starts has a valid recipe.
    """
    stages: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages():
        stages[stage.name] = dict(stage.load().plan(recipe.config(stage), dict(stages)))
    return Forecast(stages, machine.memory_bytes(), machine.disk_free_bytes(out or Path("runs")))
