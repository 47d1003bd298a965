"""The schedule against curves drawn independently with numpy."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.core.errors import ConfigError
from pocketphi.train.config import PhaseConfig
from pocketphi.train.schedule import learning_rate

TOTAL, STEP = 100_000, 1000


def phase(**changes) -> PhaseConfig:
    base = {"name": "p", "tokens": TOTAL, "learning_rate": 2e-3, "sequence_length": 100, "batch_tokens": STEP}
    return PhaseConfig(**{**base, "micro_batch_tokens": STEP, **changes})


def curve(settings: PhaseConfig) -> np.ndarray:
    return np.array([learning_rate(settings, t, STEP) for t in range(0, TOTAL, STEP)])


def test_warmup_stable_decay_is_a_trapezoid() -> None:
    found = curve(phase(warmup_tokens=10_000, decay_tokens=20_000, final_ratio=0.1))
    middle = np.arange(0, TOTAL, STEP) + STEP / 2
    wanted = np.interp(middle, [0, 10_000, 80_000, TOTAL], [0, 2e-3, 2e-3, 2e-4])
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_cosine() -> None:
    found = curve(phase(schedule="cosine", warmup_tokens=5000, final_ratio=0.25))
    middle = np.arange(0, TOTAL, STEP) + STEP / 2
    x = (middle - 5000) / 95_000
    wanted = np.where(middle < 5000, 2e-3 * middle / 5000, 2e-3 * (0.25 + 0.75 * (1 + np.cos(np.pi * x)) / 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_sqrt_decay_falls_faster_at_first_and_ends_at_the_same_rate() -> None:
    linear = curve(phase(decay_tokens=TOTAL))
    root = curve(phase(decay_tokens=TOTAL, decay_shape="sqrt"))
    assert (root[:-1] < linear[:-1]).all()
    np.testing.assert_allclose(root, 2e-3 * (1 - np.sqrt((np.arange(0, TOTAL, STEP) + STEP / 2) / TOTAL)))
    assert (curve(phase(schedule="constant")) == 2e-3).all()


def test_another_batch_size_follows_the_same_curve() -> None:
    small = phase(warmup_tokens=10_000, decay_tokens=20_000)
    large = phase(warmup_tokens=10_000, decay_tokens=20_000, batch_tokens=5000)
    for t in range(0, TOTAL, 5000):
        mean = np.mean([learning_rate(small, t + k * STEP, STEP) for k in range(5)])
        assert learning_rate(large, t, 5000) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 1050}, "not a multiple of sequence_length"),
        ({"warmup_tokens": 60_000, "decay_tokens": 60_000}, "exceed the phase's"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"final_ratio": 2.0}, "final_ratio"),
    ],
)
def test_contradictions_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phase(**changes)
