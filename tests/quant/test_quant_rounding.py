"""Blocks of 4 to 8 bits: the same bytes as ggml's reference, and searches that never do worse."""

from __future__ import annotations

import numpy as np
import pytest

from pocketphi.core.errors import EngineError
from pocketphi.engine.formats import dequantise
from pocketphi.quant import rounding


@pytest.fixture(scope="module")
def x_RC() -> np.ndarray:
    rng = np.random.default_rng(1)
    x = (rng.standard_t(4, size=(64, 512)) * 0.03).astype(np.float32)
    x[0, :256] = 0  # a block of zeros
    x[1, :256] = 0.25  # constant blocks
    x[2, :256] = -0.25
    x[3, :32] = np.linspace(-1e-9, 1e-9, 32)  # below what half precision holds
    x[4, 5] = 3.0  # an outlier
    x[5, :256] = np.abs(x[5, :256])
    return x


def back(raw: np.ndarray, type_: str, x: np.ndarray) -> np.ndarray:
    return dequantise(raw, type_, x.shape)


def loss(raw: np.ndarray, type_: str, x: np.ndarray, weight: np.ndarray | float = 1.0) -> float:
    return float(((back(raw, type_, x) - x) ** 2 * weight).sum())


@pytest.mark.parametrize("type_", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_same_bytes_as_the_gguf_package(x_RC: np.ndarray, type_: str) -> None:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        expected = gguf.quantize(x_RC, gguf.GGMLQuantizationType[type_])
    ours = rounding.quantise(x_RC, type_)
    assert np.array_equal(ours, np.ascontiguousarray(expected).view(np.uint8).reshape(ours.shape))


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("search", [False, True])
def test_the_gguf_package_reads_the_same_values(x_RC: np.ndarray, type_: str, search: bool) -> None:
    gguf = pytest.importorskip("gguf")
    raw = rounding.quantise(x_RC, type_, search=search)
    judged = gguf.dequantize(raw, gguf.GGMLQuantizationType[type_])
    assert np.array_equal(judged, back(raw, type_, x_RC))


# Root mean square error as a share of the weights' own, on this heavy-tailed sample.
BOUNDS = {"Q8_0": 0.009, "Q6_K": 0.03, "Q4_K": 0.105, "Q4_1": 0.12, "Q4_0": 0.14}


@pytest.mark.parametrize("type_", list(BOUNDS))
def test_error_bounds(x_RC: np.ndarray, type_: str) -> None:
    share = (loss(rounding.quantise(x_RC, type_), type_, x_RC) / float((x_RC**2).sum())) ** 0.5
    assert share < BOUNDS[type_]
    assert share > BOUNDS[type_] / 3, "too good to be true: the bound says nothing"


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_search_lowers_the_error_it_is_given(x_RC: np.ndarray, type_: str) -> None:
    importance = np.exp(np.random.default_rng(2).normal(size=512) * 1.5).astype(np.float32)
    plain = loss(rounding.quantise(x_RC, type_), type_, x_RC)
    even = loss(rounding.quantise(x_RC, type_, np.ones(512, np.float32), search=True), type_, x_RC)
    assert even < plain
    weighted = rounding.quantise(x_RC, type_, importance, search=True)
    unweighted = rounding.quantise(x_RC, type_, np.ones(512, np.float32), search=True)
    assert loss(weighted, type_, x_RC, importance) < 0.97 * loss(unweighted, type_, x_RC, importance)


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"])
def test_values_on_the_grid_come_back(type_: str) -> None:
    """A matrix that is already on a grid of the type is kept (nearly) as it is by the search."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8, 512)).astype(np.float32)
    once = back(rounding.quantise(x, type_, search=True), type_, x)
    twice = back(rounding.quantise(once, type_, search=True), type_, x)
    assert np.abs(twice - once).max() < 0.02 * np.abs(once).max()
    assert ((twice - once) ** 2).mean() < 0.05 * ((once - x) ** 2).mean() + 1e-12


def test_degenerate_blocks(x_RC: np.ndarray) -> None:
    for type_ in ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"):
        for search in (False, True):
            y = back(rounding.quantise(x_RC, type_, np.zeros(512, np.float32), search=search), type_, x_RC)
            assert np.isfinite(y).all()
            assert not y[0, :256].any()
            assert np.allclose(y[1, :256], 0.25, rtol=0.02) and np.allclose(y[2, :256], -0.25, rtol=0.04)
    huge = np.full((1, 256), 3e38, dtype=np.float32)
    assert np.isfinite(back(rounding.quantise(huge, "Q8_0"), "Q8_0", huge)).all()


def test_threads_do_not_matter() -> None:
    x = np.random.default_rng(4).normal(size=(3000, 512)).astype(np.float32)
    whole = rounding.quantise(x, "Q4_0", search=True)
    parts = [rounding.quantise(x[i : i + 700], "Q4_0", search=True) for i in range(0, 3000, 700)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_refuses(x_RC: np.ndarray) -> None:
    with pytest.raises(EngineError, match="did you mean 'Q4_K'"):
        rounding.quantise(x_RC, "Q4_KK")
    with pytest.raises(EngineError, match="do not fill Q4_K blocks of 256"):
        rounding.quantise(x_RC[:, :300], "Q4_K")
    with pytest.raises(EngineError, match="not finite"):
        rounding.quantise(np.full((1, 32), np.nan, np.float32), "Q4_0")
