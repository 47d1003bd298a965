"""Forecasts: a rehearsal is real, clusters are counted by hand, what cannot fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketphi import recipe as recipes
from pocketphi.core.errors import ConfigError, UserError
from pocketphi.model.config import ModelConfig
from pocketphi.train import forecast, rehearsal
from pocketphi.train.config import ClusterConfig, PhaseConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def test_phi3_mini_on_512_gpus_by_hand() -> None:
    """The shipped recipe's GPU-days, from the counts of the shape written out here."""
    found = recipes.plan(recipes.read(ROOT / "recipes" / "phi3-mini.yaml")).stages["train"]
    layer = 4 * 3072**2 + 3 * 3072 * 8192
    per_token = 6 * (32 * layer + 32064 * 3072) + 6 * 32 * 3072 * 4096
    assert found["flops_per_token"] == pytest.approx(per_token, rel=1e-6)
    assert found["tokens"] == pytest.approx(3.3e12, rel=1e-5)
    compute_s = per_token * found["tokens"] / (512 * 989e12 * 0.45)
    assert found["compute_days"] == pytest.approx(compute_s / 86400, abs=0.01)
    # A step: two gathers in bf16 and a scatter in float32 inside the node, a ring between 64 nodes.
    weights = 3_821_079_552
    talk = 8 * weights * 7 / 8 / 3.5e11 + 8 * weights / 8 * 63 / 64 / 4e10
    exposed = 0.3 * talk * found["tokens"] / 4194304
    assert found["communication_exposed_days"] == pytest.approx(exposed / 86400, abs=0.01)
    days = (compute_s + exposed) / 0.95 / 86400
    assert found["gpu_days"] == pytest.approx(days * 512, rel=1e-3)
    assert 1500 < found["gpu_days"] < 3600  # the published run took about 7 days of 512: 3584
    assert 16 * weights / 8 < found["gpu_memory_bytes"] < 80e9
    assert found["parameters"] == weights


def cluster(**changes: object) -> TrainConfig:
    phase = {"name": "p", "tokens": 10**9, "learning_rate": 1e-3, "sequence_length": 4096}
    phase |= {"batch_tokens": 8 * 8192, "micro_batch_tokens": 8192, **changes}
    settings = ClusterConfig(gpu="H100", num_gpus=8)
    return TrainConfig(model="phi-3-mini-4k", cluster=settings, phases=[PhaseConfig(**phase)])  # type: ignore[arg-type]


def test_a_batch_that_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"one H100 has 80 GB, this run needs about \d+ GB"):
        forecast.train_plan(cluster(batch_tokens=8 * 131072, micro_batch_tokens=131072), {})
    with pytest.raises(ConfigError, match="do not divide over 8 GPUs"):
        forecast.train_plan(cluster(batch_tokens=9 * 4096), {})
    wrong = cluster()
    wrong.cluster.gpu = "H1000"
    with pytest.raises(ConfigError, match="unknown GPU"):
        forecast.train_plan(wrong, {})


def test_recomputing_layers_takes_less_memory() -> None:
    plain, recomputed = cluster(), cluster()
    recomputed.checkpoint_layers = 32
    found = [forecast.train_plan(c, {})["gpu_memory_bytes"] for c in (plain, recomputed)]
    assert found[1] < found[0]


