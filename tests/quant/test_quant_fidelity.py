"""The fidelity figures against plain numpy and scipy, and against cases known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pocketphi.core.errors import DataError, EngineError
from pocketphi.quant import fidelity


def test_figures_are_what_they_say() -> None:
    special = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(0)
    windows = [(rng.normal(size=(n, 11)) * 3, rng.integers(0, 11, n)) for n in (5, 9, 7)]
    result = fidelity.Comparison()
    p_all, q_all, divergences, agree = [], [], [], []
    for logits, targets in windows:
        other = logits + rng.normal(size=logits.shape)
        result.add(logits, other, targets)
        p, q = special.log_softmax(logits, axis=1), special.log_softmax(other, axis=1)
        p_all.append(-p[np.arange(len(targets)), targets])
        q_all.append(-q[np.arange(len(targets)), targets])
        divergences.append(special.rel_entr(np.exp(p), np.exp(q)).sum(axis=1))
        agree.append(logits.argmax(1) == other.argmax(1))
    figures = result.figures()
    flat = {k: np.concatenate(v) for k, v in {"p": p_all, "q": q_all, "d": divergences, "a": agree}.items()}
    assert figures["num_tokens"] == 21 and figures["num_windows"] == 3
    assert figures["reference_nll_per_token"] == pytest.approx(flat["p"].mean())
    assert figures["nll_per_token"] == pytest.approx(flat["q"].mean())
    assert figures["nll_gap"] == pytest.approx((flat["q"] - flat["p"]).mean())
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(figures["nll_gap"]))
    assert figures["kl_divergence"] == pytest.approx(flat["d"].mean())
    assert figures["kl_divergence_p99"] == pytest.approx(np.quantile(flat["d"], 0.99), rel=1e-5)
    assert figures["top1_agreement"] == pytest.approx(flat["a"].mean())


def test_standard_error_is_that_of_windows() -> None:
    """Repeated draws of windows with a common offset: the stated error is the spread of the means."""
    rng = np.random.default_rng(1)
    means, stated = [], []
    for _ in range(400):
        offset = rng.normal(size=20)  # tokens of a window share it: they are no independent draws
        sums = np.array([(o + 0.1 * rng.normal(size=30)).sum() for o in offset])
        mean, stderr = fidelity.mean(sums, np.full(20, 30.0))
        means.append(mean)
        stated.append(stderr)
    assert np.mean(stated) == pytest.approx(np.std(means), rel=0.1)
    assert math.isnan(fidelity.mean(np.array([3.0]), np.array([2.0]))[1])


def test_same_model_and_errors() -> None:
    logits = np.random.default_rng(2).normal(size=(40, 7)).astype(np.float32)
    same = fidelity.compare(lambda ids: logits[ids], lambda ids: logits[ids], [[1, 2, 3], [4, 5, 6], [7]])
    assert same["kl_divergence"] == 0 and same["top1_agreement"] == 1 and same["num_tokens"] == 4
    with pytest.raises(DataError, match="no text"):
        fidelity.compare(lambda ids: logits[ids], lambda ids: logits[ids], [[1]])
    with pytest.raises(EngineError, match="not the same model"):
        fidelity.compare(lambda ids: logits[ids], lambda ids: logits[ids, :5], [[1, 2]])
