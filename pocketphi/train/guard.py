"""The guard of a run: what to do about a step whose loss or gradient is not finite, or jumps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pocketphi.train.config import GuardConfig

Verdict = Literal["accept", "skip", "roll_back", "stop"]


@dataclass
class Guard:
    """Judges steps one by one; its state is part of a checkpoint.

    `mean` and `variance` follow the accepted losses exponentially, over `window` steps.
    """

    config: GuardConfig
    accepted: int = 0
    mean: float = 0.0
    variance: float = 0.0
    skips_in_a_row: int = 0
    num_skipped: int = 0
    num_not_finite: int = 0
    num_spikes: int = 0
    num_roll_backs: int = 0

    def judge(self, loss: float, grad_norm: float) -> tuple[Verdict, str]:
        """Return the verdict on a step before its update, and the reason where it is not accepted."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.num_not_finite += 1
            reason = f"loss {loss:.4g}, gradient norm {grad_norm:.4g} (not finite)"
        elif self.accepted >= self.config.window and loss > self.limit:
            self.num_spikes += 1
            reason = f"loss {loss:.4g} above {self.limit:.4g} (spike)"
        else:
            self._learn(loss)
            self.skips_in_a_row = 0
            return "accept", ""
        self.num_skipped += 1
        self.skips_in_a_row += 1
        if self.skips_in_a_row <= self.config.max_skips:
            return "skip", reason
        if self.num_roll_backs < self.config.max_roll_backs:
            return "roll_back", reason
        return "stop", reason

    @property
    def limit(self) -> float:
        """Losses above this are spikes; the deviation counts as at least 1% of the mean."""
        deviation = max(math.sqrt(self.variance), 0.01 * self.mean)
        return self.mean + self.config.spike_deviations * deviation

    def rolled_back(self, before: dict[str, Any]) -> None:
        """Take the statistics of the checkpoint `before`, keep the counts, count one roll-back."""
        self.accepted, self.mean, self.variance = before["accepted"], before["mean"], before["variance"]
        self.skips_in_a_row = 0
        self.num_roll_backs += 1

    def new_phase(self) -> None:
        """Forget the statistics: another mixture has another loss."""
        self.accepted, self.mean, self.variance, self.skips_in_a_row = 0, 0.0, 0.0, 0

    def state(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "config"}

    def load_state(self, state: dict[str, Any]) -> None:
        for key in self.state():
            setattr(self, key, state[key])

    def _learn(self, loss: float) -> None:
        self.accepted += 1
        # The first steps count evenly, later ones exponentially.
        share = max(1.0 / self.accepted, 1.0 / self.config.window)
        delta = loss - self.mean
        self.mean += share * delta
        self.variance = (1 - share) * (self.variance + share * delta * delta)
