"""The law is found again in data made from one, and a ladder of real tiny runs forecasts a larger one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pocketphi.core.errors import ConfigError, DataError
from pocketphi.train import scaling
from pocketphi.train.ladder import LadderConfig, rung
from pocketphi.train.scaling import Run


def made(noise: float = 0.0) -> list[Run]:
    """Runs of Chinchilla's published law at nine sizes and lengths."""
    rng = np.random.default_rng(0)
    return [
        Run(n, d, (1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28) * (1 + noise * rng.standard_normal()))
        for n in (1e8, 4e8, 1.6e9)
        for d in (2e9, 8e9, 3.2e10)
    ]


def test_the_law_behind_the_data_is_found() -> None:
    law = scaling.fit(made())
    found = [law.irreducible, law.parameter_exponent, law.token_exponent]
    np.testing.assert_allclose(found, [1.69, 0.34, 0.28], rtol=0.03)
    assert law.relative_error < 1e-4
    assert law.loss(7e10, 1.4e12) == pytest.approx(
        1.69 + 406.4 * 7e10**-0.34 + 410.7 * 1.4e12**-0.28, rel=5e-3
    )


def test_noise_gives_a_range_that_holds_the_truth() -> None:
    value, low, high = scaling.forecast(made(noise=0.003), 6.4e9, 1.28e11)
    truth = 1.69 + 406.4 * 6.4e9**-0.34 + 410.7 * 1.28e11**-0.28
    assert low <= value <= high
    assert value == pytest.approx(truth, rel=0.02)
    assert low * 0.99 <= truth <= high * 1.01


def test_the_best_size_for_a_budget_is_the_minimum_of_the_law() -> None:
    law = scaling.fit(made())
    flops = 1e21
    best = law.best_parameters(flops)
    sizes = np.exp(np.linspace(np.log(best / 10), np.log(best * 10), 2001))
    losses = [law.loss(n, flops / 6 / n) for n in sizes]
    assert sizes[int(np.argmin(losses))] == pytest.approx(best, rel=0.01)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(DataError, match="do not determine"):
        scaling.fit(made()[:4])
    with pytest.raises(ConfigError, match="five runs"):
        LadderConfig(widths=[64, 96], tokens=[1000, 2000])
    with pytest.raises(ConfigError, match="not a multiple of head_dim"):
        LadderConfig(widths=[64, 100])


def test_rungs_differ_in_width_alone() -> None:
    config = LadderConfig(widths=[64, 128], head_dim=32, tokens=[100_000, 200_000, 400_000])
    narrow, wide = rung(config, 64, 100_000), rung(config, 128, 100_000)
    assert narrow.phases == wide.phases and narrow.parametrization == wide.parametrization == "mup"
    assert wide.mup_base_width == 64
    assert wide.model_overrides["intermediate_size"] == 2 * narrow.model_overrides["intermediate_size"]


def test_a_ladder_of_real_runs(ladder_inputs: dict[str, Path], tmp_path: Path) -> None:
    """Six tiny runs, a forecast said before the seventh is made, and the seventh."""
    from pocketphi.train import ladder

    config = LadderConfig(
        head_dim=16,
        widths=[16, 32],
        tokens=[4096, 8192, 16384],
        predict_width=48,
        predict_tokens=24576,
        train_predicted=True,
        sequence_length=32,
        batch_tokens=512,
        micro_batch_tokens=512,
        num_threads=1,
    )
    made_now = ladder.run(config, ladder_inputs, out=tmp_path / "ladder")
    tree = json.loads(made_now.file("ladder.json").read_text())
    assert len(tree["runs"]) == 7 and sum(r["larger"] for r in tree["runs"]) == 1
    losses = {(r["width"], r["tokens"]): r["loss"] for r in tree["runs"]}
    assert losses[32, 16384] < losses[32, 4096] and losses[16, 16384] < losses[16, 4096]
    forecast = tree["forecast"]
    assert forecast["parameters"] == max(r["parameters"] for r in tree["runs"])
    assert forecast["actual_loss"] == losses[48, 24576]
    assert abs(forecast["relative_error"]) < 0.1
    assert made_now.counts["runs"] == 7
    # Asked again, nothing is trained: the rungs and the ladder are artifacts.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    ladder.run(config, ladder_inputs, out=tmp_path / "ladder")
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
