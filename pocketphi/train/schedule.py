"""The learning rate as a function of tokens. Torch-free."""

from __future__ import annotations

import math

from pocketphi.train.config import PhaseConfig


def learning_rate(phase: PhaseConfig, tokens_done: int, step_tokens: int) -> float:
    """Rate of the step that follows `tokens_done` tokens of the phase and processes `step_tokens`.

    The curve is read at the middle of the step: the first step of a warm-up and the last of a decay
    are not zero, and another batch size follows the same curve.
    """
    total = phase.num_steps * phase.batch_tokens
    at = min(tokens_done + step_tokens / 2, total)
    peak = phase.learning_rate
    if at < phase.warmup_tokens:
        return peak * at / phase.warmup_tokens
    if phase.schedule == "cosine":
        progress = (at - phase.warmup_tokens) / max(total - phase.warmup_tokens, 1)
        return peak * (phase.final_ratio + (1 - phase.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    left = total - at
    if phase.schedule == "wsd" and left < phase.decay_tokens:
        progress = 1 - left / phase.decay_tokens
        fall = progress if phase.decay_shape == "linear" else math.sqrt(progress)
        return peak * (1 - (1 - phase.final_ratio) * fall)
    return peak
