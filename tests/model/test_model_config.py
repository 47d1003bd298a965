"""Configurations: published shapes, both Hugging Face layouts, refusals, no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pocketphi.core.errors import ConfigError
from pocketphi.model.config import ModelConfig, config_names, describe


@pytest.mark.parametrize(
    ("name", "parameters", "cache_bytes"),
    [
        ("phi-3-mini-4k", 3_821_079_552, 384 * 1024),
        ("phi-3-mini-128k", 3_821_079_552, 384 * 1024),
        ("phi-3.5-mini", 3_821_079_552, 384 * 1024),
        ("phi-3-medium-4k", 13_960_238_080, 200 * 1024),
        ("phi-3-medium-128k", 13_960_238_080, 200 * 1024),
    ],
)
def test_published_sizes(name, parameters, cache_bytes):
    config = ModelConfig.named(name)
    assert config.num_parameters == parameters
    assert config.kv_bytes_per_token == cache_bytes
    assert config.attention_factor == pytest.approx(1.190238 if config.rope_scaling else 1.0, abs=1e-6)


def test_our_sizes():
    assert ModelConfig.named("pocket").num_parameters <= 45_000_000
    assert ModelConfig.named("nano").num_parameters <= 4_500_000
    assert ModelConfig.named("phi-3-mini-4k").visible_window == 2048


def test_every_shipped_config_is_described_and_round_trips():
    for name in config_names():
        config = ModelConfig.named(name)
        assert describe(name).endswith(".")
        assert ModelConfig.from_hf(config.to_hf()) == config


def test_incomplete_factor_lists_are_refused_when_building():
    with pytest.raises(ConfigError, match="not known in full") as caught:
        ModelConfig.named("phi-3-mini-128k").require_factors()
    assert "config.json" in caught.value.hint
    ModelConfig.named("phi-3.5-mini").require_factors()


def test_misspelt_name_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'phi-3-mini-4k'"):
        ModelConfig.named("phi3-mini-4k")


def test_layout_of_transformers_5():
    tree = ModelConfig.named("phi-3.5-mini").to_hf()
    rope = tree.pop("rope_scaling")
    tree["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": tree.pop("rope_theta"),
        "short_factor": rope["short_factor"],
        "long_factor": rope["long_factor"],
        "original_max_position_embeddings": 4096,
    }
    tree["dtype"] = tree.pop("torch_dtype")
    assert ModelConfig.from_hf(tree) == ModelConfig.named("phi-3.5-mini")


@pytest.mark.parametrize("alias", ["su", "yarn", "longrope"])
def test_aliases_of_longrope(alias):
    factors = [1.0] * 48
    config = ModelConfig(rope_scaling={"type": alias, "short_factor": factors, "long_factor": factors})
    assert config.rope_scaling["type"] == "longrope"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 3000}, "multiple"),
        ({"num_key_value_heads": 5}, "multiple"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"head_dim": 64}, "head_dim"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "llama3"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "expected 48 numbers, found 1"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48}}, "long_factor"),
        ({"rope_scaling": {"type": "su", "short_facter": [1.0] * 48}}, "did you mean 'short_factor'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf({**ModelConfig.named("phi-3-mini-4k").to_hf(), **change}, where="x/config.json")


def test_no_torch_is_imported():
    code = (
        "import sys; from pocketphi.model import ModelConfig; ModelConfig.named('nano'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
