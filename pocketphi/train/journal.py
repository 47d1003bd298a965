"""The logs of a run: metrics.jsonl and samples.jsonl, the clock of the steps, and outside trackers.

A checkpoint remembers how long the logs were; a run that goes back cuts them there, so that what is
written after a kill is what would have been written without it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from pocketphi.core.errors import UserError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
_EVENT_EVERY_S = 1.0


class Tracker(Protocol):
    """Where scalars go besides metrics.jsonl."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Writes the logs of the main rank; other ranks (`writes` False) only count along.

    `trackers` also get the numbers of every line of metrics.jsonl that has a step.
    """

    def __init__(self, folder: Path, *, writes: bool, trackers: list[Tracker] | None = None) -> None:
        self.folder, self.writes, self.trackers = folder, writes, trackers or []
        self.lengths: dict[str, int] = {METRICS: 0, SAMPLES: 0}

    def write(self, name: str, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        raw = json.dumps(line, allow_nan=False).encode() + b"\n"
        with open(self.folder / name, "ab") as file:
            file.write(raw)
        self.lengths[name] += len(raw)
        if name == METRICS and "step" in line:
            for tracker in self.trackers:
                tracker.log(int(line["step"]), scalars(line))

    def truncate(self, lengths: dict[str, int]) -> None:
        """Cut the logs to what they held when a checkpoint was written."""
        self.lengths = dict(lengths)
        if not self.writes:
            return
        for name, length in lengths.items():
            with open(self.folder / name, "ab") as file:
                file.truncate(length)

    def holds(self, lengths: dict[str, int]) -> bool:
        """Whether the logs are at least as long as a checkpoint says."""
        return not self.writes or all(
            length == 0 or ((self.folder / name).exists() and (self.folder / name).stat().st_size >= length)
            for name, length in lengths.items()
        )

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def scalars(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line, nested ones under `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            found[prefix + key] = float(value)
    return found


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "trackers asks for 'tensorboard', which is not installed", hint="pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "trackers asks for 'wandb', which is not installed", hint="pip install wandb"
            ) from None
        self._run = wandb.init(project="pocketphi", dir=str(folder), config=settings)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


def trackers(names: list[str], folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """Open the trackers of a run. Raises UserError naming the package that is not installed."""
    made: list[Tracker] = []
    for name in names:
        made.append(_TensorBoard(folder) if name == "tensorboard" else _WeightsAndBiases(folder, settings))
    return made


class Clock:
    """Speed of the steps alone, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.tokens = self._recent_tokens = 0
        self.seconds = self._recent_seconds = 0.0
        self._last_event = 0.0

    def step(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self._recent_tokens += tokens
        self._recent_seconds += seconds

    def event_due(self) -> bool:
        return time.monotonic() - self._last_event >= _EVENT_EVERY_S

    def recent_tokens_per_s(self) -> float:
        speed = self._recent_tokens / max(self._recent_seconds, 1e-9)
        self._recent_tokens, self._recent_seconds = 0, 0.0
        self._last_event = time.monotonic()
        return speed

    def figures(self) -> dict[str, float]:
        return {
            "train_s": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens / self.seconds, 1) if self.seconds else 0.0,
        }
