"""Maximal-update parametrisation: activations move alike at every width, exports are plain Phi-3."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from train.toy_training import toy_model

from pocketphi import model as models
from pocketphi.core.errors import ConfigError
from pocketphi.model.parametrization import MaximalUpdate, folded, is_plain
from pocketphi.train.config import OptimizerConfig
from pocketphi.train.optimizer import Optimizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_coordinate_check() -> None:
    """Over four widths, what training changes in every part keeps its size; standard, it grows."""
    import mup_coordinate_check as check

    widths = [64, 128, 256, 512]
    torch.set_num_threads(1)
    scaled = check.coordinate_check(widths, "mup", "adamw", seeds=1, rows=4, length=32)
    plain = check.coordinate_check(widths[:3], "standard", "adamw", seeds=1, rows=4, length=32)
    slopes = {part: check.slope(widths, sizes) for part, sizes in scaled.items()}
    assert all(abs(value) < 0.25 for value in slopes.values()), slopes
    grown = {part: check.slope(widths[:3], sizes) for part, sizes in plain.items()}
    assert grown["attention"] > 0.8 and grown["mlp"] > 0.8 and grown["stream"] > 0.8, grown


def test_at_the_base_width_it_is_the_standard_model() -> None:
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    one, two = toy_model(), toy_model()
    MaximalUpdate.of(two.config, two.config.hidden_size).start(two)
    assert torch.equal(one(ids), two(ids))
    assert is_plain(two)


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_a_plain_phi3_that_computes_the_same(tmp_path: Path, tied: bool) -> None:
    """Judge: transformers, from the folder alone. Base head size 4 gives both factors something to do."""
    from transformers import AutoModelForCausalLM

    model = toy_model(tie_word_embeddings=tied)
    scaled = MaximalUpdate.of(model.config, base_width=16, base_head_dim=4)
    scaled.start(model)
    assert model.output_factor == 0.5 and scaled.query_factor == pytest.approx(0.5**0.5)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # logits of a fresh model are too small to show a difference
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    wanted = model(ids).detach()
    models.save(model, tmp_path / "out")
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(judge).__name__ == "Phi3ForCausalLM"
    torch.testing.assert_close(judge(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    ours = models.load(tmp_path / "out")
    assert is_plain(ours)
    torch.testing.assert_close(ours(ids), wanted, rtol=1e-4, atol=1e-4)
    # Without the fold the function is another one: the test can fail.
    unfolded = toy_model(tie_word_embeddings=tied)
    unfolded.load_state_dict(model.state_dict())
    assert (unfolded(ids) - wanted).abs().max() > 0.05
    # A plain checkpoint continued under the parametrisation starts as the same function.
    scaled.start(ours, redraw=False)
    assert not is_plain(ours)
    torch.testing.assert_close(ours(ids), wanted, rtol=1e-4, atol=1e-4)
    again = dict(folded(ours, ours.named_parameters()))
    torch.testing.assert_close(again["model.norm.weight"], models.load(tmp_path / "out").model.norm.weight)


def test_rates_and_decay_of_the_groups() -> None:
    model = toy_model(tie_word_embeddings=False)
    scaled = MaximalUpdate.of(model.config, base_width=8)  # four times the base
    for kind, factor in (("adamw", 0.25), ("muon", 0.5)):
        settings = OptimizerConfig(kind=kind, weight_decay=0.1)  # type: ignore[arg-type]
        optimizers = Optimizers(model, settings, scaled.rate_factor)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.step(0.02)
        rates = {
            optimizers.names[id(p)]: (group["lr"], group["lr"] * group["weight_decay"])
            for optimizer in optimizers.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for name, (rate, decay) in rates.items():
            matrix = ".layers." in name and not name.endswith("norm.weight")
            assert rate == pytest.approx(0.02 * (factor if matrix else 1.0)), name
            assert decay == pytest.approx(0.002 if matrix or "lm_head" in name else 0.0), name


def test_a_base_width_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="mup_base_width"):
        MaximalUpdate(width=64, head_dim=16, base_width=0)
