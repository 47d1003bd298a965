"""Error feedback on single matrices: it lowers the error it is meant to lower, and packs what it chose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

from pocketphi.core.errors import DataError
from pocketphi.engine.formats import dequantise
from pocketphi.quant import calibration, rounding


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """A matrix [48, 512] and the second moments of correlated, unevenly excited inputs."""
    rng = np.random.default_rng(0)
    x_RC = rng.normal(size=(48, 512)).astype(np.float32)
    mixing = rng.normal(size=(512, 160)) * np.exp(rng.normal(size=(512, 1)))
    inputs = rng.normal(size=(2000, 160)) @ mixing.T + 0.1 * rng.normal(size=(2000, 512))
    return x_RC, inputs.T @ inputs / len(inputs)


def lost(x_RC: np.ndarray, raw: np.ndarray, type_: str, H_CC: np.ndarray) -> float:
    error = x_RC.astype(np.float64) - dequantise(raw, type_, x_RC.shape)
    return float(np.trace(error @ H_CC @ error.T) / np.trace(x_RC @ H_CC @ x_RC.T))


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_each_step_lowers_the_error(case: tuple[np.ndarray, np.ndarray], type_: str) -> None:
    x_RC, H_CC = case
    errors = {}
    for method, passes in (("rtn", 0), ("importance", 0), ("gptq", 0), ("gptq", 3)):
        raw, figures = calibration.quantise_matrix(x_RC, type_, H_CC, method, refine_passes=passes)
        errors[method, passes] = lost(x_RC, raw, type_, H_CC)
        assert figures["error"] == pytest.approx(errors[method, passes], rel=1e-3)
        assert figures["error_rtn"] == pytest.approx(errors["rtn", 0], rel=1e-3)
    assert errors["importance", 0] < errors["rtn", 0]
    assert errors["gptq", 0] < 0.7 * errors["importance", 0]
    assert errors["gptq", 3] < errors["gptq", 0]


def test_independent_inputs_need_no_feedback() -> None:
    """With a diagonal H nothing can be compensated: feedback rounds as the search alone does."""
    rng = np.random.default_rng(1)
    x_RC = rng.normal(size=(16, 128)).astype(np.float32)
    importance = np.exp(rng.normal(size=128))
    raw = calibration.gptq(x_RC, "Q4_0", np.diag(importance), damping=0.01, refine_passes=2)
    expected = rounding.quantise(x_RC, "Q4_0", importance, search=True)
    assert (raw == expected).mean() > 0.995


def test_descent_never_raises_the_error(case: tuple[np.ndarray, np.ndarray]) -> None:
    x_RC, H_CC = case
    before = [
        lost(x_RC, calibration.gptq(x_RC, "Q4_0", H_CC, damping=0.01, refine_passes=n), "Q4_0", H_CC)
        for n in (0, 1, 2, 4)
    ]
    assert all(b <= a * 1.0001 for a, b in itertools.pairwise(before))


def test_fewer_tokens_than_channels_and_dead_channels() -> None:
    rng = np.random.default_rng(2)
    x_RC = rng.normal(size=(8, 256)).astype(np.float32)
    inputs = rng.normal(size=(20, 256))
    inputs[:, 40:80] = 0
    H_CC = inputs.T @ inputs / 20
    raw, figures = calibration.quantise_matrix(x_RC, "Q4_0", H_CC, "gptq")
    values = dequantise(raw, "Q4_0", x_RC.shape)
    assert np.isfinite(values).all() and figures["error"] < figures["error_rtn"]
    # Channels that the text never excites are still kept, not thrown away.
    assert np.abs(values[:, 40:80] - x_RC[:, 40:80]).max() < 1.0


def test_no_activations_is_an_error() -> None:
    import torch

    moments = calibration._Moments(4)
    moments.add(torch.zeros(3, 4))
    with pytest.raises(DataError, match="no usable activations"):
        moments.matrix("w")