def test_a_rehearsal_runs_the_real_trainer_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child reports times and memory of the shape that was asked about."""
    monkeypatch.setattr(rehearsal, "_LONGEST_S", 280.0)  # a machine that is busy with other tests
    phase = PhaseConfig(name="p", tokens=10**6, learning_rate=1e-3, batch_tokens=1024, micro_batch_tokens=512)
    config = TrainConfig(num_threads=1, phases=[phase], sample_prompts=[])
    shape = ModelConfig.named("nano")
    small = rehearsal.measured(config, shape, [phase])
    assert small is not None
    assert len(small.step_s) == 1 and small.step_s[0] > 0
    assert small.busy > 0.99 and small.checkpoint_s > 0 and small.evaluate_token_s > 0
    state = 16 * shape.num_parameters
    assert state + 150e6 < small.peak_memory_bytes < state + 1.5e9
    assert torch.get_num_threads() >= 1


def test_a_forecast_multiplies_out_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rehearsal.Measured((0.5, 0.25), 2.0, 3.0, 1e-4, 0.01, 0.2, 700_000_000)
    monkeypatch.setattr(rehearsal, "measured", lambda *_: found)
    monkeypatch.setattr(forecast, "_REHEARSE_FROM_S", 0.0)
    common = {"learning_rate": 1e-3, "sequence_length": 256, "batch_tokens": 4096, "micro_batch_tokens": 4096}
    phases = [PhaseConfig(name=n, tokens=4096 * 100, **common) for n in ("one", "two")]  # type: ignore[arg-type]
    config = TrainConfig(phases=phases, device="cpu", sample_prompts=["a", "b"], sample_tokens=10)
    plan = forecast.train_plan(config, {"shards": {"disk_bytes": 10_000_000}})
    steps = 100 * 0.5 + 100 * 0.25
    beside = 3.0 + 2 * 2 * 20000 * 1e-4 + 2 * 2 * 10 * 0.01 + 2 * (10 + 1) * 0.2
    assert plan["wall_s"] == pytest.approx(steps + beside, abs=0.2)
    assert plan["rehearsed"] == 1
    tokenizer = plan["peak_memory_bytes"] - 700_000_000 - 2 * 4096 * 200
    assert 10e6 < tokenizer < 40e6


@pytest.mark.parametrize(
    ("model", "changes", "phase", "seconds", "gigabytes"),
    [
        # benchmarks/train_gpu.py on an H200, plain causal attention, one micro-batch a step.
        ("phi-3-mini-4k", {}, (4096, 8192, 8192, False), 0.408, 76.5),
        ("phi-3-mini-4k", {}, (4096, 16384, 16384, False), 0.779, 105.7),
        # recipes/pocket.yaml on an H200: 910 thousand tokens a second.
        (
            "pocket",
            {"intermediate_size": 1408, "num_key_value_heads": 4},
            (1024, 262144, 65536, True),
            0.288,
            15.9,
        ),
    ],
)
def test_counted_steps_beside_measured_ones(model, changes, phase, seconds, gigabytes) -> None:
    """Time within 15 % and memory within 10 % of what runs on a GPU measured (docs/experiments.md)."""
    length, batch, micro, masks = phase
    settings = PhaseConfig(
        name="p",
        tokens=10**7,
        learning_rate=1e-3,
        sequence_length=length,
        batch_tokens=batch,
        micro_batch_tokens=micro,
        document_mask=masks,
    )
    config = TrainConfig(
        model=model,
        model_overrides=changes,
        phases=[settings],
        loss_chunk_tokens=8192,
        cluster=ClusterConfig(gpu="H200", downtime=0.0),
    )
    plan = forecast.train_plan(config, {})
    steps = settings.num_steps
    assert plan["wall_s"] / steps == pytest.approx(seconds, rel=0.15)
    assert plan["gpu_memory_bytes"] / 1e9 == pytest.approx(gigabytes, rel=0.10)


def test_a_recipe_for_a_gpu_is_counted_for_one_and_refused_where_there_is_none(tmp_path: Path) -> None:
    """The plan counts an H100; the run stops before its first stage, not after an hour of corpus."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = recipes.read(ROOT / "recipes" / "pocket.yaml")
    plan = recipes.plan(recipe)
    assert plan.stages["train"]["gpu"] == plan.stages["sft"]["gpu"] == "H100"
    assert 60 < plan.stages["train"]["wall_s"] < 1800
    with pytest.raises(UserError, match="stage 'train' is to run on a CUDA GPU"):
        recipes.run(recipe, out=tmp_path)
    assert not (tmp_path / "synth").exists()
